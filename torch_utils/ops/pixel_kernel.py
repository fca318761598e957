"""Lines to picture in one Triton kernel, for inference on GPUs: a pixel's features never leave the processor.

Each program paints a tile of pixels: it reads the lines that cross in it, passes the pixels through all decoders and
the refinement with weights that stay in the cache, and writes their colours. Products are of the weights' dtype, sums
are float32. The widest features of a decoder are made and used up in chunks, so that registers hold what there is.

Legend: K fusions, C channels, D thickness, H×W pixels, B pixels of a tile, P channels padded to a power of two.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from torch_utils.ops.chain import LARGEST, Layer

TILE, WARPS = (8, 8), 4  # pixels down and to the right. No register spills on 9.0; not tuned, for no GPU was at hand
LEAST = 16  # of each side of a product on tensor cores


@triton.jit
def _clip(x, largest):
    return tl.where(x > largest, largest, tl.where(x < -largest, -largest, x))


@triton.jit
def _layer(x, weights, biases, IN: tl.constexpr, OUT: tl.constexpr):
    """x [B,IN] -> [B,OUT]. The weights lie inputs first."""
    inputs, outputs = tl.arange(0, IN), tl.arange(0, OUT)
    weight = tl.load(weights + inputs[:, None] * OUT + outputs[None, :])
    return tl.dot(x.to(weight.dtype), weight, input_precision="ieee") + tl.load(biases + outputs)[None, :]


@triton.jit
def _two_layers(x, weights, biases, clamp, IN: tl.constexpr, MID: tl.constexpr, OUT: tl.constexpr, CHUNK: tl.constexpr):
    """x [B,IN] -> [B,MID] -> [B,OUT], each with its leaky ReLU and clamp. The hidden layer is never materialised."""
    inputs, some, outputs = tl.arange(0, IN), tl.arange(0, CHUNK), tl.arange(0, OUT)
    x = x.to(weights.dtype.element_ty)
    y = tl.full([x.shape[0], OUT], 0.0, tl.float32) + tl.load(biases + MID + outputs)[None, :]
    for first in range(0, MID, CHUNK):
        weight = tl.load(weights + inputs[:, None] * MID + (first + some)[None, :])
        part = tl.dot(x, weight, input_precision="ieee") + tl.load(biases + first + some)[None, :]
        part = _clip(tl.where(part < 0, part * 0.2, part), clamp).to(weight.dtype)
        weight = tl.load(weights + IN * MID + (first + some)[:, None] * OUT + outputs[None, :])
        y = tl.dot(part, weight, y, input_precision="ieee")
    return _clip(tl.where(y < 0, y * 0.2, y), clamp)


@triton.jit
def _fusion(rows, cols, h, w, height, width, stride_h, stride_w, C: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    """[B,P]: half the dot product over the thickness (paper section 3.2); 0 beyond the C channels and the window."""
    c = tl.arange(0, P)
    rows += (c * D)[None, :] * stride_h + h[:, None]
    cols += (c * D)[None, :] * stride_w + w[:, None]
    x = tl.full([h.shape[0], w.shape[0], P], 0.0, tl.float32)
    for d in tl.range(0, D, num_stages=3):
        row = tl.load(rows + d * stride_h, mask=(h < height)[:, None] & (c < C)[None, :], other=0.0)
        col = tl.load(cols + d * stride_w, mask=(w < width)[:, None] & (c < C)[None, :], other=0.0)
        x += row[:, None, :] * col[None, :, :]
    return tl.reshape(x * 0.5, [h.shape[0] * w.shape[0], P])


@triton.jit
def _paint(
    rows,
    cols,
    weights,
    biases,
    image,
    height,
    width,
    stride_h,
    stride_w,
    summed,
    decoders,
    clamp,
    largest,
    channels,
    C: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    OUT: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    no_clamp = float("inf")
    h = tl.program_id(0) * DOWN + tl.arange(0, DOWN)
    w = tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
    x = tl.full([DOWN * ACROSS, P], 0.0, tl.float32)
    for k in range(summed + decoders):
        x += _fusion(rows, cols, h, w, height, width, stride_h, stride_w, C, P, D)
        if k >= summed:
            x = _clip(x, largest)
            x = _layer(x, weights, biases, P, 2 * P)
            x = tl.where(x < 0, x * 0.2, x)
            x = _two_layers(x, weights + 2 * P * P, biases + 2 * P, no_clamp, 2 * P, 4 * P, 2 * P, CHUNK)
            x = _layer(x, weights + 18 * P * P, biases + 8 * P, 2 * P, P)
            x = tl.where(x < 0, x * 0.2, x)
            weights += 20 * P * P
            biases += 9 * P
        rows += C * D * stride_h
        cols += C * D * stride_w
    colours = _layer(x, weights, biases, P, OUT)
    x = _two_layers(x, weights + P * OUT, biases + OUT, clamp, P, 4 * P, 4 * P, CHUNK)
    weights += P * OUT + 20 * P * P
    biases += OUT + 8 * P
    colours += _clip(_layer(x, weights, biases, 4 * P, OUT), clamp)
    x = _two_layers(x, weights + 4 * P * OUT, biases + OUT, clamp, 4 * P, 2 * P, 2 * P, CHUNK)
    weights += 4 * P * OUT + 12 * P * P
    biases += OUT + 4 * P
    colours += _clip(_layer(x, weights, biases, 2 * P, OUT), clamp)
    o = tl.arange(0, OUT)
    colours = tl.reshape(colours, [DOWN, ACROSS, OUT])
    place = image + (o[None, None, :].to(tl.int64) * height + h[:, None, None]) * width + w[None, :, None]
    tl.store(place, colours, mask=((h < height)[:, None] & (w < width)[None, :])[:, :, None] & (o < channels))


class PixelKernel:
    """As torch_utils.ops.pixel_path.PixelPath, for layers in half types on a CUDA device."""

    def __init__(self, layers: Sequence[Layer], summed: int, *, tile: tuple[int, int] = TILE, warps: int = WARPS):
        self.tile, self.warps = tile, warps
        self.channels, self.decoders, self.summed = layers[0].weight.shape[1], (len(layers) - 7) // 4, summed
        self.outputs = len(layers[-1].bias)
        self.colours = triton.next_power_of_2(max(self.outputs, LEAST))
        self.padded = triton.next_power_of_2(max(self.channels, LEAST))
        self.clamp = layers[-1].clamp
        wide = [self._pad(layer) for layer in layers]
        self.weights = torch.cat([weight.mT.flatten() for weight, _ in wide])
        self.biases = torch.cat([bias for _, bias in wide]).float()

    def _pad(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Weight and bias with zeros behind, as many times wider as the channels become; colours to a power of two."""
        outputs, inputs = layer.weight.shape
        more_inputs = inputs // self.channels * self.padded - inputs
        more_outputs = (self.colours if layer.branch else outputs // self.channels * self.padded) - outputs
        if not (more_inputs or more_outputs):
            return layer.weight, layer.bias  # F.pad would copy them, and starting a kernel takes longer than its work
        return F.pad(layer.weight, (0, more_inputs, 0, more_outputs)), F.pad(layer.bias, (0, more_outputs))

    def __call__(self, rows: Tensor, cols: Tensor) -> Tensor:
        rows, cols = (x if _even(x) else x.contiguous() for x in (rows, cols))
        height, width = rows.shape[3], cols.shape[3]
        image = rows.new_empty(self.outputs, height * width)
        half = self.weights.dtype == torch.float16
        grid = triton.cdiv(height, self.tile[0]), triton.cdiv(width, self.tile[1])
        with torch.cuda.device_of(rows):
            _paint[grid](
                rows,
                cols,
                self.weights,
                self.biases,
                image,
                height,
                width,
                rows.stride(2),
                cols.stride(2),
                self.summed,
                self.decoders,
                self.clamp,
                LARGEST if half else math.inf,
                self.outputs,
                C=self.channels,
                P=self.padded,
                D=rows.shape[2],
                OUT=self.colours,
                DOWN=self.tile[0],
                ACROSS=self.tile[1],
                CHUNK=min(32, self.padded),
                num_warps=self.warps,
            )
        return image


def _even(x: Tensor) -> bool:
    """Whether [K,C,D,R] is a window of contiguous lines."""
    return x.stride(3) == 1 and x.stride(1) == x.shape[2] * x.stride(2) and x.stride(0) == x.shape[1] * x.stride(1)
