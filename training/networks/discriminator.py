"""StyleGAN2's residual discriminator (Karras et al., CVPR 2020, section 4.1).

Legend: N images, C channels, R the resolution of a block: the shorter side, if that is a power of two, else the power
of two below it. Features are [N,C,H,W].
"""

import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dnnlib.config import setting
from torch_utils.distributed import Processes
from torch_utils.ops.bias_act import ACTIVATIONS, bias_act
from torch_utils.ops.convolution import conv2d
from torch_utils.ops.resample import lowpass
from torch_utils.precision import full_precision
from torch_utils.recompute import by_parts, recomputed
from training.networks.layers import CLAMP, EqualLinear, ImageConfig, Layer
from training.networks.mapping import Mapping, check_label

SCALE_FEATURES = 8


def scale_features(zoom: Tensor) -> Tensor:
    """Describe zooms [N] as [N,SCALE_FEATURES]: 1, v = log2 zoom, sines and cosines of v·π·(1, 2, 4)."""
    v = zoom.log2()[:, None]
    phase = v * math.pi * torch.tensor([1.0, 2.0, 4.0], dtype=v.dtype, device=v.device)
    return torch.cat([torch.ones_like(v), v, phase.sin(), phase.cos()], dim=1)


class DiscriminatorConfig(ImageConfig):
    kind: Literal["residual"] = "residual"
    channel_base: int = Field(32768, ge=1, description="resolution R has min(channel_base / R, channel_max) channels")
    channel_max: int = Field(512, ge=1)
    mbstd_group: int = setting(
        4, ge=1, flag="mbstd-group", description="largest number of images in a minibatch-std group"
    )
    mapping_layers: int = Field(8, ge=0, le=64, description="layers of the label's mapping, when conditional")
    scale_aware: bool = Field(False, description="judge windows by their scale, too: c is followed by scale_features")

    @model_validator(mode="after")
    def _buildable(self):
        height, width = self.img_shape
        if min(self.img_shape) < 8:
            raise ValueError(f"images of {width}x{height} are too small for the discriminator; use 8x8 or more")
        unit = 1 << len(self.resolutions)
        if height % unit or width % unit:
            near = f"{width // unit * unit}x{height // unit * unit}"
            raise ValueError(
                f"the sides of {width}x{height} must be multiples of {unit}, because the discriminator halves images "
                f"{len(self.resolutions)} times; make an archive with dataset_tool.py --resolution={near} "
                "--transform=center-crop"
            )
        if self.channels(top := self.resolutions[0]) < 1:
            raise ValueError(
                f"channel_base={self.channel_base} leaves no channel at resolution {top}; use {top} or more"
            )
        return self

    @property
    def resolutions(self) -> list[int]:
        """Return R of every block, each half of the one before; the last, 8, leaves a shorter side of 4 to 7 pixels."""
        return [8 << i for i in reversed(range((min(self.img_shape) // 4).bit_length() - 1))]

    @property
    def label_dim(self) -> int:
        """Return how many numbers D gets for each image besides its pixels."""
        return self.c_dim + SCALE_FEATURES * self.scale_aware


class EqualConv2d(Layer):
    """[N,I,H,W] -> [N,O,·,·]: k×k convolution with an equalised learning rate, activation with its gain, clamp.

    `halve` low-passes the image and keeps every second sample: H and W are halved. `gain` multiplies the result.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, act="lrelu", bias=True, halve=False, gain=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.act, self.halve = act, halve
        # The skip path has no bias, activation or clamp: its weight takes the gain.
        self.gain, skip_gain = (ACTIVATIONS[act].gain * gain, 1) if bias else (1, gain)
        self.clamp = CLAMP * gain if bias else None
        self.weight_gain = skip_gain / math.sqrt(inputs * kernel**2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.weight_gain
        kernel = weight.shape[-1]
        if not self.halve:
            x = conv2d(x, weight, padding=(kernel // 2, kernel // 2))
        elif kernel == 1:
            x = conv2d(lowpass(x, padding=1, stride=2, impl=self.impl), weight)
        else:
            x = conv2d(lowpass(x, padding=2, impl=self.impl), weight, stride=(2, 2))
        return bias_act(x, self.bias, act=self.act, gain=self.gain, clamp=self.clamp, dim=1, impl=self.impl)


class ResidualBlock(nn.Module):
    """[N,I,H,W] -> [N,O,H/2,W/2]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        half = math.sqrt(0.5)  # the two paths are added: each carries half of the variance
        self.conv0 = EqualConv2d(inputs, inputs, 3)
        self.conv1 = EqualConv2d(inputs, outputs, 3, halve=True, gain=half)
        self.skip = EqualConv2d(inputs, outputs, 1, act="linear", bias=False, halve=True, gain=half)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv0(x)) + self.skip(x)


def minibatch_std(x: Tensor, group: int, batches: int = 1, procs: Processes | None = None) -> Tensor:
    """[N,C,H,W] -> [N,C+1,H,W]: append the standard deviation within a group, averaged over channels and pixels.

    Progressive GAN (ICLR 2018), section 3. With G = min(group, N), the group of image n is n, n + N/G, n + 2N/G, …
    (mod N). When rank i mod P gets image i of a batch, groups that fit into a rank stay on it, and P ranks compute what
    one would.

    x may hold several `batches` of N in sequence, which share no group: generated and real images, for instance.
    procs: the ranks whose images, equally many each, form the N images together; by default x has them all.
    """
    if procs is not None:  # [P,B,n] -> [B,n,P]
        whole = procs.gather(x.unflatten(0, (batches, len(x) // batches))).movedim(0, 2).flatten(0, 2)
        return minibatch_std(whole, group, batches)[procs.rank :: procs.world]
    n = len(x) // batches
    group = min(group, n)
    if n % group or len(x) % batches:
        raise ValueError(f"{n} images do not divide into minibatch-std groups of {group}; use a multiple of {group}")
    y = x.unflatten(0, (batches, group, n // group))
    # Not Tensor.var: the error of its second derivative, which R1 needs, is ten times as large.
    variance = (y - y.mean(dim=1, keepdim=True)).square().mean(dim=1, keepdim=True)
    deviation = (variance + 1e-8).sqrt().mean(dim=(3, 4, 5), keepdim=True)
    return torch.cat([x, deviation.expand(-1, group, -1, 1, *x.shape[2:]).flatten(0, 2)], dim=1)


class Epilogue(nn.Module):
    """[N,C,H,W] -> [N,outputs], in at least float32: the logits determine every gradient.

    procs: as in minibatch_std; all of them must then call at the same time.
    """

    procs: Processes | None = None

    def __init__(self, channels: int, pixels: int, outputs: int, mbstd_group: int):
        super().__init__()
        self.mbstd_group = mbstd_group
        self.conv = EqualConv2d(channels + 1, channels, 3)
        self.fc = EqualLinear(channels * pixels, channels, act="lrelu")
        self.out = EqualLinear(channels, outputs)

    def forward(self, x: Tensor, batches: int = 1) -> Tensor:
        with full_precision(x):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            x = self.conv(minibatch_std(x, self.mbstd_group, batches, self.procs))
            return self.out(self.fc(x.flatten(1)))


class Discriminator(Layer):
    """img [N,C,H,W] in [-1,1], c [N,label_dim] or None -> logits [N,1].

    H and W may also be larger or smaller than those of the config, in the same proportions: the last features are then
    averaged over, or repeated in, the usual number of areas. img may hold several `batches` in sequence: the same as
    one call per batch, and faster. Conditional: the projection of Miyato and Koyama (ICLR 2018) on a mapping of the
    label. Raises ValueError when img or c has another shape, or a batch does not divide into minibatch-std groups.

    recompute "all": keep only the images for the backward pass, which recomputes one image and one block at a time.
    """

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        self.from_rgb = EqualConv2d(config.img_channels, config.channels(config.resolutions[0]), 1)
        # Named by resolution, so that a larger discriminator can start from the blocks of a smaller one.
        self.blocks = nn.ModuleDict(
            {str(r): ResidualBlock(config.channels(r), config.channels(r // 2)) for r in config.resolutions}
        )
        last = config.channels(4)
        self.mapping = Mapping(0, config.label_dim, last, config.mapping_layers) if config.label_dim else None
        self.areas = tuple(side >> len(config.resolutions) for side in config.img_shape)
        self.epilogue = Epilogue(last, math.prod(self.areas), last if config.label_dim else 1, config.mbstd_group)

    def features(self, img: Tensor) -> Tensor:
        """[N,img_channels,H,W] -> [N,C,h,w], each image separately; h and w are those of images of the usual size."""
        call = recomputed if self.recompute == "all" else ResidualBlock.__call__
        if img.device.type == "cpu":  # convolutions with channels last are about three times as fast there
            img = img.contiguous(memory_format=torch.channels_last)
        x = self.from_rgb(img)
        for block in self.blocks.values():
            x = call(block, x)
        return x if x.shape[2:] == self.areas else F.adaptive_avg_pool2d(x, self.areas)

    def forward(self, img: Tensor, c: Tensor | None = None, batches: int = 1) -> Tensor:
        channels, height, width = self.config.img_channels, *self.config.img_shape
        if (
            img.ndim != 4
            or img.shape[1] != channels
            or img.shape[2] * width != img.shape[3] * height
            or not min(img.shape[2:]) >> len(self.blocks)
        ):
            raise ValueError(
                f"img must be [N,{channels},{height},{width}], or larger or smaller in these proportions and halved "
                f"{len(self.blocks)} times; got {list(img.shape)}"
            )
        if not len(img):
            raise ValueError("img is an empty batch; the minibatch standard deviation needs an image")
        check_label(c, self.config.label_dim, len(img))
        if self.recompute == "all":
            shared = itertools.chain(self.from_rgb.parameters(), self.blocks.parameters())
            x = torch.cat(by_parts(self.features, [(one,) for one in img.split(1)], shared))
        else:
            x = self.features(img)
        x = self.epilogue(x, batches)
        if self.mapping is not None:
            x = (x * self.mapping(None, c)).sum(dim=1, keepdim=True) / math.sqrt(x.shape[1])
        return x

    def regularised(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """Return the logits whose gradient R1 penalises: all."""
        return self(img, c)
