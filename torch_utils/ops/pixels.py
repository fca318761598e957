"""Lines to colours for training: fusions and per-pixel layers, of which nothing but the lines is kept.

Legend: N images, K fusions, C channels, D thickness, H rows, W columns, I inputs, O outputs.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dnnlib.console import UserError
from torch_utils.build import library, say_once
from torch_utils.ops.chain import Layer
from torch_utils.precision import full_precision

IMPLS = ("auto", "reference", "cpp")
PART = 4096  # positions of a part, of which a gradient of the weights is held; no more than four parts in an image


def pixels(rows: Tensor, cols: Tensor, layers: Sequence[Layer], *, impl: str = "auto") -> Tensor:
    """rows [K,N,H,D,C], cols [K,N,W,D,C] -> the sum of the branches [N,O,H,W]; differentiable twice.

    Fusion k at (h, w) is half the dot product over D of the two lines. The fusions that no layer asks for as a term
    are summed first; they are the input of the chain. `layers` are those of torch_utils.ops.chain, with at most one
    term each, the last a branch; a weight may be [N,O,I], one for each image.

    impl: "reference" is PyTorch; "cpp" (pixels.cpp), for float32 on CPUs, keeps the lines alone and computes some
        positions at a time again for each derivative; "auto" chooses "cpp" where it can be built, and says once why it
        cannot. Raises UserError when "cpp" is asked for and unavailable.
    """
    native = choose(impl, rows)
    if native is None:
        return reference(rows, cols, layers)
    tensors = [t for layer in layers for t in (layer.weight, layer.bias)]
    return Value.apply(native, layers, rows, cols, *tensors)


def choose(impl: str, x: Tensor) -> ctypes.CDLL | None:
    """The library for x, or None where the reference serves."""
    if impl not in IMPLS:
        raise UserError(f"impl={impl!r} is unknown; use one of {', '.join(IMPLS)}")
    serves = x.dtype == torch.float32 and x.device.type == "cpu"
    if impl == "cpp" and not serves:
        raise UserError(f"impl='cpp' of pixels is for float32 on CPUs, not {x.dtype} on {x.device.type}")
    if impl == "reference" or not serves or (impl == "auto" and torch.compiler.is_compiling()):
        return None
    native, reason = build()
    if native is None and impl == "cpp":
        raise UserError(reason)
    return native


@functools.lru_cache
def build() -> tuple[ctypes.CDLL | None, str]:
    """The functions of pixels.cpp, or None and the reason."""
    try:
        native = library(Path(__file__).with_suffix(".cpp"))
    except UserError as error:
        say_once(f"Training continues without the C++ code for pixels, which is slower: {error}")
        return None, str(error)
    native.pixels.restype = None
    return native, ""


def reference(rows: Tensor, cols: Tensor, layers: Sequence[Layer]) -> Tensor:
    with full_precision(rows):
        fusions = torch.einsum("knhdc,knwdc->knchw", rows * 0.5, cols).flatten(3)  # [K,N,C,P]
        terms = sum(layer.terms for layer in layers)
        x, later, colours = fusions[: len(fusions) - terms].sum(0), iter(fusions[len(fusions) - terms :]), 0
        for layer in layers:
            y = layer.weight @ x + layer.bias[:, None]
            if layer.slope != 1:
                y = F.leaky_relu(y, layer.slope)
            if layer.clamp < math.inf:
                y = y.clamp(-layer.clamp, layer.clamp)
            if layer.branch:
                colours = colours + y
            else:
                x = y + next(later) if layer.terms else y
    return colours.unflatten(2, (rows.shape[2], cols.shape[2]))


# --- derivatives ------------------------------------------------------------------------------------------------------


class Value(Function):
    @staticmethod
    def forward(ctx, native, layers, rows, cols, *tensors):
        ctx.native, ctx.layers = native, layers
        ctx.save_for_backward(rows, cols, *tensors)
        return Program(native, layers, rows, cols, tensors).value()

    @staticmethod
    def backward(ctx, gradient):
        return None, None, *Gradient.apply(ctx.native, ctx.layers, gradient, *ctx.saved_tensors)


class Gradient(Function):
    """Of ⟨gradient, pixels(rows, cols, layers)⟩. Its own derivative is the reference's, part by part."""

    @staticmethod
    def forward(ctx, native, layers, gradient, rows, cols, *tensors):
        ctx.layers = layers
        ctx.save_for_backward(gradient, rows, cols, *tensors)
        return Program(native, layers, rows, cols, tensors).gradient(gradient)

    @staticmethod
    def backward(ctx, *weights):
        made = [torch.zeros_like(t) for t in ctx.saved_tensors]
        height, width = ctx.saved_tensors[0].shape[2:]
        count = max(1, PART // width)
        for n in range(len(ctx.saved_tensors[0])):
            for h in range(0, height, count):

                def part(gradient, rows, cols, *tensors, n=n, h=h):
                    """Views of what concerns some rows of an image."""
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


def with_tensors(layers: Sequence[Layer], tensors: Sequence[Tensor]) -> list[Layer]:
    """The layers with other weights and biases."""
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return [layer._replace(weight=w, bias=b) for layer, (w, b) in zip(layers, pairs, strict=True)]


# --- C++ --------------------------------------------------------------------------------------------------------------


class CLayer(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "per_image", "branch", "term")),
        ("slope", ctypes.c_float),
        ("clamp", ctypes.c_float),
    ]


