"""The state of a run that a crash must not lose: made new, started from other weights, saved and restored."""

import copy
import itertools
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from dnnlib.console import UserError, brief, shorten
from torch_utils import checkpoint
from torch_utils.distributed import Processes
from torch_utils.randomness import make_rng
from torch_utils.stats import Stats
from training.config import OptimConfig, RunConfig
from training.networks import Generator, build_discriminator
from training.networks.creps import grow
from training.networks.layers import ImageConfig, compute_with
from training.networks.mapping import LR_MULT, Mapping
from training.networks.released import is_released, load_released
from training.phases import Phase, phases
from training.snapshot import find_network, load_generator


@dataclass
class TrainState:
    """What a crash must not lose. All fields are saved and restored, and nothing else is."""

    G: Generator
    D: nn.Module
    G_ema: Generator
    G_opt: torch.optim.Adam
    D_opt: torch.optim.Adam
    augment_p: float
    teacher: Generator | None = None  # G_ema as it was at first, for scales.teacher
    step: int = 0
    pl_mean: Tensor = field(default_factory=lambda: torch.zeros([]))
    # Sum and count of sign(D(real)) since the last adjustment of the augmentation.
    signs: Tensor = field(default_factory=lambda: torch.zeros(2))
    bad_steps: dict[str, Tensor] = field(default_factory=dict)  # of each phase: non-finite gradients in a row
    stats: Stats = field(default_factory=Stats)  # since the last report
    seconds: dict[str, float] = field(default_factory=lambda: {"total": 0.0, "tick": 0.0, "data": 0.0})
    written: dict[str, int] = field(default_factory=dict)  # bytes of each log that belong to the steps so far

    def state_dict(self) -> dict:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in values.items()}

    def load_state_dict(self, saved: dict, procs: Processes) -> None:
        """Restore every field. Raises UserError when `saved` belongs to other networks."""
        saved = {"teacher": None} | saved  # states of earlier versions have none
        try:
            for name in (f.name for f in fields(self)):
                own, value = getattr(self, name), saved[name]
                if isinstance(own, torch.optim.Adam):  # states of earlier versions were not fused
                    groups = [group | {"fused": True, "foreach": None} for group in value["param_groups"]]
                    value = value | {"param_groups": groups}
                if hasattr(own, "load_state_dict"):
                    own.load_state_dict(value)
                else:
                    setattr(self, name, value.to(procs.device) if isinstance(value, Tensor) else value)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"the training state does not fit the networks in options.yaml ({brief(error)}); restore the "
                "options.yaml of its run"
            ) from error
        if not procs.is_first:
            self._zero_sums()

    def gather_sums(self, procs: Processes) -> None:
        """Move the sums of all ranks to rank 0, whose state then holds all of them. Every rank calls it."""
        procs.sum_(self.signs)
        for name in sorted(self.stats.moments):
            procs.sum_(self.stats.moments[name])
        if not procs.is_first:
            self._zero_sums()

    def _zero_sums(self) -> None:
        self.signs.zero_()
        for moments in self.stats.moments.values():
            moments.zero_()


def new_state(config: RunConfig, device: torch.device) -> TrainState:
    """Build the state before the first step: a function of the config alone, equal on every rank."""
    dtype = torch.float64 if config.train.precision == "float64" else torch.float32
    # Sampled on the CPU, so that a GPU starts from the same weights; the caller's random state is left alone.
    with torch.random.fork_rng(devices=[]):
        # Not the seed itself: latents of torch.manual_seed(seed) would be rows of the mapping's first weights.
        torch.manual_seed(make_rng(config.train.seed, 0, "weights").initial_seed())
        G, D = Generator(config.G).to(device, dtype), build_discriminator(config.D).to(device, dtype)
    for network in (G, D):
        compute_with(network, config.train.impl, config.train.recompute)
    steps = phases(config.loss)
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    return TrainState(
        G=G,
        D=D,
        G_ema=G_ema,
        G_opt=_adam(G, config.optim.g_lr, config.optim, [phase for phase in steps if phase.network == "G"]),
        D_opt=_adam(D, config.optim.d_lr, config.optim, [phase for phase in steps if phase.network == "D"]),
        augment_p=0.0 if config.augment.mode == "none" else config.augment.p,
        teacher=copy.deepcopy(G_ema) if config.scales.teacher else None,
        pl_mean=torch.zeros([], device=device, dtype=dtype),
        signs=torch.zeros(2, device=device, dtype=torch.float64),
        stats=Stats(device),
    )


