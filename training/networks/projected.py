"""The projected discriminator: heads on frozen features of a pretrained network, next to a residual one on pixels.

Sauer et al., "Projected GANs Converge Faster" (NeurIPS 2021). The features hardly respond to colours and fine texture;
the residual discriminator does.

Legend: N images, C channels. Features are [N,C,H,W].
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from torch_utils.lite0 import CHANNELS, Lite0
from torch_utils.ops.bias_act import ACTIVATIONS
from torch_utils.precision import full_precision
from training.networks.discriminator import Discriminator, DiscriminatorConfig
from training.networks.layers import EqualLinear
from training.networks.mapping import Mapping

MIXED = (64, 128, 256, 512)  # channels of the four features after mixing across channels …
FUSED = (64, 64, 128, 256)  # … and across scales
HEAD = (64, 128, 256, 256)  # channels at strides 8, 16, 32, 64 in the heads
SPREAD = (9.8, 8.9, 6.0, 2.5)  # standard deviations of the features, which are divided by them
LABEL = 64  # dimension of the projection of an image on its label


class ProjectedConfig(DiscriminatorConfig):
    """Its channels are those of the residual discriminator on pixels."""

    kind: Literal["projected"] = "projected"
    channel_base: int = Field(2048, ge=1, description="resolution R has min(channel_base / R, channel_max) channels")
    channel_max: int = Field(128, ge=1)
    feature_size: int = Field(
        192, ge=64, multiple_of=32, description="shorter side to which images are enlarged for features"
    )

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Return the (height, width), multiples of 32, of the images that the features are computed from."""
        scale = max(1, self.feature_size / min(self.img_shape))
        height, width = (32 * round(side * scale / 32) for side in self.img_shape)
        return height, width


class Projection(nn.Module):
    """[N,3,H,W] in [-1,1] -> four features of FUSED channels: frozen, mixed by random frozen 1×1 convolutions."""

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.shape = shape
        self.network = Lite0()
        for i, (inputs, mixed, fused) in enumerate(zip(CHANNELS, MIXED, FUSED, strict=True)):
            self._freeze(f"mix{i}", mixed, inputs)
            self._freeze(f"fuse{i}", fused, mixed)

    def _freeze(self, name: str, outputs: int, inputs: int) -> None:
        self.register_buffer(name, torch.randn(outputs, inputs, 1, 1) / math.sqrt(inputs))

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.shape[2:] != self.shape:
            x = F.interpolate(x, self.shape, mode="bilinear")
        features = self.network(x)
        result, coarse = [], None
        for i in reversed(range(len(features))):
            x = F.conv2d(features[i] / SPREAD[i], getattr(self, f"mix{i}"))
            if coarse is not None:
                x = x + F.interpolate(coarse, x.shape[2:], mode="bilinear")
            coarse = F.conv2d(x, getattr(self, f"fuse{i}"))
            result.append(coarse)
        return result[::-1]


class HeadLayer(nn.Module):
    """[N,I,H,W] -> [N,O,H/2,W/2]: 4×4 convolution with stride 2, GroupNorm, leaky ReLU.

    The learning rate is equalised, as in every layer, so that one rate suits heads, pixels and G. GroupNorm replaces
    the paper's BatchNorm and spectral normalisation, so that the logits of an image do not depend on its batch.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 4, 4))
        self.weight_gain = 1 / math.sqrt(inputs * 16)
        self.norm = nn.GroupNorm(outputs // 16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight * self.weight_gain, stride=2, padding=1)
        return F.leaky_relu(self.norm(x), ACTIVATIONS["lrelu"].slope)


class FeatureHead(nn.Module):
    """[N,C,H,W] -> [N,outputs]: halve until a side has at most 4 pixels, at least once, then one linear layer."""

    def __init__(self, index: int, shape: tuple[int, int], outputs: int):
        super().__init__()
        layers = []
        channels, (height, width) = FUSED[index], shape
        widths = HEAD[index:]
        while min(height, width) > 4 or not layers:
            wider = widths[min(len(layers), len(widths) - 1)]
            layers.append(HeadLayer(channels, wider))
            channels, height, width = wider, height // 2, width // 2
        self.layers = nn.Sequential(*layers)
        self.out = EqualLinear(channels * height * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        with full_precision(x):
            return self.out(x.to(self.out.weight.dtype).flatten(1))


class ProjectedDiscriminator(nn.Module):
    """img [N,C,H,W] in [-1,1], c [N,label_dim] or None -> logits [N,8]: four of features, fine first, four of pixels.

    The four of pixels are equal, so that pixels and features have the same weight in a mean. Labels, sizes, `batches`
    and errors are those of Discriminator.
    """

    def __init__(self, config: ProjectedConfig):
        super().__init__()
        self.config = config
        self.pixels = Discriminator(config)
        height, width = config.feature_shape
        self.projection = Projection((height, width))
        outputs = LABEL if config.label_dim else 1
        self.heads = nn.ModuleList(FeatureHead(i, (height >> i + 2, width >> i + 2), outputs) for i in range(4))
        self.mappings = nn.ModuleList(
            Mapping(0, config.label_dim, LABEL, config.mapping_layers) for _ in self.heads if config.label_dim
        )

    def regularised(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """Return the logits whose gradient R1 penalises: that of pixels."""
        return self.pixels(img, c)

    def forward(self, img: Tensor, c: Tensor | None = None, batches: int = 1) -> Tensor:
        pixels = self.pixels(img, c, batches)
        features = self.projection(as_rgb(img))
        logits = [head(x) for head, x in zip(self.heads, features, strict=True)]
        if self.mappings:
            pairs = zip(logits, self.mappings, strict=True)
            logits = [(x * m(None, c)).sum(dim=1, keepdim=True) / math.sqrt(LABEL) for x, m in pairs]
        return torch.cat([*logits, pixels.expand(-1, len(logits))], dim=1)


def as_rgb(img: Tensor) -> Tensor:
    """[N,1|3|4,H,W] in [-1,1] -> [N,3,H,W]: repeat grey, put transparent images on white."""
    if img.shape[1] == 4:
        alpha = (img[:, 3:] + 1) / 2
        return 1 + (img[:, :3] - 1) * alpha
    return img.expand(-1, 3, -1, -1)
