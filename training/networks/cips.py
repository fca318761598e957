"""CIPS: one style-modulated MLP computes every pixel from its position (Anokhin et al., CVPR 2021; class CIPSskip).

Legend: N images, H×W pixels, P = H·W, C channels, w the style. Features are [N,P,C].
"""

import itertools
import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.modulated_linear import modulated_linear
from torch_utils.recompute import by_parts
from training.networks.base import Synthesis, SynthesisConfig, sample_noise
from training.networks.coords import COORDS, interpolate
from training.networks.layers import FreeHead, SynthesisLayer


class CIPSConfig(SynthesisConfig):
    """The architecture of CIPS. The defaults are the published ones for 256×256.

    The released code computes with `coords` and `embedding_coords` "endpoints" in training. In evaluation it reads the
    embedding as "centers", up to half a pixel aside, at the training size too.
    """

    kind: Literal["cips"] = "cips"
    features: int = Field(512, ge=1, description="sines of the position, and channels of the learned embedding")
    channel_base: int = Field(32768, ge=1, description="layers k = 4, 8, … are min(channel_base / k, channel_max) wide")
    channel_max: int = Field(512, ge=1)
    embedding_coords: Literal[tuple(COORDS)] = Field("endpoints", description="as coords, for the embedding's cells")

    @model_validator(mode="after")
    def _buildable(self):
        if max(self.img_shape) < 4 or self.widths[-1] < 1:
            raise ValueError(
                f"img_shape={self.img_shape} with channel_base={self.channel_base} has no layers; use images of 4x4 or "
                "more, and channel_base of at least the longer side"
            )
        return self

    @property
    def widths(self) -> list[int]:
        """Return the channels of the pairs of layers k = 4, 8, … up to the longer side."""
        count = int(math.log2(max(self.img_shape))) - 1
        return [self.channels(4 << i) for i in range(count)]

    @property
    def num_ws(self) -> int:
        return 1


class PositionInput(nn.Module):
    """rows [H] or [N,H], cols [W] or [N,W] -> [P,2C] or [N,P,2C]: sin(W·(x,y) + b), and the learned embedding.

    x and y run from -1 to 1. The embedding is a vector for each pixel of the training image, and interpolated between.
    """

    def __init__(self, channels: int, shape: tuple[int, int], coords: str):
        super().__init__()
        self.coords = coords
        self.weight = nn.Parameter(torch.empty(channels, 2).uniform_(-math.sqrt(4.5), math.sqrt(4.5)))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-math.sqrt(0.5), math.sqrt(0.5)))
        self.embedding = nn.Parameter(torch.randn(*shape, channels))

    def forward(self, rows: Tensor, cols: Tensor) -> Tensor:
        y, x = (2 * rows - 1)[..., :, None, None], (2 * cols - 1)[..., None, :, None]
        sines = (x * self.weight[:, 0] + (y * self.weight[:, 1] + self.bias)).sin().to(self.weight.dtype)
        embedding = interpolate(self.embedding, rows, cols, self.coords)
        return torch.cat([sines, embedding], dim=-1).flatten(-3, -2)


class NoisyLayer(SynthesisLayer):
    """[N,P,I], w [N,w_dim], noise [N,P,1] or None -> [N,P,O]: a synthesis layer without clamp.

    The noise, times a learned strength, is added before the bias.
    """

    clamp = None

    def __init__(self, inputs: int, outputs: int, w_dim: int):
        super().__init__(inputs, outputs, w_dim)
        self.noise_strength = nn.Parameter(torch.zeros([]))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            return super().forward(x, w)
        none = torch.zeros_like(self.bias)
        x = modulated_linear(x, self.weight, self.affine(w), none, act="linear", impl=self.impl)
        return bias_act(x + (noise * self.noise_strength).to(x.dtype), self.bias, act=self.act, impl=self.impl)


class CIPSSynthesis(Synthesis):
    """One style for all layers: `layers` 0, then two layers and a head for each of config.widths; the heads are summed.

    noise None turns the noise off. recompute "pixels" or "all": the backward pass recomputes one image at a time.
    """

    def __init__(self, config: CIPSConfig):
        super().__init__(config)
        widths = config.widths
        self.input = PositionInput(config.features, config.img_shape, config.embedding_coords)
        pairs = itertools.pairwise([2 * config.features, widths[0], *(c for c in widths for _ in range(2))])
        self.layers = nn.ModuleList(NoisyLayer(i, o, config.w_dim) for i, o in pairs)
        self.heads = nn.ModuleList(FreeHead(c, config.img_channels, config.w_dim) for c in widths)

    def compute(self, ws: Tensor, rows: Tensor, cols: Tensor, noise: Tensor | None) -> Tensor:
        shape = rows.shape[-1], cols.shape[-1]
        arguments = [ws[:, 0], rows, cols]
        if noise is not None:
            values = sample_noise(noise, len(self.layers) * math.prod(shape), ws)
            arguments.append(values.unflatten(1, (len(self.layers), -1)))
        if self.recompute == "none" or not len(ws):
            colours = self.colours(*arguments)
        else:
            each = (t.expand(len(ws), -1).split(1) if t is rows or t is cols else t.split(1) for t in arguments)
            colours = torch.cat(by_parts(self.colours, zip(*each, strict=True), self.parameters()))
        return colours.unflatten(1, shape).movedim(-1, 1)

    def colours(self, w: Tensor, rows: Tensor, cols: Tensor, noise: Tensor | None = None) -> Tensor:
        """w [N,w_dim], rows and cols as in PositionInput, noise [N,layers,P] or None -> [N,P,img_channels]."""
        of_layers = [None] * len(self.layers) if noise is None else noise[..., None].unbind(1)
        x, image = self.input(rows, cols).expand(len(w), -1, -1), 0
        for i, (layer, of_layer) in enumerate(zip(self.layers, of_layers, strict=True)):
            x = layer(x, w, of_layer)
            if i and i % 2 == 0:
                image = image + self.heads[i // 2 - 1](x, w)
        return image
