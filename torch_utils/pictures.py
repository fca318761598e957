"""Pictures as numbers that files hold."""

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """[…] in [-1,1] -> uint8, as StyleGAN does it: 127.5·x + 128, clamped and truncated."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
