"""Stage two: lines become pixels. Its cost grows with H·W, and no pixel depends on its neighbours.

Legend: N images, H×W pixels, D thickness, C channels, K fusions. Features are [N,H·W,C].
"""

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from torch_utils.ops.chain import Folded
from torch_utils.precision import full_precision
from torch_utils.recompute import by_parts
from training.networks import fused_pixels
from training.networks.layers import EqualLinear, Head, Layer, SynthesisLayer
from training.networks.lines import Lines

FUSION_GAIN = 0.5  # of the dot product of row and column (paper section 3.2); rows are multiplied by it beforehand


def part_size(device: torch.device) -> int:
    """Return how many positions a backward pass recomputes at a time.

    On a CPU, the widest features of a part are 2 MB with the paper's widths. On a GPU, a part keeps 5 KiB for each
    position, a thirteenth of the memory: smaller parts would not keep the GPU busy.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2**16
    return 4096 if device.type == "cpu" else 2**18


def fuse(rows: Tensor, cols: Tensor) -> Tensor:
    """[N,H,D,C] x [N,W,D,C] -> [N,H·W,C]: the dot product over the thickness D.

    At least in float32: the lines are sums over all blocks, and a product of two of them exceeds float16's range.
    """
    with full_precision(rows):
        return torch.einsum("nhdc,nwdc->nhwc", rows, cols).flatten(1, 2)


class Decoder(nn.Sequential):
    """[N,P,C] -> [N,P,C]: the per-pixel MLP C→2C→4C→2C→C, a leaky ReLU after every layer (supplement, table 2)."""

    def __init__(self, channels: int):
        widths = [channels, 2 * channels, 4 * channels, 2 * channels, channels]
        super().__init__(*(EqualLinear(i, o, act="lrelu") for i, o in itertools.pairwise(widths)))


class RefinementBlock(nn.Module):
    """[N,P,I], w [N,w_dim] -> [N,P,O] and its contribution to the colours [N,P,img_channels] (supplement, table 1)."""

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

    recompute "pixels" or "all": compute some rows of an image at a time, and again in the backward pass, which keeps
    only the lines. The C++ of fused_pixels always works that way.
    """

    def __init__(self, num_fusions: int, channels: int, img_channels: int, w_dim: int, *, decoders: bool):
        super().__init__()
        make = Decoder if decoders else lambda channels: nn.Sequential()
        self.decoders = nn.ModuleList(make(channels) for _ in range(num_fusions - 1))
        self.decoder_last = Decoder(channels)
        self.decoder_img = EqualLinear(channels, img_channels)
        self.refinement = nn.ModuleList(
            [
                RefinementBlock(channels, 4 * channels, img_channels, w_dim),
                RefinementBlock(4 * channels, 2 * channels, img_channels, w_dim),
            ]
        )

    def forward(self, lines: Lines, w: Tensor) -> Tensor:
        rows, cols = lines.rows * FUSION_GAIN, lines.cols
        if fused_pixels.find_kernels(self.impl, rows):
            with full_precision(w):
                return fused_pixels.fused_pixels(rows, cols, self.folded(w), impl=self.impl)
        if self.recompute == "none" or not len(w):
            return self.window(rows, cols, w)
        height, width = rows.shape[2], cols.shape[2]
        size = part_size(w.device)
        images, count = max(1, size // (height * width)), max(1, size // width)  # several images, or rows of one
        groups = zip(rows.split(images, 1), cols.split(images, 1), w.split(images), strict=True)
        parts = [(part, col, style) for row, col, style in groups for part in row.split(count, 2)]
        made = by_parts(self.window, parts, self.parameters())
        bands = -(-height // count)
        return torch.cat([torch.cat(made[i : i + bands], dim=2) for i in range(0, len(made), bands)])

    def window(self, rows: Tensor, cols: Tensor, w: Tensor) -> Tensor:
        """rows [K,N,H,D,C] times FUSION_GAIN, cols [K,N,W,D,C], w [N,w_dim] -> [N,img_channels,H,W]."""
        x = fuse(rows[0], cols[0])
        for decoder, row, col in zip(self.decoders, rows[1:], cols[1:], strict=True):
            x = decoder(x) + fuse(row, col)
        x = self.decoder_last(x)
        image = self.decoder_img(x)
        for block in self.refinement:
            x, colours = block(x, w)
            image = image + colours
        return image.unflatten(1, (rows.shape[2], cols.shape[2])).movedim(-1, 1)

    def folded(self, w: Tensor, imap: Callable[..., Iterable] = map) -> list[Folded]:
        """Fold the layers of `window` for w […,w_dim], as a chain whose terms are the fusions after each decoder.

        `imap` maps a function over the layers, for instance in threads.
        """
        layers = [*itertools.chain(*self.decoders), *self.decoder_last, self.decoder_img]
        layers += [layer for block in self.refinement for layer in (*block.layers, block.head)]
        made = dict(zip(layers, imap(lambda layer: layer.folded(w), layers), strict=True))
        for decoder in filter(len, self.decoders):
            made[decoder[-1]] = made[decoder[-1]]._replace(term=True)
        made[self.decoder_img] = made[self.decoder_img]._replace(branch=True)
        return list(made.values())
