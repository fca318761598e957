"""The layers that every network is made of.

Legend: N images, P positions, I inputs, O outputs, w the style. Channels are the last axis.
Weights are drawn N(0,1) and scaled at run time (equalised learning rate: Karras et al., ICLR 2018, section 4.1), so
that Adam moves every layer at the same relative speed.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dnnlib.config import Config
from torch_utils.ops.bias_act import ACTIVATIONS, bias_act
from torch_utils.ops.chain import Layer as ChainLayer
from torch_utils.ops.modulated_linear import modulated, modulated_linear
from torch_utils.precision import full_precision

CLAMP = 256.0  # features of the synthesis and of the discriminator stay within ±256, far from float16's 65504


class ImageConfig(Config):
    """What G and D both know of the images. `img_resolution: R` stands for squares, `img_shape: [R, R]`."""

    img_shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = Field(
        (512, 512), description="(height, width) of the images in training"
    )
    img_channels: int = Field(3, ge=1, description="1 grey, 3 RGB, 4 RGBA")
    c_dim: int = Field(0, ge=0, description="label numbers per image; 0 is unconditional")

    @model_validator(mode="before")
    @classmethod
    def _read_resolution(cls, settings: object) -> object:
        if isinstance(settings, dict) and "img_resolution" in settings:
            side = settings["img_resolution"]
            shape = settings.get("img_shape", (side, side))
            if shape not in ((side, side), [side, side]):
                raise ValueError(f"img_resolution={side} and img_shape={shape} differ; give one of them")
            settings = {key: v for key, v in settings.items() if key != "img_resolution"} | {"img_shape": shape}
        return settings


class Layer(nn.Module):
    """A module that can be computed in several ways, all with the same result: see `compute_with`."""

    impl = "auto"
    recompute = "pixels"


def compute_with(network: nn.Module, impl: str = "auto", recompute: str = "pixels") -> None:
    """Set how all layers of a network are computed.

    impl: "auto", the fastest implementation of an operation (torch_utils.ops) that works on the device, or "reference",
        plain PyTorch.
    recompute: what backward passes compute again, part by part, instead of keeping it in memory: "none", "pixels", or
        "all", the lines and D's features as well.
    """
    for module in network.modules():
        if isinstance(module, Layer):
            module.impl, module.recompute = impl, recompute


class EqualLinear(Layer):
    """[…,I] -> […,O]: linear with an equalised learning rate, then the activation with its gain."""

    def __init__(self, inputs: int, outputs: int, *, act: str = "linear", lr_mult: float = 1.0, bias_init: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_mult)
        self.bias = nn.Parameter(torch.full((outputs,), bias_init / lr_mult))
        self.act = act
        self.weight_gain = lr_mult / math.sqrt(inputs)
        self.bias_gain = lr_mult

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)
        return bias_act(x, act=self.act, impl=self.impl)

    def folded(self) -> ChainLayer:
        """The layer with its gains, which commute with a leaky ReLU, in weight [O,I] and bias."""
        slope, gain = ACTIVATIONS[self.act]
        return ChainLayer(self.weight * (self.weight_gain * gain), self.bias * (self.bias_gain * gain), slope)


class SynthesisLayer(Layer):
    """[N,P,I], w [N,w_dim] -> [N,P,O]: modulated and demodulated 1×1 convolution, leaky ReLU, clamp."""

    def __init__(self, inputs: int, outputs: int, w_dim: int):
        super().__init__()
        self.affine = EqualLinear(w_dim, inputs, bias_init=1)
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        with full_precision(w):
            style = self.affine(w)
        return modulated_linear(x, self.weight, style, self.bias, clamp=CLAMP, impl=self.impl)

    def folded(self, w: Tensor) -> ChainLayer:
        """As EqualLinear's, for styles w [N,w_dim]: the weight is [N,O,I]."""
        slope, gain = ACTIVATIONS["lrelu"]
        return ChainLayer(modulated(self.weight, self.affine(w), gain=gain), self.bias * gain, slope, CLAMP)


class Head(Layer):
    """[N,P,I], w [N,w_dim] -> [N,P,O] in at least float32: modulated 1×1 convolution without demodulation, bias, clamp.

    It ends a stage: lines that are summed, or colours.
    """

    def __init__(self, inputs: int, outputs: int, w_dim: int):
        super().__init__()
        self.affine = EqualLinear(w_dim, inputs, bias_init=1)
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.style_gain = 1 / math.sqrt(inputs)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        with full_precision(w):
            style = self.affine(w) * self.style_gain
        y = modulated_linear(
            x, self.weight, style, self.bias, demodulate=False, act="linear", clamp=CLAMP, impl=self.impl
        )
        return y.to(torch.promote_types(y.dtype, torch.float32))

    def folded(self, w: Tensor) -> ChainLayer:
        """As SynthesisLayer's; its output is a branch of the chain."""
        weight = modulated(self.weight, self.affine(w) * self.style_gain, demodulate=False)
        return ChainLayer(weight, self.bias, clamp=CLAMP, branch=True)