def _adam(network: nn.Module, lr: float, optim: OptimConfig, phases: list[Phase]) -> torch.optim.Adam:
    # A lazy term adds updates. Scale the learning rate by the steps per update, k/(k+1) for one term every k steps,
    # and raise the betas to that power (StyleGAN2, appendix B).
    cycle = math.lcm(*(phase.interval for phase in phases))
    share = cycle / sum(cycle // phase.interval for phase in phases)
    betas = (float(optim.beta1**share), float(optim.beta2**share))
    mapped = {p for module in network.modules() if isinstance(module, Mapping) for p in module.layers.parameters()}

    def rate(p: nn.Parameter) -> float:  # the scale of their weights slows the mapping layers by LR_MULT already
        return lr * share * (optim.mapping_lr / LR_MULT if p in mapped else 1)

    groups = [{"params": list(same), "lr": value} for value, same in itertools.groupby(network.parameters(), rate)]
    return torch.optim.Adam(groups, betas=betas, eps=optim.eps, fused=True)


def find_weights(start: str) -> Path:
    """Return the file that a new run starts from: the newest state of a run directory, or else what find_network finds.

    Raises UserError.
    """
    return next(iter(checkpoint.found(Path(start))), None) or find_network(start)


def initialise(state: TrainState, path: Path) -> list[str]:
    """Give `state` the weights in a snapshot (G and its EMA), or in a training state or released file (D as well).

    Tensors of the same name and shape are taken; a larger generator starts from the old one (see grow). A teacher gets
    the tensors of the EMA, all of them. Returns a report, line by line, which names the settings of G with which more
    of a snapshot would fit; raises UserError when nothing fits.
    """
    if is_released(path):
        networks = load_released(path)
        sources = {name: network.state_dict() for name, network in ({"G": networks["G_ema"]} | networks).items()}
    elif path.suffix == ".pt":
        saved = checkpoint.load(path)
        sources = {name: saved.get(name, {}) for name in ("G", "G_ema", "D")}
    else:
        network = load_generator(path)
        weights = network.state_dict()
        sources = {"G": weights, "G_ema": weights}
    report, taken = [], 0
    for name, tensors in sources.items():
        own = getattr(state, name).state_dict()
        tensors, grown = grow(tensors, own)
        fits = [n for n in own if n in tensors and tensors[n].shape == own[n].shape]
        for n in fits:
            own[n].copy_(tensors[n])
        fresh, left = [n for n in own if n not in fits], [n for n in tensors if n not in fits]
        taken += len(fits)
        report.append(
            f"{name}: {len(fits)} of {len(own)} tensors from {path}"
            + "".join(f"; {how}" for how in grown)
            + (f"; fresh: {shorten(fresh, 3)}" if fresh else "")
            + (f"; not taken: {shorten(left, 3)}" if left else "")
        )
        if name == "G_ema" and state.teacher:
            if fresh:
                raise UserError(
                    f"scales.teacher needs all of G from {path}, which lacks {fresh[0]} of this shape; give G the "
                    "settings of that network, or set scales.teacher to 0"
                )
            exact, _ = grow(sources[name], own, noise=0)
            state.teacher.load_state_dict({n: exact[n] for n in own})
    if not taken:
        raise UserError(f"nothing in {path} fits these networks; compare its sizes with G and D of the config")
    if "D" not in sources:
        report.append(f"D: starts from new weights, because {path} holds none")
        own = dict(state.G.config)
        lacking = [
            f"-o G.{name}={value}"
            for name, value in network.config
            if value != own.get(name) and name not in ImageConfig.model_fields
        ]
        if fresh and lacking:
            report.append(f"to take more of {path}: {' '.join(lacking)}")
    return report
