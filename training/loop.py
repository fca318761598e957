"""The training loop: steps, and at their times reports, pictures, snapshots and states."""

import contextlib
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dnnlib.console import UserError
from torch_utils import checkpoint
from torch_utils.distributed import Processes
from torch_utils.images import to_uint8
from torch_utils.randomness import make_rng
from torch_utils.reading import cores
from training.config import RunConfig
from training.data import ImageArchive, batches
from training.memory import GIB, expected_bytes, parameters
from training.networks import Generator
from training.report import RunLog, SilentLog, duration, grid_shape, tile
from training.snapshot import save_generator, snapshot_name
from training.trainer import Trainer, TrainState


@dataclass
class Interrupt:
    """Which of SIGTERM and SIGINT (Ctrl-C) came, and when."""

    signal: int | None = None
    time: float = 0.0


def train(
    config: RunConfig,
    folder: Path,
    state: TrainState,
    images: ImageArchive,
    procs: Processes,
    evaluate: Callable[[Generator, Callable[[], bool]], list[dict]],
) -> int:
    """Runs from `state` to the end of the schedule and writes into `folder`; every process calls it.

    `evaluate(G, stop)` is called by every process at a snapshot, when all else is saved. It measures config.metrics and
    returns their lines for metric-<name>.jsonl, or nothing soon after stop() became true in some process.
    Returns the exit code: 0 at the end, 128 + the signal's number after SIGTERM or Ctrl-C, which save the state first.
    """
    t = config.train
    trainer = Trainer(config, state, images, procs)
    last = math.ceil(round(t.kimg * 1000) / t.batch)
    tick = max(1, round(t.tick * 1000 / t.batch))  # steps between reports
    log = RunLog(folder, state.written, state.step) if procs.is_first else SilentLog()
    stream = batches(
        images,
        batch=t.batch,
        start=state.step * t.batch,
        rank=procs.rank,
        world=procs.world,
        seed=t.seed,
        workers=min(config.data.workers, cores()),
        pin_memory=procs.device.type == "cuda",
    )
    if state.step == 0:
        _introduce(config, trainer, images, log)
        log.picture("reals", _reals(images, t.seed), 0)
        log.picture("fakes000000", _fakes(trainer, images), 0)
    with _interruptible() as interrupt, contextlib.closing(log):
        while state.step < last:
            began = time.perf_counter()
            real, c = next(stream)
            waited = time.perf_counter() - began
            trainer.step(real, c)
            _clock(state, time.perf_counter() - began, waited)

            done = state.step == last
            stop = procs.any(interrupt.signal is not None) and not done
            if state.step % tick == 0 or done:
                _report(config, trainer, log)
            snap = state.step % (tick * t.snap) == 0 or done
            if snap and procs.is_first:
                _snapshot(trainer, images, folder, log)
            if snap or stop:
                state.written = log.written()
                state.gather_sums(procs)
                if procs.is_first:
                    checkpoint.save(state.state_dict(), folder, state.step)
                procs.any(False)  # the others wait here: a launcher ends all of them as soon as one has ended
            if snap and not stop and config.metrics:
                _measure(trainer, log, evaluate, lambda: interrupt.signal is not None)
                stop = procs.any(interrupt.signal is not None) and not done
            if stop:
                log.print(f"interrupted at {kimg(config, state):.3f} kimg; to continue: --resume={folder}")
                return 128 + (interrupt.signal or signal.SIGTERM)
    return 0


def kimg(config: RunConfig, state: TrainState) -> float:
    return state.step * config.train.batch / 1000


@contextlib.contextmanager
def _interruptible() -> Iterator[Interrupt]:
    """SIGTERM and Ctrl-C are noted; another one, more than a second later, ends the process at once.

    Within a second it is the same one: Ctrl-C reaches every process of a terminal, and a launcher passes it on as well.
    """
    interrupt = Interrupt()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number, frame):
        if interrupt.signal is None:
            interrupt.signal, interrupt.time = number, time.monotonic()
        elif time.monotonic() - interrupt.time > 1:
            sys.exit(128 + number)

    for number in before:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clock(state: TrainState, seconds: float, waited: float) -> None:
    state.seconds["total"] += seconds
    state.seconds["tick"] += seconds
    state.seconds["data"] += waited


def _introduce(config: RunConfig, trainer: Trainer, images: ImageArchive, log: RunLog | SilentLog) -> None:
    s, t, world = trainer.state, config.train, trainer.procs.world
    height, width = config.G.img_shape
    memory = expected_bytes(config, trainer.micro, trainer.procs.device.type) / GIB
    share = f"{t.batch} images a step" + (f" on {world} processes" if world > 1 else "")
    share += f", {trainer.micro} at a time" if trainer.rounds > 1 else ""
    log.print(
        f"G {parameters(s.G) / 1e6:.2f} M parameters, D {parameters(s.D) / 1e6:.2f} M; "
        f"about {memory:.1f} GiB of memory per process"
    )
    log.print(f"{len(images):,} images of {width}x{height} from {config.data.path}; {share}; {t.kimg:g} kimg to train")


