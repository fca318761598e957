"""Windows of images, so that a generator learns the detail of large images at a fixed number of pixels.

A window (zoom, y, x) shows the frame of an image, resampled to zoom·H × zoom·W pixels, from (y, x) on, in fractions of
the frame's height and width: its H×W pixels are at y + (i + ½) / (zoom·H) and x + (j + ½) / (zoom·W). The whole image
is (1, 0, 0). Legend: N images, H×W the training size.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dnnlib.config import Config, setting
from torch_utils.randomness import make_rng


class ScalesConfig(Config):
    """What part of an image is trained on. By default whole images only."""

    max: float = setting(
        1.0,
        ge=1,
        le=4096,
        flag="max-scale",
        description="windows from images of up to this many times data.resolution",
    )
    windows: float = setting(0.5, ge=0, le=1, description="share of the images that are windows; others are whole")
    sampling: Literal["log-uniform", "uniform"] = setting("log-uniform", description="distribution of the zooms")
    consistency: float = setting(
        0.0, ge=0, description="weight of the squared difference between a window, halved, and the window at half size"
    )
    teacher: float = setting(
        0.0, ge=0, description="weight of the absolute difference from the network of --init-from, at its own pixels"
    )
    larger: float = setting(
        1.0, ge=1, le=4, description="half of the steps render and judge images of this many times data.resolution"
    )
    pairs: float = setting(
        0.0, ge=0, le=1, description="share of the steps with images of both sizes, the generated ones mixed"
    )

    def larger_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) of the larger images."""
        height, width = (round(side * self.larger) for side in shape)
        return height, width


def check_scales(run) -> None:
    """Raise ValueError unless `scales` and the other settings of `run`, a training.config.RunConfig, go together."""
    scales, shape = run.scales, run.D.img_shape
    if scales.max > 1:
        if run.data.resolution is None:
            raise ValueError(
                "scales.max needs images that are larger than the training size; make an archive with "
                "dataset_tool.py --transform=native, and set data.resolution to the training size"
            )
        if not run.G.any_position:
            raise ValueError(f"scales.max needs a G.kind that renders windows, such as creps, not {run.G.kind}")
        if run.G.coords != "centers":
            raise ValueError("scales.max needs G.coords=centers, so that a window is part of the whole image")
    elif scales.consistency or scales.teacher or scales.larger > 1:
        raise ValueError(
            "scales.consistency, scales.teacher and scales.larger need windows; set scales.max to more than 1"
        )
    elif run.D.scale_aware and run.loss.pyramid == 1:
        raise ValueError("D.scale_aware needs several scales; set scales.max or loss.pyramid to more than 1")
    if scales.larger > 1:
        height, width = scales.larger_shape(shape)
        if height % 2 or width % 2 or height * shape[1] != width * shape[0]:
            raise ValueError(
                f"scales.larger={scales.larger:g} makes images of {width}x{height}, whose sides must be even and in "
                f"the proportions of {shape[1]}x{shape[0]}; choose another factor or data.resolution"
            )
        if scales.teacher:
            raise ValueError("scales.teacher compares images of the training size; set scales.larger to 1")
        if run.augment.mode != "none":
            raise ValueError("scales.larger is for images that are not augmented; set augment.mode to none")
    elif scales.pairs:
        raise ValueError("scales.pairs needs images of two sizes; set scales.larger to more than 1")


def sample_window(scales: ScalesConfig, largest: float, seed: int, position: int) -> tuple[float, float, float]:
    """Sample the window of the image at `position` of the stream: zoom from 1 to `largest` or scales.max."""
    choice, zoom, y, x = torch.rand(4, dtype=torch.float64, generator=make_rng(seed, position, "window")).tolist()
    if choice >= scales.windows:
        return 1.0, 0.0, 0.0
    largest = max(1, min(scales.max, largest / scales.larger))  # so that larger images are not enlarged ones
    zoom = largest**zoom if scales.sampling == "log-uniform" else 1 + zoom * (largest - 1)
    return zoom, y * (1 - 1 / zoom), x * (1 - 1 / zoom)


def positions(windows: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """windows [N,3] -> rows [N,H] and cols [N,W] of their pixels, float64, in fractions of the frame."""
    zoom = windows[:, :1]
    axes = zip(windows[:, 1:].split(1, dim=1), shape, strict=True)
    return tuple(
        corner + (torch.arange(side, dtype=torch.float64, device=windows.device) + 0.5) / (zoom * side)
        for corner, side in axes
    )


def parts(windows: Tensor, shape: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for rows and for columns, how windows [N,3] of H×W pixels show the whole image of H×W pixels.

    Across such a window the image has q = round(H / zoom) pixels, at least one: positions [N,H] of these, of which
    only the first q count, and weights [N,H,H] that average pixels of the window over the area of each, 0 beyond q.
    """
    zoom = windows[:, :1]
    for corner, side in zip(windows[:, 1:].split(1, dim=1), shape, strict=True):
        count = (side / zoom).round().clamp(min=1)
        index = torch.arange(side, dtype=torch.float64, device=windows.device)
        length = (side / count)[:, :, None]  # of an area, in pixels of the window
        start = index[:, None] * length
        covered = torch.minimum(index + 1, start + length) - torch.maximum(index, start)
        yield corner + (index + 0.5) / (zoom * count), covered.clamp(min=0) / length


def resized(images: Tensor, shape: tuple[int, int]) -> Tensor:
    """[N,C,H,W] -> [N,C,*shape]: bilinear, with antialiasing."""
    return images if images.shape[2:] == shape else F.interpolate(images, shape, mode="bilinear", antialias=True)


def mix(sized: list[Tensor], rng: torch.Generator) -> list[Tensor]:
    """Mix images of two sizes, [N,C,h,w] and [N,C,H,W]: they exchange a rectangle, then some of their channels.

    Those of one size stay as they are. ScaleParty (Ntavelis et al., ECCV 2022). For each size, the other images are
    resized to it, and the rectangle and the channels are drawn once for the batch.
    """
    if len(sized) == 1:
        return sized
    mixed = []
    for own, other in (sized, sized[::-1]):
        inside = []
        for side in own.shape[2:]:
            first, last = torch.randperm(side + 1, generator=rng)[:2].sort().values
            index = torch.arange(side)
            inside.append((index >= first) & (index < last))
        channels = torch.rand(own.shape[1], 1, 1, generator=rng) < 0.5
        exchanged = (inside[0][:, None] & inside[1]) ^ channels
        mixed.append(torch.where(exchanged.to(own.device), resized(other, own.shape[2:]), own))
    return mixed
