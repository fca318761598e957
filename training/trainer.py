"""The training step: four phases as in StyleGAN2-ADA, and the state that a crash must not lose.

Legend: N images of a micro-batch, z latents, c labels. A step sees one batch of real images, all processes together.

Randomness is a function of (seed, step), which every process draws for the whole batch. It keeps what is its own:
image i goes to process i mod world, and within a process to round i mod rounds. So the split of a batch over processes
and rounds changes nothing but the order of float additions; minibatch-std groups stay whole (see minibatch_std).
"""

import contextlib
import copy
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from dnnlib.console import UserError
from torch_utils import checkpoint
from torch_utils.distributed import Processes
from torch_utils.precision import multiplies_bfloat16_fast
from torch_utils.randomness import make_rng
from torch_utils.stats import Stats
from training import diffaug, ema, losses
from training.augment import Draws, adjust, draw
from training.config import RunConfig
from training.data import ImageArchive
from training.networks import Generator, build_discriminator
from training.networks.layers import compute_with
from training.networks.released import load_released
from training.snapshot import load_generator

ADA_INTERVAL = 4  # steps between adjustments of p (ADA paper, section 3.1)


@dataclass
class TrainState:
    """What a crash must not lose. All fields are saved and restored, and nothing else is."""

    G: Generator
    D: nn.Module
    G_ema: Generator
    G_opt: torch.optim.Adam
    D_opt: torch.optim.Adam
    augment_p: float
    step: int = 0
    pl_mean: Tensor = field(default_factory=lambda: torch.zeros([]))
    signs: Tensor = field(
        default_factory=lambda: torch.zeros(2)
    )  # sum and count of sign(D(real)) since the last adjustment
    bad_steps: dict[str, int] = field(default_factory=dict)  # of each phase: non-finite gradients in a row
    stats: Stats = field(default_factory=Stats)  # since the last report
    seconds: dict[str, float] = field(default_factory=lambda: {"total": 0.0, "tick": 0.0, "data": 0.0})
    written: dict[str, int] = field(default_factory=dict)  # bytes of each log that belong to the steps so far

    def state_dict(self) -> dict:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in values.items()}

    def load_state_dict(self, saved: dict, procs: Processes) -> None:
        """Raises UserError when `saved` belongs to other networks."""
        try:
            for name in (field.name for field in fields(self)):
                own, value = getattr(self, name), saved[name]
                if hasattr(own, "load_state_dict"):
                    own.load_state_dict(value)
                else:
                    setattr(self, name, value.to(procs.device) if isinstance(value, Tensor) else value)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(f"the training state does not fit the networks in options.yaml ({reason})") from error
        if not procs.is_first:
            self._forget_sums()

    def gather_sums(self, procs: Processes) -> None:
        """Moves the sums of all processes, which must call this together, to the first: its state holds them all."""
        procs.sum_(self.signs)
        for name in sorted(self.stats.moments):
            procs.sum_(self.stats.moments[name])
        if not procs.is_first:
            self._forget_sums()

    def _forget_sums(self) -> None:
        self.signs.zero_()
        for moments in self.stats.moments.values():
            moments.zero_()


def new_networks(config: RunConfig) -> tuple[Generator, nn.Module]:
    """Build G and D, computed as the run wants them to be."""
    G, D = Generator(config.G), build_discriminator(config.D)
    for network in (G, D):
        compute_with(network, config.train.impl, config.train.recompute)
    return G, D


def new_state(config: RunConfig, device: torch.device) -> TrainState:
    """The state before the first step: a function of the config alone, equal in every process."""
    dtype = torch.float64 if config.train.precision == "float64" else torch.float32
    # Drawn on the CPU, so that a GPU starts from the same weights; the caller's random state is left alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        G, D = (network.to(device, dtype) for network in new_networks(config))
    return TrainState(
        G=G,
        D=D,
        G_ema=copy.deepcopy(G).eval().requires_grad_(False),
        G_opt=_adam(G, config.optim.g_lr, config.loss.pl_interval if config.loss.pl_weight else None, config),
        D_opt=_adam(D, config.optim.d_lr, config.loss.r1_interval if config.loss.r1_gamma else None, config),
        augment_p=0.0 if config.augment.mode == "none" else config.augment.p,
        pl_mean=torch.zeros([], device=device, dtype=dtype),
        signs=torch.zeros(2, device=device, dtype=torch.float64),
        stats=Stats(device),
    )


