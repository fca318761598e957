"""The training loop: steps, and the jobs that are due after some of them."""

import contextlib
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from dnnlib.console import UserError
from torch_utils import checkpoint
from torch_utils.distributed import PeerLost, Processes
from torch_utils.errors import explain
from torch_utils.reading import cores
from torch_utils.signals import note_signals
from training.config import RunConfig
from training.data import Batch, ImageArchive, batches
from training.grids import generated_grid, real_grid
from training.memory import GIB, peak_bytes
from training.networks import Generator
from training.report import RunLog, SilentLog, duration
from training.snapshot import save_generator, snapshot_name
from training.state import TrainState
from training.trainer import CHECK_INTERVAL, Trainer
from training.writer import TakenOver, Writer

T = TypeVar("T")
LINE = {  # what the lines of log.txt show: name -> (key in stats.jsonl, how to write it)
    "kimg": ("Progress/kimg", "{:.3f}".format),
    "time": ("Timing/total_sec", duration),
    "s/kimg": ("Timing/sec_per_kimg", "{:.2f}".format),
    "data wait": ("Timing/data_wait_share", "{:.1%}".format),
    "memory": ("Resources/peak_mem_gib", "{:.2f}".format),
    "spread": ("Spread/ratio", "{:.3f}".format),
    "augment": ("Progress/augment", "{:.3f}".format),
}


