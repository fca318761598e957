"""Stage two: lines become pixels. Its cost grows with H·W, and no pixel looks at its neighbour.

Legend: N images, H×W pixels, D thickness, C channels, K fusions. Features are [N,H·W,C].
"""

import itertools

import torch
from torch import Tensor, nn

from torch_utils.ops import pixels as pixels_op
from torch_utils.ops.chain import Layer as ChainLayer
from torch_utils.precision import full_precision
from torch_utils.recompute import by_parts
from training.networks.layers import EqualLinear, Head, Layer, SynthesisLayer
from training.networks.lines import Lines


def part_size(device: str) -> int:
    """How many positions a backward pass computes again at once: on a CPU, 2 MB of the paper's widest features."""
    return 4096 if device == "cpu" else 2**18


def fuse(rows: Tensor, cols: Tensor) -> Tensor:
    """[N,H,D,C] x [N,W,D,C] -> [N,H·W,C]: half the dot product over the thickness D (paper section 3.2).

    At least in float32: the lines are sums over all blocks, and a product of two of them passes float16's range.
    """
    with full_precision(rows):
        return torch.einsum("nhdc,nwdc->nhwc", rows * 0.5, cols).flatten(1, 2)


class Decoder(nn.Sequential):
    """[N,P,C] -> [N,P,C]: the per-pixel MLP C→2C→4C→2C→C with leaky ReLUs, the last too (supplement, table 2)."""

    def __init__(self, channels: int):
        widths = [channels, 2 * channels, 4 * channels, 2 * channels, channels]
        super().__init__(*(EqualLinear(i, o, act="lrelu") for i, o in itertools.pairwise(widths)))


class RefinementBlock(nn.Module):
    """[N,P,I] -> [N,P,O] and its contribution to the colours [N,P,img_channels] (supplement, table 1)."""

    def __init__(self, inputs: int, outputs: int, img_channels: int, w_dim: int):
        super().__init__()
        self.layers = nn.ModuleList([SynthesisLayer(inputs, outputs, w_dim), SynthesisLayer(outputs, outputs, w_dim)])
        self.head = Head(outputs, img_channels, w_dim)

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = layer(x, w)
        return x, self.head(x, w)


class PixelSynthesis(Layer):
    """Lines of any window, w [N,w_dim] -> [N,img_channels,H,W]. Paper section 3.3.

    recompute "pixels" or "all": compute some rows of a picture at a time, and again in the backward pass, which keeps
    only the lines. Where torch_utils.ops.pixels has C++ code, that is how it works in any case.
    """

    def __init__(self, num_fusions: int, channels: int, img_channels: int, w_dim: int, *, decoders: bool):
        super().__init__()
        self.decoders = nn.ModuleList(Decoder(channels) if decoders else nn.Identity() for _ in range(num_fusions - 1))
        self.decoder_last = Decoder(channels)
        self.decoder_img = EqualLinear(channels, img_channels)
        self.refinement = nn.ModuleList(
            [
                RefinementBlock(channels, 4 * channels, img_channels, w_dim),
                RefinementBlock(4 * channels, 2 * channels, img_channels, w_dim),
            ]
        )

    def forward(self, lines: Lines, w: Tensor) -> Tensor:
        if pixels_op.choose(self.impl, lines.rows):
            with full_precision(w):
                return pixels_op.pixels(*lines, self.folded(w), impl=self.impl)
        if self.recompute == "none" or not len(w):
            return self.window(*lines, w)
        height, width = lines.rows.shape[2], lines.cols.shape[2]
        size = part_size(w.device.type)
        images, count = max(1, size // (height * width)), max(1, size // width)  # several images, or rows of one
        groups = zip(lines.rows.split(images, 1), lines.cols.split(images, 1), w.split(images), strict=True)
        parts = [(part, cols, style) for rows, cols, style in groups for part in rows.split(count, 2)]
        made = by_parts(self.window, parts, self.parameters())
        bands = -(-height // count)
        return torch.cat([torch.cat(made[i : i + bands], dim=2) for i in range(0, len(made), bands)])

    def window(self, rows: Tensor, cols: Tensor, w: Tensor) -> Tensor:
        """rows [K,N,H,D,C], cols [K,N,W,D,C], w [N,w_dim] -> [N,img_channels,H,W]."""
        x = fuse(rows[0], cols[0])
        for decoder, row, col in zip(self.decoders, rows[1:], cols[1:], strict=True):
            x = decoder(x) + fuse(row, col)
        x = self.decoder_last(x)
        image = self.decoder_img(x)
        for block in self.refinement:
            x, colours = block(x, w)
            image = image + colours
        return image.unflatten(1, (rows.shape[2], cols.shape[2])).movedim(-1, 1)

    def folded(self, w: Tensor) -> list[ChainLayer]:
        """The layers for styles w [N,w_dim], as the operation takes them."""
        layers = []
        for decoder in self.decoders:
            made = [layer.folded() for layer in decoder.children()]
            layers += made[:-1] + [layer._replace(terms=1) for layer in made[-1:]]
        layers += [layer.folded() for layer in self.decoder_last]
        layers.append(self.decoder_img.folded()._replace(branch=True))
        for block in self.refinement:
            layers += [layer.folded(w) for layer in (*block.layers, block.head)]
        return layers
