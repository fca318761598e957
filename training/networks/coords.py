"""Where the pixels of a picture lie in [0,1]. Another convention is another entry."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Coords(NamedTuple):
    positions: Callable[[int, torch.dtype], Tensor]  # of `count` pixels, [count]
    steps: Callable[[int], int]  # how many distances between neighbours fit into [0,1]


COORDS = {
    # With both ends, as released.
    "endpoints": Coords(
        lambda count, dtype=torch.float32: torch.linspace(0, 1, count, dtype=dtype),
        lambda count: max(count - 1, 1),
    ),
    # Pixel centres.
    "centers": Coords(
        lambda count, dtype=torch.float32: (torch.arange(count, dtype=dtype) + 0.5) / count,
        lambda count: count,
    ),
}
