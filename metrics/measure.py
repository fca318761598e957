"""What a metric returns."""

import math
from typing import NamedTuple

from torch import Tensor


class Measure(NamedTuple):
    mean: float
    standard_error: float  # of the mean; nan for a single picture
    num: int
    values: Tensor | None = None  # float64 [N], on the CPU: one per picture
    filter: str | None = None  # what brought the larger pictures down, if any were


def measure(values: Tensor, filter: str | None = None) -> Measure:
    """The mean of one value per picture, [N], and its standard error: their standard deviation over √N."""
    values = values.double().cpu()
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Measure(values.mean().item(), error, len(values), values, filter)