class Sizes(NamedTuple):
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
    threads: int
    record: int


class Program:
    """The arguments as pixels.cpp wants them."""

    def __init__(self, native: ctypes.CDLL, layers: Sequence[Layer], rows: Tensor, cols: Tensor, tensors):
        self.native, self.layers = native, layers
        self.tensors = [t.contiguous() for t in tensors]
        strip, lanes = (ctypes.c_int64.in_dll(native, name).value for name in ("pixels_strip", "pixels_lanes"))
        fusions, images, height, thickness, channels = rows.shape
        visible = cols.shape[2]
        self.rows = (rows * 0.5).contiguous()
        width = lanes
        while width < min(visible, strip):
            width *= 2
        self.cols = F.pad(cols.permute(1, 0, 4, 3, 2), (0, -visible % width)).contiguous()  # [N,K,C,D,W]
        shapes = [w.shape[-2:] for w in self.tensors[::2]]
        self.records = [(o, -(-i // lanes) * lanes, lanes) for o, i in shapes]  # outputs, padded inputs, lanes
        self.sizes = Sizes(
            *(images, fusions, channels, thickness, height, self.cols.shape[4], visible),
            tall=strip // width,
            first=fusions - sum(layer.terms for layer in layers),
            colours=shapes[-1][0],
            bands=min(4, -(-height * visible // PART), height),
            threads=torch.get_num_threads(),
            record=sum(o * (i + lanes) for o, i, lanes in self.records),
        )

    def run(self, *outputs: Tensor | None) -> None:
        layers = (CLayer * len(self.layers))(
            *(
                CLayer(w.data_ptr(), b.data_ptr(), w.shape[-1], w.shape[-2], w.ndim == 3, layer.branch, layer.terms)
                for layer, w, b in zip(self.layers, self.tensors[::2], self.tensors[1::2], strict=True)
            )
        )
        for c, layer in zip(layers, self.layers, strict=True):
            c.slope, c.clamp = layer.slope, layer.clamp
        tensors = (self.rows, self.cols, *outputs)
        self.native.pixels(
            (ctypes.c_int64 * len(self.sizes))(*self.sizes),
            layers,
            ctypes.c_int64(len(layers)),
            *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors),
        )

    def value(self) -> Tensor:
        s = self.sizes
        colours = self.rows.new_empty(s.images, s.colours, s.height, s.visible)
        self.run(colours, None, None, None, None)
        return colours

    def gradient(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """By rows, cols, and the weights and biases of the layers."""
        s = self.sizes
        rows = torch.zeros_like(self.rows)
        cols = self.cols.new_zeros(s.images, s.bands, *self.cols.shape[1:])
        record = rows.new_zeros(s.images, s.bands, s.record)
        self.run(None, gradient.contiguous(), rows, cols, record)
        made = [rows * 0.5, cols.sum(1)[..., : s.visible].permute(1, 0, 4, 3, 2)]
        parts = record.sum(1).split([n for o, i, lanes in self.records for n in (o * i, o * lanes)], dim=1)
        for weight, (o, i, lanes), dw, db in zip(self.tensors[::2], self.records, parts[::2], parts[1::2], strict=True):
            dw = dw.view(-1, o, i)[..., : weight.shape[-1]]
            made += [dw if weight.ndim == 3 else dw.sum(0), db.view(-1, o, lanes).sum((0, 2))]
        return tuple(made)
