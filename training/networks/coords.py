"""Conventions of where the pixels of an image are in [0,1].

To add a convention, add an entry to COORDS. Its positions must be evenly spaced and symmetric about ½, as View.of
assumes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
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
