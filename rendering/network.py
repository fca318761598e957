"""A generator made ready to paint one picture: weights modulated once, then pure functions, `line` and `pixels`.

Legend: C channels, D thickness, K fusions, R positions of a line, P pixels. The arithmetic is that of
training.networks. Here channels come first and positions last, [C,…,P]: a layer is weight @ x, and the fusion of two
lines is a batched product without transposing. A leaky ReLU commutes with its positive gain, so gains are folded into
weights and biases.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_utils.ops.bias_act import ACTIVATIONS
from training.networks import Generator
from training.networks.layers import CLAMP, EqualLinear, Head

LARGEST = 60_000.0  # features of the fusion can pass the end of float16, 65504


class Layer:
    """x [I,P] -> [O,P] in the dtype of the weights: affine, then leaky ReLU and clamp where the module has them."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, w: Tensor | None = None):
        """`module`: EqualLinear, SynthesisLayer or Head; the last two with their style w [w_dim]."""
        self.linear = isinstance(module, Head) or (isinstance(module, EqualLinear) and module.act == "linear")
        gain = ACTIVATIONS["linear" if self.linear else "lrelu"].gain
        if isinstance(module, EqualLinear):
            self.clamp = None
            weight, bias = module.weight * (module.weight_gain * gain), module.bias * (module.bias_gain * gain)
        else:
            self.clamp = CLAMP
            weight, bias = module.weight * style(module.affine, w), module.bias * gain
            if self.linear:
                weight *= module.style_gain
            else:  # demodulation
                weight *= gain * (torch.linalg.vector_norm(weight, dim=1, keepdim=True).square() + 1e-8).rsqrt()
        self.weight, self.bias = weight.to(dtype), bias.to(dtype)[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, self.weight, x)
        if not self.linear:
            F.leaky_relu_(y, 0.2)
        return y if self.clamp is None else y.clamp_(-self.clamp, self.clamp)


def style(affine: EqualLinear, w: Tensor) -> Tensor:
    """affine(w) for one w [w_dim] -> [I]. The gain goes to w: a scaled copy of the weights would cost more than all."""
    return F.linear(w * affine.weight_gain, affine.weight, affine.bias * affine.bias_gain)


class Painter:
    """Paints the picture of w [num_ws,w_dim]: `line` for its rows and columns, then `pixels`.

    `dtype` is that of the matrix products in the layers; sums of lines, features and colours are float32 at least.
    `imap` makes the weights of the layers (see engine.workers).
    """

    def __init__(self, G: Generator, w: Tensor, dtype: torch.dtype, imap: Callable = map):
        lines, pixels = G.synthesis.lines, G.synthesis.pixels
        self.dtype, self.wide = dtype, torch.promote_types(dtype, torch.float32)
        self.device, self.thickness = w.device, lines.thickness
        self.input = lines.input
        (self.scale,) = imap(lambda first: lines.input.scale(style(lines.input.affine, first)[None])[0], [w[0]])
        blocks = list(lines.styled())
        decoders = [() if isinstance(d, nn.Identity) else tuple(d) for d in (*pixels.decoders, pixels.decoder_last)]

        styles: dict[nn.Module, Tensor | None] = {pixels.decoder_img: None}
        styles |= {layer: None for decoder in decoders for layer in decoder}
        styles |= {layer: w[i] for layers, head in blocks for layer, i in [*layers, *([head] if head else [])]}
        styles |= {layer: w[-1] for block in pixels.refinement for layer in [*block.layers, block.head]}
        made = dict(zip(styles, imap(lambda layer: Layer(layer, dtype, styles[layer]), styles), strict=True))

        self.blocks = [([made[layer] for layer, _ in layers], head and made[head[0]]) for layers, head in blocks]
        self.decoders = [[made[layer] for layer in decoder] for decoder in decoders]
        self.decoder_img = made[pixels.decoder_img]
        self.refinement = [([made[layer] for layer in block.layers], made[block.head]) for block in pixels.refinement]

    def line(self, axis: int, positions: Tensor) -> Tensor:
        """float64 [R] -> [K,C,D,R]: lines of rows (axis 0) or columns (axis 1), summed up to each fusion."""
        x = self.input.features(positions) * self.scale[axis]
        x = x.permute(2, 1, 0).flatten(1).to(self.dtype)
        sums: list[Tensor] = []
        for layers, head in self.blocks:
            for layer in layers:
                x = layer(x)
            if head:
                y = head(x).to(self.wide)
                sums.append(sums[-1] + y if sums else y)
        return torch.stack(sums).unflatten(2, (-1, len(positions)))

    def pixels(self, fusions: Iterable[Tensor]) -> Tensor:
        """K features [C,P], as `fuse` and `fuse_points` make them -> colours [img_channels,P], about [-1,1]."""
        fusions = iter(fusions)
        x = next(fusions)
        for decoder, fusion in zip(self.decoders[:-1], fusions, strict=True):
            x = self.decode(decoder, x).to(self.wide).add_(fusion)
        x = self.decode(self.decoders[-1], x)
        colours = self.decoder_img(x).to(self.wide)
        for layers, head in self.refinement:
            for layer in layers:
                x = layer(x)
            colours += head(x)
        return colours

    def decode(self, layers: list[Layer], x: Tensor) -> Tensor:
        if not layers:
            return x
        x = x.clamp(-LARGEST, LARGEST).to(self.dtype) if self.dtype == torch.float16 else x.to(self.dtype)
        for layer in layers:
            x = layer(x)
        return x


def fuse(rows: Tensor, cols: Tensor) -> Iterator[Tensor]:
    """[K,C,D,H] and [K,C,D,W] -> K times [C,H·W]: half the dot product over the thickness (paper section 3.2)."""
    for row, col in zip(rows, cols, strict=True):
        yield torch.bmm((row * 0.5).mT, col).flatten(1)


def fuse_points(rows: Tensor, cols: Tensor) -> Iterator[Tensor]:
    """[P,K,D,C] and [P,K,D,C] -> K times [C,P]: as `fuse`, for points with a row and a column each."""
    yield from (rows * cols).sum(2).mul_(0.5).permute(1, 2, 0).contiguous()
