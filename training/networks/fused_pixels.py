"""From lines to colours in one differentiable operation that keeps only the lines for the backward pass.

Legend: N images, K fusions, C channels, D thickness, H rows, W columns, I inputs, O outputs.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torch_utils.build import Kernels, choose
from torch_utils.ops.chain import DTYPES, Folded, c_layers
from torch_utils.precision import full_precision

IMPLS = ("auto", "reference", "cpp")
SOURCE = Path(__file__).with_suffix(".cpp")
PART = 4096  # positions per part, which has its own gradient of the weights; at most four parts per image


def find_kernels(impl: str, x: Tensor) -> Kernels | None:
    return choose(impl, IMPLS, SOURCE, x, DTYPES)


def fused_pixels(rows: Tensor, cols: Tensor, layers: Sequence[Folded], *, impl: str = "auto") -> Tensor:
    """rows [K,N,H,D,C], cols [K,N,W,D,C] -> the sum of the branches [N,O,H,W]; differentiable twice.

    Fusion k at (h, w) is the dot product over D of the two lines. The last fusions are the terms that layers add; the
    sum of the others is the input of the first layer. The last layer is a branch. A weight may be [N,O,I].

    impl: "reference" is PyTorch; "cpp" (fused_pixels.cpp), for float32 on CPUs, recomputes some positions at a time for
        each derivative; "auto" as in `torch_utils.build.choose`. Raises UserError when "cpp" is requested and
        unavailable.
    """
    kernels = find_kernels(impl, rows)
    if kernels is None:
        return reference(rows, cols, layers)
    tensors = [t for layer in layers for t in (layer.weight, layer.bias)]
    return Value.apply(kernels, layers, rows, cols, *tensors)


def reference(rows: Tensor, cols: Tensor, layers: Sequence[Folded]) -> Tensor:
    with full_precision(rows):
        fusions = torch.einsum("knhdc,knwdc->knchw", rows, cols).flatten(3)  # [K,N,C,P]
        first = len(fusions) - sum(layer.term for layer in layers)
        x, terms, colours = fusions[:first].sum(0), iter(fusions[first:]), 0
        for layer in layers:
            y = layer.activate(layer.weight @ x + layer.bias[:, None])
            if layer.branch:
                colours = colours + y
            else:
                x = y + next(terms) if layer.term else y
    return colours.unflatten(2, (rows.shape[2], cols.shape[2]))


# --- derivatives ------------------------------------------------------------------------------------------------------


class Value(Function):
    @staticmethod
    def forward(ctx, kernels, layers, rows, cols, *tensors):
        ctx.kernels, ctx.layers = kernels, layers
        ctx.save_for_backward(rows, cols, *tensors)
        return Program(kernels, layers, rows, cols, tensors).value()

    @staticmethod
    def backward(ctx, gradient):
        return None, None, *Gradient.apply(ctx.kernels, ctx.layers, gradient, *ctx.saved_tensors)


class Gradient(Function):
    """The gradient of ⟨gradient, fused_pixels(rows, cols, layers)⟩. Its derivative is the reference's, part by part."""

    @staticmethod
    def forward(ctx, kernels, layers, gradient, rows, cols, *tensors):
        ctx.layers = layers
        ctx.save_for_backward(gradient, rows, cols, *tensors)
        return Program(kernels, layers, rows, cols, tensors).gradient(gradient)

    @staticmethod
    def backward(ctx, *weights):
        made = [torch.zeros_like(t) for t in ctx.saved_tensors]
        height, width = ctx.saved_tensors[0].shape[2:]
        count = max(1, PART // width)
        for n in range(len(ctx.saved_tensors[0])):
            for h in range(0, height, count):

                def part(gradient, rows, cols, *tensors, n=n, h=h):
                    """Return views of what concerns some rows of an image."""
                    image, band = slice(n, n + 1), slice(h, h + count)
                    own = [t[image] if t.ndim == 3 else t for t in tensors]
                    first = [] if gradient is None else [gradient[image, :, band]]
                    return [*first, rows[:, image, band], cols[:, image], *own]

                inputs = [t.detach().requires_grad_() for t in part(*ctx.saved_tensors)]
                with torch.enable_grad():
                    colours = reference(*inputs[1:3], with_tensors(ctx.layers, inputs[3:]))
                    first = torch.autograd.grad(colours, inputs[1:], inputs[0], create_graph=True)
                    second = torch.autograd.grad(
                        first, inputs, part(None, *weights), allow_unused=True, materialize_grads=True
                    )
                for whole, more in zip(part(*made), second, strict=True):
                    whole += more
        return None, None, *made


def with_tensors(layers: Sequence[Folded], tensors: Sequence[Tensor]) -> list[Folded]:
    """Replace the weights and biases of the layers by `tensors`: weight, bias, weight, bias, …"""
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return [layer._replace(weight=w, bias=b) for layer, (w, b) in zip(layers, pairs, strict=True)]


# --- C++ --------------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Shape in fused_pixels.cpp."""

    images: int
    fusions: int
    channels: int
    thickness: int
    height: int
    width: int
    visible: int
    tall: int
    first: int
    colours: int
    bands: int
    record: int


class Program:
    """The arguments in the layout of fused_pixels.cpp."""

    def __init__(self, kernels: Kernels, layers: Sequence[Folded], rows: Tensor, cols: Tensor, tensors):
        self.kernels, self.layers, self.rows = kernels, layers, rows.contiguous()
        self.tensors = [t.contiguous() for t in tensors]
        strip, lanes = (kernels.constant(name) for name in ("pixels_strip", "pixels_lanes"))
        fusions, images, height, thickness, channels = rows.shape
        visible = cols.shape[2]
        width = lanes
        while width < min(visible, strip):
            width *= 2
        self.cols = F.pad(cols.permute(1, 0, 4, 3, 2), (0, -visible % width)).contiguous()  # [N,K,C,D,W]
        shapes = [w.shape[-2:] for w in self.tensors[::2]]
        self.records = [(o, -(-i // lanes) * lanes, lanes) for o, i in shapes]  # outputs, padded inputs, lanes
        self.sizes = Sizes(
            *(images, fusions, channels, thickness, height, self.cols.shape[4], visible),
            tall=strip // width,
            first=fusions - sum(layer.term for layer in layers),
            colours=shapes[-1][0],
            bands=min(4, -(-height * visible // PART), height),
            record=sum(o * (i + lanes) for o, i, lanes in self.records),
        )

    def run(self, *outputs: Tensor | None) -> None:
        sizes = (ctypes.c_int64 * len(self.sizes))(*self.sizes)
        layers = c_layers(self.layers, list(zip(self.tensors[::2], self.tensors[1::2], strict=True)))
        self.kernels.call("pixels", sizes, layers, len(layers), self.rows, self.cols, *outputs)

    def value(self) -> Tensor:
        s = self.sizes
        colours = self.rows.new_empty(s.images, s.colours, s.height, s.visible)
        self.run(colours, None, None, None, None)
        return colours

    def gradient(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of rows, cols, and each layer's weight and bias."""
        s = self.sizes
        rows = torch.zeros_like(self.rows)
        cols = self.cols.new_zeros(s.images, s.bands, *self.cols.shape[1:])
        record = rows.new_zeros(s.images, s.bands, s.record)
        self.run(None, gradient.contiguous(), rows, cols, record)
        made = [rows, cols.sum(1)[..., : s.visible].permute(1, 0, 4, 3, 2)]
        parts = record.sum(1).split([n for o, i, lanes in self.records for n in (o * i, o * lanes)], dim=1)
        for weight, (o, i, lanes), dw, db in zip(self.tensors[::2], self.records, parts[::2], parts[1::2], strict=True):
            dw = dw.view(-1, o, i)[..., : weight.shape[-1]]
            made += [dw if weight.ndim == 3 else dw.sum(0), db.view(-1, o, lanes).sum((0, 2))]
        return tuple(made)
