"""Where the pixels of a picture lie: sizes, windows, transforms, tiles.

Positions are fractions of the picture that the network was trained on: x runs to the right and y down, [0,1] is that
picture, and numbers beyond continue it. They are float64: at zoom 100,000 neighbouring pixels of a 512² window differ
by 2e-8. Transforms are 3×3 matrices that move the picture, about its centre, in units of its longer side; their product
applies the right one first.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from training.networks.coords import COORDS

Field = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # output positions x, y -> the positions shown there


class Axis(NamedTuple):
    """Pixel i of `count` lies at first + i·step; it is sampled at `samples` places, evenly over its step."""

    first: float
    step: float
    count: int
    samples: int = 1

    def positions(self, start: int, stop: int) -> Tensor:
        """float64 [(stop − start)·samples], those of pixels start … stop − 1; the same in whichever part they are."""
        number = torch.arange(start * self.samples, stop * self.samples, dtype=torch.float64)
        return self.first + ((number + 0.5) / self.samples - 0.5) * self.step

    @property
    def fineness(self) -> float:
        """The step, relative to the largest position: float64 tells positions 2⁻⁵² apart."""
        last = self.first + (self.count - 1) * self.step
        return abs(self.step) / max(1, abs(self.first), abs(last))


class Box(NamedTuple):
    """Rows y0 … y1 − 1 and columns x0 … x1 − 1 of a picture, in pixels."""

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

    def split(self, side: int) -> Iterator["Box"]:
        """Squares of `side` pixels, row by row; smaller at the right and the lower edge."""
        for y in range(self.y0, self.y1, side):
            for x in range(self.x0, self.x1, side):
                yield Box(y, min(y + side, self.y1), x, min(x + side, self.x1))


@dataclass(frozen=True)
class View:
    """The position of every pixel of a picture: pixel (i, j) shows y = rows[i], x = cols[j], or field(x, y) if any.

    With `turned`, it shows x = rows[i], y = cols[j]: what a rotation by 90° needs.
    """

    rows: Axis
    cols: Axis
    turned: bool = False
    field: Field | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.rows.count, self.cols.count

    def points(self, box: Box) -> tuple[Tensor, Tensor]:
        """x and y, float64 [h,w] each, of the samples in `box`. Raises ValueError for other shapes or not finite."""
        y, x = torch.meshgrid(self.rows.positions(box.y0, box.y1), self.cols.positions(box.x0, box.x1), indexing="ij")
        if self.field is None:
            return (y, x) if self.turned else (x, y)
        moved = [t.double() for t in self.field(x, y)]
        shapes = [list(t.shape) for t in moved]
        if shapes != [list(x.shape)] * 2:
            raise ValueError(f"a field must return x and y of the shape it is given, {list(x.shape)}; got {shapes}")
        if not all(t.isfinite().all() for t in moved):
            raise ValueError("the transform leads to positions that are not finite; keep all of them finite")
        return moved[0], moved[1]


def view(
    coords: str,
    size: tuple[int, int],
    *,
    trained: tuple[int, int] = (1, 1),
    window: tuple[float, float, float, float] | None = None,
    fit: str = "crop",
    transform: Tensor | Field | None = None,
    supersample: int = 1,
) -> View:
    """The View of a picture of `size` = (height, width) pixels.

    `coords`: a key of COORDS. `trained`: (height, width) that [0,1]² has in training; its shape counts, not its size.
    `window` = (x0, y0, x1, y1), by default the whole picture (0, 0, 1, 1).
    `fit`, where the window has another shape than `size`: "crop" shows the largest part of it, "extend" the whole of it
    and more, "stretch" all of it with oblong pixels.
    `transform`: a matrix [3,3] that moves the picture, or a Field. `supersample` = K takes K² samples of each pixel.
    Raises ValueError with a sentence.
    """
    height, width = size
    if min(size) < 1:
        raise ValueError(f"a picture of {width}x{height} has no pixels; give a size of at least 1x1")
    if fit not in FITS:
        raise ValueError(f"fit={fit!r} is unknown; use one of {', '.join(FITS)}")
    if supersample < 1:
        raise ValueError(f"supersample={supersample} makes no samples; use 1 or more")
    x0, y0, x1, y1 = map(float, window or (0, 0, 1, 1))
    if not (all(map(math.isfinite, (x0, y0, x1, y1))) and x0 < x1 and y0 < y1):
        raise ValueError(
            f"window={x0:g},{y0:g},{x1:g},{y1:g} is empty; give left, top, right, bottom with left < right"
        )
    # In units of the longer side, about the centre of the picture, pixels are square.
    count = COORDS[coords].steps
    tall, wide = (count(side) / max(map(count, trained)) for side in trained)
    steps = FITS[fit]((y1 - y0) * tall / count(height), (x1 - x0) * wide / count(width))
    centres = resized((y0 + y1) / 2, tall), resized((x0 + x1) / 2, wide)
    rows, cols = (
        Axis(centre - (pixels - 1) / 2 * step, step, pixels, supersample)
        for centre, pixels, step in zip(centres, size, steps, strict=True)
    )
    shown = View(rows, cols)
    if isinstance(transform, Tensor):
        shown = transformed(shown, transform)
    elif transform is not None:
        shown = replace(shown, field=transform)
    if tall != wide:
        shown = in_fractions(shown, tall, wide)
    for axis in (shown.rows, shown.cols):
        if not axis.fineness >= 2**-46:  # nor is it where an end is infinite
            raise ValueError(
                f"the pixels around {axis.first:g} are {abs(axis.step):.0e} sides apart, and float64 cannot tell them; "
                "choose a larger window or another transform"
            )
    return shown


def resized(t, side: float):
    """`t` (numbers or tensors) about ½, times `side`: from fractions of a side to units of the longer one."""
    return t if side == 1 else (t - 0.5) * side + 0.5


def in_fractions(shown: View, height: float, width: float) -> View:
    """`shown`, whose positions are in units of the longer side, in fractions of a picture of `height` and `width`."""
    if field := shown.field:

        def fractions(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            x, y = field(x, y)
            return resized(x, 1 / width), resized(y, 1 / height)

        return replace(shown, field=fractions)
    sides = (width, height) if shown.turned else (height, width)
    rows, cols = (
        axis._replace(first=resized(axis.first, 1 / side), step=axis.step / side)
        for axis, side in zip((shown.rows, shown.cols), sides, strict=True)
    )
    return replace(shown, rows=rows, cols=cols)


# (row step, column step) that would stretch the window over the picture -> the steps used.
FITS = {
    "crop": lambda row, col: (min(row, col),) * 2,
    "extend": lambda row, col: (max(row, col),) * 2,
    "stretch": lambda row, col: (row, col),
}


def transformed(plain: View, matrix: Tensor) -> View:
    """`plain` with the picture moved by `matrix` [3,3]. Raises ValueError when it has no inverse."""
    matrix = matrix.double()
    if matrix.shape != (3, 3) or not matrix.isfinite().all() or matrix.det() == 0:
        raise ValueError(f"a transform is an invertible matrix [3,3]; got {matrix.tolist()}")
    inverse = torch.linalg.inv(matrix)
    (a, b, tx), (c, d, ty), (px, py, one) = (inverse / inverse[2, 2]).tolist() if inverse[2, 2] else inverse.tolist()

    def moved(axis: Axis, factor: float, shift: float) -> Axis:
        return axis._replace(first=(axis.first - 0.5) * factor + shift + 0.5, step=axis.step * factor)

    if px == py == 0 and b == c == 0:
        return View(moved(plain.rows, d, ty), moved(plain.cols, a, tx))
    if px == py == 0 and a == d == 0:
        return View(moved(plain.rows, b, tx), moved(plain.cols, c, ty), turned=True)

    def field(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = x - 0.5, y - 0.5
        depth = px * x + py * y + one
        return (a * x + b * y + tx) / depth + 0.5, (c * x + d * y + ty) / depth + 0.5

    return replace(plain, field=field)


def translation(x: float, y: float) -> Tensor:
    """Moves the picture to the right by x and down by y, in units of its longer side."""
    return torch.tensor([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=torch.float64)


def rotation(degrees: float) -> Tensor:
    """Turns the picture counter-clockwise."""
    quarters, rest = divmod(degrees, 90)
    # Quarter turns are exact, so that they stay a matter of rows and columns.
    cos, sin = math.cos(math.radians(rest)), math.sin(math.radians(rest))
    for _ in range(int(quarters) % 4):
        cos, sin = -sin, cos
    return torch.tensor([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], dtype=torch.float64)


def zoom(x: float, y: float | None = None) -> Tensor:
    """Magnifies the picture, by x across and by y (default x) down; negative numbers flip it."""
    return torch.tensor([[x, 0, 0], [0, x if y is None else y, 0], [0, 0, 1]], dtype=torch.float64)


def shear(x: float, y: float = 0.0) -> Tensor:
    """Slants the picture: a line one side lower moves x to the right, one that is one side further right y down."""
    return torch.tensor([[1, x, 0], [y, 1, 0], [0, 0, 1]], dtype=torch.float64)


def perspective(x: float, y: float) -> Tensor:
    """Tilts the picture: at one side to the right of the centre it is 1 + x times as far away, and likewise below."""
    return torch.tensor([[1, 0, 0], [0, 1, 0], [x, y, 1]], dtype=torch.float64)


def lens(strength: float) -> Field:
    """A radial distortion about the centre: radius r shows r·(1 + strength·r²); positive bulges like a barrel."""

    def field(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = x - 0.5, y - 0.5
        factor = 1 + strength * (x.square() + y.square())
        return x * factor + 0.5, y * factor + 0.5

    return field
