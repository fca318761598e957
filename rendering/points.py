"""Compute the colours of points anywhere: rotations, lenses, any field of positions.

Each point has its own row and column, so the exact computation needs two line positions per point, hundreds of times
the cost of a pixel of a grid. The fast method computes dense samples of the lines of a region once, and interpolates
between four neighbours (cubic convolution: Keys, IEEE Trans. ASSP 1981, a = −½).

Legend: C channels, D thickness, K fusions, M samples or R positions of a line, P points.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rendering.network import FoldedGenerator

DENSITY = 1024  # minimum number of samples of a line per side of the image; docs/rendering.md has the errors
FINENESS = 1  # minimum number of samples per pixel
LONGEST = 2**15  # samples of a line kept at a time: 235 MB with the paper's widths
MARGIN = 2  # samples beyond the outermost points, for the neighbours


class Samples(NamedTuple):
    """Lines [M,K,D,C] of one axis at first + m·step, to interpolate between."""

    first: float
    step: float
    lines: Tensor

    def at(self, t: Tensor) -> Tensor:
        """Interpolate at float64 [P], MARGIN steps inside -> [P,K,D,C]."""
        u = (t - self.first) / self.step
        left = u.floor()
        s = (u - left).to(self.lines.dtype)
        # The cubic through the two inner neighbours, with the slopes of the chords between their neighbours.
        weights = [((2 - s) * s - 1) * s, (3 * s - 5) * s * s + 2, ((4 - 3 * s) * s + 1) * s, (s - 1) * s * s]
        taps = left.long()[:, None] + torch.arange(-1, 3, device=t.device)
        mixed = F.embedding_bag(taps, self.lines.flatten(1), per_sample_weights=torch.stack(weights, 1) / 2, mode="sum")
        return mixed.unflatten(1, self.lines.shape[1:])


class Spread(NamedTuple):
    """The range of points along one axis, the distance between neighbours, and their number."""

    low: float
    high: float
    spacing: float
    count: int

    @classmethod
    def of(cls, t: Tensor) -> "Spread":
        """Measure positions [h,w] or [P]."""
        spacing = sum(t.diff(dim=i).abs().mean().item() for i in range(t.ndim) if t.shape[i] > 1)
        return cls(t.min().item(), t.max().item(), spacing, t.numel())

    def grid(self) -> tuple[float, float, int] | None:
        """Return (first, step, count) of the samples to interpolate; None if exact points cost less or are too far."""
        step = min(1 / DENSITY, self.spacing / FINENESS) or 1 / DENSITY
        samples = (self.high - self.low) / step + 1 + 2 * MARGIN
        resolved = step > 2**-46 * max(abs(self.low), abs(self.high))  # by float64
        if samples > min(self.count, LONGEST) or not resolved:
            return None
        return self.low - MARGIN * step, step, math.ceil(samples) + 1


def position_major(lines: Tensor) -> Tensor:
    """Transpose [K,C,D,R] to [R,K,D,C]."""
    return lines.permute(3, 0, 2, 1).contiguous()


def lines_at(G: FoldedGenerator, axis: int, t: Tensor, samples: Samples | None) -> Tensor:
    """Return lines [P,K,D,C] at float64 [P]: interpolated, or exact, with equal positions computed once."""
    if samples is not None:
        return samples.at(t)
    distinct, index = torch.unique(t, return_inverse=True)
    return position_major(G.line(axis, distinct))[index]


def colours(G: FoldedGenerator, x: Tensor, y: Tensor, samples: tuple[Samples | None, Samples | None]) -> Tensor:
    """Return colours [img_channels,P] at x, y float64 [P]. samples: of rows and of columns, None for exact lines."""
    rows, cols = (lines_at(G, axis, t, samples[axis]) for axis, t in enumerate((y, x)))
    fusions = (rows * cols).sum(2).permute(1, 2, 0).contiguous()  # [K,C,P]
    return G.pixels.decode(iter(fusions), len(fusions))
