"""Batches of images, the input of every metric. Sizes are (H, W)."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Size = tuple[int, int]


class Activations(NamedTuple):
    """What a detector returns for N images."""

    features: Tensor  # float [N,F]
    logits: Tensor | None = None  # float [N,K], of detectors that know K classes


class Batch:
    """Some images of a set, by their numbers in it; anything that several metrics ask for is computed once."""

    def __init__(self, numbers: Sequence[int], images: Tensor | None = None):
        """images: uint8 [N,C,H,W], unless a subclass renders them."""
        self.numbers = torch.tensor(numbers)
        self._images, self._computed = images, {}

    def once(self, key: object, compute: Callable[[], object]):
        """Return compute() of the first call with `key`."""
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]

    def images(self) -> Tensor:
        """Return uint8 [N,C,H,W], at the measured size."""
        return self._images

    def activations(self, detector: Callable[[Tensor], Activations]) -> Activations:
        return self.once(detector, lambda: detector(self.images()))


def segments(limits: Iterable[int]) -> list[range]:
    """Split the numbers below the largest limit at every limit."""
    return [range(*ends) for ends in itertools.pairwise(sorted({0, *limits}))]


def split(numbers: Sequence[int], batch: int) -> list[Sequence[int]]:
    return [numbers[i : i + batch] for i in range(0, len(numbers), batch)]


def cut(limits: Iterable[int], batch: int) -> list[range]:
    """Split the numbers below the largest limit into batches, none of which crosses a limit."""
    return [numbers for segment in segments(limits) for numbers in split(segment, batch)]
