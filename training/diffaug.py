"""DiffAugment: every real or generated image is translated, cut and recoloured before the discriminator sees it.

Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training" (NeurIPS 2020), with its magnitudes.

Legend: N images, C channels, H×W pixels.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.transfer import send

Policy = tuple[Literal["color", "translation", "cutout"], ...]
SHIFT = 1 / 8  # of the side, at most
CUTOUT = 1 / 2  # side of the square that is zeroed, in sides of the image


@dataclass(frozen=True)
class Augmentations:
    """The transformation of each of N images; slicing selects images.

    colour: float32 [N,3], brightness added, saturation and contrast multiplied; (0, 1, 1) changes nothing.
    shift: int64 [N,2], pixels down and to the right.
    cut: int64 [N,4], first and last row, first and last column of the zeroed square, the last ones excluded.
    """

    colour: Tensor
    shift: Tensor
    cut: Tensor

    def __len__(self) -> int:
        return len(self.shift)

    def __getitem__(self, part: slice) -> "Augmentations":
        return Augmentations(*(getattr(self, field.name)[part] for field in fields(self)))

    def apply(self, images: Tensor) -> Tensor:
        """Transform images [N,C,H,W] in [-1,1], grey, RGB or RGBA (alpha is moved and cut, not recoloured).

        What moves in from beyond an edge is 0, and so is the square that is cut.
        """
        images = recolour(images, self.colour)
        moved = [
            F.pad(image, (x, -x, y, -y)) if x or y else image
            for image, (y, x) in zip(images.split(1), self.shift.tolist(), strict=True)
        ]
        height, width = images.shape[2:]
        rows, cols = torch.arange(height), torch.arange(width)
        top, bottom, left, right = self.cut.T[..., None]
        outside = ~(((rows >= top) & (rows < bottom))[:, :, None] & ((cols >= left) & (cols < right))[:, None])
        return torch.cat(moved) * send(outside[:, None], images.device, images.dtype)


def sample(policy: Policy, count: int, image_shape: tuple[int, int], rng: torch.Generator) -> Augmentations:
    """Sample for `count` images of `image_shape` (H, W). Every policy consumes the same random numbers."""
    height, width = image_shape
    numbers = torch.rand(count, 7, generator=rng)
    colour = numbers[:, :3] * torch.tensor([1.0, 2.0, 1.0]) + torch.tensor([-0.5, 0.0, 0.5])
    if "color" not in policy:
        colour = torch.tensor([0.0, 1.0, 1.0]).expand(count, 3)
    side = torch.tensor([height, width])
    most = (side * SHIFT + 0.5).long()
    shift = (numbers[:, 3:5] * (2 * most + 1)).long() - most
    size = (side * CUTOUT + 0.5).long()
    centre = (numbers[:, 5:] * (side + (1 - size % 2))).long()
    first = (centre - size // 2).clamp(min=0)
    last = torch.minimum(centre - size // 2 + size, side)
    cut = torch.stack([first, last], dim=2).flatten(1)
    return Augmentations(
        colour, shift if "translation" in policy else shift * 0, cut if "cutout" in policy else torch.zeros_like(cut)
    )


def recolour(images: Tensor, colour: Tensor) -> Tensor:
    """[N,C,H,W], [N,3] -> [N,C,H,W]: add brightness, scale saturation about a pixel's grey, contrast about the mean."""
    if torch.equal(colour, colour.new_tensor([0.0, 1.0, 1.0]).expand_as(colour)):
        return images
    brightness, saturation, contrast = send(colour, images.device, images.dtype).T[..., None, None, None]
    x, alpha = images[:, :3], images[:, 3:]
    x = x + brightness
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * saturation
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return torch.cat([mean + (x - mean) * contrast, alpha], dim=1)
