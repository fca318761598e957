"""Measures a set of pictures by several metrics at once.

results = measure(parse("fid50k_full,kid50k_full,scale_psnr"), fakes, reals, photos, tools, settings, procs)

Photographs come first, and what was seen in them is kept (metrics/cache.py). Then the pictures measured pass once, in
batches of numbers that the processes share; every metric takes what it needs of a batch, and what several need (a size,
the activations of a detector) is made once. At the end the first process puts the figures together.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from dnnlib.console import UserError, progress
from metrics.cache import Statistics, cache_key, cached
from metrics.lines import LineShare
from metrics.pictures import Batch, Fakes, Files, Numbers, Whole, Windowed, cut
from metrics.plan import (
    DISTANCES,
    METRICS,
    Collector,
    Finish,
    Plan,
    Result,
    Settings,
    features_of,
    moments_of,
    table_of,
)
from metrics.registry import FAMILIES, Metric
from torch_utils.distributed import Processes


class Stopped(Exception):
    """The caller's `stop` became true."""


# --- the networks that look ------------------------------------------------------------------------------------------


def load_tools(metrics: Iterable[Metric], procs: Processes, weights: str | os.PathLike | None = None) -> dict:
    """name -> what some metric needs: a features.Detector, a LineShare or a perceptual.LPIPS. Raises UserError."""
    needed = filter(None, dict.fromkeys(FAMILIES[metric.family].tool for metric in metrics))
    if not procs.is_first:
        procs.barrier()  # until the first process has downloaded what is missing
    tools = {name: TOOLS[name](procs.device, weights) for name in needed}
    if procs.is_first:
        procs.barrier()
    return tools


def load_detector(kind: str) -> Callable:
    def load(device, weights):
        from metrics import features  # torch-fidelity takes seconds to import

        return features.load(kind, weights_dir=weights, device=device)

    return load


def load_lpips(net: str) -> Callable:
    def load(device, weights):
        from metrics.perceptual import LPIPS

        return LPIPS(net, weights).to(device)

    return load


TOOLS = {
    "inception": load_detector("inception"),
    "dinov2": load_detector("dinov2"),
    "lite0": load_detector("lite0"),
    "lines": lambda device, weights: LineShare(),
    "lpips-vgg": load_lpips("vgg"),
    "lpips-alex": load_lpips("alex"),
}


# --- one pass --------------------------------------------------------------------------------------------------------


def run(
    batches: Callable[[Sequence[Numbers]], Iterator[Batch]],
    lists: Sequence[Numbers],
    collectors: Sequence[Collector],
    desc: str,
    procs: Processes,
    stop: Callable[[], bool],
) -> list:
    """Shows every collector its batches, which the processes take in turn, and returns what the collectors gather."""
    mine = batches(lists[procs.rank :: procs.world])
    turns = range(0, len(lists), procs.world)
    for turn in progress(turns, desc=desc, unit="batch") if procs.is_first else turns:
        if procs.any(stop()):  # all take the same number of turns, so that they stop together
            raise Stopped
        if turn + procs.rank < len(lists):
            show(next(mine), collectors)
    return [collector.gather(procs) for collector in collectors]


def show(batch: Batch, collectors: Sequence[Collector]) -> None:
    for collector in collectors:
        if batch.numbers[0] < collector.limit:
            collector.feed(batch)


# --- all together ----------------------------------------------------------------------------------------------------


def prepare(
    metrics: Sequence[Metric],
    fakes: Fakes,
    reals: Files | None,
    photos: Files | None,
    tools: dict,
    settings: Settings,
    procs: Processes,
) -> tuple[Plan, list[Finish]]:
    """What the metrics need. Raises UserError when these pictures cannot give it."""
    plan = Plan(fakes, reals, photos, tools, settings, procs)
    for metric in metrics:
        family = FAMILIES[metric.family]
        sizes = settings.scales or (fakes.native,) if metric.family in DISTANCES else (fakes.size,)
        for size in sizes:
            if min(size) < family.side:
                least = f"{family.side}x{family.side}"
                raise UserError(f"{metric.name} takes pictures of {least} pixels or more, not {size[1]}x{size[0]}")
        if family.tool and fakes.channels not in (1, 3):
            raise UserError(f"{metric.name} looks at RGB or grey pictures, and these have {fakes.channels} channels")
    return plan, [METRICS[metric.family](plan, metric) for metric in metrics]


