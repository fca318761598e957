"""A generator made ready to paint one picture: weights modulated once, then pure functions, `line` and `pixels`.

Legend: C channels, D thickness, K fusions, R positions of a line, P pixels. The arithmetic is that of
training.networks. Here channels come first and positions last, [C,…,P]: a layer is weight @ x, and the fusion of two
lines is a batched product without transposing. A leaky ReLU commutes with its positive gain, so gains are folded into
weights and biases.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_utils.ops.bias_act import ACTIVATIONS
from torch_utils.ops.chain import Chain, Layer
from torch_utils.ops.pixel_path import PixelPath
from training.networks import Generator
from training.networks.layers import CLAMP, EqualLinear, Head


def ready(module: nn.Module, dtype: torch.dtype, w: Tensor | None = None) -> Layer:
    """EqualLinear, SynthesisLayer or Head, the last two with their style w [w_dim], as a layer of a chain."""
    linear = isinstance(module, Head) or (isinstance(module, EqualLinear) and module.act == "linear")
    gain = ACTIVATIONS["linear" if linear else "lrelu"].gain
    if isinstance(module, EqualLinear):
        weight, bias = module.weight * (module.weight_gain * gain), module.bias * (module.bias_gain * gain)
    else:
        weight, bias = module.weight * style(module.affine, w), module.bias * gain
        if linear:
            weight *= module.style_gain
        else:  # demodulation
            weight *= gain * (torch.linalg.vector_norm(weight, dim=1, keepdim=True).square() + 1e-8).rsqrt()
    clamp = math.inf if isinstance(module, EqualLinear) else CLAMP
    return Layer(weight.to(dtype), bias.to(dtype), 1.0 if linear else 0.2, clamp)


def style(affine: EqualLinear, w: Tensor) -> Tensor:
    """affine(w) for one w [w_dim] -> [I]. The gain goes to w: a scaled copy of the weights would cost more than all."""
    return F.linear(w * affine.weight_gain, affine.weight, affine.bias * affine.bias_gain)


class Painter:
    """Paints the picture of w [num_ws,w_dim]: `line` for its rows and columns, then `pixels`.

    `dtype` is that of the matrix products in the layers; sums of lines, features and colours are float32 at least.
    `imap` makes the weights of the layers (see engine.workers). `impl` as in torch_utils.ops.pixel_path; by default,
    that of G.
    """

    def __init__(self, G: Generator, w: Tensor, dtype: torch.dtype, imap: Callable = map, impl: str | None = None):
        impl = impl or G.synthesis.pixels.impl
        lines, pixels = G.synthesis.lines, G.synthesis.pixels
        self.dtype, self.device, self.thickness = dtype, w.device, lines.thickness
        self.input = lines.input
        (self.scale,) = imap(lambda first: lines.input.scale(style(lines.input.affine, first)[None])[0], [w[0]])

        line, colour = [], []  # a module, its style, and what a Layer says of branch and terms
        for layers, head in lines.styled():
            line += [(layer, w[i], {}) for layer, i in layers]
            line += [(head[0], w[head[1]], {"branch": True})] if head else []
        summed = 0  # fusions that are added before any decoder
        for decoder in pixels.decoders:
            layers = [] if isinstance(decoder, nn.Identity) else list(decoder)
            colour += [(layer, None, {"terms": int(layer is layers[-1])}) for layer in layers]
            summed += not layers
        colour += [(layer, None, {}) for layer in pixels.decoder_last]
        colour.append((pixels.decoder_img, None, {"branch": True}))
        for block in pixels.refinement:
            colour += [(layer, w[-1], {}) for layer in block.layers]
            colour.append((block.head, w[-1], {"branch": True}))

        made = list(imap(lambda part: ready(part[0], dtype, part[1])._replace(**part[2]), line + colour))
        self.lines = Chain(made[: len(line)], every=True, impl="auto" if impl == "triton" else impl, imap=imap)
        self.pixels = PixelPath(made[len(line) :], summed, impl=impl, imap=imap)

    def line(self, axis: int, positions: Tensor) -> Tensor:
        """float64 [R] -> [K,C,D,R]: lines of rows (axis 0) or columns (axis 1), summed up to each fusion."""
        x = self.input.features(positions) * self.scale[axis]
        sums = self.lines(x.permute(2, 1, 0).flatten(1).to(self.dtype))
        return sums.unflatten(2, (-1, len(positions)))
