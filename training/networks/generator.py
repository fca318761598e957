"""The CREPS generator: mapping, lines, pixels.

Legend: N images, L blocks, H×W pixels, w the style dimension. Images are [N,C,H,W] with values about [-1,1].
"""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dnnlib.config import setting
from training.networks.coords import COORDS
from training.networks.layers import ImageConfig
from training.networks.lines import Lines, LineSynthesis
from training.networks.mapping import Mapping
from training.networks.pixels import PixelSynthesis


class GeneratorConfig(ImageConfig):
    """The architecture of the generator. The defaults are the paper's (supplement, section 1)."""

    depth: int | None = Field(None, ge=2, le=64, description="blocks; by default log2 of the longer side, less 1")
    z_dim: int = Field(512, ge=1)
    w_dim: int = Field(512, ge=1)
    mapping_layers: int = setting(8, ge=1, le=64, flag="map-depth", description="layers of the mapping network")
    channel_base: int = Field(65536, ge=1, description="block k = 4, 8, … is min(channel_base / k, channel_max) wide")
    channel_max: int = Field(1024, ge=2)
    biline_channels: int = Field(32, ge=1, description="channels of the summed lines and of the pixel features")
    thickness: int = Field(8, ge=1, description="D: numbers per channel at each position of a line")
    bandwidth: float = Field(10.0, gt=0, description="standard deviation of the input frequencies, cycles per image")
    architecture: Literal["skip", "orig"] = Field("skip", description="fuse after every block, or once at the end")
    decoders: bool = Field(True, description="decode the pixel features between fusions (paper, table 4)")
    coords: Literal[tuple(COORDS)] = Field(
        "endpoints", description="positions: " + "; ".join(f"{name}: {c.description}" for name, c in COORDS.items())
    )

    @model_validator(mode="after")
    def _buildable(self):
        if self.depth is None and max(self.img_shape) < 8:
            raise ValueError(f"img_shape={self.img_shape} is too small for two blocks; set depth as well")
        odd = self.widths[0] % 2
        if odd or self.widths[-1] < 1:
            what = "an odd first block" if odd else "an empty last block"
            raise ValueError(
                f"channel_base={self.channel_base} and channel_max={self.channel_max} give {what} "
                f"(widths {self.widths}); use a larger channel_base and an even channel_max"
            )
        return self

    @property
    def num_blocks(self) -> int:
        return self.depth or int(math.log2(max(self.img_shape))) - 1

    @property
    def widths(self) -> list[int]:
        """Channels of blocks k = 4, 8, …"""
        return [min(self.channel_base // (4 << i), self.channel_max) for i in range(self.num_blocks)]

    @property
    def num_fusions(self) -> int:
        return self.num_blocks - 1 if self.architecture == "skip" else 1

    @property
    def num_ws(self) -> int:
        return 2 * self.num_blocks + 1


class Synthesis(nn.Module):
    """From styles and positions to an image, in two stages that can be called separately: `lines`, then `pixels`.

    `G.synthesis.lines(ws, rows, cols)` -> Lines, and `G.synthesis.pixels(lines.window(…), ws[:, -1])` -> [N,C,h,w].
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        self.lines: LineSynthesis = LineSynthesis(
            config.widths,
            config.biline_channels,
            config.thickness,
            config.w_dim,
            config.bandwidth,
            every_block=config.architecture == "skip",
        )
        self.pixels: PixelSynthesis = PixelSynthesis(
            config.num_fusions,
            config.biline_channels,
            config.img_channels,
            config.w_dim,
            decoders=config.decoders,
        )

    def forward(self, ws: Tensor, rows: Tensor | None = None, cols: Tensor | None = None) -> Tensor:
        """ws [N,num_ws,w_dim], rows [H], cols [W] -> [N,C,H,W].

        rows run down the image and cols to the right, both in fractions of it: 0 is the first edge, 1 the last, and
        numbers outside continue the image. By default, the training grid. Raises ValueError for other shapes.
        """
        expected = (self.config.num_ws, self.config.w_dim)
        if ws.ndim != 3 or ws.shape[1:] != expected:
            raise ValueError(f"ws must be [N,{expected[0]},{expected[1]}], as G.mapping makes it; got {list(ws.shape)}")
        height, width = self.config.img_shape
        dtype = torch.promote_types(ws.dtype, torch.float32)  # half types cannot distinguish 512 positions
        positions = COORDS[self.config.coords].positions
        rows = positions(height, dtype) if rows is None else rows
        cols = positions(width, dtype) if cols is None else cols
        for name, axis in (("rows", rows), ("cols", cols)):
            if axis.ndim != 1 or not len(axis) or not axis.is_floating_point():
                got = f"{axis.dtype} {list(axis.shape)}"
                raise ValueError(f"{name} must be a one-dimensional float tensor of positions in [0,1]; got {got}")
        lines: Lines = self.lines(ws, rows.to(ws.device), cols.to(ws.device))
        return self.pixels(lines, ws[:, -1])


class StyleMapping(Mapping):
    """z [N,z_dim], c [N,c_dim] or None -> ws [N,num_ws,w_dim], moved towards the average style by truncation.

    ws = w_avg + ψ·(w − w_avg), for the first `truncation_cutoff` styles when a cutoff is given. `w_avg` [w_dim]
    tracks the mean of w during training (see training.phases). Raises ValueError when z or c has another shape.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__(config.z_dim, config.c_dim, config.w_dim, config.mapping_layers)
        self.num_ws = config.num_ws
        self.register_buffer("w_avg", torch.zeros(config.w_dim))

    def forward(
        self, z: Tensor, c: Tensor | None = None, truncation_psi: float = 1, truncation_cutoff: int | None = None
    ) -> Tensor:
        ws = super().forward(z, c)[:, None].repeat(1, self.num_ws, 1)
        if truncation_psi == 1:
            return ws
        first = ws[:, :truncation_cutoff]
        return torch.cat([self.w_avg.lerp(first, truncation_psi), ws[:, first.shape[1] :]], dim=1)


class Generator(nn.Module):
    """z [N,z_dim], c [N,c_dim] or None -> [N,C,H,W], on the training grid or at any rows × cols (see Synthesis).

    class_names: what the numbers of c stand for, or []. Snapshots keep it, and nothing computed depends on it.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        self.class_names: list[str] = []
        self.mapping = StyleMapping(config)
        self.synthesis = Synthesis(config)

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        rows: Tensor | None = None,
        cols: Tensor | None = None,
    ) -> Tensor:
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        return self.synthesis(ws, rows, cols)
