"""The synthesis of StyleGAN2 (Karras et al., CVPR 2020): 3×3 convolutions at doubling resolutions, with noise.

Legend: N images, C channels, k = 4, 8, … the resolution of a block: the shorter side, if the image's is a power of two.
Features are [N,C,H,W].
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from torch_utils.ops.bias_act import ACTIVATIONS, bias_act
from torch_utils.ops.convolution import conv2d, conv_transpose2d
from torch_utils.ops.modulated_linear import EPSILON
from torch_utils.ops.resample import lowpass, upsample
from torch_utils.precision import product_dtype
from torch_utils.recompute import by_parts
from training.networks.base import Synthesis, SynthesisConfig, sample_noise
from training.networks.layers import CLAMP, Affine, Head, Layer


class StyleGAN2Config(SynthesisConfig):
    any_position: ClassVar[bool] = False

    kind: Literal["stylegan2"] = "stylegan2"
    channel_base: int = Field(32768, ge=1, description="block k = 4, 8, … is min(channel_base / k, channel_max) wide")
    channel_max: int = Field(512, ge=1)
    architecture: Literal["skip", "resnet", "orig"] = Field(
        "skip", description="colours from every block; or from the last, of residual or plain blocks"
    )
    noise: bool = Field(True, description="add noise to the features, with a learned strength per layer")
    coords: Literal["centers"] = "centers"

    @model_validator(mode="after")
    def _buildable(self):
        height, width = self.img_shape
        unit = 1 << self.num_blocks - 1
        if min(self.img_shape) < 8 or height % unit or width % unit:
            raise ValueError(
                f"the sides of {width}x{height} must be multiples of {unit}, and at least 8; make another archive with "
                "dataset_tool.py"
            )
        if self.widths[-1] < 1:
            raise ValueError(f"channel_base={self.channel_base} leaves no channel in the last block; use a larger one")
        return self

    @property
    def num_blocks(self) -> int:
        """Count the blocks; the first has a shorter side of 4 to 7 pixels."""
        return max(min(self.img_shape) // 4, 1).bit_length()

    @property
    def widths(self) -> list[int]:
        """Return the channels of blocks k = 4, 8, …"""
        return [self.channels(4 << i) for i in range(self.num_blocks)]

    @property
    def num_ws(self) -> int:
        return 2 * self.num_blocks

    def shape(self, block: int) -> tuple[int, int]:
        """Return (height, width) of the features of a block."""
        halvings = self.num_blocks - 1 - block
        return self.img_shape[0] >> halvings, self.img_shape[1] >> halvings


class ModulatedConv(Layer):
    """[N,I,H,W], w [N,w_dim], noise […,h,w] or None -> [N,O,h,w]: modulated, demodulated 3×3 convolution, leaky ReLU.

    shape: (h, w) of the noise, None without. `double` doubles H and W. `gain` multiplies the result.
    """

    def __init__(
        self, inputs: int, outputs: int, w_dim: int, shape: tuple[int, int] | None, *, double=False, gain: float = 1.0
    ):
        super().__init__()
        self.affine = Affine(w_dim, inputs)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        if shape:
            self.noise_strength = nn.Parameter(torch.zeros([]))
            self.register_buffer("noise_const", torch.randn(shape))
        self.double, self.gain, self.clamp = double, ACTIVATIONS["lrelu"].gain * gain, CLAMP * gain

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        # Scaling inputs and outputs is modulating and demodulating the weight, which all images then share.
        style, dtype = self.affine(w), product_dtype(x)
        scale = (style.square() @ self.weight.square().sum(dim=(2, 3)).T + EPSILON).rsqrt()
        x = x.to(dtype) * style.to(dtype)[..., None, None]
        if self.double:
            size = 2 * x.shape[2] + 1, 2 * x.shape[3] + 1
            x = conv_transpose2d(x, self.weight.transpose(0, 1), size, stride=(2, 2))
            x, scale = lowpass(x, padding=1, impl=self.impl), scale * 4  # three of four inputs of the filter are zeros
        else:
            x = conv2d(x, self.weight, padding=(1, 1))
        x = x * scale.to(dtype)[..., None, None]
        if noise is not None:
            x = x + (noise * self.noise_strength).to(dtype)
        return bias_act(x, self.bias, act="lrelu", gain=self.gain, clamp=self.clamp, dim=1, impl=self.impl)


class Skip(Layer):
    """[N,I,H,W] -> [N,O,2H,2W]: 1×1 convolution of doubled features, with an equalised learning rate, times √½."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return upsample(conv2d(x, self.weight * math.sqrt(0.5 / x.shape[1])), impl=self.impl)


