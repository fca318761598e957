"""Stage one: positions become thick row and column lines. Its cost grows with H + W.

Legend: N images, H×W pixels, D thickness, C channels, K fusions, w the style dimension.
A line is [N,H,D,C] (rows) or [N,W,D,C] (columns). No layer looks from one position at another, so both lines travel as
one tensor [N,(H+W)·D,C] through the layers, and any set of positions can be computed on its own.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_utils.precision import full_precision
from torch_utils.recompute import by_parts, recomputed
from training.networks.layers import EqualLinear, Head, Layer, SynthesisLayer


class Lines(NamedTuple):
    """The summed lines after every fusion: rows [K,N,H,D,C], cols [K,N,W,D,C], float32 (float64 in a float64 model)."""

    rows: Tensor
    cols: Tensor

    def window(self, rows: slice, cols: slice) -> "Lines":
        """The lines of a window of the picture, as views."""
        return Lines(self.rows[:, :, rows], self.cols[:, :, cols])


class FourierInput(nn.Module):
    """rows [H], cols [W], w [N,w_dim] -> [N,(H+W)·D,C]: sines and cosines of the positions, scaled by the style.

    Paper section 3.2. Positions in float32 give phases in float32, as released. Positions in float64 give them to 1e-7
    of a cycle however far apart or close together they lie, and the rest goes on in the dtype of the weights.
    """

    def __init__(self, channels: int, thickness: int, w_dim: int, bandwidth: float):
        super().__init__()
        self.shape = (thickness, channels)
        self.register_buffer("freqs", torch.randn(thickness, channels // 2) * bandwidth)  # cycles per picture
        self.weight = nn.Parameter(torch.randn(2, thickness, channels))  # [rows or columns, D, C]
        self.affine = EqualLinear(w_dim, 2 * thickness * channels, bias_init=1)

    def features(self, positions: Tensor) -> Tensor:
        """[R] -> [R,D,C] in the dtype of the weights."""
        # The order of these products is the released one: phases reach 300, and another rounding shows in the picture.
        dtype = torch.promote_types(positions.dtype, self.weight.dtype)
        turns = positions.to(dtype)[:, None, None] * self.freqs.to(dtype)
        if dtype != self.weight.dtype:
            turns = (turns - turns.round()).to(self.weight.dtype)  # whole cycles go while all digits are there
        phase = turns * (2 * math.pi)
        return torch.cat([phase.sin(), (phase + math.pi / 2).sin()], dim=-1)

    def scale(self, style: Tensor) -> Tensor:
        """style [N,2·D·C] -> [N,2,D,C]: the factors of the features of rows and of columns."""
        return self.weight * style.unflatten(1, (2, *self.shape)) / math.sqrt(self.shape[1])

    def forward(self, rows: Tensor, cols: Tensor, w: Tensor) -> Tensor:
        with full_precision(w):
            scale = self.scale(self.affine(w))
        lines = [self.features(t) * scale[:, axis, None] for axis, t in enumerate((rows, cols))]
        return torch.cat(lines, dim=1).flatten(1, 2)


class LineBlock(nn.Module):
    """One or two synthesis layers and, where the lines are summed, a head. All at full length: nothing is upsampled."""

    def __init__(self, inputs: int, outputs: int, line_channels: int, w_dim: int, *, num_layers: int, head: bool):
        super().__init__()
        widths = [inputs] + [outputs] * num_layers
        self.layers = nn.ModuleList(SynthesisLayer(i, o, w_dim) for i, o in itertools.pairwise(widths))
        self.head = Head(outputs, line_channels, w_dim) if head else None


class LineSynthesis(Layer):
    """ws [N,num_ws,w_dim], rows [H], cols [W] -> Lines. Paper section 3.2, with the layer-wise heads of section 3.3.

    recompute "all": keep nothing for the backward pass, which computes one image's lines at a time again, and each of
    their layers once more.
    """

    def __init__(
        self,
        widths: list[int],
        line_channels: int,
        thickness: int,
        w_dim: int,
        bandwidth: float,
        *,
        every_block: bool,
    ):
        """`widths`: channels of the blocks. `every_block`: heads from the second block on, else on the last alone."""
        super().__init__()
        self.thickness = thickness
        self.input = FourierInput(widths[0], thickness, w_dim, bandwidth)
        self.blocks = nn.ModuleList()
        last = len(widths) - 1
        for i, width in enumerate(widths):
            head = i > 0 and (every_block or i == last)
            block = LineBlock(widths[max(i - 1, 0)], width, line_channels, w_dim, num_layers=min(i, 1) + 1, head=head)
            self.blocks.append(block)

    def styled(self) -> Iterator[tuple[list[tuple[SynthesisLayer, int]], tuple[Head, int] | None]]:
        """Block by block: its layers and its head, if any, each with the number of the style in ws that it reads."""
        for i, block in enumerate(self.blocks):
            # As released: the first two blocks both start at ws[1], each later one two further on, and a head reads the
            # style after its block's last layer, which is the first style of the next block.
            first = max(2 * i - 1, 1)
            layers = [(layer, first + j) for j, layer in enumerate(block.layers)]
            yield layers, None if block.head is None else (block.head, first + len(layers))

    def forward(self, ws: Tensor, rows: Tensor, cols: Tensor) -> Lines:
        if self.recompute == "all" and len(ws):
            parts = [(w, rows, cols) for w in ws.split(1)]
            lines = torch.cat(by_parts(self.summed, parts, self.parameters()), dim=1)
        else:
            lines = self.summed(ws, rows, cols)
        return Lines(*lines.split([len(rows), len(cols)], dim=2))

    def summed(self, ws: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """[K,N,H+W,D,C]: the sums of the lines after every fusion."""
        call = recomputed if self.recompute == "all" else SynthesisLayer.__call__
        x = self.input(rows, cols, ws[:, 0])
        total, sums = None, []
        for layers, head in self.styled():
            for layer, style in layers:
                x = call(layer, x, ws[:, style])
            if head is not None:
                y = head[0](x, ws[:, head[1]])
                total = y if total is None else total + y
                sums.append(total)
        return torch.stack(sums).unflatten(2, (-1, self.thickness))
