"""Images of a generator, by number, at any size."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

import rendering
from metrics.images import Batch, Size
from metrics.path_length import path_lengths
from metrics.reals import Windows
from rendering.grid import Shot, View
from torch_utils.images import to_uint8
from torch_utils.randomness import make_rng

EXACT = 64 * 64  # pixels up to which rotated images are computed exactly, at about a hundred times the cost


class Generated:
    """The images of a generator; image i depends on (seed, i) alone.

    size      the measured size
    native    the training size
    shot      how the whole image is rendered at that size
    variant   deviations from the defaults, for the names of results
    points    how rotated images are computed: "exact", or "interpolated" between samples of lines
    """

    def __init__(
        self,
        G: nn.Module,
        size: Size | None = None,
        *,
        seed: int = 0,
        trunc: float = 1,
        supersample: int = 1,
        labelled=None,
    ):
        """supersample: of rendering.Shot, for all images. labelled: a training.data.ImageArchive from which the labels
        of a conditional generator are sampled; without it, classes take turns.
        """
        self.G, self.seed, self.trunc, self.labelled = G, seed, trunc, labelled
        self.native, self.channels = G.config.img_shape, G.config.img_channels
        self.size = size or self.native
        self.shot = Shot(self.size, supersample=supersample)
        self.variant = () if trunc == 1 else (f"trunc{trunc:g}",)
        self.variant += () if supersample == 1 else (f"supersample{supersample}",)
        self.points = "exact" if math.prod(self.size) <= EXACT else "interpolated"
        self.weight = next(G.parameters())  # for its dtype and device

    def latents(self, numbers: Sequence[int], purpose: str) -> tuple[Tensor, Tensor]:
        """Sample z [N,z_dim] and labels [N,c_dim]."""
        config, z = self.G.config, []
        c = torch.zeros(len(numbers), config.c_dim)
        for i, number in enumerate(numbers):
            rng = make_rng(self.seed, number, purpose)
            z.append(torch.randn(config.z_dim, generator=rng))
            if self.labelled:
                c[i] = self.labelled.label(int(torch.randint(len(self.labelled), (), generator=rng)))
            elif config.c_dim:
                c[i, number % config.c_dim] = 1
        return torch.stack(z).to(self.weight), c.to(self.weight)

    def styles(self, z: Tensor, c: Tensor) -> Tensor:
        return self.G.mapping(z, c, self.trunc)

    def batches(self, lists: Sequence[Sequence[int]]) -> Iterator["GeneratedBatch"]:
        return (GeneratedBatch(self, numbers) for numbers in lists)


class GeneratedBatch(Batch):
    """Images of a generator, rendered on request."""

    def __init__(self, generated: Generated, numbers: Sequence[int]):
        super().__init__(numbers)
        self.generated = generated
        self.z, self.c = generated.latents(numbers, "latents")
        self.ws = generated.styles(self.z, self.c)

    def colours(self, size: Size) -> Tensor:
        shot = replace(self.generated.shot, size=size)
        return self.once(("colours", size), lambda: rendering.render(self.generated.G, self.ws, shot))

    def images(self, size: Size | None = None) -> Tensor:
        size = size or self.generated.size
        return self.once(("images", size), lambda: to_uint8(self.colours(size)))

    def moved(self, index: int, matrix: Tensor | None) -> Tensor:
        """Render image `index` of the batch, [1,C,H,W], moved by float64 [3,3], in pixels about its centre."""
        generated = self.generated
        if matrix is None:
            return self.colours(generated.size)[index : index + 1]
        height, width = generated.native
        view = View.of(generated.G.config, Shot(generated.size))
        longer = view.cols if width >= height else view.rows
        sides = matrix.clone()
        sides[:2, 2] *= longer.step  # from pixels to the longer side of the training size
        shot = replace(generated.shot, transform=sides, exact=generated.points == "exact")
        return rendering.render(generated.G, self.ws[index : index + 1], shot)

    def windows(self, kind: Windows) -> Tensor:
        """Render a window of each image: uint8 [N,C,H,W] of the training size."""
        boxes = [kind.box("fake", number) for number in self.numbers.tolist()]
        shots = [replace(self.generated.shot, size=self.generated.native, window=box) for box in boxes]
        return to_uint8(rendering.render_each(self.generated.G, self.ws, shots))

    def path_lengths(self, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return float64 [N], see metrics/path_length.py."""
        generated = self.generated
        towards, _ = generated.latents(self.numbers.tolist(), "latents of path ends")

        def synthesis(ws: Tensor) -> Tensor:
            return rendering.render(generated.G, ws, generated.shot)

        return path_lengths(generated.styles, synthesis, distance, self.z, towards, self.c)
