"""The training loop: steps, and the jobs that are due after some of them."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_utils import checkpoint
from torch_utils.distributed import PeerLost, Processes
from torch_utils.reading import cores
from torch_utils.signals import note_signals
from training.config import RunConfig
from training.data import ImageArchive, batches
from training.grids import generated_grid, real_grid
from training.memory import GIB, peak_bytes
from training.networks import Generator
from training.report import RunLog, SilentLog, duration
from training.snapshot import save_generator, snapshot_name
from training.state import TrainState
from training.trainer import CHECK_INTERVAL, Trainer


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
        self.log = RunLog(self.folder, self.state.written, self.state.step) if self.procs.is_first else SilentLog()

    def run(self) -> int:
        """Return the exit code: 0 at the end, or 128 + signal after SIGTERM or Ctrl-C, when the state is saved."""
        s, t = self.state, self.config.train
        last = math.ceil(round(t.kimg * 1000) / t.batch)
        tick = max(1, round(t.tick * 1000 / t.batch))  # steps between reports
        jobs = [(tick, self.report)] + [(tick * t.snap, job) for job in (self.snapshot, self.save, self.measure)]
        # Several GPUs agree on a signal by waiting for each other, so they do it where a step waits anyway.
        listen = CHECK_INTERVAL if self.procs.world > 1 and self.procs.device.type == "cuda" else 1
        stream = self.stream()
        with note_signals() as self.signals, contextlib.closing(self.log):
            try:
                if s.step == 0:
                    self.introduce()
                while s.step < last:
                    self.step(stream)
                    for interval, job in jobs:
                        if s.step % interval == 0 or s.step == last:
                            job()
                    if s.step < last and s.step % listen == 0 and self.procs.any(bool(self.signals)):
                        self.save()
                        self.log.print(f"interrupted at {self.kimg:.3f} kimg; to continue: --resume={self.folder}")
                        return 128 + (self.signals[0][0] if self.signals else signal.SIGTERM)
            except PeerLost:
                if not self.signals:
                    raise
                return 128 + self.signals[0][0]  # the launcher ends all processes, because one has ended
        return 0

    @property
    def kimg(self) -> float:
        return self.state.step * self.config.train.batch / 1000

    def stream(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        t = self.config.train
        return batches(
            self.images,
            batch=t.batch,
            start=self.state.step * t.batch,
            rank=self.procs.rank,
            world=self.procs.world,
            seed=t.seed,
            workers=min(self.config.data.workers, cores()),
            pin_memory=self.procs.device.type == "cuda",
        )

    def step(self, stream: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        began = time.perf_counter()
        real, c = next(stream)
        waited = time.perf_counter() - began
        self.trainer.step(real, c)
        self.add_seconds(time.perf_counter() - began, waited)
        if self.state.step == 1:  # all phases were due
            self.log.print(f"memory {peak_bytes(self.procs.device) / GIB:.2f} GiB per process in the first step")

    def add_seconds(self, seconds: float, waited: float = 0.0) -> None:
        clock = self.state.seconds
        clock["total"] += seconds
        clock["tick"] += seconds
        clock["data"] += waited

    def introduce(self) -> None:
        """Log what is trained on what, and the first grids."""
        s, t, world = self.state, self.config.train, self.procs.world
        height, width = self.config.G.img_shape
        sizes = (sum(p.numel() for p in network.parameters()) / 1e6 for network in (s.G, s.D))
        step = f"{t.batch} images a step" + (f" on {world} processes" if world > 1 else "")
        step += f", {self.trainer.micro} at a time" if len(self.trainer.parts) > 1 else ""
        self.log.print("G {:.2f} M parameters, D {:.2f} M".format(*sizes))
        self.log.print(
            f"{len(self.images):,} images of {width}x{height} from {self.config.data.path}; {step}; "
            f"{t.kimg:g} kimg to train"
        )
        if self.procs.is_first:
            self.log.image("reals", real_grid(self.images, t.seed), 0)
            self.log.image("fakes000000", self.generated_grid(), 0)

    def generated_grid(self):
        return generated_grid(self.state.G_ema, self.images, self.config.train.seed, self.trainer.micro)

    def report(self) -> None:
        s = self.state
        began = time.perf_counter()
        summary = s.stats.collect(self.procs)  # waits for the steps that are queued on the device
        self.add_seconds(time.perf_counter() - began)
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
        words = {
            "kimg": f"{self.kimg:.3f}",
            "time": duration(s.seconds["total"]),
            "s/kimg": f"{now['Timing/sec_per_kimg']:.2f}",
            "data wait": f"{now['Timing/data_wait_share']:.1%}",
            "memory": f"{now['Resources/peak_mem_gib']:.2f}",
        }
        if "Spread/fake" in summary:  # only two images at a time show how much they differ
            variances = summary["Spread/fake"]["mean"], summary["Spread/real"]["mean"]
            now["Spread/ratio"] = math.sqrt(variances[0] / max(variances[1], 1e-8))
            words["spread"] = f"{now['Spread/ratio']:.3f}"
        words["augment"] = f"{s.augment_p:.3f}"
        # Every rank reports every update.
        bad = sum(m["mean"] * m["num"] for name, m in summary.items() if "bad_gradients" in name) / self.procs.world
        if bad:
            words["gradients not finite, updates skipped"] = f"{bad:.0f}"
        self.log.stats(summary | now | {"timestamp": time.time()}, s.step)
        self.log.print(" ".join(f"{name} {value:<8}" for name, value in words.items()).rstrip())
        s.seconds.update(tick=0.0, data=0.0, at_kimg=self.kimg)

    def snapshot(self) -> None:
        if self.procs.is_first:
            self.log.image(f"fakes{int(self.kimg):06d}", self.generated_grid(), self.state.step)
            path = self.folder / snapshot_name(self.kimg)
            save_generator(self.state.G_ema, path, step=self.state.step, kimg=self.kimg)

    def save(self) -> None:
        self.state.written = self.log.written()
        self.state.gather_sums(self.procs)
        if self.procs.is_first:
            checkpoint.save(self.state.state_dict(), self.folder, self.state.step)
        self.procs.barrier()  # a launcher ends all processes as soon as one has ended

    def measure(self) -> None:
        if self.config.metrics:
            where = {"network": snapshot_name(self.kimg), "kimg": self.kimg, "step": self.state.step}
            for record in self.evaluate(self.state.G_ema, lambda: bool(self.signals)):
                self.log.metric(record | where, self.state.step)
