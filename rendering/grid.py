"""The position of every pixel: what to render (Shot) and where its pixels are (View).

Positions are fractions of the training image: x runs to the right and y down, [0,1] is that image, and the network
continues it beyond. They are float64: at zoom 100,000, neighbouring pixels of a 512² window differ by 2e-8.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dnnlib.console import UserError
from rendering.transforms import Field
from training.networks import AnyGeneratorConfig
from training.networks.coords import COORDS

# (row step, column step) that would stretch the window over the image -> the steps used.
FITS = {
    "crop": lambda row, col: (min(row, col),) * 2,
    "extend": lambda row, col: (max(row, col),) * 2,
    "stretch": lambda row, col: (row, col),
}


@dataclass(frozen=True, eq=False)
class Shot:
    """What to render of a generator's image, at which size, and how.

    size: (height, width) in pixels; by default, the training size.
    window: (x0, y0, x1, y1) in fractions of the training image.
    fit: what to show if the window and the size differ in shape. "crop": the largest part of the window with that
        shape; "extend": the whole window and what surrounds it; "stretch": exactly the window, with oblong pixels.
    transform: a matrix or a field of rendering.transforms.
    supersample: K averages K² samples of each pixel.
    exact: for transforms that mix rows and columns. False interpolates between dense samples of the lines (errors:
        docs/rendering.md); True computes the lines of every pixel, about a hundred times slower.
    tile: side of a tile in pixels; the default depends on the device.
    Raises UserError for values out of range.
    """

    size: tuple[int, int] | None = None
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    fit: str = "crop"
    transform: Tensor | Field | None = None
    supersample: int = 1
    exact: bool = False
    tile: int | None = None

    def __post_init__(self):
        if self.size is not None and min(self.size) < 1:
            raise UserError(f"size={self.size[0]},{self.size[1]} has no pixels; give height and width of 1 or more")
        x0, y0, x1, y1 = self.window
        if not (all(map(math.isfinite, self.window)) and x0 < x1 and y0 < y1):
            raise UserError(
                f"window={x0:g},{y0:g},{x1:g},{y1:g} is empty; give left, top, right, bottom with left < right"
            )
        if self.fit not in FITS:
            raise UserError(f"fit={self.fit!r} is unknown; use one of {', '.join(FITS)}")
        matrix = self.transform
        if isinstance(matrix, Tensor) and not (
            matrix.shape == (3, 3) and matrix.isfinite().all() and matrix.double().det()
        ):
            raise UserError(f"a transform is an invertible matrix [3,3]; got {matrix.tolist()}")
        if self.supersample < 1:
            raise UserError(f"supersample={self.supersample} has no samples; use 1 or more")
        if self.tile is not None and self.tile < 1:
            raise UserError(f"tile={self.tile} has no pixels; use 1 or more")


class Axis(NamedTuple):
    """Positions of `count` pixels: pixel i is at first + i·step and has `samples` samples, spread evenly over step."""

    first: float
    step: float
    count: int
    samples: int = 1

    def positions(self, start: int, stop: int, device: torch.device | None = None) -> Tensor:
        """Return float64 [(stop − start)·samples] for pixels start … stop − 1; equal in any part."""
        index = torch.arange(start * self.samples, stop * self.samples, dtype=torch.float64, device=device)
        return self.first + ((index + 0.5) / self.samples - 0.5) * self.step

    def scaled(self, factor: float, shift: float) -> "Axis":
        """Map every position t to (t − ½)·factor + ½ + shift."""
        return self._replace(first=(self.first - 0.5) * factor + shift + 0.5, step=self.step * factor)


class Box(NamedTuple):
    """Rows y0 … y1 − 1 and columns x0 … x1 − 1 of an image, in pixels."""

    y0: int
    y1: int
    x0: int
    x1: int

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    @property
    def shape(self) -> tuple[int, int]:
        return self.y1 - self.y0, self.x1 - self.x0

    def shifted(self, down: int, right: int) -> "Box":
        return Box(self.y0 + down, self.y1 + down, self.x0 + right, self.x1 + right)

    def split(self, side: int) -> Iterator["Box"]:
        """Yield squares of `side` pixels, row by row; smaller at the right and lower edges."""
        for y in range(self.y0, self.y1, side):
            for x in range(self.x0, self.x1, side):
                yield Box(y, min(y + side, self.y1), x, min(x + side, self.x1))


@dataclass(frozen=True)
class View:
    """The position of every pixel: pixel (i, j) shows y = rows[i], x = cols[j], or field(x, y) if there is one.

    With `transposed` it shows x = rows[i], y = cols[j], which a quarter turn needs.
    """

    rows: Axis
    cols: Axis
    transposed: bool = False
    field: Field | None = None

    @classmethod
    def of(cls, config: AnyGeneratorConfig, shot: Shot) -> "View":
        """Resolve `shot` for a generator. Raises UserError if float64 cannot resolve neighbouring pixels."""
        size = shot.size or config.img_shape
        x0, y0, x1, y1 = map(float, shot.window)
        # In units of the longer side, about the centre of the image, pixels are square.
        count = COORDS[config.coords].steps
        tall, wide = (count(side) / max(map(count, config.img_shape)) for side in config.img_shape)
        steps = FITS[shot.fit]((y1 - y0) * tall / count(size[0]), (x1 - x0) * wide / count(size[1]))
        centres = ((y0 + y1 - 1) / 2 * tall + 0.5, (x0 + x1 - 1) / 2 * wide + 0.5)
        rows, cols = (
            Axis(centre - (pixels - 1) / 2 * step, step, pixels, shot.supersample)
            for centre, pixels, step in zip(centres, size, steps, strict=True)
        )
        transform = torch.eye(3, dtype=torch.float64) if shot.transform is None else shot.transform
        if isinstance(transform, Tensor):
            view = cls.transformed(rows, cols, torch.linalg.inv(transform.double()), (wide, tall))
        else:

            def field(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
                return tuple((t - 0.5) / side + 0.5 for t, side in zip(transform(x, y), (wide, tall), strict=False))

            view = cls(rows, cols, field=field)
        for axis in (view.rows, view.cols):
            last = axis.first + (axis.count - 1) * axis.step
            # float64 resolves differences of 2⁻⁵²; `not >=` catches infinite ends too.
            if not abs(axis.step) / max(1, abs(axis.first), abs(last)) >= 2**-46:
                raise UserError(
                    f"the pixels around {axis.first:g} are {abs(axis.step):.0e} sides apart, and float64 cannot "
                    "resolve them; choose a larger window or another transform"
                )
        return view

    @classmethod
    def transformed(cls, rows: Axis, cols: Axis, inverse: Tensor, sides: tuple[float, float]) -> "View":
        """Apply a matrix [3,3] to positions in units of the longer side; convert to fractions of (width, height)."""
        inverse = inverse / torch.tensor([[sides[0]], [sides[1]], [1]], dtype=torch.float64)
        if inverse[2, 2]:
            inverse = inverse / inverse[2, 2]
        (a, b, tx), (c, d, ty), (px, py, one) = inverse.tolist()
        if px == py == 0 and b == c == 0:
            return cls(rows.scaled(d, ty), cols.scaled(a, tx))
        if px == py == 0 and a == d == 0:
            return cls(rows.scaled(b, tx), cols.scaled(c, ty), transposed=True)

        def field(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            x, y = x - 0.5, y - 0.5
            depth = px * x + py * y + one
            return (a * x + b * y + tx) / depth + 0.5, (c * x + d * y + ty) / depth + 0.5

        return cls(rows, cols, field=field)

    @property
    def size(self) -> tuple[int, int]:
        return self.rows.count, self.cols.count

    def points(self, box: Box, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Return x and y, float64 [h,w] each, of the samples in `box`. Raises UserError unless finite and [h,w]."""
        rows, cols = self.rows.positions(box.y0, box.y1, device), self.cols.positions(box.x0, box.x1, device)
        y, x = torch.meshgrid(rows, cols, indexing="ij")
        if self.field is None:
            return (y, x) if self.transposed else (x, y)
        moved = [t.double() for t in self.field(x, y)]
        shapes = [list(t.shape) for t in moved]
        if shapes != [list(x.shape)] * 2:
            raise UserError(f"a field must return x and y of the shape it is given, {list(x.shape)}; got {shapes}")
        if not all(t.isfinite().all() for t in moved):
            raise UserError("the transform leads to positions that are not finite; keep all of them finite")
        return moved[0], moved[1]
