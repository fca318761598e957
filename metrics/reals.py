"""Read real images by number: as files, and as batches at the measured size. Sizes are (H, W)."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dnnlib.console import UserError, progress
from metrics.cache import content_digest
from metrics.images import Batch, Size, cut, segments, split
from metrics.resize import fit, resize
from torch_utils.randomness import make_rng
from torch_utils.reading import cores, read_ahead

READERS = 3  # processes that read ahead
MIN_IMAGES_FOR_READERS = 1000  # below this, starting readers costs more than it saves

T = TypeVar("T")


# --- files -----------------------------------------------------------------------------------------------------------


class Files:
    """Images in files: subclasses define read(index) -> uint8 [C,H,W] and contents(), the bytes of each file.

    num       number of images
    size      of all images, or None: each has its own
    channels  of all images
    facts     everything else that affects their pixels
    """

    @functools.cached_property
    def digest(self) -> str:
        """Return the metrics.cache.content_digest of the files."""
        return content_digest(progress(self.contents(), desc="digest of the real images"))


def read_lists(read: Callable[[list[int]], T], lists: Sequence[Sequence[int]]) -> Iterator[T]:
    """Yield read(numbers) for each of `lists`; several processes read ahead if that is worth it."""
    workers = min(READERS, cores()) if sum(map(len, lists)) >= MIN_IMAGES_FOR_READERS else 0
    return read_ahead(read, lists, workers)


class EqualFiles(Files):
    """Images of one size."""

    def __init__(self, images, mirror: bool = False):
        """images: a training.data.ImageArchive. mirror: whether it includes every image mirrored as well."""
        self.images, self.num = images, len(images)
        self.channels, *size = images.shape
        self.size = tuple(size)
        self.facts = {"mirror": mirror, "channels": self.channels, **images.facts()}

    def read(self, index: int) -> Tensor:
        return self.images[index][0]

    def contents(self) -> Iterator[bytes]:
        return self.images.contents()


class LargeFiles(Files):
    """The images of at least `side` pixels per side; each has its own size."""

    size = None

    def __init__(self, files, channels: int, side: int):
        """files: a training.data.ImageFiles. Raises UserError if all images are smaller."""
        self.files, self.channels, self.facts = files, channels, {"channels": channels, **files.facts()}
        names = files.names()
        self.names = [name for name, size in zip(names, files.sizes(), strict=True) if min(size) >= side]
        if not self.names:
            raise UserError(
                f"no image of {files.path} has {side} pixels per side; give larger ones, or choose a smaller size"
            )
        self.num, self.left_out = len(self.names), len(names) - len(self.names)

    def read(self, index: int) -> Tensor:
        image = self.files.image(self.names[index], self.channels)
        return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).movedim(2, 0)

    def contents(self) -> Iterator[bytes]:
        return self.files.contents(self.names)


# --- batches ---------------------------------------------------------------------------------------------------------


class Fitted:
    """Images of files in random order, cropped about their centres and resized to one size."""

    def __init__(self, files: Files, size: Size, filter: str, device: torch.device):
        self.files, self.size, self.filter, self.device = files, size, filter, device
        self.order = np.random.RandomState(0).permutation(files.num)  # the first images are a fair sample of all

    def facts(self, limit: int) -> dict:
        """Return everything that affects the first `limit` images, besides the files."""
        return {**self.files.facts, "size": self.size, "filter": self.filter, "limit": limit}

    cut = staticmethod(cut)

    def batches(self, lists: Sequence[Sequence[int]]) -> Iterator[Batch]:
        for numbers, images in zip(lists, read_lists(self.read, lists), strict=True):
            yield Batch(numbers, fit(images.to(self.device), self.size, self.filter))

    def read(self, numbers: Sequence[int]) -> Tensor:
        """Return uint8 [N,C,H,W], of the files' size."""
        return torch.stack([self.files.read(int(self.order[number])) for number in numbers])


class Given(Fitted):
    """Images of files, used instead of generated images."""

    variant = ()

    def __init__(self, files: EqualFiles, device: torch.device):
        super().__init__(files, files.size, "lanczos", device)  # of this size already: the filter is not used
        self.native, self.channels = files.size, files.channels


class Windows(NamedTuple):
    """Random windows of the central squares of images, window i from image i mod the number of images.

    The squares have at least `large` pixels per side. A window is 1/zoom of its square, resized to size × size. The
    zooms are log-uniform from 1 to large / size, or all equal to `zoom`.
    """

    size: int
    large: int
    filter: str
    seed: int
    zoom: float | None = None

    def box(self, kind: str, number: int) -> tuple[float, float, float, float]:
        """Return x0, y0, x1, y1 in sides of the square, a function of (seed, kind, number) alone."""
        zoom, x, y = torch.rand(3, dtype=torch.float64, generator=make_rng(self.seed, number, f"{kind} window"))
        part = 1 / self.zoom if self.zoom else (self.large / self.size) ** -zoom.item()
        x0, y0 = x.item() * (1 - part), y.item() * (1 - part)
        return x0, y0, x0 + part, y0 + part

    def crop(self, image: Tensor, number: int) -> Tensor:
        """Crop uint8 [C,H,W] to a window, in whole pixels, and resize it to [C,size,size]."""
        length = min(image.shape[-2:])
        top, left = ((have - length) // 2 for have in image.shape[-2:])
        x0, y0, x1, _ = self.box("real", number)
        part = max(self.size, round((x1 - x0) * length))
        y, x = (min(round(v * length), length - part) for v in (y0, x0))
        window = image[None, :, top + y : top + y + part, left + x : left + x + part]
        return resize(window, (self.size, self.size), self.filter)[0]


@dataclass(frozen=True)
class Windowed:
    """Windows of files, of several `kinds`: all those of an image are cut from one decoding. Compared by value."""

    files: Files
    kinds: tuple[Windows, ...]  # of one size
    device: torch.device

    @functools.cached_property
    def order(self) -> np.ndarray:
        return np.random.RandomState(0).permutation(self.files.num)

    def facts(self, limit: int) -> dict:
        """Return everything that affects the first `limit` windows, besides the files and the kind."""
        return {**self.files.facts, "limit": limit}

    def cut(self, limits: Iterable[int], batch: int) -> list[list[int]]:
        """Split as metrics.images.cut, with the windows of an image one after another."""
        ordered = (sorted(segment, key=self.image_of) for segment in segments(limits))
        return [numbers for segment in ordered for numbers in split(segment, batch)]

    def batches(self, lists: Sequence[Sequence[int]]) -> Iterator["WindowBatch"]:
        for numbers, crops in zip(lists, read_lists(self.read, lists), strict=True):
            yield WindowBatch(numbers, dict(zip(self.kinds, crops.to(self.device), strict=True)))

    def image_of(self, number: int) -> int:
        return int(self.order[number % self.files.num])

    def read(self, numbers: list[int]) -> Tensor:
        """Return uint8 [kinds,N,C,size,size]."""
        crops = []
        for index, same in itertools.groupby(numbers, self.image_of):
            image = self.files.read(index)
            crops += [torch.stack([kind.crop(image, number) for kind in self.kinds]) for number in same]
        return torch.stack(crops, dim=1)


class WindowBatch(Batch):
    """Windows of some numbers: uint8 [N,C,size,size] of each kind."""

    def __init__(self, numbers: Sequence[int], crops: dict[Windows, Tensor]):
        super().__init__(numbers)
        self._crops = crops

    def windows(self, kind: Windows) -> Tensor:
        return self._crops[kind]