def initialise(state: TrainState, path: str) -> list[str]:
    """Gives `state` the weights in a snapshot (G and its average), or in a training state or released .pkl (D as well).

    Tensors of the same name and shape are taken. Returns a report, line by line; raises UserError when nothing fits.
    """
    if path.endswith(".pt"):
        saved = checkpoint.load(Path(path))
        sources = {name: saved.get(name, {}) for name in ("G", "G_ema", "D")}
    elif path.endswith(".pkl"):
        networks = load_released(path)
        sources = {name: network.state_dict() for name, network in ({"G": networks["G_ema"]} | networks).items()}
    else:
        weights = load_generator(path).state_dict()
        sources = {"G": weights, "G_ema": weights}
    report, taken = [], 0
    for name, tensors in sources.items():
        own = getattr(state, name).state_dict()
        fits = [n for n in own if n in tensors and tensors[n].shape == own[n].shape]
        for n in fits:
            own[n].copy_(tensors[n])
        fresh, left = [n for n in own if n not in fits], [n for n in tensors if n not in fits]
        taken += len(fits)
        report.append(
            f"{name}: {len(fits)} of {len(own)} tensors from {path}"
            + (f"; fresh: {', '.join(fresh)}" if fresh else "")
            + (f"; not taken: {', '.join(left)}" if left else "")
        )
    if not taken:
        raise UserError(f"nothing in {path} fits these networks; check --cfg, --cbase and --cmax against its config")
    if "D" not in sources:
        report.append(f"D: begins from new weights, for {path} holds none")
    return report


def _adam(network: nn.Module, lr: float, lazy_interval: int | None, config: RunConfig) -> torch.optim.Adam:
    # A lazy term adds an update every k steps: k/(k+1) slows rate and decays to balance (StyleGAN2, appendix B).
    share = 1.0 if lazy_interval is None else lazy_interval / (lazy_interval + 1)
    betas = (float(config.optim.beta1**share), float(config.optim.beta2**share))
    return torch.optim.Adam(network.parameters(), lr=lr * share, betas=betas, eps=config.optim.eps, fused=True)


