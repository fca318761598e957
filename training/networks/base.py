"""What generators of every kind share: images, styles, the mapping to styles, and the arguments of a synthesis.

Legend: N images, H×W pixels, w the style dimension. Images are [N,C,H,W] with values about [-1,1].
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dnnlib.config import setting
from training.networks.coords import COORDS
from training.networks.layers import ImageConfig, Layer
from training.networks.mapping import Mapping


class SynthesisConfig(ImageConfig):
    """The settings that every kind of generator has. A kind adds `kind: Literal[…]` and `num_ws`."""

    any_position: ClassVar[bool] = True  # whether the synthesis takes positions other than the training grid

    z_dim: int = Field(512, ge=1)
    w_dim: int = Field(512, ge=1)
    mapping_layers: int = setting(8, ge=1, le=64, flag="map-depth", description="layers of the mapping network")
    coords: Literal[tuple(COORDS)] = Field(
        "endpoints", description="positions: " + "; ".join(f"{name}: {c.description}" for name, c in COORDS.items())
    )

    @property
    @abstractmethod
    def num_ws(self) -> int:
        """Return how many styles an image has."""


class Synthesis(Layer, ABC):
    """From styles, positions and noise to an image. A kind implements `compute`."""

    def __init__(self, config: SynthesisConfig):
        super().__init__()
        self.config = config

    def forward(
        self, ws: Tensor, rows: Tensor | None = None, cols: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """ws [N,num_ws,w_dim], rows [H] or [N,H], cols [W] or [N,W], noise [N] -> [N,C,H,W].

        rows run down the image and cols to the right, both in fractions of it: 0 is the first edge, 1 the last, and
        numbers outside continue the image. By default, the training grid, the only one that some kinds have
        (`config.any_position`).
        noise: int64 seeds. The noise of an image depends on its seed alone; None fixes it. Kinds without noise ignore
        it. Raises ValueError for other shapes or positions.
        """
        config, expected = self.config, (self.config.num_ws, self.config.w_dim)
        if ws.ndim != 3 or ws.shape[1:] != expected:
            raise ValueError(f"ws must be [N,{expected[0]},{expected[1]}], as G.mapping makes it; got {list(ws.shape)}")
        if not config.any_position and not rows is cols is None:
            raise ValueError(f"a generator of kind {config.kind} has no positions but those of its training grid")
        dtype = torch.promote_types(ws.dtype, torch.float32)  # half types cannot distinguish 512 positions
        axes = []
        for name, given, side in zip(("rows", "cols"), (rows, cols), config.img_shape, strict=True):
            axis = COORDS[config.coords].positions(side, dtype) if given is None else given
            if (
                axis.shape[:-1] not in ((), (len(ws),))
                or not math.prod(axis.shape[-1:])
                or not axis.is_floating_point()
            ):
                got = f"{axis.dtype} {list(axis.shape)}"
                raise ValueError(f"{name} must be float positions, [R] or [N,R], in fractions of the image; got {got}")
            axes.append(axis.to(ws.device))
        return self.compute(ws, *axes, noise)

    @abstractmethod
    def compute(self, ws: Tensor, rows: Tensor, cols: Tensor, noise: Tensor | None) -> Tensor:
        """Return [N,C,H,W] of checked arguments, on the device of ws."""


def sample_noise(seeds: Tensor, count: int, like: Tensor) -> Tensor:
    """Sample N(0,1) [N,count] in the dtype and on the device of `like`, each image from its seed in int64 [N]."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    noise = torch.empty(len(seeds), count, dtype=dtype, device=like.device)
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        row.normal_(generator=torch.Generator(like.device).manual_seed(seed))
    return noise


class StyleMapping(Mapping):
    """z [N,z_dim], c [N,c_dim] or None -> ws [N,num_ws,w_dim], moved towards the average style by truncation.

    ws = w_avg + ψ·(w − w_avg), for the first `truncation_cutoff` styles when a cutoff is given. `w_avg` [w_dim]
    tracks the mean of w during training (see training.phases). Raises ValueError when z or c has another shape.
    """

    def __init__(self, config: SynthesisConfig):
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
