"""Compute colours from lines in one Triton kernel, for inference on GPUs: a pixel's features never leave the chip.

Each program renders a tile of pixels: it fuses the lines that cross in it, passes the pixels through all decoders and
the refinement with weights that stay in the cache, and writes their colours. Products are in the dtype of the weights,
sums in float32. The widest features are computed and consumed in chunks, so that they fit into registers.

Legend: K fusions, C channels, D thickness, H×W pixels, B pixels of a tile, P and OUT: channels and colours, padded to
powers of two. The weights of all layers are concatenated, as are their biases; `weights` and `biases` point to
the next layer.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from torch_utils.ops.chain import LARGEST, Folded

TILE, WARPS = (8, 8), 4  # pixels down and to the right. No register spills on 9.0; not tuned on a GPU yet
LEAST = 16  # size of each side of a product on tensor cores
NO_CLAMP = tl.constexpr(math.inf)


@triton.jit
def _clip(x, largest):
    return tl.where(x > largest, largest, tl.where(x < -largest, -largest, x))


@triton.jit
def _activate(x, slope, clamp):
    return _clip(tl.where(x < 0, x * slope, x), clamp)


@triton.jit
def _layer(x, weights, biases, slope, clamp, IN: tl.constexpr, OUT: tl.constexpr):
    """Map x [B,IN] -> [B,OUT]; return it and the next weights and biases. The weight is stored as [IN,OUT]."""
    inputs, outputs = tl.arange(0, IN), tl.arange(0, OUT)
    weight = tl.load(weights + inputs[:, None] * OUT + outputs[None, :])
    y = tl.dot(x.to(weight.dtype), weight, input_precision="ieee") + tl.load(biases + outputs)[None, :]
    return _activate(y, slope, clamp), weights + IN * OUT, biases + OUT


@triton.jit
def _two_layers(x, weights, biases, slope, clamp, IN: tl.constexpr, MID: tl.constexpr, OUT: tl.constexpr):
    """Map x [B,IN] -> [B,MID] -> [B,OUT]; return it, and the next weights and biases. Never stores the middle."""
    CHUNK: tl.constexpr = MID if MID < 32 else 32
    inputs, some, outputs = tl.arange(0, IN), tl.arange(0, CHUNK), tl.arange(0, OUT)
    x = x.to(weights.dtype.element_ty)
    y = tl.full([x.shape[0], OUT], 0.0, tl.float32) + tl.load(biases + MID + outputs)[None, :]
    for first in range(0, MID, CHUNK):
        weight = tl.load(weights + inputs[:, None] * MID + (first + some)[None, :])
        part = tl.dot(x, weight, input_precision="ieee") + tl.load(biases + first + some)[None, :]
        part = _activate(part, slope, clamp).to(weight.dtype)
        weight = tl.load(weights + IN * MID + (first + some)[:, None] * OUT + outputs[None, :])
        y = tl.dot(part, weight, y, input_precision="ieee")
    return _activate(y, slope, clamp), weights + (IN + OUT) * MID, biases + MID + OUT


@triton.jit
def _decode(x, weights, biases, slope, P: tl.constexpr):
    """Map x [B,P] -> [B,P]; return it and the next weights and biases."""
    x, weights, biases = _layer(x, weights, biases, slope, NO_CLAMP, P, 2 * P)
    x, weights, biases = _two_layers(x, weights, biases, slope, NO_CLAMP, 2 * P, 4 * P, 2 * P)
    return _layer(x, weights, biases, slope, NO_CLAMP, 2 * P, P)


@triton.jit
def _refine(x, colours, weights, biases, slope, clamp, IN: tl.constexpr, MID: tl.constexpr, OUT: tl.constexpr):
    """Map x [B,IN], colours [B,OUT] -> [B,MID], [B,OUT]; return them and the next weights and biases."""
    x, weights, biases = _two_layers(x, weights, biases, slope, clamp, IN, MID, MID)
    more, weights, biases = _layer(x, weights, biases, 1.0, clamp, MID, OUT)
    return x, colours + more, weights, biases


@triton.jit
def _fuse(rows, cols, h, w, height, width, row_stride, col_stride, C: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    """Return the dot products over the thickness [B,P]; 0 beyond the C channels and the window."""
    c = tl.arange(0, P)
    rows += (c * D)[None, :] * row_stride + h[:, None]
    cols += (c * D)[None, :] * col_stride + w[:, None]
    x = tl.full([h.shape[0], w.shape[0], P], 0.0, tl.float32)
    for d in tl.range(0, D, num_stages=3):
        row = tl.load(rows + d * row_stride, mask=(h < height)[:, None] & (c < C)[None, :], other=0.0)
        col = tl.load(cols + d * col_stride, mask=(w < width)[:, None] & (c < C)[None, :], other=0.0)
        x += row[:, None, :] * col[None, :, :]
    return tl.reshape(x, [h.shape[0] * w.shape[0], P])


@triton.jit
def _render(
    rows,  # [K,C,D,H]
    cols,  # [K,C,D,W]
    weights,
    biases,
    image,  # [colours,H,W]
    height,
    width,
    row_stride,  # between neighbours along D
    col_stride,
    fusions,
    decoders,  # one for each of the last fusions; earlier fusions are added first
    slope,
    clamp,
    largest,  # input of the decoders
    colours,
    C: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    OUT: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
):
    h = tl.program_id(0) * DOWN + tl.arange(0, DOWN)
    w = tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
    x = tl.full([DOWN * ACROSS, P], 0.0, tl.float32)
    for k in range(fusions):
        x += _fuse(rows, cols, h, w, height, width, row_stride, col_stride, C, P, D)
        rows += C * D * row_stride
        cols += C * D * col_stride
        if k >= fusions - decoders:
            x, weights, biases = _decode(_clip(x, largest), weights, biases, slope, P)
    y, weights, biases = _layer(x, weights, biases, 1.0, NO_CLAMP, P, OUT)
    x, y, weights, biases = _refine(x, y, weights, biases, slope, clamp, P, 4 * P, OUT)
    x, y, weights, biases = _refine(x, y, weights, biases, slope, clamp, 4 * P, 2 * P, OUT)
    o = tl.arange(0, OUT)
    place = image + (o[None, None, :].to(tl.int64) * height + h[:, None, None]) * width + w[None, :, None]
    inside = ((h < height)[:, None] & (w < width)[None, :])[:, :, None] & (o < colours)
    tl.store(place, tl.reshape(y, [DOWN, ACROSS, OUT]), mask=inside)


class PixelKernel:
    """kernel(rows, cols) as PixelPath, for layers in half types on a CUDA device."""

    def __init__(self, layers: Sequence[Folded], *, tile: tuple[int, int] = TILE, warps: int = WARPS):
        self.tile, self.warps = tile, warps
        self.channels, self.colours = layers[0].weight.shape[1], len(layers[-1].bias)
        self.padded, self.out = (triton.next_power_of_2(max(n, LEAST)) for n in (self.channels, self.colours))
        self.decoders = 1 + sum(layer.term for layer in layers)
        self.slope, self.clamp = layers[0].slope, layers[-1].clamp
        padded = [self._pad(layer) for layer in layers]
        self.weights = torch.cat([weight.mT.flatten() for weight, _ in padded])
        self.biases = torch.cat([bias for _, bias in padded]).float()
        self.largest = LARGEST if self.weights.dtype == torch.float16 else math.inf

    def _pad(self, layer: Folded) -> tuple[Tensor, Tensor]:
        """Append zeros to weight and bias for multiples of P channels and for OUT colours."""
        outputs, inputs = layer.weight.shape
        more_inputs = inputs // self.channels * self.padded - inputs
        more_outputs = (self.out if layer.branch else outputs // self.channels * self.padded) - outputs
        if not (more_inputs or more_outputs):
            return layer.weight, layer.bias  # F.pad would copy them, and starting a kernel takes longer than its work
        return F.pad(layer.weight, (0, more_inputs, 0, more_outputs)), F.pad(layer.bias, (0, more_outputs))

    def __call__(self, rows: Tensor, cols: Tensor) -> Tensor:
        rows, cols = (x if _is_window(x) else x.contiguous() for x in (rows, cols))
        height, width = rows.shape[3], cols.shape[3]
        image = rows.new_empty(self.colours, height * width)
        grid = triton.cdiv(height, self.tile[0]), triton.cdiv(width, self.tile[1])
        with torch.cuda.device_of(rows):
            _render[grid](
                *(rows, cols, self.weights, self.biases, image),
                *(height, width, rows.stride(2), cols.stride(2)),
                *(len(rows), self.decoders, self.slope, self.clamp, self.largest, self.colours),
                *(self.channels, self.padded, rows.shape[2], self.out, *self.tile),
                num_warps=self.warps,
            )
        return image


def _is_window(x: Tensor) -> bool:
    """Tell whether [K,C,D,R] is a window of contiguous lines."""
    return x.stride(3) == 1 and x.stride(1) == x.shape[2] * x.stride(2) and x.stride(0) == x.shape[1] * x.stride(1)
