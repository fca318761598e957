"""Define the metrics: their inputs, computations and names.

(metric,) = parse("fid50k_full")
metric.num, metric.full  # 50000, True
metric.of(1000).name  # "fid1k_full"

A new metric is one entry in FAMILIES. Legend: N images, F numbers per image. Sizes are (H, W).
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dnnlib.config import nearest
from dnnlib.console import UserError
from metrics.distances import frechet_distance, inception_score, kernel_distance, precision_recall
from metrics.equivariance import decibels, eqr, eqt_frac, eqt_int, errors
from metrics.estimate import Estimate, mean
from metrics.generated import GeneratedBatch
from metrics.images import Size
from metrics.lines import LineShare, line_ratio
from metrics.needs import Inputs, Need, Task
from metrics.path_length import trimmed
from metrics.reals import WindowBatch, Windowed, Windows
from metrics.resize import resize
from metrics.scale import Distance, on_uint8, psnr, ssim

MOST_IMAGES = 10**7  # the numbers of more take long to list
MOST_FEATURES = 200_000  # real images whose features are kept for kid and pr: 1.6 GB of memory


class Family(NamedTuple):
    """Metrics that differ only in their numbers."""

    # A template of the name. #: the number of images; [_#]: the same, or nothing at the default; _?: an underscore, or
    # nothing after a number that ends in k.
    pattern: str
    tasks: Callable[["Metric", Inputs], list[Task]]  # raises UserError for inputs that are insufficient or unfit
    tool: Callable | None = None  # (device, folder of weights) -> the network that looks at the images
    reals: bool = False  # compares with real images: all if the name ends in _full, else as many as the number
    windows: bool = False  # compares with windows of large real images
    renders: bool = False  # needs a generator; files of its images are not enough
    least: int = 2  # images
    side: int = 1  # pixels, at least
    default: int = 50_000  # images, where the name has no number


@dataclass(frozen=True)
class Metric:
    family: Family
    num: int  # images to generate
    full: bool = False  # against all real images

    @property
    def name(self) -> str:
        """Return the name in StyleGAN's notation, with thousands as k."""
        number = str(self.num) if self.num % 1000 else f"{self.num // 1000}k"
        optional = "" if self.num == self.family.default else f"_{number}"
        name = self.family.pattern.replace("[_#]", optional).replace("#", number)
        return name.replace("_?", "" if number.endswith("k") else "_") + "_full" * self.full

    def of(self, num: int) -> "Metric":
        """Return the same metric of `num` images. Raises UserError if they are too few or too many."""
        if num < self.family.least:
            raise UserError(f"{self.name} needs {self.family.least} images or more, not {num}")
        if num > MOST_IMAGES:
            raise UserError(f"{num:,} images are more than {MOST_IMAGES:,}, the most that are measured; give fewer")
        return replace(self, num=num)


# --- computations of metrics ------------------------------------------------------------------------------------------


def task(
    metric: Metric,
    inputs: Inputs,
    compute: Callable,
    need: Need,
    real: Need | None = None,
    variant: tuple[str, ...] = (),
    facts: dict | None = None,
    sizes: tuple[Size, ...] = (),
) -> Task:
    """Return the task with the attributes common to all. Raises UserError for unsuitable images.

    sizes: the sizes of the images; () is the measured size, which the name states if it is not the default.
    """
    images, family, tool = inputs.images, metric.family, inputs.tools.get(metric.family.tool)
    for height, width in sizes or (images.size,):
        if min(height, width) < family.side:
            raise UserError(
                f"{metric.name} needs images of {family.side}x{family.side} pixels or more, not {width}x{height}; "
                "choose a larger size"
            )
    if tool and images.channels not in (1, 3):
        raise UserError(
            f"{metric.name} supports RGB and grey images, and these have {images.channels} channels; leave it out"
        )
    known = {"num_fake": metric.num, "size": list(images.size), "seed": inputs.settings.seed}
    if not sizes and images.size != images.native:
        variant = (f"{images.size[1]}x{images.size[0]}", *variant)
    variant += images.variant
    if tool:
        known["detector"] = {"name": tool.name, "sha256": tool.digest}
        variant += () if tool.standard else (tool.name,)
    return Task(metric.name, need, real, compute, variant, known | (facts or {}))


def compare(kind: str, distance: Callable) -> Callable:
    """Compare the "moments" or the "features" of generated images with those of real ones."""

    def tasks(metric: Metric, inputs: Inputs) -> list[Task]:
        files, tool = inputs.reals, inputs.tools[metric.family.tool]
        if files is None:
            raise UserError(f"{metric.name} compares with real images; give them as data")
        limit = files.num if metric.full else min(files.num, metric.num)
        if kind == "features":
            limit = min(limit, MOST_FEATURES)
        if limit < metric.family.least:
            raise UserError(f"{metric.name} needs {metric.family.least} real images or more, and data has {limit}")
        key = tool.digest or tool.name
        need = Need(key, kind, metric.num, tool.num_features, lambda batch: batch.activations(tool).features)
        real = replace(need, limit=limit, images=inputs.fitted)
        filter = inputs.fitted.filter
        resized = None if files.size == inputs.images.size else f"centre crop, {filter}"
        variant = (filter,) if resized and filter != "lanczos" else ()
        facts = {"num_real": limit, "real_size": list(files.size), "resize": resized, "mirror": files.facts["mirror"]}
        if distance is frechet_distance:
            facts |= caution(metric.num, limit, tool.num_features)
        return [task(metric, inputs, distance, need, real, variant, facts)]

    return tasks


