"""Define the inputs of a metric (Inputs), the statistics that it needs (Need), and what it computes from them (Task).

Legend: N images, F numbers per image. Sizes are (H, W).
"""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from metrics.estimate import Estimate
from metrics.generated import Generated
from metrics.images import Batch, Size
from metrics.moments import Moments, Table
from metrics.reals import Files, Fitted, Given, Windowed


class Settings(NamedTuple):
    scales: tuple[Size, ...] = ()  # of scale_*: the first is compared with each other one; () is (R, 2R)
    filter: str | None = None  # None: box for scale_*, lanczos for real images
    seed: int = 0
    batch: int | None = None  # images at once, None: 32 on a GPU, else 8; it changes results only by rounding


@dataclass(frozen=True)
class Inputs:
    images: Generated | Given  # measured
    reals: Files | None  # to compare with
    large: Files | None  # real images of all sizes, for pfid
    tools: dict[Callable, object]  # the networks that look at images, by the functions that load them
    settings: Settings
    device: torch.device

    @functools.cached_property
    def fitted(self) -> Fitted:
        """Return the real images at the measured size."""
        return Fitted(self.reals, self.images.size, self.settings.filter or "lanczos", self.device)


@dataclass(frozen=True)
class Need:
    """Statistics of the first `limit` images of a set; equal needs are computed once.

    key     identifies what is measured: for real images, JSON values, among them the digest of the detector
    kind    a key of EMPTY; for real images "moments" or "features", which are kept on disk
    look    batch -> [N,width]
    images  real images, or None: the measured images
    """

    key: Hashable
    kind: str
    limit: int
    width: int
    look: Callable[[Batch], Tensor] = field(compare=False)
    images: Fitted | Windowed | None = None


# kind -> function(limit, width, device) -> statistics of no image yet
EMPTY = {
    "moments": lambda limit, width, device: Moments(width, device),
    "features": lambda limit, width, device: Table(limit, width),
    "values": lambda limit, width, device: Table(limit, width, torch.float64),
}


class Task(NamedTuple):
    """One line of results.

    name     of the metric
    compute  statistics for `need`, and for `real` if any -> an estimate, or several by the endings of their names
    variant  deviations from the defaults, for the name: the size, the truncation, the detector's weights, …
    facts    other details for the reader, as JSON values
    """

    name: str
    need: Need
    real: Need | None
    compute: Callable[..., Estimate | dict[str, Estimate]]
    variant: tuple[str, ...]
    facts: dict

    def named(self, ending: str = "") -> str:
        """Return "fid50k_full", or with all deviations "fid50k_full@512x512@inception-custom-1a2b3c4d"."""
        return "@".join((self.name + ending, *self.variant))
