"""The value of a metric and its standard error."""

import math
from typing import NamedTuple

from torch import Tensor


class Estimate(NamedTuple):
    value: float
    standard_error: float = math.nan  # nan if there is none
    values: Tensor | None = None  # float64 [N] on the CPU, one per image, where a record lists them


def mean(values: Tensor) -> Estimate:
    """Return the mean of [N] independent values; its standard error is their standard deviation over √N."""
    values = values.double().cpu()
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), error)