def measure(*arguments, stop: Callable[[], bool] = lambda: False) -> list[Result]:
    """The results of all metrics, in every process. The arguments are those of `prepare`.

    Raises UserError, and Stopped at the next batch after `stop` became true in some process. What was seen in
    photographs until then is kept, once all of them were seen.
    """
    began = time.monotonic()
    plan, finish = prepare(*arguments)
    procs, batch = plan.procs, plan.settings.batch
    photographs(plan, stop)
    lists = cut([collector.limit for collector in plan.collectors.values()], batch)
    values = run(plan.fakes.batches, lists, list(plan.collectors.values()), "pictures", procs, stop)
    plan.found |= zip(plan.collectors, values, strict=True)
    passed = time.monotonic() - began
    results = []
    for figures in finish if procs.is_first else ():
        began = time.monotonic()
        for result in figures():
            result.seconds = passed + time.monotonic() - began
            results.append(result)
    return procs.broadcast(results)


def by_set(plan: Plan) -> dict[Whole | Windowed, list[tuple]]:
    groups = {}
    for key in plan.statistics:
        groups.setdefault(key[0], []).append(key)
    return groups


def real_collector(plan: Plan, key: tuple) -> Collector:
    _, kind, name, limit = key
    tool = plan.tools[name]
    if kind == "features":
        return table_of(features_of(tool), limit, tool.num_features)
    return moments_of(features_of(tool), limit, tool.num_features, plan.procs.device)


def photographs(plan: Plan, stop: Callable[[], bool]) -> None:
    """Finds the statistics of photographs: those that were kept, and the others in one pass over each set."""
    procs = plan.procs
    for pictures, keys in by_set(plan).items():
        content = procs.broadcast(pictures.files.digest() if procs.is_first else None)
        wanted = {}
        for key in keys:
            _, kind, name, limit = key
            tool = plan.tools[name]
            facts = cache_key(content, detector=tool.digest or tool.name, **pictures.facts(limit))
            wanted[Statistics(kind, facts, tool.num_features)] = key

        def compute(missing: list[Statistics], pictures=pictures, wanted=wanted) -> list:
            collectors = [real_collector(plan, wanted[one]) for one in missing]
            lists = pictures.lists([collector.limit for collector in collectors], plan.settings.batch)
            return run(pictures.batches, lists, collectors, "photographs", procs, stop)

        plan.found |= zip(wanted.values(), cached(list(wanted), compute, procs), strict=True)


def estimate(*arguments) -> tuple[float, float]:
    """How long `measure` will take: seconds for the pictures, and for photographs of which nothing is kept.

    Shows two batches of each sort to the metrics, and times the second one.
    """
    plan, _ = prepare(*arguments)

    def seconds(batches, lists: list[Numbers], collectors: Sequence[Collector]) -> float:
        shown = (lists * 2)[:2]
        stream = batches(shown)
        for numbers in shown:
            began = time.monotonic()
            show(next(stream), collectors)
            taken = (time.monotonic() - began) / len(numbers)
        return taken * sum(map(len, lists)) / plan.procs.world

    collectors = list(plan.collectors.values())
    edges = sorted({0, *(collector.limit for collector in collectors)})
    lists = cut(edges, plan.settings.batch)
    parts = [[x for x in lists if begin <= x[0] < end] for begin, end in itertools.pairwise(edges)]
    fakes = sum(seconds(plan.fakes.batches, part, collectors) for part in parts)
    reals = 0.0
    for pictures, keys in by_set(plan).items():
        looking = [real_collector(plan, key) for key in keys]
        lists = pictures.lists([collector.limit for collector in looking], plan.settings.batch)
        reals += seconds(pictures.batches, lists, looking)
    return fakes, reals
