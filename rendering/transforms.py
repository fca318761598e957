"""Transforms of images: matrices and fields of positions.

A matrix [3,3], float64, gives where content goes: x runs to the right, y down, angles counter-clockwise on the screen,
all about the image's centre and in units of its longer side. `a @ b` applies b first. A field gives where content comes
from.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# x, y float64 [h,w] of output positions, on the device that renders -> the positions shown there. The centre is (½, ½),
# in units of the longer side.
Field = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def translation(x: float, y: float) -> Tensor:
    """Move by x to the right and y down."""
    return torch.tensor([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=torch.float64)


def rotation(degrees: float) -> Tensor:
    """Rotate counter-clockwise. Quarter turns are exact, so rows stay rows or become columns."""
    quarters, rest = divmod(degrees, 90)
    cos, sin = math.cos(math.radians(rest)), math.sin(math.radians(rest))
    for _ in range(int(quarters) % 4):
        cos, sin = -sin, cos
    return torch.tensor([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], dtype=torch.float64)


def zoom(x: float, y: float | None = None) -> Tensor:
    """Magnify by x across and y (default x) down; negative factors flip."""
    return torch.tensor([[x, 0, 0], [0, x if y is None else y, 0], [0, 0, 1]], dtype=torch.float64)


def shear(x: float, y: float = 0.0) -> Tensor:
    """Shear: move content x to the right per side below the centre, and y down per side right of the centre."""
    return torch.tensor([[1, x, 0], [y, 1, 0], [0, 0, 1]], dtype=torch.float64)


def perspective(x: float, y: float) -> Tensor:
    """Tilt: one side to the right of the centre, distance grows by the factor 1 + x; one side below, by 1 + y."""
    return torch.tensor([[1, 0, 0], [0, 1, 0], [x, y, 1]], dtype=torch.float64)


def lens(strength: float) -> Field:
    """Distort radially about the centre: radius r shows r·(1 + strength·r²); positive strengths make barrels."""

    def field(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = x - 0.5, y - 0.5
        factor = 1 + strength * (x.square() + y.square())
        return x * factor + 0.5, y * factor + 0.5

    return field
