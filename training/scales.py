"""Windows of pictures, so that a generator learns the detail of large photographs at a fixed number of pixels.

A window (zoom, y, x) shows the frame of a picture, resampled to zoom·H × zoom·W pixels, from (y, x) on, in fractions of
the frame's height and width: its H×W pixels are at y + (i + ½) / (zoom·H) and x + (j + ½) / (zoom·W). The whole picture
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
    """What part of a picture is trained on. By default whole pictures only."""

    max: float = setting(
        1.0,
        ge=1,
        le=4096,
        flag="max-scale",
        description="windows from pictures of up to this many times data.resolution",
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
    """Yield, for rows and for columns, how windows [N,3] of H×W pixels show the whole picture of H×W pixels.

    Across such a window the picture has q = round(H / zoom) pixels, at least one: positions [N,H] of these, of which
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
