"""Conventions of where the pixels of an image are in [0,1].

To add a convention, add an entry to COORDS. Its positions must be evenly spaced and symmetric about ½, as View.of
and interpolate assume.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Coords(NamedTuple):
    description: str  # in the help of commands
    positions: Callable[[int, torch.dtype], Tensor]  # count, dtype -> [count]
    steps: Callable[[int], int]  # count -> how many distances between neighbours fit into [0,1]


COORDS = {
    "endpoints": Coords(
        "0 … 1 with both ends, as released",
        lambda count, dtype=torch.float32: torch.linspace(0, 1, count, dtype=dtype),
        lambda count: max(count - 1, 1),
    ),
    "centers": Coords(
        "pixel centres (i + ½) / R",
        lambda count, dtype=torch.float32: (torch.arange(count, dtype=dtype) + 0.5) / count,
        lambda count: count,
    ),
}


def interpolate(grid: Tensor, rows: Tensor, cols: Tensor, coords: str) -> Tensor:
    """grid [S,T,C], rows [H] or [N,H], cols [W] or [N,W] -> [H,W,C] or [N,H,W,C]: bilinear, constant beyond the grid.

    The cells of the grid are the pixels of an image of S×T, where the convention `coords` has them.
    """

    def neighbours(t: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the cell before each position, and how far the position is on the way to the next cell."""
        u = ((t - 0.5) * COORDS[coords].steps(count) + (count - 1) / 2).clamp(0, count - 1)
        low = u.floor().clamp(max=count - 2)
        return low.long(), (u - low).to(grid.dtype)[..., None]

    row, down = neighbours(rows[..., :, None], grid.shape[0])
    col, right = neighbours(cols[..., None, :], grid.shape[1])
    cell, cells = row * grid.shape[1] + col, grid.flatten(0, 1)
    above, below = (F.embedding(i, cells).lerp(F.embedding(i + 1, cells), right) for i in (cell, cell + grid.shape[1]))
    return above.lerp(below, down)