@dataclass
class Loop:
    """Trains `state` to the end of the schedule and writes into `folder`. Every rank has one.

    `evaluate(G, stop)` measures the metrics of a snapshot on all ranks and returns their lines for metric-<name>.jsonl,
    or nothing soon after stop() became true on some rank.
    """

    config: RunConfig
    folder: Path
    state: TrainState
    images: ImageArchive
    procs: Processes
    evaluate: Callable[[Generator, Callable[[], bool]], list[dict]]

    def __post_init__(self):
        self.trainer = Trainer(self.config, self.state, self.images, self.procs)
        self.saved = self.state.step or None  # the step of the newest state
        self.failure: Exception | None = None  # the first one, kept until all ranks have saved the state
        self.signals: list[tuple[int, float]] = []  # those noted so far
        scales = self.config.scales
        self.scales = scales if scales.max > 1 else None
        self.views = {"": None} | ({"-windows": scales} if self.scales else {})  # what the grids show
        self.writer = Writer(self.folder) if self.procs.is_first else None
        if self.writer:
            self.writer.claim()
        self.log = RunLog(self.folder, self.state.written, self.state.step) if self.procs.is_first else SilentLog()

    def run(self) -> int:
        """Return the exit code: 0 at the end, or 128 + signal after one of torch_utils.signals.STOPS.

        Raises UserError. All ranks save the state after a signal, or an error between steps (an unreadable image, say).
        """
        try:
            with note_signals() as self.signals, contextlib.closing(self.log), contextlib.closing(self.stream()) as s:
                return self.train(s)
        except PeerLost:
            if not self.signals:
                raise
            return 128 + self.signals[0][0]  # the launcher ends all processes, because one has ended
        except UserError:
            raise
        except Exception as error:
            raise self.explain(error) from error

    def train(self, stream: Iterator[Batch]) -> int:
        """Train to the last step, a signal or an error, save the state, and return the exit code."""
        s, t = self.state, self.config.train
        last = t.steps
        tick = max(1, round(t.tick * 1000 / t.batch))  # steps between reports
        # Several GPUs agree on a stop by waiting for each other, so they do it where a step waits anyway.
        listen = CHECK_INTERVAL if self.procs.world > 1 and self.procs.device.type == "cuda" else 1
        if s.step == 0:
            self.attempt(self.introduce)
        while s.step < last:
            count = min(listen - s.step % listen, tick - s.step % tick, last - s.step)
            stop = bool(self.signals)
            ahead = self.attempt(self.read, stream, count)
            if self.procs.any(stop or self.failure is not None):
                break
            for batch in ahead:
                self.step(batch)
            if s.step % tick == 0 or s.step == last:
                self.attempt(self.report)
            if s.step % (tick * t.snap) == 0 or s.step == last:
                self.attempt(self.snapshot)
                self.save()
                if not self.procs.any(self.failure is not None):
                    self.measure()
        if self.saved != s.step:
            self.attempt(self.save)
        if self.procs.any(self.failure is not None):
            if self.failure is None:
                raise PeerLost("another process of this run has stopped; resume the run")
            raise self.explain(self.failure) from self.failure
        if s.step < last:
            self.log.print(f"interrupted at {self.kimg:.3f} kimg; to continue: --resume={self.folder}")
            return 128 + (self.signals[0][0] if self.signals else signal.SIGTERM)
        return 0

    def attempt(self, job: Callable[..., T], *arguments: object) -> T | None:
        """Call `job`, between steps. An exception is kept until all ranks have saved the state."""
        try:
            return job(*arguments)
        except PeerLost:
            raise
        except Exception as error:
            self.failure = self.failure or error

    def explain(self, error: Exception) -> UserError:
        """Return an error as a sentence that says how to resume. Its traceback, if unexpected, goes to log.txt."""
        mistake = explain(error, self.folder / "log.txt")
        if self.saved is None or isinstance(error, TakenOver):
            return mistake
        kimg = self.saved * self.config.train.batch / 1000
        return type(mistake)(f"{mistake}; to continue from {kimg:.3f} kimg: --resume={self.folder}")

    @property
    def kimg(self) -> float:
        return self.state.step * self.config.train.batch / 1000

    def stream(self) -> Iterator[Batch]:
        t = self.config.train
        return batches(
            self.images,
            batch=t.batch,
            start=self.state.step * t.batch,
            rank=self.procs.rank,
            world=self.procs.world,
            seed=t.seed,
            workers=min(self.config.data.workers, cores()),
            scales=self.scales,
        )

    def read(self, stream: Iterator[Batch], count: int) -> list[Batch]:
        """Read the batches of `count` steps."""
        with self.clock("total", "tick", "data"):
            return list(itertools.islice(stream, count))

    def step(self, batch: Batch) -> None:
        with self.clock("total", "tick"):
            self.trainer.step(batch)
        if self.state.step == 1:  # all phases were due
            self.log.print(f"memory {peak_bytes(self.procs.device) / GIB:.2f} GiB per process in the first step")

    @contextlib.contextmanager
    def clock(self, *names: str) -> Iterator[None]:
        """Add the seconds of a block to these entries of state.seconds."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        for name in names:
            self.state.seconds[name] += seconds

    def introduce(self) -> None:
        """Log what is trained on what, and the first grids."""
        s, t, world = self.state, self.config.train, self.procs.world
        height, width = self.config.G.img_shape
        sizes = (sum(p.numel() for p in network.parameters()) / 1e6 for network in (s.G, s.D))
        step = f"{t.batch} images a step" + (f" on {world} processes" if world > 1 else "")
        step += f", {self.trainer.micro} at a time" if len(self.trainer.parts) > 1 else ""
        self.log.print("G {:.2f} M parameters, D {:.2f} M".format(*sizes))
        self.log.print(
            f"{len(self.images):,} images from {self.config.data.path}, trained at {width}x{height}; {step}; "
            f"{t.kimg:g} kimg to train"
        )
        if self.procs.is_first:
            for view, scales in self.views.items():
                self.log.image(f"reals{view}", real_grid(self.images, t.seed, scales), 0)
            self.log_generated()

    def log_generated(self) -> None:
        s, seed = self.state, self.config.train.seed
        for view, scales in self.views.items():
            grid = generated_grid(s.G_ema, self.images, seed, self.trainer.micro, scales)
            self.log.image(f"fakes{view}{int(self.kimg):06d}", grid, s.step)

    def report(self) -> None:
        s = self.state
        with self.clock("total", "tick"):
            summary = s.stats.collect(self.procs)  # waits for the steps that are queued on the device
        if self.writer:
            self.writer.check()  # after what all ranks do together
        now = {
            "Progress/kimg": self.kimg,
            "Progress/augment": s.augment_p,
            "Timing/total_sec": s.seconds["total"],
            "Timing/sec_per_kimg": s.seconds["tick"] / (self.kimg - s.seconds.get("at_kimg", 0.0)),
            "Timing/data_wait_share": s.seconds["data"] / s.seconds["tick"],
            "Resources/peak_mem_gib": peak_bytes(self.procs.device) / GIB,
        }
        if self.procs.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.procs.device)
        if "Spread/fake" in summary:  # only two images at a time show how much they differ
            variances = summary["Spread/fake"]["mean"], summary["Spread/real"]["mean"]
            now["Spread/ratio"] = math.sqrt(variances[0] / max(variances[1], 1e-8))
        self.log.stats(summary | now | {"timestamp": time.time()}, s.step)
        words = [f"{name} {write(now[key]):<8}" for name, (key, write) in LINE.items() if key in now]
        # Every rank reports every update.
        bad = sum(m["mean"] * m["num"] for name, m in summary.items() if "bad_gradients" in name) / self.procs.world
        words += [f"gradients not finite, updates skipped {bad:.0f}"] if bad else []
        self.log.print(" ".join(words).rstrip())
        s.seconds.update(tick=0.0, data=0.0, at_kimg=self.kimg)

    def snapshot(self) -> None:
        if self.writer:
            self.writer.check()
            self.log_generated()
            path = self.folder / snapshot_name(self.kimg)
            save_generator(self.state.G_ema, path, step=self.state.step, kimg=self.kimg)

    def save(self) -> None:
        self.state.written = self.log.written()
        self.state.gather_sums(self.procs)
        try:
            if self.writer:
                self.writer.check()
                checkpoint.save(self.state.state_dict(), self.folder, self.state.step)
            self.saved = self.state.step
        finally:
            self.procs.barrier()  # a launcher ends all processes as soon as one has ended

    def measure(self) -> None:
        if self.config.metrics:
            where = {"network": snapshot_name(self.kimg), "kimg": self.kimg, "step": self.state.step}
            for record in self.evaluate(self.state.G_ema, lambda: bool(self.signals)):
                if self.writer and not self.writer.other():
                    self.log.metric(record | where, self.state.step)
