"""Bias, activation, gain and clamp: what follows every linear map of the networks."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Activation(NamedTuple):
    function: Callable[[torch.Tensor], torch.Tensor]
    gain: float  # the default: keeps the second moment of normal inputs about 1


ACTIVATIONS = {
    "linear": Activation(torch.positive, 1.0),
    "lrelu": Activation(lambda x: F.leaky_relu(x, 0.2), math.sqrt(2)),
}


def bias_act(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    dim: int = -1,
) -> torch.Tensor:
    """clamp(gain · act(x + bias), ±clamp) in the dtype of x; `bias` [C] lies along axis `dim` of x.

    `act` is a key of ACTIVATIONS, which also holds its default gain. No clamp by default.
    Differentiable twice.
    """
    if bias is not None:
        x = x + bias.to(x.dtype).view([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
    activation = ACTIVATIONS[act]
    gain = activation.gain if gain is None else gain
    x = activation.function(x)
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)
