"""What metrics look at: batches of the pictures measured, and of photographs brought to their size.

The commands bring the pictures; the protocols below say what is asked of them. Sizes are (H, W).

Legend: N pictures, C channels, H×W pixels.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from metrics.scale import resize
from torch_utils.randomness import make_rng

TOGETHER = 64  # windows of one photograph
Size = tuple[int, int]
Numbers = Sequence[int]


class Activations(NamedTuple):
    """What a detector sees in N pictures."""

    features: Tensor  # float [N,F]
    logits: Tensor | None = None  # float [N,K], of detectors that know K classes


class Batch:
    """Some pictures of a set; whatever several metrics ask for is made once."""

    def __init__(self, numbers: Numbers, size: Size, pictures: Tensor | None = None):
        """`pictures`: uint8 [N,C,H,W] of that size, unless a subclass paints them."""
        self.numbers, self.size = torch.tensor(numbers), size
        self._made = {} if pictures is None else {("pictures", size): pictures}

    def once(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def pictures(self, size: Size | None = None) -> Tensor:
        """uint8 [N,C,H,W], by default of the size measured."""
        return self._made["pictures", size or self.size]

    def activations(self, detector: Callable[[Tensor], Activations]) -> Activations:
        return self.once(detector, lambda: detector(self.pictures()))


class Drawing(Batch):
    """What a generator paints: `pictures` may have any size, and there is more to ask for. The commands fill it in."""

    def moved(self, index: int, matrix: Tensor | None) -> Tensor:
        """float [1,C,H,W] about [-1,1] of the size measured: picture `index` of the batch, as it is, or moved by a
        matrix float64 [3,3], in pixels about its centre.
        """

    def windows(self, boxes: list[tuple[float, float, float, float]]) -> Tensor:
        """uint8 [N,C,H,W] of the size trained at: of each picture the window (x0, y0, x1, y1), in its sides."""

    def path_lengths(self, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """float64 [N], see metrics/path_length.py."""


class Fakes(Protocol):
    """The pictures measured. Picture number i is the same in every batch, process and call."""

    size: Size  # measured at
    native: Size  # trained at
    channels: int
    variant: tuple[str, ...]  # what is not usual about them, for the names of results
    points: str  # of rotated ones: "exact", or "interpolated" between samples of lines

    def batches(self, lists: Sequence[Numbers]) -> Iterator[Batch]: ...


class Files(Protocol):
    """Photographs, by number."""

    num: int
    size: Size | None  # None: each its own
    facts: dict  # what else decides their pixels, besides the files

    def digest(self) -> str:
        """The metrics.cache.content_digest of the files."""

    def batches(self, lists: Sequence[Numbers]) -> Iterator[list[Tensor]]:
        """For each list, uint8 [C,H,W] of each number in it."""


def cut(limits: Iterable[int], batch: int) -> list[range]:
    """The numbers below the largest limit in batches, none of which lies on both sides of a limit."""
    edges = sorted({0, *limits})
    return [
        range(start, min(start + batch, end))
        for begin, end in itertools.pairwise(edges)
        for start in range(begin, end, batch)
    ]


# --- photographs -----------------------------------------------------------------------------------------------------


def fitted(pictures: Tensor, size: Size, filter: str) -> Tensor:
    """uint8 [N,C,H',W'] -> uint8 [N,C,H,W]: the largest part of that shape about the centre, resized."""
    height, width = pictures.shape[-2:]
    if (height, width) == size:
        return pictures
    scale = min(height / size[0], width / size[1])
    rows, cols = (max(1, round(length * scale)) for length in size)
    top, left = (height - rows) // 2, (width - cols) // 2
    return resize(pictures[..., top : top + rows, left : left + cols], size, filter)


class Whole:
    """Photographs as they are, in random order, brought to one size."""

    def __init__(self, files: Files, size: Size, filter: str, device: torch.device):
        self.files, self.size, self.filter, self.device = files, size, filter, device
        self.order = np.random.RandomState(0).permutation(files.num)  # the first ones are a fair sample of all

    def facts(self, limit: int) -> dict:
        return {**self.files.facts, "size": self.size, "filter": self.filter, "limit": limit}

    def lists(self, limits: Iterable[int], batch: int) -> list[range]:
        return cut(limits, batch)

    def batches(self, lists: Sequence[Numbers]) -> Iterator[Batch]:
        read = self.files.batches([self.order[list(numbers)].tolist() for numbers in lists])
        for numbers, pictures in zip(lists, read, strict=True):
            yield Batch(numbers, self.size, fitted(torch.stack(pictures).to(self.device), self.size, self.filter))


@dataclass(frozen=True)
class Windows:
    """Random windows of squares about the centres of photographs, window i of photograph i mod their number.

    A square is taken for a picture of at least `large` pixels per side. A window is 1/zoom of it, with zooms from 1 to
    large / size, evenly in their logarithms, and is brought down to size × size.
    """

    size: int
    large: int
    filter: str
    seed: int

    def box(self, kind: str, number: int) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in sides of the square. It depends on (seed, kind, number) alone."""
        zoom, x, y = torch.rand(3, dtype=torch.float64, generator=make_rng(self.seed, number, f"{kind} window"))
        part = (self.large / self.size) ** -zoom.item()
        x0, y0 = x.item() * (1 - part), y.item() * (1 - part)
        return x0, y0, x0 + part, y0 + part

    def of_photograph(self, photograph: Tensor, number: int) -> Tensor:
        """uint8 [C,H,W] -> uint8 [C,size,size], in whole pixels of the photograph."""
        length = min(photograph.shape[-2:])
        top, left = ((have - length) // 2 for have in photograph.shape[-2:])
        x0, y0, x1, _ = self.box("real", number)
        part = max(self.size, round((x1 - x0) * length))
        y, x = (min(round(v * length), length - part) for v in (y0, x0))
        window = photograph[None, :, top + y : top + y + part, left + x : left + x + part]
        return resize(window, (self.size, self.size), self.filter)[0]


class Windowed:
    """`limit` Windows of photographs as pictures to measure."""

    def __init__(self, files: Files, windows: Windows, limit: int, device: torch.device):
        self.files, self.windows, self.limit, self.device = files, windows, limit, device
        self.order = np.random.RandomState(0).permutation(files.num)

    def facts(self, limit: int) -> dict:
        return {**self.files.facts, "windows": vars(self.windows), "limit": limit}

    def lists(self, limits: Iterable[int], batch: int) -> list[range]:
        """Up to `TOGETHER` windows of a photograph together, so that it is decoded once for them."""
        step = self.files.num
        wanted = [range(first, self.limit, step) for first in range(min(step, self.limit))]
        return [part[i : i + TOGETHER] for part in wanted for i in range(0, len(part), TOGETHER)]

    def batches(self, lists: Sequence[Numbers]) -> Iterator[Batch]:
        read = self.files.batches([[int(self.order[numbers[0]])] for numbers in lists])
        size = (self.windows.size, self.windows.size)
        for numbers, (photograph,) in zip(lists, read, strict=True):
            photograph = photograph.to(self.device)
            yield Batch(numbers, size, torch.stack([self.windows.of_photograph(photograph, i) for i in numbers]))
