"""Scale consistency: is the picture at twice the size the same picture? (paper, table 2: 256² against 512²)"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Measure(NamedTuple):
    mean: float
    standard_error: float  # of the mean; nan for a single picture
    num: int


def measure(values: Tensor) -> Measure:
    """The mean of one value per picture, float64 [N]."""
    return Measure(values.mean().item(), (values.std() / math.sqrt(len(values))).item(), len(values))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """uint8-scaled [N,C,H,W] pairs (0..255) -> [N] in dB against a peak of 255; inf for equal pictures."""
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def scale_psnr(pairs: Iterable[tuple[Tensor, Tensor]]) -> Measure:
    """Pairs (uint8 [N,C,H,W], uint8 [N,C,2H,2W]) -> PSNR between the first and the second averaged over 2×2 pixels.

    Higher is more consistent. The average is rounded to uint8, as a saved picture would be.
    """
    values = [psnr(small, F.avg_pool2d(large.float(), 2).round()) for small, large in pairs]
    return measure(torch.cat(values))
