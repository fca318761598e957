"""INR-GAN: an MLP of the position on finer and finer grids, whose weights each image scales (Skorokhodov et al., 2021).

Legend: N images, H×W pixels, P = H·W, C channels, w the style. Features are [N,H,W,C]. Blocks are k = 4, 8, … up to the
side of the image; a block's grid has k×k cells, at least 32×32.
"""

import itertools
import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from torch_utils.ops.bias_act import bias_act
from torch_utils.precision import full_precision, product_dtype
from training.networks.base import Synthesis, SynthesisConfig
from training.networks.coords import interpolate
from training.networks.layers import EqualLinear, FreeHead, Layer

FIRST_GRID = 32  # cells along a side of the grid that blocks 4, 8, 16 and 32 share
FINE = 128  # from this grid on, random frequencies replace diagonal ones, and blocks may have a third layer


class INRGANConfig(SynthesisConfig):
    """The architecture of INR-GAN. The defaults are the published ones for 256×256."""

    kind: Literal["inr_gan"] = "inr_gan"
    channel_base: int = Field(32768, ge=1, description="block k = 4, 8, … is min(channel_base / k, channel_max) wide")
    channel_max: int = Field(512, ge=1)
    rank: int = Field(10, ge=1, description="of the matrix by which a style scales a layer's weight")
    extra_layers: bool = Field(True, description="a third layer in the blocks from 128 on")
    coords: Literal["centers"] = "centers"

    @model_validator(mode="after")
    def _buildable(self):
        height, width = self.img_shape
        if height != width or width < FIRST_GRID or width & (width - 1):
            raise ValueError(
                f"INR-GAN is for squares of {FIRST_GRID}, {2 * FIRST_GRID}, {4 * FIRST_GRID}, … pixels, not "
                f"{width}x{height}; make an archive with dataset_tool.py --resolution={FIRST_GRID * 2}x{FIRST_GRID * 2}"
            )
        if self.channels(width) < 1:
            raise ValueError(
                f"channel_base={self.channel_base} leaves no channel in block {width}; use {width} or more"
            )
        return self

    @property
    def blocks(self) -> list[int]:
        return [4 << i for i in range(self.img_shape[0].bit_length() - 2)]

    def num_layers(self, block: int) -> int:
        return 1 if block == 4 else 3 if block >= FINE and self.extra_layers else 2

    @property
    def num_ws(self) -> int:
        return sum(map(self.num_layers, self.blocks)) + 1


class CoordinateFeatures(nn.Module):
    """rows [H] or [N,H], cols [W] or [N,W] -> [H,W,C] or [N,H,W,C]: sines, cosines, and a learned embedding.

    The positions are centres of `side`² cells. x and y run from -1 to 1, y upwards, and as in the released code a cell
    has the x of its left edge and the y of its lower edge. The embedding is interpolated between cells.
    """

    def __init__(self, side: int):
        super().__init__()
        self.side = side
        octaves = math.pi / 2 * 2 ** torch.arange(side.bit_length() - 1).float()[:, None]
        directions = [(0, 1), (1, 0)] if side >= FINE else [(0, 1), (1, 0), (-0.5, 0.5), (0.5, 0.5)]
        # Frequencies along x and y, in radians per unit: octaves, then random ones.
        self.register_buffer("log_basis", torch.cat([octaves * torch.tensor(d) for d in directions]))
        self.register_buffer("random_basis", torch.randn(32, 2) * 10 if side >= FINE else None)
        self.embedding = nn.Parameter(torch.randn(side, side, 64 if side >= FINE else 128))

    @property
    def basis(self) -> Tensor:
        return self.log_basis if self.random_basis is None else torch.cat([self.log_basis, self.random_basis])

    @property
    def channels(self) -> int:
        return 2 * len(self.basis) + self.embedding.shape[-1]

    def forward(self, rows: Tensor, cols: Tensor) -> Tensor:
        y, x = (1 - 2 * rows - 1 / self.side)[..., :, None, None], (2 * cols - 1 - 1 / self.side)[..., None, :, None]
        along_x, along_y = self.basis.unbind(1)
        phase = x * along_x + y * along_y
        waves = torch.cat([phase.sin(), phase.cos()], dim=-1).to(self.embedding.dtype)
        return torch.cat([waves, interpolate(self.embedding, rows, cols, "centers")], dim=-1)


