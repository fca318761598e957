"""Resize uint8 images in float64, with the filters of image libraries.

Legend: N images, C channels, H rows, W columns. Sizes are (H, W).
"""

import torch
from torch import Tensor


def box(distance: Tensor, ratio: float) -> Tensor:
    """Return the part of each source pixel that the target pixel covers."""
    return ((ratio + 1) / 2 - distance.abs()).clamp(0, 1)


def bicubic(distance: Tensor, ratio: float) -> Tensor:
    """Return Keys' cubic with a = −½, over ±2 target pixels."""
    t = distance.abs() / ratio
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t < 1, near, torch.where(t < 2, far, 0))


def lanczos(distance: Tensor, ratio: float) -> Tensor:
    """Return a sinc under a sinc window, over ±3 target pixels."""
    t = distance / ratio
    return torch.where(t.abs() < 3, torch.sinc(t) * torch.sinc(t / 3), 0)


# name -> function(distance of the centres in source pixels, source pixels per target pixel but 1 at least) -> weight,
# not normalised. bicubic and lanczos widen with the ratio, as in Pillow's Image.resize. For smaller images,
# box is the exact area; for larger ones, it is linear between pixels.
FILTERS = {"box": box, "bicubic": bicubic, "lanczos": lanczos}


def resize(images: Tensor, size: tuple[int, int], filter: str) -> Tensor:
    """Resize uint8 [N,C,H',W'] to uint8 [N,C,H,W]: rounded (halves to even) and clamped. `filter`: a key of FILTERS."""

    def weights(before: int, after: int) -> Tensor:
        """Return float64 [after,before], rows that sum to 1."""
        ratio = before / after
        centres, pixels = (torch.arange(count, dtype=torch.float64) + 0.5 for count in (after, before))
        matrix = FILTERS[filter](pixels - centres[:, None] * ratio, max(ratio, 1))
        return (matrix / matrix.sum(1, keepdim=True)).to(images.device)

    rows, cols = (weights(*lengths) for lengths in zip(images.shape[-2:], size, strict=True))
    return (rows @ images.double() @ cols.mT).round().clamp(0, 255).to(torch.uint8)


def fit(images: Tensor, size: tuple[int, int], filter: str) -> Tensor:
    """Crop uint8 [N,C,H',W'] to the largest central part of the shape of `size`, and resize it to [N,C,H,W]."""
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    scale = min(height / size[0], width / size[1])
    rows, cols = (max(1, round(length * scale)) for length in size)
    top, left = (height - rows) // 2, (width - cols) // 2
    return resize(images[..., top : top + rows, left : left + cols], size, filter)
