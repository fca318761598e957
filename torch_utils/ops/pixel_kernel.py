"""Lines to picture in one Triton kernel, for inference on GPUs: a pixel's features never leave the processor.

Each program paints `BLOCK` pixels of a row: it reads their lines, passes them through all decoders and the refinement
with weights that stay in the cache, and writes their colours. Products are of the weights' dtype, sums are float32.

Legend: K fusions, C channels, D thickness, H×W pixels.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from torch_utils.ops.chain import LARGEST, Layer

BLOCK, WARPS = 64, 4  # pixels; not tuned, for no GPU was at hand
LEAST = 16  # of each side of a product on tensor cores
DTYPES = (torch.float16, torch.bfloat16)


@triton.jit
def _layer(x, weights, biases, at_w, at_b, clamp, IN: tl.constexpr, OUT: tl.constexpr, LINEAR: tl.constexpr):
    """x [B,IN] -> [B,OUT]. The weights lie at `at_w`, inputs first, the biases at `at_b`."""
    inputs, outputs = tl.arange(0, IN), tl.arange(0, OUT)
    weight = tl.load(weights + at_w + inputs[:, None] * OUT + outputs[None, :])
    y = tl.dot(x.to(weight.dtype), weight, input_precision="ieee") + tl.load(biases + at_b + outputs)[None, :]
    if not LINEAR:
        y = tl.where(y < 0, y * 0.2, y)
    return tl.where(y > clamp, clamp, tl.where(y < -clamp, -clamp, y))


@triton.jit
def _fusion(
    rows, cols, k, h, w, wanted, stride_h, stride_w, C: tl.constexpr, P: tl.constexpr, D: tl.constexpr, B: tl.constexpr
):
    """[B,P]: half the dot product over the thickness (paper section 3.2); 0 beyond the C channels."""
    c = tl.arange(0, P)
    x = tl.full([B, P], 0.0, tl.float32)
    for d in range(D):
        at = ((k * C + c) * D + d).to(tl.int64)
        row = tl.load(rows + at * stride_h + h, mask=c < C, other=0.0)
        col = tl.load(cols + at[None, :] * stride_w + w[:, None], mask=wanted[:, None] & (c < C)[None, :], other=0.0)
        x += row[None, :] * col
    return x * 0.5


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
    B: tl.constexpr,
):
    no_clamp = float("inf")
    h = tl.program_id(0)
    w = tl.program_id(1) * B + tl.arange(0, B)
    wanted = w < width
    x = _fusion(rows, cols, 0, h, w, wanted, stride_h, stride_w, C, P, D, B)
    for k in range(1, summed + 1):
        x += _fusion(rows, cols, k, h, w, wanted, stride_h, stride_w, C, P, D, B)
    at_w = 0
    at_b = 0
    for k in range(decoders):
        x = tl.where(x > largest, largest, tl.where(x < -largest, -largest, x))
        y = _layer(x, weights, biases, at_w, at_b, no_clamp, P, 2 * P, False)
        y = _layer(y, weights, biases, at_w + 2 * P * P, at_b + 2 * P, no_clamp, 2 * P, 4 * P, False)
        y = _layer(y, weights, biases, at_w + 10 * P * P, at_b + 6 * P, no_clamp, 4 * P, 2 * P, False)
        x = _layer(y, weights, biases, at_w + 18 * P * P, at_b + 8 * P, no_clamp, 2 * P, P, False)
        if k + 1 < decoders:
            x += _fusion(rows, cols, summed + k + 1, h, w, wanted, stride_h, stride_w, C, P, D, B)
        at_w += 20 * P * P
        at_b += 9 * P
    colours = _layer(x, weights, biases, at_w, at_b, no_clamp, P, OUT, True)
    at_w += P * OUT
    at_b += OUT
    x = _layer(x, weights, biases, at_w, at_b, clamp, P, 4 * P, False)
    x = _layer(x, weights, biases, at_w + 4 * P * P, at_b + 4 * P, clamp, 4 * P, 4 * P, False)
    at_w += 20 * P * P
    at_b += 8 * P
    colours += _layer(x, weights, biases, at_w, at_b, clamp, 4 * P, OUT, True)
    at_w += 4 * P * OUT
    at_b += OUT
    x = _layer(x, weights, biases, at_w, at_b, clamp, 4 * P, 2 * P, False)
    x = _layer(x, weights, biases, at_w + 8 * P * P, at_b + 2 * P, clamp, 2 * P, 2 * P, False)
    colours += _layer(x, weights, biases, at_w + 12 * P * P, at_b + 4 * P, clamp, 2 * P, OUT, True)
    o = tl.arange(0, OUT)
    place = image + (o[None, :].to(tl.int64) * height + h) * width + w[:, None]
    tl.store(place, colours, mask=wanted[:, None] & (o < channels)[None, :])


class PixelPath:
    """rows [K,C,D,H] and cols [K,C,D,W], float32 -> colours float32 [img_channels,H·W], about [-1,1].

    layers: those of a Chain from features to colours: decoders of four, then the six of the refinement with its heads.
    summed: how many fusions are added to the first one before the first decoder
    """

    def __init__(self, layers: Sequence[Layer], summed: int):
        self.channels, self.decoders, self.summed = layers[0].weight.shape[1], (len(layers) - 7) // 4, summed
        self.outputs = len(layers[-1].bias)
        self.padded = triton.next_power_of_2(max(self.channels, LEAST))
        self.clamp = layers[-1].clamp
        wide = [self._pad(layer) for layer in layers]
        self.weights = torch.cat([weight.mT.flatten() for weight, _ in wide])
        self.biases = torch.cat([bias for _, bias in wide]).float()

    def _pad(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Weight and bias with zeros behind: as many times wider as the channels become, and colours to the least."""
        outputs, inputs = layer.weight.shape
        more_inputs = inputs // self.channels * self.padded - inputs
        more_outputs = (LEAST if layer.branch else outputs // self.channels * self.padded) - outputs
        return F.pad(layer.weight, (0, more_inputs, 0, more_outputs)), F.pad(layer.bias, (0, more_outputs))

    def __call__(self, rows: Tensor, cols: Tensor) -> Tensor:
        rows, cols = (x if _even(x) else x.contiguous() for x in (rows, cols))
        height, width = rows.shape[3], cols.shape[3]
        image = rows.new_empty(self.outputs, height * width)
        half = self.weights.dtype == torch.float16
        _paint[(height, triton.cdiv(width, BLOCK))](
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
            OUT=LEAST,
            B=BLOCK,
            num_warps=WARPS,
        )
        return image


def _even(x: Tensor) -> bool:
    """Whether [K,C,D,R] is a window of contiguous lines."""
    return x.stride(3) == 1 and x.stride(1) == x.shape[2] * x.stride(2) and x.stride(0) == x.shape[1] * x.stride(1)