class ScaledLayer(Layer):
    """[N,P,I], w [N,w_dim] -> [N,P,O]: 1×1 convolution, bias, leaky ReLU.

    The weight of an image is W ⊙ (1 + A·B/√r), each row scaled to length 1. A [O,r] and B [r,I] come from the style.
    """

    def __init__(self, inputs: int, outputs: int, w_dim: int, rank: int):
        super().__init__()
        self.rank = rank
        self.affine = EqualLinear(w_dim, (outputs + inputs) * rank)
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        with full_precision(w):
            a, b = self.affine(w).split([side * self.rank for side in self.weight.shape], dim=1)
            factors = a.unflatten(1, (-1, self.rank)) @ b.unflatten(1, (self.rank, -1)) / math.sqrt(self.rank)
            weight = self.weight * (1 + factors)
            weight = weight / (weight.norm(dim=2, keepdim=True) + 1e-8)
        dtype = product_dtype(x)
        return bias_act(x.to(dtype) @ weight.mT.to(dtype), self.bias, act="lrelu", impl=self.impl)


class Block(nn.Module):
    """[N,P,I], one style per layer and head -> [N,P,O] and its contribution to the colours [N,P,img_channels]."""

    def __init__(self, inputs: int, outputs: int, count: int, config: INRGANConfig):
        super().__init__()
        widths = [inputs] + [outputs] * count
        self.layers = nn.ModuleList(ScaledLayer(i, o, config.w_dim, config.rank) for i, o in itertools.pairwise(widths))
        self.head = FreeHead(outputs, config.img_channels, config.w_dim)

    def forward(self, x: Tensor, styles: list[Tensor]) -> tuple[Tensor, Tensor]:
        for layer, w in zip(self.layers, styles, strict=False):
            x = layer(x, w)
        return x, self.head(x, styles[len(self.layers)])


class INRGANSynthesis(Synthesis):
    """Blocks on grids of 32×32, 64×64, … cells, each of which reads the nearest cells of the grid before.

    The last grid is the image, computed at any positions. On the others, only the cells that are read are computed.
    Noise is ignored.
    """

    def __init__(self, config: INRGANConfig):
        super().__init__(config)
        self.inputs = nn.ModuleDict()  # of the first block on each grid
        self.blocks = nn.ModuleDict()
        width = 0
        for k in config.blocks:
            if k == 4 or k > FIRST_GRID:
                self.inputs[str(k)] = CoordinateFeatures(max(k, FIRST_GRID))
                width += self.inputs[str(k)].channels
            self.blocks[str(k)] = Block(width, config.channels(k), config.num_layers(k), config)
            width = config.channels(k)

    def compute(self, ws: Tensor, rows: Tensor, cols: Tensor, noise: Tensor | None) -> Tensor:
        sides = [features.side for features in self.inputs.values()]
        grids = zip(grid_positions(rows, sides), grid_positions(cols, sides), strict=True)
        styles, x, image, shape = ws.unbind(1), None, 0, None
        for k, block in self.blocks.items():
            if k in self.inputs:
                (rows, from_rows), (cols, from_cols) = next(grids)
                features = self.inputs[k](rows, cols).expand(len(ws), -1, -1, -1).flatten(1, 2)
                if x is None:
                    x = features
                else:
                    x, image = (read_cells(t.unflatten(1, shape), from_rows, from_cols) for t in (x, image))
                    x = torch.cat([x, features], dim=-1)
                shape = rows.shape[-1], cols.shape[-1]
            x, colours = block(x, styles)
            styles = styles[len(block.layers) :]  # the style of a head is also that of the next layer
            image = image + colours
        return image.unflatten(1, shape).movedim(-1, 1)


def grid_positions(t: Tensor, sides: list[int]) -> list[tuple[Tensor, Tensor | None]]:
    """Trace positions [H] or [N,H] on the last grid back to the first one of `sides` cells.

    Returns for each grid the positions to compute, and the index of the one before that each of them reads.
    """
    found = []
    whole = t.shape[-1] >= sides[-1]  # most cells are read; finding the others would wait for the device
    for side in reversed(sides[:-1]):
        cells = (t * side).floor().clamp(0, side - 1)
        if whole:
            index, cells = cells.long(), torch.arange(side, dtype=t.dtype, device=t.device)
        else:
            cells, index = cells.unique(return_inverse=True)
        found.append((t, index))
        t = (cells + 0.5) / side
    return [(t, None), *reversed(found)]


def read_cells(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """x [N,H,W,C], indices [H'] or [N,H'] and [W'] or [N,W'] -> [N,H'·W',C]."""
    x = x.take_along_dim(rows.reshape(-1, rows.shape[-1], 1, 1), dim=1)
    return x.take_along_dim(cols.reshape(-1, 1, cols.shape[-1], 1), dim=2).flatten(1, 2)
