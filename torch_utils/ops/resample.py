"""Halving an image without aliasing."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torch_utils.precision import full_precision


def lowpass(x: Tensor, padding: int, stride: int = 1) -> Tensor:
    """Filters both axes with [1,3,3,1]/8 after zero padding, and keeps every `stride`-th sample of both (1 or 2).

    [N,C,H,W] -> [N,C,H',W'] with H' = ⌈(H + 2·padding − 3) / stride⌉. Differentiable any number of times, each as one
    depthwise convolution: the derivative that PyTorch has for those is several times as slow, and R1 takes two.
    """
    return Lowpass.apply(x, padding, stride)


class Lowpass(Function):
    @staticmethod
    def forward(ctx, x, padding, stride):
        ctx.arguments = (*x.shape[2:], padding, stride)
        return convolve(x, padding, stride)

    @staticmethod
    def backward(ctx, g):
        return Adjoint.apply(g, *ctx.arguments), None, None


class Adjoint(Function):
    """The filter is symmetric: zeros between the samples, then the same filter with the complementary padding."""

    @staticmethod
    def forward(ctx, g, height, width, padding, stride):
        ctx.arguments = padding, stride
        if stride > 1:
            samples, size = g, (height + 2 * padding - 3, width + 2 * padding - 3)
            g = torch.empty(*g.shape[:2], *size, dtype=g.dtype, device=g.device, memory_format=layout(g)).zero_()
            g[:, :, ::stride, ::stride] = samples
        return convolve(g, 3 - padding, 1)

    @staticmethod
    def backward(ctx, x):
        return Lowpass.apply(x, *ctx.arguments), None, None, None, None


def convolve(x: Tensor, padding: int, stride: int) -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8
    with full_precision(x):
        return F.conv2d(x, torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4), None, stride, padding, 1, x.shape[1])


def layout(x: Tensor) -> torch.memory_format:
    """channels_last where x is so and only so."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
