"""Halving a picture without aliasing."""

import torch
import torch.nn.functional as F


def lowpass(x: torch.Tensor, padding: int) -> torch.Tensor:
    """Filters both axes with [1,3,3,1]/8 after zero padding: [N,C,H,W] -> [N,C,H+2·padding−3,W+2·padding−3].

    Written as sums of shifted pictures: on a CPU its second derivative is six times as fast as that of a depthwise
    convolution, and R1 asks for it at every resolution.
    """
    x = F.pad(x, [padding] * 4)
    x = (x[:, :, :-3] + x[:, :, 3:]).add(x[:, :, 1:-2] + x[:, :, 2:-1], alpha=3)
    x = (x[..., :-3] + x[..., 3:]).add(x[..., 1:-2] + x[..., 2:-1], alpha=3)
    return x / 64