def _report(config: RunConfig, trainer: Trainer, log: RunLog | SilentLog) -> None:
    s = trainer.state
    summary = s.stats.collect(trainer.procs)
    seen, at_last_report = kimg(config, s), s.seconds.get("at_kimg", 0.0)
    now = {
        "Progress/kimg": seen,
        "Progress/augment": s.augment_p,
        "Timing/total_sec": s.seconds["total"],
        "Timing/sec_per_kimg": s.seconds["tick"] / (seen - at_last_report),
        "Timing/data_wait_share": s.seconds["data"] / s.seconds["tick"],
        "Resources/peak_mem_gib": _peak_memory(trainer.procs.device) / GIB,
    }
    words = {
        "kimg": f"{seen:.3f}",
        "time": duration(s.seconds["total"]),
        "s/kimg": f"{now['Timing/sec_per_kimg']:.2f}",
        "data wait": f"{now['Timing/data_wait_share']:.1%}",
        "memory": f"{now['Resources/peak_mem_gib']:.2f}",
    }
    if "Spread/fake" in summary:  # it takes two images at a time to see how much they differ
        variances = summary["Spread/fake"]["mean"], summary["Spread/real"]["mean"]
        now["Spread/ratio"] = math.sqrt(variances[0] / max(variances[1], 1e-8))
        words["spread"] = f"{now['Spread/ratio']:.3f}"
    words["augment"] = f"{s.augment_p:.3f}"
    # Every process reports every update.
    bad = sum(m["mean"] * m["num"] for name, m in summary.items() if "bad_gradients" in name) / trainer.procs.world
    if bad:
        words["gradients not finite, updates skipped"] = f"{bad:.0f}"
    log.stats(summary | now | {"timestamp": time.time()}, s.step)
    log.print(" ".join(f"{name} {value:<8}" for name, value in words.items()).rstrip())
    s.seconds.update(tick=0.0, data=0.0, at_kimg=seen)


def _peak_memory(device: torch.device) -> int:
    """Bytes at most: allocated on the GPU since the last call, or resident in this process since its start."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _snapshot(trainer: Trainer, images: ImageArchive, folder: Path, log: RunLog | SilentLog) -> None:
    s, seen = trainer.state, kimg(trainer.config, trainer.state)
    log.picture(f"fakes{int(seen):06d}", _fakes(trainer, images), s.step)
    save_generator(s.G_ema, folder / snapshot_name(seen), step=s.step, kimg=seen)


def _measure(trainer: Trainer, log: RunLog | SilentLog, evaluate: Callable, stop: Callable[[], bool]) -> None:
    s, seen = trainer.state, kimg(trainer.config, trainer.state)
    where = {"network": snapshot_name(seen), "kimg": seen, "step": s.step}
    for record in evaluate(s.G_ema, stop):
        log.metric(record | where, s.step)


def _reals(images: ImageArchive, seed: int):
    rows, columns = grid_shape(*images.shape[1:])
    chosen = torch.randperm(len(images), generator=make_rng(seed, 0, "grid of reals")).tolist()
    chosen = (chosen * math.ceil(rows * columns / len(chosen)))[: rows * columns]
    return tile(torch.stack([images[i][0] for i in chosen]), rows)


@torch.no_grad()
def _fakes(trainer: Trainer, images: ImageArchive):
    """The same latents at every snapshot. With labels, each row of the grid is one class."""
    config, G = trainer.config, trainer.state.G_ema
    rows, columns = grid_shape(*config.G.img_shape)
    random = make_rng(config.train.seed, 0, "grid of fakes")
    z = torch.randn(rows * columns, config.G.z_dim, generator=random)
    chosen = torch.randint(len(images), [rows * columns], generator=random)
    c = torch.stack([images.label(i) for i in chosen.tolist()])
    c = c[torch.arange(rows).repeat_interleave(columns) * columns]
    z, c = (x.to(trainer.procs.device, trainer.dtype).split(trainer.micro) for x in (z, c))
    return tile(torch.cat([to_uint8(G(z, c)) for z, c in zip(z, c, strict=True)]), rows)


def find_state(folder: Path, say: Callable[[str], None]) -> Path:
    """The newest intact state in a run directory. Broken ones are named and passed over. Raises UserError."""
    broken = False
    for path in checkpoint.found(folder):
        try:
            checkpoint.load(path)
            return path
        except UserError as error:
            broken = True
            say(f"passed over: {error}")
    if broken:
        raise UserError(f"no training state in {folder} is intact; start a new run with --init-from and a snapshot")
    raise UserError(f"{folder} holds no training-state-*.pt to continue from; give the directory of a run")