def caution(num: int, num_real: int, num_features: int) -> dict[str, str]:
    """Return a note on a Fréchet distance of so few images that their covariance is singular; else {}."""
    fewest = min(num, num_real)
    if fewest > num_features:
        return {}
    return {
        "caution": f"{fewest:,} images are too few to estimate the covariance of {num_features:,} features, so the "
        f"distance is biased; use more than {num_features:,}, or compare only with equal numbers of images"
    }


def inception_scores(metric: Metric, inputs: Inputs) -> list[Task]:
    tool = inputs.tools[metric.family.tool]
    need = Need(metric, "features", metric.num, tool.num_classes, lambda batch: batch.activations(tool).logits)
    return [task(metric, inputs, inception_score, need)]


def windows(kind: str, distance: Callable, by_scale: bool = False) -> Callable:
    """Compare windows of large generated images with windows of large real ones.

    by_scale: once for each scale 1, 2, 4, … up to that of the large images, at which all windows are cut.
    """

    def tasks(metric: Metric, inputs: Inputs) -> list[Task]:
        images, tool = inputs.images, inputs.tools[metric.family.tool]
        (large, width), (size, other) = images.size, images.native
        if size != other:
            raise UserError(f"{metric.name} needs a generator trained on squares, not on {other}x{size}; leave it out")
        if large != width or large <= size:
            raise UserError(
                f"{metric.name} compares windows of {size}x{size} pixels in larger squares; give the size of the "
                f"squares, for example {4 * size}x{4 * size}"
            )
        if not images.G.config.any_position:
            raise UserError(
                f"{metric.name} needs a generator that renders windows; one of kind {images.G.config.kind} does not"
            )
        if inputs.large is None:
            raise UserError(f"{metric.name} compares with large real images; give them as data")
        filter = inputs.settings.filter or "lanczos"
        limit = max(metric.num, inputs.large.num) if metric.full else metric.num
        facts = {"num_real": limit, "num_photographs": inputs.large.num, "window": size, "resize": filter}
        facts |= caution(metric.num, limit, tool.num_features)
        scales = [2**i for i in range((large // size).bit_length())] if by_scale else [None]
        kinds = tuple(Windows(size, large, filter, inputs.settings.seed, scale) for scale in scales)
        real_images = Windowed(inputs.large, kinds, inputs.device)
        found = []
        for of_scale in kinds:

            def look(batch: GeneratedBatch | WindowBatch, of_scale: Windows = of_scale) -> Tensor:
                return batch.once((tool, of_scale), lambda: tool(batch.windows(of_scale))).features

            need = Need((tool.digest or tool.name, of_scale), kind, metric.num, tool.num_features, look)
            real = replace(need, limit=limit, images=real_images)
            variant = (filter,) if filter != "lanczos" else ()
            variant += (f"x{of_scale.zoom}",) if of_scale.zoom else ()
            found.append(task(metric, inputs, distance, need, real, variant, facts))
        return found

    return tasks


def path_length(metric: Metric, inputs: Inputs) -> list[Task]:
    tool = inputs.tools[metric.family.tool]
    need = Need(metric, "values", metric.num, 1, lambda batch: batch.path_lengths(tool)[:, None])
    return [task(metric, inputs, lambda lengths: mean(trimmed(lengths.flatten())), need)]


def equivariance(move: Callable) -> Callable:
    """Compare images of moved scenes with moved images; each image has its own transform, in any batch."""

    def tasks(metric: Metric, inputs: Inputs) -> list[Task]:
        def look(batch: GeneratedBatch) -> Tensor:
            numbers = enumerate(batch.numbers.tolist())
            return torch.cat([errors(partial(batch.moved, i), move, inputs.settings.seed, n) for i, n in numbers])

        facts = {"points": inputs.images.points} if move is eqr else {}
        return [task(metric, inputs, decibels, Need(metric, "values", metric.num, 2, look), facts=facts)]

    return tasks


def consistency(distance_of: Callable[[object], Distance]) -> Callable:
    """Compare images with the same images at another size, the larger downsampled."""

    def tasks(metric: Metric, inputs: Inputs) -> list[Task]:
        native = inputs.images.native
        doubled = (native, (2 * native[0], 2 * native[1]))
        first, *others = inputs.settings.scales or doubled
        filter, distance = inputs.settings.filter or "box", distance_of(inputs.tools.get(metric.family.tool))
        found = []
        for other in others:
            if first[0] * other[1] != first[1] * other[0]:
                raise UserError(
                    f"scales {size_name(first)} and {size_name(other)} have different shapes, so they show different "
                    "parts; choose scales of one shape"
                )
            small, large = sorted((first, other))

            def look(batch: GeneratedBatch, small: Size = small, large: Size = large) -> Tensor:
                shrunk = batch.once((large, small), lambda: resize(batch.images(large), small, filter))
                return distance(batch.images(small), shrunk)[:, None]

            variant = () if (small, large) == doubled else (f"{size_name(small)}-{size_name(large)}",)
            variant += () if filter == "box" else (filter,)
            facts = {"scales": [list(first), list(other)], "filter": filter}
            need = Need((metric, small, large), "values", metric.num, 1, look)
            found.append(task(metric, inputs, listed_mean, need, None, variant, facts, (first, other)))
        return found

    return tasks


def listed_mean(values: Tensor) -> Estimate:
    """Return the mean of [N,1], and the values."""
    return mean(values.flatten())._replace(values=values.flatten().cpu())


def size_name(size: Size) -> str:
    """Return "256" for a square, else "512x256", width first."""
    return str(size[0]) if size[0] == size[1] else f"{size[1]}x{size[0]}"


# --- the networks that look at images --------------------------------------------------------------------------------


def load_detector(kind: str, device: torch.device, weights_dir: str | os.PathLike | None):
    from metrics.features import Detector  # importing torch-fidelity takes seconds

    return Detector(kind, weights_dir, device)


def load_lpips(net: str, device: torch.device, weights_dir: str | os.PathLike | None):
    from metrics.perceptual import LPIPS

    return LPIPS(net, weights_dir, device)


# Metrics that share a network name the same loader: it is loaded once, and runs once per image.
INCEPTION, DINOV2, LITE0 = (partial(load_detector, kind) for kind in ("inception", "dinov2", "lite0"))
VGG, ALEX = (partial(load_lpips, net) for net in ("vgg", "alex"))


# --- the table -------------------------------------------------------------------------------------------------------

FAMILIES = [
    Family("fid#", compare("moments", frechet_distance), INCEPTION, reals=True),
    Family("kid#", compare("features", kernel_distance), INCEPTION, reals=True),
    Family("pr#_?3", compare("features", precision_recall), INCEPTION, reals=True, least=4),
    Family("is#", inception_scores, INCEPTION, least=10),
    Family("fd_dinov2_#", compare("moments", frechet_distance), DINOV2, reals=True),
    Family("fd_lite0_#", compare("moments", frechet_distance), LITE0, reals=True),
    Family("lines#", compare("moments", line_ratio), lambda *_: LineShare(), reals=True, side=16, default=1000),
    Family("pfid#", windows("moments", frechet_distance), INCEPTION, windows=True, renders=True),
    Family("fid_scales#", windows("moments", frechet_distance, True), INCEPTION, windows=True, renders=True),
    Family("kid_scales#", windows("features", kernel_distance, True), INCEPTION, windows=True, renders=True),
    Family("fd_lite0_scales_#", windows("moments", frechet_distance, True), LITE0, windows=True, renders=True),
    Family("ppl2_wend[_#]", path_length, VGG, renders=True, side=16),
    Family("eqt#_int", equivariance(eqt_int), renders=True, side=32),
    Family("eqt#_frac", equivariance(eqt_frac), renders=True, side=32),
    Family("eqr#", equivariance(eqr), renders=True, side=32),
    Family("scale_psnr[_#]", consistency(lambda tool: psnr), renders=True, default=1000),
    Family("scale_ssim[_#]", consistency(lambda tool: ssim), renders=True, side=11, default=1000),
    Family("scale_lpips[_#]", consistency(on_uint8), ALEX, renders=True, side=31, default=1000),
]


# --- names -----------------------------------------------------------------------------------------------------------


def parse(text: str) -> tuple[Metric, ...]:
    """Return the metrics in "a,b,c", each once; () for "none". Raises UserError for unknown names, too few images."""
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    return tuple(dict.fromkeys(map(_parse, names)))


def _parse(name: str) -> Metric:
    for family in FAMILIES:
        compares = family.reals or family.windows
        pattern = family.pattern.replace("[_#]", "(?:_#)?").replace("#", r"(\d{1,9})(k?)") + "(_full)?" * compares
        if match := re.fullmatch(pattern, name, re.IGNORECASE):
            number, thousands, *full = match.groups()
            num = int(number) * (1000 if thousands else 1) if number else family.default
            return Metric(family, family.default, any(full)).of(num)
    known = nearest(name, KNOWN, lambda word: re.sub(r"\d+k|_full", "", word.lower()))  # the numbers may be any
    raise UserError(f"there is no metric {name!r}; {known}")


# The usual names; the numbers in them may be others.
KNOWN = tuple(Metric(family, family.default, family.reals or family.windows).name for family in FAMILIES)
