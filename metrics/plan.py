"""The metrics: what each needs of the pictures, and how its figures come of that.

Legend: N pictures, F features. Sizes are (H, W).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dnnlib.console import UserError
from metrics import equivariance
from metrics.distances import frechet_distance, inception_score, kernel_distance, precision_recall
from metrics.measure import Measure
from metrics.measure import measure as summary
from metrics.moments import FeatureTable, Moments
from metrics.path_length import trimmed
from metrics.pictures import Batch, Drawing, Fakes, Files, Size, Whole, Windowed, Windows
from metrics.registry import FAMILIES, Metric
from metrics.scale import bring_down, on_uint8, psnr, ssim
from torch_utils.distributed import Processes

MOST_FEATURES = 200_000  # photographs whose features are kept for kid and pr: 1.6 GB of memory


class Settings(NamedTuple):
    scales: tuple[Size, ...] = ()  # of scale_*: the first is compared with each other one; () is (R, 2R)
    filter: str | None = None  # None: box for scale_*, lanczos for photographs
    seed: int = 0
    batch: int = 8  # pictures at once; another number changes no result but by rounding


@dataclass
class Result:
    """One metric, measured once.

    variant   what differs from the usual, for the name: the size, the truncation, the detector's weights, …
    measures  the ending of each figure's name -> the figure: "" for most
    facts     all else that a reader may want to know, as JSON holds it
    """

    metric: Metric
    variant: tuple[str, ...]
    measures: dict[str, Measure]
    facts: dict
    seconds: float = 0.0

    def named(self, ending: str = "") -> str:
        """ "fid50k_full", or with all that is unusual: "fid50k_full@512x512@inception-custom-1a2b3c4d"."""
        return "@".join((self.metric.name + ending, *self.variant))


def side(size: Size) -> str:
    """ "256" of a square, else "512x256", width first."""
    return str(size[0]) if size[0] == size[1] else f"{size[1]}x{size[0]}"


# --- what is kept of many batches ------------------------------------------------------------------------------------


class Collector(NamedTuple):
    """Takes the pictures 0 … limit − 1, in whole batches."""

    limit: int
    feed: Callable[[Batch], None]
    gather: Callable[[Processes], object]  # all processes call it together, and get the same


def moments_of(look: Callable[[Batch], Tensor], limit: int, num_features: int, device: torch.device) -> Collector:
    moments = Moments(num_features, device)
    return Collector(limit, lambda batch: moments.update(look(batch)), moments.gather)


def table_of(look: Callable[[Batch], Tensor], limit: int, num_features: int) -> Collector:
    table = FeatureTable(limit, num_features)
    return Collector(limit, lambda batch: table.update(look(batch), batch.numbers), table.gather)


def values_of(look: Callable[[Batch], Tensor], limit: int, shape: tuple[int, ...] = ()) -> Collector:
    """float64 [limit,*shape], on the CPU."""
    values = torch.zeros(limit, *shape, dtype=torch.float64)

    def feed(batch: Batch) -> None:
        values[batch.numbers] = look(batch).double().cpu()

    return Collector(limit, feed, lambda procs: procs.sum_(values.to(procs.device)).cpu())


def features_of(tool) -> Callable[[Batch], Tensor]:
    return lambda batch: batch.activations(tool).features


# --- what is needed, and what was found ------------------------------------------------------------------------------


@dataclass
class Plan:
    """What the metrics of one call need of the pictures; then what was found.

    A metric, METRICS[family](plan, metric), asks for what it needs, and returns a function that is called when
    `found` has it.
    """

    fakes: Fakes
    reals: Files | None
    photos: Files | None  # of all sizes, for pfid
    tools: dict
    settings: Settings
    procs: Processes
    collectors: dict[tuple, Collector] = field(default_factory=dict)  # of the pictures measured
    statistics: list[tuple] = field(default_factory=list)  # of photographs: their set, kind, detector, how many
    found: dict[tuple, object] = field(default_factory=dict)

    def fake(self, key: tuple, collector: Callable[[], Collector]) -> tuple:
        if key not in self.collectors:
            self.collectors[key] = collector()
        return key

    def real(self, kind: str, pictures: Whole | Windowed, name: str, limit: int) -> tuple:
        key = (pictures, kind, name, limit)
        if key not in self.statistics:
            self.statistics.append(key)
        return key

    def whole(self, metric: Metric, most: float = math.inf) -> tuple[Whole, int]:
        """The photographs that a metric compares with, and how many of them."""
        if self.reals is None:
            raise UserError(f"{metric.name} compares with photographs; give them with --data")
        limit = min(self.reals.num, math.inf if metric.full else metric.num, most)
        least = FAMILIES[metric.family].least
        if limit < least:
            raise UserError(f"{metric.name} takes {least} photographs or more, and --data has {limit}")
        return self._whole, limit

    @functools.cached_property
    def _whole(self) -> Whole:
        return Whole(self.reals, self.fakes.size, self.settings.filter or "lanczos", self.procs.device)

    def moments(self, key: tuple, look: Callable[[Batch], Tensor], metric: Metric, name: str) -> tuple:
        num_features = self.tools[name].num_features
        return self.fake(key, lambda: moments_of(look, metric.num, num_features, self.procs.device))

    def features(self, name: str, num: int) -> tuple:
        """The features of the first `num` pictures measured."""
        tool = self.tools[name]
        return self.fake(("features", name, num), lambda: table_of(features_of(tool), num, tool.num_features))

    def result(self, metric: Metric, measures: dict[str, Measure], variant: tuple[str, ...] = (), **facts) -> Result:
        """With what all results tell."""
        tool = self.tools.get(FAMILIES[metric.family].tool)
        if tool is not None:
            facts["detector"] = {"name": tool.name, "sha256": tool.digest}
        if self.fakes.size != self.fakes.native and not metric.family.startswith("scale_"):
            variant = (f"{self.fakes.size[1]}x{self.fakes.size[0]}", *variant)
        variant += self.fakes.variant
        if tool is not None and not tool.standard:
            variant += (tool.name,)
        facts = {"num_fake": metric.num, "size": list(self.fakes.size), "seed": self.settings.seed, **facts}
        return Result(metric, variant, measures, facts)

    def compared(self, metric: Metric, measures: dict[str, Measure], limit: int) -> Result:
        """Of a metric that compares with whole photographs."""
        files, filter = self.reals, self.settings.filter or "lanczos"
        recipe = None if files.size == self.fakes.size else f"centre crop, {filter}"
        variant = (filter,) if recipe and filter != "lanczos" else ()
        facts = {"num_real": limit, "real_size": list(files.size), "resize": recipe, "mirror": files.facts["mirror"]}
        return self.result(metric, measures, variant, **facts)


Finish = Callable[[], list[Result]]


def both_moments(plan: Plan, metric: Metric) -> tuple[tuple, tuple, int]:
    """The keys of the moments of generated images and of photographs, and how many photographs."""
    name, (pictures, limit) = FAMILIES[metric.family].tool, plan.whole(metric)
    fake = plan.moments(("moments", name, metric.num), features_of(plan.tools[name]), metric, name)
    return fake, plan.real("moments", pictures, name, limit), limit


def frechet(plan: Plan, metric: Metric) -> Finish:
    fake, real, limit = both_moments(plan, metric)
    return lambda: [plan.compared(metric, {"": frechet_distance(plan.found[fake], plan.found[real])}, limit)]


def line_artefacts(plan: Plan, metric: Metric) -> Finish:
    fake, real, limit = both_moments(plan, metric)

    def finish() -> list[Result]:
        both = plan.found[fake], plan.found[real]
        shares = [Measure(m.mean.item(), math.sqrt(m.covariance.item() / m.count), m.count) for m in both]
        if not shares[1].mean:
            raise UserError(f"{metric.name}: the photographs have no fine detail, so there is nothing to compare with")
        ratio = shares[0].mean / shares[1].mean
        # The relative variances of independent factors add up.
        errors = (s.standard_error / s.mean if s.mean else 0.0 for s in shares)
        measures = dict(zip(("_fake", "_real"), shares, strict=True))
        measures["_ratio"] = Measure(ratio, ratio * math.hypot(*errors), metric.num)
        return [plan.compared(metric, measures, limit)]

    return finish


def kernel(plan: Plan, metric: Metric) -> Finish:
    pictures, limit = plan.whole(metric, MOST_FEATURES)
    keys = plan.features("inception", metric.num), plan.real("features", pictures, "inception", limit)

    def finish() -> list[Result]:
        fake, real = (plan.found[key].to(plan.procs.device) for key in keys)
        return [plan.compared(metric, {"": kernel_distance(fake, real)}, limit)]

    return finish


def precision(plan: Plan, metric: Metric) -> Finish:
    pictures, limit = plan.whole(metric, MOST_FEATURES)
    keys = plan.features("inception", metric.num), plan.real("features", pictures, "inception", limit)

    def finish() -> list[Result]:
        both = precision_recall(*(plan.found[key].to(plan.procs.device) for key in keys))
        return [plan.compared(metric, dict(zip(("_precision", "_recall"), both, strict=True)), limit)]

    return finish


def inception(plan: Plan, metric: Metric) -> Finish:
    tool = plan.tools["inception"]

    def look(batch: Batch) -> Tensor:
        return batch.activations(tool).logits

    key = plan.fake(("logits", metric.num), lambda: table_of(look, metric.num, tool.num_classes))

    def finish() -> list[Result]:
        score = inception_score(plan.found[key])
        deviation = Measure(score.values.std(correction=0).item(), math.nan, score.num)
        return [plan.result(metric, {"_mean": score, "_std": deviation})]

    return finish


def patches(plan: Plan, metric: Metric) -> Finish:
    fakes, tool = plan.fakes, plan.tools["inception"]
    (large, width), (size, other) = fakes.size, fakes.native
    if size != other:
        raise UserError(f"{metric.name} takes a generator trained on squares, not on {side(fakes.native)}")
    if large != width or large <= size:
        raise UserError(
            f"{metric.name} looks at windows of {size}x{size} pixels in larger squares; give the size of these, "
            f"for example --size={4 * size}x{4 * size}"
        )
    if plan.photos is None:
        raise UserError(f"{metric.name} compares with large photographs; give them with --data")
    windows = Windows(size, large, plan.settings.filter or "lanczos", plan.settings.seed)
    limit = max(metric.num, plan.photos.num) if metric.full else metric.num

    def look(batch: Drawing) -> Tensor:
        boxes = [windows.box("fake", number) for number in batch.numbers.tolist()]
        return tool(batch.windows(boxes)).features

    fake = plan.moments(("windows", metric.num), look, metric, "inception")
    pictures = Windowed(plan.photos, windows, limit, plan.procs.device)
    real = plan.real("moments", pictures, "inception", limit)

    def finish() -> list[Result]:
        measures = {"": frechet_distance(plan.found[fake], plan.found[real])}
        variant = (windows.filter,) if windows.filter != "lanczos" else ()
        facts = {"num_real": limit, "num_photographs": plan.photos.num, "window": size, "resize": windows.filter}
        return [plan.result(metric, measures, variant, **facts)]

    return finish


def path_length(plan: Plan, metric: Metric) -> Finish:
    def look(batch: Drawing) -> Tensor:
        return batch.path_lengths(plan.tools["lpips-vgg"])

    key = plan.fake(("lengths", metric.num), lambda: values_of(look, metric.num))
    return lambda: [plan.result(metric, {"": summary(trimmed(plan.found[key]))})]


def equivariant(plan: Plan, metric: Metric) -> Finish:
    kind = metric.family

    def look(batch: Drawing) -> Tensor:
        numbers = enumerate(batch.numbers.tolist())
        # One by one: each picture has a transform of its own, whatever batch it is in.
        rows = [equivariance.errors(partial(batch.moved, i), (kind,), plan.settings.seed, n)[kind] for i, n in numbers]
        return torch.cat(rows)

    key = plan.fake((kind, metric.num), lambda: values_of(look, metric.num, (2,)))
    facts = {"points": plan.fakes.points} if kind == "eqr" else {}
    return lambda: [plan.result(metric, {"": equivariance.decibels(plan.found[key])}, **facts)]


def consistent(plan: Plan, metric: Metric) -> Finish:
    native = plan.fakes.native
    doubled = (native, (2 * native[0], 2 * native[1]))
    first, *others = plan.settings.scales or doubled
    for other in others:
        if first[0] * other[1] != first[1] * other[0]:
            raise UserError(f"--scales: {side(first)} and {side(other)} have different shapes, and so different parts")
    filter = plan.settings.filter or "box"
    distance = DISTANCES[metric.family](plan.tools)
    keys = {}
    for other in others:
        small, large = sorted((first, other))

        def look(batch: Drawing, small=small, large=large) -> Tensor:
            brought = batch.once((large, small), lambda: bring_down(batch.pictures(large), small, filter))
            return distance(batch.pictures(small), brought)

        keys[small, large] = plan.fake((metric, small, large), lambda look=look: values_of(look, metric.num))

    def finish() -> list[Result]:
        results = []
        for (small, large), key in keys.items():
            variant = () if (small, large) == doubled else (f"{side(small)}-{side(large)}",)
            variant += (filter,) * (filter != "box")
            other = large if small == first else small
            facts = {"scales": [list(first), list(other)], "filter": filter}
            facts["values"] = [float(f"{value:.6g}") for value in plan.found[key].tolist()]
            results.append(plan.result(metric, {"": summary(plan.found[key], filter)}, variant, **facts))
        return results

    return finish


DISTANCES = {
    "scale_psnr": lambda tools: psnr,
    "scale_ssim": lambda tools: ssim,
    "scale_lpips": lambda tools: on_uint8(tools["lpips-alex"]),
}
METRICS = {
    "fid": frechet,
    "kid": kernel,
    "pr": precision,
    "is": inception,
    "fd_dinov2": frechet,
    "fd_lite0": frechet,
    "lines": line_artefacts,
    "pfid": patches,
    "ppl2_wend": path_length,
    "eqt_int": equivariant,
    "eqt_frac": equivariant,
    "eqr": equivariant,
    **dict.fromkeys(DISTANCES, consistent),
}
