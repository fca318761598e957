"""The layers that every network is made of.

Legend: N images, P positions, I inputs, O outputs, w the style. Channels are the last axis.
Weights are sampled from N(0,1) and scaled at run time (equalised learning rate: Karras et al., ICLR 2018, section 4.1),
so that Adam changes every layer at the same relative rate.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dnnlib.config import Config
from torch_utils.ops.bias_act import ACTIVATIONS, bias_act
from torch_utils.ops.chain import Folded
from torch_utils.ops.modulated_linear import modulated, modulated_linear
from torch_utils.precision import full_precision

CLAMP = 256.0  # features of the synthesis and of the discriminator stay within ±256, far from float16's 65504


class ImageConfig(Config):
    """The images that G and D share. `img_resolution: R` is short for squares, `img_shape: [R, R]`."""

    img_shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = Field(
        (512, 512), description="(height, width) of the training images"
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

    def channels(self, k: int) -> int:
        """Return the channels of block k = 4, 8, …, of a config that has channel_base and channel_max."""
        return min(self.channel_base // k, self.channel_max)


class Layer(nn.Module):
    """A module with several implementations, all with the same result: see `compute_with`."""

    impl = "auto"
    recompute = "pixels"


def compute_with(network: nn.Module, impl: str = "auto", recompute: str = "pixels") -> None:
    """Set how all layers of a network are computed.

    impl: "auto", the fastest implementation of each operation (torch_utils.ops) that works on the device, or
        "reference", plain PyTorch.
    recompute: what backward passes recompute, part by part, instead of keeping it: "none", "pixels", or "all", which
        includes the lines and D's features.
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

    def folded(self, w: Tensor | None = None) -> Folded:
        """Fold the gains into weight [O,I] and bias; that of a leaky ReLU commutes with it. w is ignored."""
        slope, gain = ACTIVATIONS[self.act]
        return Folded(self.weight * (self.weight_gain * gain), self.bias * (self.bias_gain * gain), slope)


class Affine(EqualLinear):
    """w […,w_dim] -> style […,O], times `gain`, in the dtype of w even under autocast."""

    def __init__(self, w_dim: int, outputs: int, gain: float = 1.0):
        super().__init__(w_dim, outputs, bias_init=1)
        self.weight_gain *= gain
        self.bias_gain = gain

    def forward(self, w: Tensor) -> Tensor:
        with full_precision(w):  # scale w, which is smaller than the weight
            return F.linear(w * self.weight_gain, self.weight, self.bias * self.bias_gain)


class ModulatedLayer(Layer):
    """[N,P,I], w [N,w_dim] -> [N,P,O]: 1×1 convolution modulated by the affine map of w, bias, activation, clamp."""

    act: str
    demodulate: bool
    clamp: float | None = CLAMP

    def __init__(self, inputs: int, outputs: int, w_dim: int):
        super().__init__()
        # Demodulation makes the length of each row of the weight 1; without it, that takes 1/√I.
        self.affine = Affine(w_dim, inputs, 1 if self.demodulate else 1 / math.sqrt(inputs))
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        how = {"demodulate": self.demodulate, "act": self.act, "clamp": self.clamp, "impl": self.impl}
        return modulated_linear(x, self.weight, self.affine(w), self.bias, **how)

    def folded(self, w: Tensor) -> Folded:
        """Fold the style of w […,w_dim] and the gain into weight […,O,I] and bias."""
        slope, gain = ACTIVATIONS[self.act]
        weight = modulated(self.weight, self.affine(w), demodulate=self.demodulate, gain=gain)
        return Folded(weight, self.bias * gain, slope, self.clamp)


class SynthesisLayer(ModulatedLayer):
    """[N,P,I], w [N,w_dim] -> [N,P,O]: modulated and demodulated 1×1 convolution, leaky ReLU, clamp."""

    act = "lrelu"
    demodulate = True


class Head(ModulatedLayer):
    """[N,P,I], w [N,w_dim] -> [N,P,O] in at least float32: modulated 1×1 convolution without demodulation, clamp.

    It ends a stage: its output is added to the lines or to the colours.
    """

    act = "linear"
    demodulate = False

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        y = super().forward(x, w)
        return y.to(torch.promote_types(y.dtype, torch.float32))

    def folded(self, w: Tensor) -> Folded:
        return super().folded(w)._replace(branch=True)


class FreeHead(Head):
    """A head without clamp, as in CIPS and INR-GAN."""

    clamp = None