class Block(nn.Module):
    """[N,I,H,W], ws [N,3,w_dim], noise of each layer -> `features` [N,O,h,w], and of these `colours` [N,C,h,w].

    shape: (h, w). Without a head there are no colours.
    """

    def __init__(self, inputs: int, outputs: int, config: StyleGAN2Config, shape, *, first: bool, head: bool):
        super().__init__()
        shape, half = shape if config.noise else None, math.sqrt(0.5)  # two paths are added: each has half the variance
        residual = config.architecture == "resnet" and not first
        self.skip = Skip(inputs, outputs) if residual else None
        last = ModulatedConv(outputs, outputs, config.w_dim, shape, gain=half if residual else 1.0)
        doubling = [] if first else [ModulatedConv(inputs, outputs, config.w_dim, shape, double=True)]
        self.layers = nn.ModuleList([*doubling, last])
        self.head = Head(outputs, config.img_channels, config.w_dim) if head else None

    def features(self, x: Tensor, ws: Tensor, noise: Sequence[Tensor | None]) -> Tensor:
        y = x
        for layer, w, eps in zip(self.layers, ws.unbind(1), noise, strict=False):
            y = layer(y, w, eps)
        return y if self.skip is None else y + self.skip(x)

    def colours(self, x: Tensor, ws: Tensor) -> Tensor:
        return self.head(x.movedim(1, -1).flatten(1, 2), ws[:, -1]).unflatten(1, x.shape[2:]).movedim(-1, 1)


class StyleGAN2Synthesis(Synthesis):
    """recompute "all": keep only the features of each block for the backward pass, which recomputes one at a time."""

    def __init__(self, config: StyleGAN2Config):
        super().__init__(config)
        widths, last = config.widths, config.num_blocks - 1
        self.const = nn.Parameter(torch.randn(widths[0], *config.shape(0)))
        self.blocks = nn.ModuleList(
            Block(
                widths[max(i - 1, 0)],
                width,
                config,
                config.shape(i),
                first=i == 0,
                head=config.architecture == "skip" or i == last,
            )
            for i, width in enumerate(widths)
        )

    def compute(self, ws: Tensor, rows: Tensor, cols: Tensor, noise: Tensor | None) -> Tensor:
        x = self.const.expand(len(ws), -1, -1, -1)
        if ws.device.type == "cpu":  # convolutions with channels last are about three times as fast there
            x = x.contiguous(memory_format=torch.channels_last)
        image, noises = None, self.noises(noise)
        for i, block in enumerate(self.blocks):
            # A head shares its style with the first layer of the next block.
            first = max(2 * i - 1, 0)
            styles = ws[:, first : first + len(block.layers) + 1]
            features = functools.partial(block.features, noise=[next(noises) for _ in block.layers])
            if self.recompute == "all":
                (x,) = by_parts(features, [(x, styles)], block.parameters())
            else:
                x = features(x, styles)
            image = None if image is None else upsample(image, impl=self.impl)
            if block.head is not None:
                colours = block.colours(x, styles)
                image = colours if image is None else image + colours
        return image

    def noises(self, seeds: Tensor | None) -> Iterator[Tensor | None]:
        """Yield the noise of each layer, [N,1,h,w] from seeds [N], or else [h,w] as stored."""
        if not self.config.noise:
            return itertools.repeat(None)
        stored = [layer.noise_const for block in self.blocks for layer in block.layers]
        if seeds is None:
            return iter(stored)
        sizes = [one.numel() for one in stored]
        sampled = sample_noise(seeds, sum(sizes), self.const).split(sizes, dim=1)
        return (new.view(-1, 1, *old.shape) for new, old in zip(sampled, stored, strict=True))
