"""Stage one: positions become thick row and column lines. Its cost grows with H + W.

Legend: N images, H×W pixels, D thickness, C channels, K fusions, w the style dimension.
A line is [N,H,D,C] (rows) or [N,W,D,C] (columns). No layer mixes positions, so both lines pass the layers as one tensor
[N,(H+W)·D,C], and any set of positions can be computed separately.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_utils.ops.chain import Folded
from torch_utils.recompute import by_parts, recomputed
from training.networks.layers import Affine, Head, Layer, ModulatedLayer, SynthesisLayer


class Lines(NamedTuple):
    """The summed lines after every fusion: rows [K,N,H,D,C], cols [K,N,W,D,C], float32 (float64 in a float64 model)."""

    rows: Tensor
    cols: Tensor

    def window(self, rows: slice, cols: slice) -> "Lines":
        """Return the lines of a window of the image, as views."""
        return Lines(self.rows[:, :, rows], self.cols[:, :, cols])


class FourierInput(nn.Module):
    """rows [H] or [N,H], cols [W] or [N,W], w [N,w_dim] -> [N,(H+W)·D,C]: sines of the positions, scaled by the style.

    Paper section 3.2. float32 positions give float32 phases, as released. float64 positions give phases with an error
    of 1e-7 cycles at any zoom; what follows is computed in the dtype of the weights.
    """

    def __init__(self, channels: int, thickness: int, w_dim: int, bandwidth: float):
        super().__init__()
        self.shape = (thickness, channels)
        self.register_buffer("freqs", torch.randn(thickness, channels // 2) * bandwidth)  # cycles per image
        self.weight = nn.Parameter(torch.randn(2, thickness, channels))  # [rows or columns, D, C]
        self.affine = Affine(w_dim, 2 * thickness * channels)

    def features(self, positions: Tensor) -> Tensor:
        """[…,R] -> […,R,D,C] in the dtype of the weights."""
        # The order of these products is the released one: phases reach 300, where rounding shows in the image.
        dtype = torch.promote_types(positions.dtype, self.weight.dtype)
        turns = positions.to(dtype)[..., None, None] * self.freqs.to(dtype)
        if dtype != self.weight.dtype:
            turns = (turns - turns.round()).to(self.weight.dtype)  # drop whole cycles before the digits are cut
        phase = turns * (2 * math.pi)
        return torch.cat([phase.sin(), (phase + math.pi / 2).sin()], dim=-1)

    def scale(self, w: Tensor) -> Tensor:
        """w […,w_dim] -> […,2,D,C]: the factors of the features of rows and of columns."""
        return self.weight * self.affine(w).unflatten(-1, (2, *self.shape)) / math.sqrt(self.shape[1])

    def forward(self, rows: Tensor, cols: Tensor, w: Tensor) -> Tensor:
        scale = self.scale(w)
        lines = [self.features(t) * scale[:, axis, None] for axis, t in enumerate((rows, cols))]
        return torch.cat(lines, dim=1).flatten(1, 2)


class LineBlock(Layer):
    """[N,P,I], one style per layer and head -> [N,P,O] and its contribution to the lines [N,P,C], if it has a head.

    One or two synthesis layers, then a head where the lines are summed. Nothing is upsampled.
    """

    def __init__(self, inputs: int, outputs: int, line_channels: int, w_dim: int, *, num_layers: int, head: bool):
        super().__init__()
        widths = [inputs] + [outputs] * num_layers
        self.layers = nn.ModuleList(SynthesisLayer(i, o, w_dim) for i, o in itertools.pairwise(widths))
        self.head = Head(outputs, line_channels, w_dim) if head else None

    def forward(self, x: Tensor, styles: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        call = recomputed if self.recompute == "all" else SynthesisLayer.__call__
        for layer, w in zip(self.layers, styles, strict=False):
            x = call(layer, x, w)
        return x, None if self.head is None else self.head(x, styles[len(self.layers)])

    def sequence(self) -> list[ModulatedLayer]:
        """Return the layers and the head, in the order of their styles."""
        return [*self.layers, self.head] if self.head else [*self.layers]


class LineSynthesis(Layer):
    """ws [N,num_ws,w_dim], rows [H] or [N,H], cols [W] or [N,W] -> Lines. Paper sections 3.2 and, for the heads, 3.3.

    recompute "all": keep nothing for the backward pass, which recomputes the lines of one image at a time, and each of
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

    def forward(self, ws: Tensor, rows: Tensor, cols: Tensor) -> Lines:
        if self.recompute == "all" and len(ws):
            axes = (t.expand(len(ws), -1).split(1) for t in (rows, cols))
            parts = list(zip(ws.split(1), *axes, strict=True))
            lines = torch.cat(by_parts(self.summed, parts, self.parameters()), dim=1)
        else:
            lines = self.summed(ws, rows, cols)
        return Lines(*lines.split([rows.shape[-1], cols.shape[-1]], dim=2))

    def summed(self, ws: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Return the sums [K,N,H+W,D,C] of the lines after every fusion."""
        x = self.input(rows, cols, ws[:, 0])
        sums = []
        for block, styles in self.styled(ws.unbind(1)):
            x, lines = block(x, styles)
            if lines is not None:
                sums.append(sums[-1] + lines if sums else lines)
        return torch.stack(sums).unflatten(2, (-1, self.thickness))

    def styled(self, ws: Sequence[Tensor]) -> Iterator[tuple[LineBlock, Sequence[Tensor]]]:
        """Yield each block with the styles of its layers and its head, as released.

        The first two blocks start at ws[1], each later one two styles after its predecessor. So a head shares its style
        with the first layer of the next block.
        """
        for i, block in enumerate(self.blocks):
            first = max(2 * i - 1, 1)
            yield block, ws[first : first + len(block.layers) + 1]

    def folded(self, ws: Tensor, imap: Callable[..., Iterable] = map) -> list[Folded]:
        """Fold all layers for ws [num_ws,w_dim]; `imap` maps a function over them, for instance in threads."""
        pairs = [pair for block, styles in self.styled(ws) for pair in zip(block.sequence(), styles, strict=False)]
        return list(imap(lambda pair: pair[0].folded(pair[1]), pairs))
