"""What is measured and what it is compared with: a generator, an archive, photographs of any size.

They are what metrics/pictures.py asks for.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

import rendering
from dnnlib.console import UserError, progress
from metrics.cache import content_digest
from metrics.path_length import path_lengths
from metrics.pictures import Batch, Drawing, Size
from torch_utils.images import to_uint8
from torch_utils.randomness import make_rng
from torch_utils.reading import cores, read_ahead
from training.data import ImageArchive, ImageFiles
from training.networks import COORDS, Generator

READERS = 3  # processes that read ahead
WORTH = 1000  # pictures from which on they are worth their start
EXACT = 64 * 64  # pixels up to which rotated pictures are computed exactly, at some hundred times the cost


class Generated:
    """The pictures of a generator; number i depends on (seed, i) alone."""

    def __init__(
        self,
        G: Generator,
        size: Size | None = None,
        *,
        seed: int = 0,
        trunc: float = 1,
        labelled: ImageArchive | None = None,
    ):
        """`labelled`: whose labels a conditional generator gets, drawn at random; without it, classes take turns."""
        self.G, self.seed, self.trunc, self.labelled = G, seed, trunc, labelled
        self.native, self.channels = G.config.img_shape, G.config.img_channels
        self.size = size or self.native
        self.variant = () if trunc == 1 else (f"trunc{trunc:g}",)
        self.points = "exact" if math.prod(self.size) <= EXACT else "interpolated"
        self.weight = G.synthesis.lines.input.weight  # for its dtype and device

    def latents(self, numbers: Sequence[int], purpose: str) -> tuple[Tensor, Tensor]:
        """z [N,z_dim] and labels [N,c_dim]."""
        z, c = [], torch.zeros(len(numbers), self.G.config.c_dim)
        for i, number in enumerate(numbers):
            random = make_rng(self.seed, number, purpose)
            z.append(torch.randn(self.G.config.z_dim, generator=random))
            if self.labelled:
                c[i] = self.labelled.label(int(torch.randint(len(self.labelled), (), generator=random)))
            elif self.G.config.c_dim:
                c[i, number % self.G.config.c_dim] = 1
        return torch.stack(z).to(self.weight), c.to(self.weight)

    def styles(self, z: Tensor, c: Tensor) -> Tensor:
        return self.G.mapping(z, c, self.trunc)

    def paint(self, ws: Tensor, size: Size, **where) -> Tensor:
        """[N,C,H,W] about [-1,1]. Raises UserError for colours that are not finite."""
        colours = rendering.render(self.G, ws, size, **where)
        if not colours.isfinite().all():
            raise UserError("the network gives colours that are not finite; it is broken, measure an earlier snapshot")
        return colours

    def batches(self, lists: Sequence[Sequence[int]]) -> Iterator["Drawn"]:
        return (Drawn(self, numbers) for numbers in lists)


class Drawn(Drawing):
    """Pictures of a generator, rendered as they are asked for."""

    def __init__(self, fakes: Generated, numbers: Sequence[int]):
        super().__init__(numbers, fakes.size)
        self.fakes = fakes
        self.z, self.c = fakes.latents(numbers, "latents")
        self.ws = fakes.styles(self.z, self.c)

    def colours(self, size: Size) -> Tensor:
        return self.once(("colours", size), lambda: self.fakes.paint(self.ws, size))

    def pictures(self, size: Size | None = None) -> Tensor:
        size = size or self.size
        return self.once(("pictures", size), lambda: to_uint8(self.colours(size)))

    def moved(self, index: int, matrix: Tensor | None) -> Tensor:
        if matrix is None:
            return self.colours(self.size)[index : index + 1]
        sides = matrix.clone()
        sides[:2, 2] /= COORDS[self.fakes.G.config.coords].steps(max(self.size))  # from pixels to longer sides
        exact = self.fakes.points == "exact"
        return self.fakes.paint(self.ws[index : index + 1], self.size, transform=sides, exact=exact)

    def windows(self, boxes: list[tuple[float, float, float, float]]) -> Tensor:
        painted = [
            self.fakes.paint(w, self.fakes.native, window=box) for w, box in zip(self.ws.split(1), boxes, strict=True)
        ]
        return to_uint8(torch.cat(painted))

    def path_lengths(self, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        towards, _ = self.fakes.latents(self.numbers.tolist(), "latents of path ends")
        paint = functools.partial(self.fakes.paint, size=self.size)
        return path_lengths(self.fakes.styles, paint, distance, self.z, towards, self.c)


class Archive:
    """Images of one size, as photographs to compare with."""

    def __init__(self, images: ImageArchive, mirror: bool):
        self.images, self.num, self.size = images, len(images), images.shape[1:]
        self.facts = {"mirror": mirror, "channels": images.shape[0]}

    @functools.cached_property
    def _digest(self) -> str:
        files = self.num // (1 + self.facts["mirror"])
        return content_digest(progress(self.images.contents(), desc=f"digest of {self.images.name}", total=files))

    def digest(self) -> str:
        return self._digest

    def batches(self, lists: Sequence[list[int]]) -> Iterator[list[Tensor]]:
        return read_ahead(self.read, lists, readers(lists))

    def read(self, indices: list[int]) -> list[Tensor]:
        return [self.images[index][0] for index in indices]


def open_labelled(path: str, G: Generator, mirror: bool) -> ImageArchive:
    """The archive, with labels if it has them and the generator wants them. Raises UserError when they do not fit."""
    settings = {"mirror": mirror, "channels": G.config.img_channels}
    images = ImageArchive(path, **settings)
    if not (G.config.c_dim and images.has_labels):
        return images
    images = ImageArchive(path, use_labels=True, **settings)
    if images.label_dim != G.config.c_dim:
        raise UserError(
            f"the labels of {path} have {images.label_dim} numbers, and the network takes {G.config.c_dim}; "
            "give the archive that it was trained on"
        )
    return images


class Given:
    """Images of one size, as the pictures measured, in random order."""

    def __init__(self, images: ImageArchive):
        self.files = Archive(images, mirror=False)
        self.channels, *size = images.shape
        self.size = self.native = tuple(size)
        self.variant = ()
        self.order = np.random.RandomState(0).permutation(self.files.num)

    def batches(self, lists: Sequence[Sequence[int]]) -> Iterator[Batch]:
        read = self.files.batches([self.order[list(numbers)].tolist() for numbers in lists])
        for numbers, pictures in zip(lists, read, strict=True):
            yield Batch(numbers, self.size, torch.stack(pictures))


class Photographs:
    """Those of at least `side` pixels per side in a folder or ZIP; each has its own size. Raises UserError."""

    size = None

    def __init__(self, path: str, channels: int, side: int):
        self.files = ImageFiles(path)
        names = self.files.names()
        self.names = [name for name in progress(names, desc=f"sizes of {path}") if min(self.files.size(name)) >= side]
        if not self.names:
            raise UserError(f"no image of {path} has {side} pixels per side; give larger ones, or a smaller --size")
        self.left_out = len(names) - len(self.names)
        self.num, self.channels, self.facts = len(self.names), channels, {"channels": channels}

    @functools.cached_property
    def _digest(self) -> str:
        return content_digest(progress(self.files.contents(self.names), desc="digest of photographs", total=self.num))

    def digest(self) -> str:
        return self._digest

    def batches(self, lists: Sequence[list[int]]) -> Iterator[list[Tensor]]:
        return read_ahead(self.read, lists, readers(lists))

    def read(self, indices: list[int]) -> list[Tensor]:
        images = (self.files.image(self.names[index], self.channels) for index in indices)
        return [torch.from_numpy(np.array(image)).view(image.height, image.width, -1).movedim(2, 0) for image in images]


def readers(lists: Sequence[Sequence[int]]) -> int:
    return min(READERS, cores()) if sum(map(len, lists)) >= WORTH else 0