class Trainer:
    """Runs training steps on a TrainState."""

    def __init__(self, config: RunConfig, state: TrainState, images: ImageArchive, procs: Processes):
        self.config, self.state, self.images, self.procs = config, state, images, procs
        self.rounds = config.rounds(procs.world)
        self.micro = config.train.batch // procs.world // self.rounds
        self.dtype = next(state.G.parameters()).dtype
        self.adversarial = losses.ADVERSARIAL[config.loss.kind]
        self.half = half_precision(config, procs.device)

    def step(self, real: Tensor, c: Tensor) -> None:
        """real uint8 [n,C,H,W] and labels [n,c_dim]: this process's share of the batch."""
        s, loss = self.state, self.config.loss
        # To the device first: a quarter of the bytes, and from pinned memory.
        real = real.to(self.procs.device, non_blocking=True).to(self.dtype) / 127.5 - 1
        c = c.to(self.procs.device, self.dtype)
        self._generator()
        if loss.pl_weight and s.step % loss.pl_interval == 0:
            self._path_length()
        self._critic(real, c)
        if loss.r1_gamma and s.step % loss.r1_interval == 0:
            self._r1(real, c)
        s.step += 1
        self._adapt_augmentation()
        train = self.config.train
        keep = ema.decay(train.batch, s.step * train.batch, train.ema_kimg, train.ema_rampup)
        ema.track(s.G_ema, s.G, keep)

    # --- the four phases ---------------------------------------------------------------------------------------------

    def _generator(self) -> None:
        s = self.state
        s.G.requires_grad_(True)
        s.D.requires_grad_(False)
        batch = self.config.train.batch
        average = 0
        for z, c, draws in self._fakes("generator", batch):
            with self._autocast():
                ws = s.G.mapping(z, c)
                logits = s.D(draws.apply(s.G.synthesis(ws)), c)
            loss = self.adversarial.generator(logits)
            (loss.mean() / self.rounds).backward()
            average = average + ws[:, 0].detach().mean(dim=0) / self.rounds
            s.stats.report("Loss/G/loss", loss)
        if self._update("G", "loss"):
            s.G.mapping.w_avg.lerp_(self.procs.mean_(average), 1 - self.config.train.w_avg_decay)

    def _path_length(self) -> None:
        s, loss = self.state, self.config.loss
        s.G.requires_grad_(True)
        count = max(self.config.train.batch // 2, self.procs.world)  # half a batch, as released
        mine = slice(self.procs.rank, None, self.procs.world)

        def synthesis(ws: Tensor) -> Tensor:
            with self._autocast():
                return s.G.synthesis(ws)

        def lengths(z: Tensor, c: Tensor, noise: Tensor) -> Tensor:
            return losses.path_lengths(synthesis, s.G.mapping(z, c), noise)

        def weigh(measured: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            """The gradient of the penalty by the lengths of this process, and the running mean after this step."""
            every = torch.zeros(count, device=self.procs.device, dtype=self.dtype)
            for lengths, places in zip(measured, self._deal(torch.arange(count)[mine]), strict=False):
                every[places] = lengths.detach()
            every = self.procs.sum_(every).requires_grad_()
            penalty, mean = losses.path_penalty(every, s.pl_mean, loss.pl_decay)
            (slopes,) = torch.autograd.grad(penalty.mean() * (loss.pl_weight * loss.pl_interval), every)
            s.stats.report("Loss/path_length/penalty", penalty[mine])
            s.stats.report("Loss/path_length/length", every[mine])
            return self._deal(slopes[mine] * self.procs.world), mean  # _update divides by world

        shape = (self.config.G.img_channels, *self.config.G.img_shape)
        noise = [
            torch.randn(shape, generator=self._random(f"path noise {i}"), dtype=self.dtype) for i in range(count)[mine]
        ]
        noise = self._deal(torch.stack(noise).to(self.procs.device))
        # With odd numbers the last rounds may have nothing to do.
        shares = [(z, c, n) for (z, c), n in zip(self._latents("path", count), noise, strict=True) if len(z)]
        # The penalty compares each length with a mean over the whole batch. With several rounds the lengths are
        # measured first and computed again one round at a time, so that only one round's graph is ever held.
        if len(shares) == 1:
            only = lengths(*shares[0])
            slopes, mean = weigh([only])
            only.backward(slopes[0])
        else:
            slopes, mean = weigh([lengths(*share).detach() for share in shares])
            for share, slope in zip(shares, slopes, strict=False):
                lengths(*share).backward(slope)
        if self._update("G", "path length"):
            s.pl_mean = mean

    def _critic(self, real: Tensor, c: Tensor) -> None:
        s = self.state
        s.G.requires_grad_(False)
        s.D.requires_grad_(True)
        batch = self.config.train.batch
        reals = zip(self._deal(real), self._deal(c), self._draws("critic real", batch), strict=True)
        for (fake_z, fake_c, fake_draws), (x, x_c, x_draws) in zip(self._fakes("critic", batch), reals, strict=True):
            with self._autocast():
                with torch.no_grad():
                    fake = s.G(fake_z, fake_c)
                both = torch.cat([fake_draws.apply(fake), x_draws.apply(x)])
                fake_logits, real_logits = s.D(both, torch.cat([fake_c, x_c]), batches=2).chunk(2)
            loss = self.adversarial.critic(real_logits, fake_logits)
            (loss.mean() / self.rounds).backward()
            s.signs += torch.stack([real_logits.detach().sign().sum(), real_logits.new_full((), real_logits.numel())])
            s.stats.report("Loss/D/loss", loss)
            s.stats.report("Loss/scores/fake", fake_logits)
            s.stats.report("Loss/scores/real", real_logits)
            s.stats.report("Loss/signs/real", real_logits.sign())
            if len(x) > 1:
                s.stats.report("Spread/fake", fake.var(dim=0))
                s.stats.report("Spread/real", x.var(dim=0))
        self._update("D", "loss")

    def _r1(self, real: Tensor, c: Tensor) -> None:
        s, loss = self.state, self.config.loss
        s.D.requires_grad_(True)
        draws = self._draws("r1", self.config.train.batch)
        for x, x_c, x_draws in zip(self._deal(real), self._deal(c), draws, strict=True):

            def judge(x, x_c=x_c, x_draws=x_draws):
                with self._autocast():
                    return s.D.regularised(x_draws.apply(x), x_c)

            penalty = losses.r1(judge, x)
            (penalty.mean() * (loss.r1_gamma / 2 * loss.r1_interval / self.rounds)).backward()
            s.stats.report("Loss/r1_penalty", penalty)
        self._update("D", "R1")

    # --- what they share ---------------------------------------------------------------------------------------------

    def _random(self, purpose: str) -> torch.Generator:
        return make_rng(self.config.train.seed, self.state.step, purpose)

    def _deal(self, mine: Tensor | Draws | diffaug.Draws) -> list:
        """This process's share of a batch -> micro-batches, one per round."""
        return [mine[i :: self.rounds] for i in range(self.rounds)]

    def _draws(self, purpose: str, count: int) -> list[Draws | diffaug.Draws]:
        settings, shape = self.config.augment, self.config.G.img_shape
        random = self._random(purpose + " augmentation")
        if settings.mode == "diffaug":
            draws = diffaug.draw(settings.policy, count, shape, random)
        else:
            draws = draw(settings, count, self.state.augment_p, image_shape=shape, generator=random)
        return self._deal(draws[self.procs.rank :: self.procs.world])

    def _fakes(self, purpose: str, count: int) -> list[tuple[Tensor, Tensor, Draws]]:
        """z [N,z_dim], c [N,c_dim] and augmentations of `count` fakes: this process's share, by rounds."""
        return [
            (*zc, draws) for zc, draws in zip(self._latents(purpose, count), self._draws(purpose, count), strict=True)
        ]

    def _latents(self, purpose: str, count: int) -> list[tuple[Tensor, Tensor]]:
        """z [N,z_dim] and c [N,c_dim] of `count` fakes: this process's share, by rounds.

        The labels are those of images drawn at random, so that they are as frequent as in the archive.
        """
        random = self._random(purpose)
        z = torch.randn(count, self.config.G.z_dim, generator=random)
        labels = [self.images.label(i) for i in torch.randint(len(self.images), [count], generator=random).tolist()]
        mine = slice(self.procs.rank, None, self.procs.world)
        z, c = (x[mine].to(self.procs.device, self.dtype) for x in (z, torch.stack(labels)))
        return list(zip(self._deal(z), self._deal(c), strict=True))

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.procs.device.type, dtype=self.half or torch.bfloat16, enabled=self.half is not None)

    def _update(self, name: str, term: str) -> bool:
        """Averages the gradients of a term over the processes and applies them, unless they are not finite.

        Raises UserError when that has happened to this term too often in a row. Returns whether the network moved.
        """
        s = self.state
        network, optimizer = (s.G, s.G_opt) if name == "G" else (s.D, s.D_opt)
        moved = [p for p in network.parameters() if p.grad is not None]
        flat = self.procs.mean_(torch.cat([p.grad.flatten() for p in moved]))
        # The squares too: one that overflows would make Adam's second moment infinite, and freeze its weight for ever.
        finite = bool(flat.dot(flat).isfinite())
        s.stats.report(f"Progress/bad_gradients_{name}", flat.new_full((), float(not finite)))
        if finite:
            s.bad_steps[f"{name} {term}"] = 0
            for p, mean in zip(moved, flat.split([p.numel() for p in moved]), strict=True):
                p.grad = mean.view_as(p)
            optimizer.step()
        else:
            bad = s.bad_steps.get(f"{name} {term}", 0) + 1
            s.bad_steps[f"{name} {term}"] = bad
            if bad >= self.config.train.max_bad_steps:
                raise UserError(
                    f"the gradients of {name} ({term}) were not finite in {bad} updates in a row, up to step {s.step}; "
                    f"the run has diverged; begin a new one with --init-from an earlier training-state-*.pt, and lower "
                    f"--{name.lower()}lr"
                )
        optimizer.zero_grad(set_to_none=True)
        return finite

    def _adapt_augmentation(self) -> None:
        s, settings = self.state, self.config.augment
        if s.step % ADA_INTERVAL:
            return
        total, count = self.procs.sum_(s.signs.clone()).tolist()
        s.signs.zero_()
        if settings.mode == "ada" and count:
            s.augment_p = adjust(
                s.augment_p, total / count, images=int(count), target=settings.target, kimg=settings.kimg
            )


def half_precision(config: RunConfig, device: torch.device) -> torch.dtype | None:
    """The type that autocast mixes with float32 on `device`, or None."""
    precision = config.train.precision
    if precision == "auto":  # of a run begun before new runs decided it: float32 on every CPU
        precision = "bfloat16" if device.type == "cuda" and multiplies_bfloat16_fast(device) else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None


def decide_precision(config: RunConfig, device: torch.device) -> RunConfig:
    """Put what is fast on `device` in the place of `precision: auto`, so that a continued run computes the same."""
    if config.train.precision != "auto":
        return config
    precision = "bfloat16" if multiplies_bfloat16_fast(device) else "float32"
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
