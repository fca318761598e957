"""Measure a set of images with several metrics at once, and return records of the results.

evaluation = Evaluation(parse("fid50k_full,kid50k_full,scale_psnr"), Settings(), procs, reals)
records = evaluation(Generated(G))

Real images come first; their statistics are kept on disk (metrics/cache.py). Then the measured images pass once, in
batches that the processes share; every metric keeps what it needs from a batch, and shared inputs (a size, the
activations of a detector) are computed once. At the end, rank 0 computes the results.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from dnnlib.console import progress
from metrics import cache
from metrics.estimate import Estimate
from metrics.generated import Generated
from metrics.images import Batch, cut, segments, split
from metrics.moments import Moments, Table
from metrics.needs import EMPTY, Inputs, Need, Settings, Task
from metrics.reals import Files, Fitted, Given, Windowed
from metrics.registry import Metric
from torch_utils.distributed import Processes


class Stopped(Exception):
    """The caller's `stop` became true."""


Kept = dict[Need, Moments | Table]  # filled batch by batch


class Evaluation:
    def __init__(
        self,
        metrics: Sequence[Metric],
        settings: Settings,
        procs: Processes,
        reals: Files | None = None,
        large: Files | None = None,
        weights: str | os.PathLike | None = None,
    ):
        """Load the networks that the metrics use. Raises UserError.

        reals: the images to compare with. large: the images whose windows pfid uses. weights: a folder of weights.
        """
        self.metrics, self.settings, self.procs, self.reals, self.large = metrics, settings, procs, reals, large
        self.batch = settings.batch or (32 if procs.device.type == "cuda" else 8)
        needed = dict.fromkeys(metric.family.tool for metric in metrics if metric.family.tool)
        if not procs.is_first:
            procs.barrier()  # rank 0 downloads what is missing
        self.tools = {load: load(procs.device, weights) for load in needed}
        if procs.is_first:
            procs.barrier()

    @torch.no_grad()
    def __call__(self, images: Generated | Given, stop: Callable[[], bool] = lambda: False) -> list[dict]:
        """Return the records for metric-<name>.jsonl, in every process; [] if `stop` became true in some process.

        `stop` is called at every batch. Statistics of real images are kept once all images were seen. Raises UserError
        if the images do not fit a metric.
        """
        began = time.monotonic()
        tasks = self.tasks(images)
        needs = [task.need for task in tasks]
        try:
            found = self.real_statistics(tasks, stop)
            lists = cut([need.limit for need in needs], self.batch)
            found |= self.collect(images.batches, lists, needs, "generated images", stop)
        except Stopped:
            return []
        passed = time.monotonic() - began
        records = []
        for task in tasks if self.procs.is_first else ():
            began = time.monotonic()
            statistics = [found[need] for need in (task.need, task.real) if need]
            on_device = [x.to(self.procs.device) if isinstance(x, Tensor) else x for x in statistics]
            estimates = task.compute(*on_device)
            records.append(self.record(task, estimates, passed + time.monotonic() - began))
        return self.procs.broadcast(records)

    def tasks(self, images: Generated | Given) -> list[Task]:
        inputs = Inputs(images, self.reals, self.large, self.tools, self.settings, self.procs.device)
        return [task for metric in self.metrics for task in metric.family.tasks(metric, inputs)]

    def empty(self, needs: Iterable[Need]) -> Kept:
        return {need: EMPTY[need.kind](need.limit, need.width, self.procs.device) for need in needs}

    def collect(
        self,
        batches: Callable[[Sequence[Sequence[int]]], Iterator[Batch]],
        lists: Sequence[Sequence[int]],
        needs: Iterable[Need],
        desc: str,
        stop: Callable[[], bool],
    ) -> dict[Need, Moments | Tensor]:
        """Compute the statistics that `needs` asks for; the processes take the batches in turn."""
        procs, kept = self.procs, self.empty(needs)
        own = batches(lists[procs.rank :: procs.world])
        turns = range(0, len(lists), procs.world)
        for turn in progress(turns, desc=desc, unit="batch") if procs.is_first else turns:
            if procs.any(stop()):  # all take the same number of turns, so that they stop together
                raise Stopped
            if turn + procs.rank < len(lists):
                feed(kept, next(own))
        return {need: statistics.gather(procs) for need, statistics in kept.items()}

    def real_statistics(self, tasks: Sequence[Task], stop: Callable[[], bool]) -> dict[Need, Moments | Tensor]:
        """Find the statistics of real images: those on disk, and the others in one pass over each set."""
        found = {}
        for images, needs in by_set(tasks).items():
            content = self.procs.broadcast(images.files.digest if self.procs.is_first else None)
            keys = {need: cache.cache_key(content, detector=need.key, **images.facts(need.limit)) for need in needs}
            kept = {need: cache.read(need.kind, key) for need, key in keys.items()}
            missing = [need for need in needs if self.procs.any(kept[need] is None)]
            if missing:
                lists = images.cut([need.limit for need in missing], self.batch)
                computed = self.collect(images.batches, lists, missing, "real images", stop)
                for need, statistics in computed.items() if self.procs.is_first else ():
                    cache.write(need.kind, keys[need], statistics)
                kept |= computed
            found |= kept
        return found

    @torch.no_grad()
    def estimate(self, images: Generated | Given) -> tuple[float, float]:
        """Estimate the seconds for these images, and for the real images if their statistics are not cached.

        The metrics get two batches of each kind, and the second one is timed. Raises the same errors as measuring.
        """
        tasks = self.tasks(images)

        def seconds(batches, lists: list[Sequence[int]], kept: Kept) -> float:
            shown = (lists * 2)[:2]
            stream = batches(shown)
            for numbers in shown:
                began = time.monotonic()
                feed(kept, next(stream))
                taken = (time.monotonic() - began) / len(numbers)
            return taken * sum(map(len, lists)) / self.procs.world

        kept = self.empty(task.need for task in tasks)
        parts = segments(need.limit for need in kept)
        generated = sum(seconds(images.batches, split(part, self.batch), kept) for part in parts)
        reals = 0.0
        for real_images, needs in by_set(tasks).items():
            lists = real_images.cut([need.limit for need in needs], self.batch)
            reals += seconds(real_images.batches, lists, self.empty(needs))
        return generated, reals

    def record(self, task: Task, estimates: Estimate | dict[str, Estimate], seconds: float) -> dict:
        if isinstance(estimates, Estimate):
            estimates = {"": estimates}
        results = {task.named(ending): estimate for ending, estimate in estimates.items()}
        errors = {name: estimate.standard_error for name, estimate in results.items()}
        (values, *_) = (estimate.values for estimate in results.values())
        return {
            "results": {name: estimate.value for name, estimate in results.items()},
            "metric": task.named(),
            "standard_error": errors,
            **task.facts,
            **({} if values is None else {"values": [float(f"{value:.6g}") for value in values.tolist()]}),
            "total_time": seconds,
            "num_gpus": self.procs.world,
            "timestamp": time.time(),
            "versions": versions(),
        }


def feed(kept: Kept, batch: Batch) -> None:
    for need, statistics in kept.items():
        if batch.numbers[0] < need.limit:  # batches do not extend over a limit
            statistics.update(need.look(batch), batch.numbers)


def by_set(tasks: Sequence[Task]) -> dict[Fitted | Windowed, list[Need]]:
    """Group the needs for real images by their set, each once."""
    groups = {}
    for need in dict.fromkeys(task.real for task in tasks if task.real):
        groups.setdefault(need.images, []).append(need)
    return groups


def versions() -> dict[str, str]:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    own = re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1]
    return {"creps": own} | {name: version(name) for name in ("torch", "torchvision", "torch-fidelity")}
