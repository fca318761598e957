"""The modulated 1×1 convolution: a linear layer whose weight each image scales by its own style.

Legend: N images, P positions, I inputs, O outputs. Channels are the last axis, so that a layer is one matrix product.
"""

import torch

from torch_utils.ops.bias_act import bias_act
from torch_utils.precision import full_precision


def modulated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    style: torch.Tensor,
    bias: torch.Tensor,
    *,
    demodulate: bool = True,
    act: str = "lrelu",
    clamp: float | None = None,
) -> torch.Tensor:
    """bias_act(w' x, bias) with w'[n,o,i] = weight[o,i] · style[n,i], scaled to length 1 over i if demodulated.

    x [N,P,I], weight [O,I], style [N,I], bias [O] -> [N,P,O]. `act` and `clamp` as in `bias_act`. Differentiable twice.
    Source: StyleGAN2 (Karras et al., CVPR 2020, equations 1 and 3).
    """
    # At least float32 here: a sum of 512 equal float16 squares overflows once |w'| > 11.3 (65504 / 512 = 127.9).
    with full_precision(x):
        modulated = weight * style.to(weight.dtype)[:, None, :]
        if demodulate:
            modulated = modulated * (modulated.square().sum(-1, keepdim=True) + 1e-8).rsqrt()
    y = torch.baddbmm(bias.to(x.dtype), x, modulated.mT.to(x.dtype))
    return bias_act(y, act=act, clamp=clamp)
