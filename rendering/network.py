"""A generator made ready to paint one picture: weights modulated once, then pure functions, `line` and `pixels`.

Legend: C channels, D thickness, K fusions, R positions of a line, P pixels. The arithmetic is that of
training.networks. Here channels come first and positions last, [C,…,P]: a layer is weight @ x, and the fusion of two
lines is a batched product without transposing. A leaky ReLU commutes with its positive gain, so gains are folded into
weights and biases.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_utils.build import say_once
from torch_utils.ops.bias_act import ACTIVATIONS
from torch_utils.ops.chain import Chain, Layer
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
    `imap` makes the weights of the layers (see engine.workers). `impl` as in torch_utils.ops.chain.
    """

    def __init__(self, G: Generator, w: Tensor, dtype: torch.dtype, imap: Callable = map, impl: str = "auto"):
        lines, pixels = G.synthesis.lines, G.synthesis.pixels
        self.dtype, self.device, self.thickness = dtype, w.device, lines.thickness
        self.input = lines.input
        (self.scale,) = imap(lambda first: lines.input.scale(style(lines.input.affine, first)[None])[0], [w[0]])

        line, colour = [], []  # a module, its style, and what a Layer says of branch and terms
        for layers, head in lines.styled():
            line += [(layer, w[i], {}) for layer, i in layers]
            line += [(head[0], w[head[1]], {"branch": True})] if head else []
        self.summed = 0  # fusions that are added before any decoder
        for decoder in pixels.decoders:
            layers = [] if isinstance(decoder, nn.Identity) else list(decoder)
            colour += [(layer, None, {"terms": int(layer is layers[-1])}) for layer in layers]
            self.summed += not layers
        colour += [(layer, None, {}) for layer in pixels.decoder_last]
        colour.append((pixels.decoder_img, None, {"branch": True}))
        for block in pixels.refinement:
            colour += [(layer, w[-1], {}) for layer in block.layers]
            colour.append((block.head, w[-1], {"branch": True}))

        made = list(imap(lambda part: ready(part[0], dtype, part[1])._replace(**part[2]), line + colour))
        self.lines = Chain(made[: len(line)], every=True, impl=impl, imap=imap)
        self.colours = Chain(made[len(line) :], impl=impl, imap=imap)
        self.kernel = kernel(made[len(line) :], self.summed) if impl == "auto" and w.device.type == "cuda" else None

    def line(self, axis: int, positions: Tensor) -> Tensor:
        """float64 [R] -> [K,C,D,R]: lines of rows (axis 0) or columns (axis 1), summed up to each fusion."""
        x = self.input.features(positions) * self.scale[axis]
        sums = self.lines(x.permute(2, 1, 0).flatten(1).to(self.dtype))
        return sums.unflatten(2, (-1, len(positions)))

    def window(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Lines [K,C,D,H] and [K,C,D,W] -> colours [img_channels,H·W], about [-1,1]."""
        if self.kernel:
            try:
                return self.kernel(rows, cols)
            except Exception as problem:  # Triton and the driver fail in many ways
                say_once(f"rendering goes on without its Triton kernel, which is slower: {problem}")
                self.kernel = None
        return self.pixels(fuse(rows, cols))

    def pixels(self, fusions: Iterable[Tensor]) -> Tensor:
        """K features [C,P], as `fuse` and `fuse_points` make them -> colours [img_channels,P], about [-1,1]."""
        fusions = iter(fusions)
        x = next(fusions)
        for _ in range(self.summed):
            x = x + next(fusions)
        return self.colours(x, fusions)


def kernel(layers: list[Layer], summed: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The kernel of pixel_path.py for these layers, or None where it does not serve."""
    try:
        from torch_utils.ops import pixel_path  # Triton comes with PyTorch for GPUs only
    except ImportError as problem:
        say_once(f"rendering goes on without its Triton kernel, which is slower: {problem}")
        return None
    return pixel_path.PixelPath(layers, summed) if layers[0].weight.dtype in pixel_path.DTYPES else None


def fuse(rows: Tensor, cols: Tensor) -> Iterator[Tensor]:
    """[K,C,D,H] and [K,C,D,W] -> K times [C,H·W]: half the dot product over the thickness (paper section 3.2)."""
    for row, col in zip(rows, cols, strict=True):
        yield torch.bmm((row * 0.5).mT, col).flatten(1)


def fuse_points(rows: Tensor, cols: Tensor) -> Iterator[Tensor]:
    """[P,K,D,C] and [P,K,D,C] -> K times [C,P]: as `fuse`, for points with a row and a column each."""
    yield from (rows * cols).sum(2).mul_(0.5).permute(1, 2, 0).contiguous()
