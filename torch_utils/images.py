"""Convert images to 8 bits."""

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Map […] in [-1,1] to uint8 as StyleGAN does: 127.5·x + 128, clamped and truncated."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
