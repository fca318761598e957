"""Halving an image without aliasing, and its transpose, doubling."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torch_utils.build import DTYPES, Kernels, choose
from torch_utils.precision import full_precision

IMPLS = ("auto", "reference", "cpp")
SOURCE = Path(__file__).with_suffix(".cpp")


def lowpass(x: Tensor, padding: int, stride: int = 1, impl: str = "auto") -> Tensor:
    """Filter both axes with [1,3,3,1]/8 after zero padding, and keep every `stride`-th sample of both (1 or 2).

    [N,C,H,W] -> [N,C,H',W'] with H' = ⌈(H + 2·padding − 3) / stride⌉. Differentiable any number of times.
    impl: "reference" is PyTorch; "cpp" (resample.cpp), for float32 and bfloat16 on CPUs, works with channels last;
        "auto" as in `torch_utils.build.choose`. Raises UserError when "cpp" is requested and unavailable.
    """
    kernels = choose(impl, IMPLS, SOURCE, x)
    return Lowpass.apply(x, padding, stride, kernels)


def upsample(x: Tensor, impl: str = "auto") -> Tensor:
    """Double both sides of [N,C,H,W]: a zero after every sample, then the filter [1,3,3,1]/4 along both axes.

    Along an axis, y[2p] = (x[p−1] + 3x[p])/4 and y[2p+1] = (3x[p] + x[p+1])/4, with zeros outside. Differentiable any
    number of times. impl: as of `lowpass`.
    """
    kernels = choose(impl, IMPLS, SOURCE, x)
    return Adjoint.apply(x * 4, 2 * x.shape[2], 2 * x.shape[3], 1, 2, kernels)


class Lowpass(Function):
    @staticmethod
    def forward(ctx, x, padding, stride, kernels):
        ctx.arguments = (*x.shape[2:], padding, stride, kernels)
        height, width = (-(-(n + 2 * padding - 3) // stride) for n in x.shape[2:])
        if kernels is None:
            return convolve(x, padding, stride)
        return native(kernels, x, (height, width), (*x.shape[2:], height, width, padding, stride, 0))

    @staticmethod
    def backward(ctx, g):
        return Adjoint.apply(g, *ctx.arguments), None, None, None


class Adjoint(Function):
    """Insert zeros between the samples and filter again, with padding 3 − `padding`: the filter is symmetric."""

    @staticmethod
    def forward(ctx, g, height, width, padding, stride, kernels):
        ctx.arguments = padding, stride, kernels
        if kernels is not None:
            return native(kernels, g, (height, width), (height, width, *g.shape[2:], padding, stride, 1))
        if stride > 1:
            samples, size = g, (height + 2 * padding - 3, width + 2 * padding - 3)
            g = torch.empty(*g.shape[:2], *size, dtype=g.dtype, device=g.device, memory_format=layout(g)).zero_()
            g[:, :, ::stride, ::stride] = samples
        return convolve(g, 3 - padding, 1)

    @staticmethod
    def backward(ctx, x):
        return Lowpass.apply(x, *ctx.arguments), None, None, None, None, None


def convolve(x: Tensor, padding: int, stride: int) -> Tensor:
    """Filter by one depthwise convolution, whose derivatives in PyTorch are several times as slow as `Adjoint`."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8
    with full_precision(x):
        return F.conv2d(x, torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4), None, stride, padding, 1, x.shape[1])


def native(kernels: Kernels, x: Tensor, size: tuple[int, int], arguments: tuple[int, ...]) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty(*x.shape[:2], *size, dtype=x.dtype, memory_format=torch.channels_last)
    if not x.numel():
        return y.zero_()
    if y.numel():
        kernels.call("lowpass", DTYPES[x.dtype], x, y, *x.shape[:2], *arguments)
    return y


def layout(x: Tensor) -> torch.memory_format:
    """Return channels_last if x is contiguous in that format alone."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
