"""Read training images: an archive of equal-size images, and an endless stream of batches from any image on.

An archive is a folder or a ZIP of equal-size images in StyleGAN's format, which dataset_tool.py writes. Labels, if any,
are in its `dataset.json` as {"labels": [["00000/img00000000.png", 3], ...]}: class numbers, or vectors of one length.

The order of the images is a function of (seed, position): a run that resumes after n images needs only n.
"""

import functools
import hashlib
import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dnnlib.console import UserError
from torch_utils.reading import read_ahead
from training.colours import MODES
from training.scales import ScalesConfig, sample_window
from training.sources import ImageFiles, size_text


class ImageArchive:
    """The images of a folder or ZIP as tensors. All have one size, which may be rectangular; formats may mix.

    shape       (channels, height, width)
    label_dim   length of a label: classes for class numbers, L for vectors, 0 when labels are not used
    has_labels  whether the archive holds labels, used or not
    class_names of the numbers in a label; [] if they have none
    name        of the folder, or of the ZIP without its ending

    use_labels  read them; class numbers become one-hot vectors of length (largest number of the archive) + 1
    mirror      each image counts twice: index i and, flipped left to right, i + len/2
    channels    1, 3 or 4: images are converted to it by to_channels (grey is repeated into RGB, and so on); by default
                the fewest that hold all images (ImageFiles.common_channels)
    """

    def __init__(
        self, path: str | os.PathLike, *, use_labels: bool = False, mirror: bool = False, channels: int | None = None
    ):
        if channels not in (None, *MODES):
            raise UserError(f"channels={channels}, but images have 1 (grey), 3 (RGB) or 4 (RGBA) channels")
        self._files = files = ImageFiles(path)
        self._mirror = mirror
        channels = channels or files.common_channels()
        self.shape = (channels, *self._side(channels))
        self.name = files.name
        table = files.labels()
        self.has_labels = table is not None
        self.label_dim, self.class_names = 0, []
        if use_labels:
            if table is None:
                raise UserError(f"{path} holds no labels; make it with labels (dataset_tool.py), or train without them")
            self._labels = table.match(files.names())
            self.label_dim, self.class_names = self._labels.dim, self._labels.names[: self._labels.dim]

    def __len__(self) -> int:
        return len(self._files) * (2 if self._mirror else 1)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image number `index`, uint8 [C,H,W] in 0..255, and its label, float32 [label_dim].

        Raises IndexError outside 0..len-1, and UserError, naming the file, when it is unreadable or of another size.
        """
        number, mirrored = self._locate(index)
        name = self._files.filename(number)
        channels, height, width = self.shape
        image = self._files.image(name, channels)
        if image.size != (width, height):
            raise UserError(
                f"{self._files.path / name} is {image.width}x{image.height}, but the first image is {width}x{height}; "
                "bring all images to one size with dataset_tool.py"
            )
        return self._pixels(image, mirrored), self.label(index)

    def label(self, index: int) -> torch.Tensor:
        """Return the label of image number `index`, float32 [label_dim], without reading the image."""
        if not self.label_dim:
            return torch.zeros(0)
        return torch.from_numpy(self._labels.vector(self._locate(index)[0]))

    def _side(self, channels: int) -> tuple[int, int]:
        """Return height and width of the training images: those of the first file."""
        if self._files.native_sizes is not None:
            raise UserError(
                f"{self._files.path} keeps images at sizes of their own; set data.resolution to the training size, or "
                "bring all images to one size with dataset_tool.py"
            )
        if not self._files.written:
            sizes = self._files.sizes()
            others = np.flatnonzero((sizes != sizes[0]).any(axis=1))
            if len(others):
                name = self._files.filename(others[0])
                raise UserError(
                    f"{self._files.path / name} is {size_text(sizes[others[0]])}, but the first image is "
                    f"{size_text(sizes[0])} ({len(others):,} of {len(sizes):,} images differ); bring all images to one "
                    "size with dataset_tool.py: --resolution 256x256 --transform center-crop, say"
                )
        first = self._files.image(self._files.filename(0), channels)
        return first.height, first.width

    def _locate(self, index: int) -> tuple[int, bool]:
        """Return the number of the file of an image, and whether it is mirrored. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        mirrored, number = divmod(index, len(self._files))
        return number, bool(mirrored)

    def _pixels(self, image: Image.Image, mirrored: bool) -> torch.Tensor:
        """Return an image as uint8 [C,H,W]."""
        pixels = np.asarray(image).reshape(image.height, image.width, self.shape[0])
        pixels = pixels[:, ::-1] if mirrored else pixels
        return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))

    def notes(self) -> list[str]:
        """Return lines on what reading leaves out or changes, as far as it is known."""
        return self._files.notes(self.shape[0])

    def facts(self) -> dict:
        """Return what affects the pixels, besides the files, the channels and mirroring."""
        return self._files.facts()

    def summary(self) -> str:
        """Return the number of images, and a digest of their names, and of the bytes and labels of 64 of them."""
        digest = hashlib.sha256()
        names = self._files.names()
        for name in names:
            digest.update(os.fsencode(name) + b"\0")
        sample = range(0, len(names), -(-len(names) // 64))
        for index, data in zip(sample, self._files.contents(names[i] for i in sample), strict=True):
            digest.update(data + self.label(index).numpy().tobytes())
        return f"{len(names)} images, {digest.hexdigest()[:16]}"

    def contents(self) -> Iterator[bytes]:
        """Yield the bytes of the files, in their order."""
        return self._files.contents(self._files.names())


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of 0..count-1 that depends on (seed, epoch) alone; int64 [count], read-only.

    It sorts raw Philox output, whose bits NumPy keeps across versions, unlike those of its own shuffle.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    order = np.argsort(keys, kind="stable")
    order.setflags(write=False)
    return order


def index_at(position: int, count: int, seed: int) -> int:
    """Return which of `count` images is at `position` of the endless stream; an epoch of `count` shows each once.

    O(count) when `position` enters an epoch, O(1) within it.
    """
    epoch, place = divmod(position, count)
    return int(epoch_order(count, seed, epoch)[place])


class Batch(NamedTuple):
    """Images uint8 [N,C,H,W], labels float32 [N,label_dim], and the windows that the images show, float64 [N,3].

    windows: see training.scales; None: whole images.
    """

    images: torch.Tensor
    labels: torch.Tensor
    windows: torch.Tensor | None = None


def batches(
    images: ImageArchive,
    *,
    batch: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    workers: int = 2,
    scales: ScalesConfig | None = None,
) -> Iterator[Batch]:
    """Yield the shards of this rank without end, batch/world images each.

    Batch s of all ranks together holds the positions start + s·batch ... start + (s+1)·batch - 1 of the order that
    `seed` gives; a rank reads every world-th of them, from the rank-th on. `start` is the number of images already
    seen. With `scales`, the images are windows of a NativeArchive, functions of (seed, position). `workers` processes
    read ahead (0: this one reads); the stream does not depend on their number.
    Raises UserError for impossible numbers at once, and for an unreadable image when its turn comes.
    """
    if batch < 1 or world < 1 or batch % world:
        raise UserError(f"batch={batch} does not divide over {world} processes; try {max(batch // world, 1) * world}")
    if not 0 <= rank < world or start < 0 or workers < 0:
        raise UserError(f"{rank=} must be below {world=}, and {start=} and {workers=} not negative")
    shards = (
        [(index_at(position, len(images), seed), position) for position in range(first + rank, first + batch, world)]
        for first in itertools.count(start, batch)
    )
    return read_ahead(functools.partial(_read, images, seed, scales), shards, workers)


def _read(images: ImageArchive, seed: int, scales: ScalesConfig | None, places: list[tuple[int, int]]) -> Batch:
    """Read the images of `places`: (index, position in the stream) each."""
    if scales is None:
        pixels, labels = zip(*(images[index] for index, _ in places), strict=True)
        return Batch(torch.stack(pixels), torch.stack(labels))
    windows = [sample_window(scales, images.largest(index), seed, position) for index, position in places]
    shape = scales.larger_shape(images.shape[1:])
    pixels = [images.window(index, *window, shape) for (index, _), window in zip(places, windows, strict=True)]
    labels = [images.label(index) for index, _ in places]
    return Batch(torch.stack(pixels), torch.stack(labels), torch.tensor(windows, dtype=torch.float64))
