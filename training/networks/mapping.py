"""The mapping from a latent and a label to a style."""

import itertools

import torch
from torch import Tensor, nn

from torch_utils.precision import full_precision
from training.networks.layers import EqualLinear

LR_MULT = 0.01  # the mapping learns a hundred times slower than the synthesis (StyleGAN, CVPR 2019, appendix C)


def normalise(x: Tensor) -> Tensor:
    """Scale [N,C] to a mean square of 1 over the channels."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


class Mapping(nn.Module):
    """z [N,z_dim], c [N,c_dim] -> w [N,w_dim]. Either of z_dim and c_dim may be 0.

    c is one-hot or any vector. Runs in at least float32 even under autocast: its rounding would affect every layer.
    """

    def __init__(self, z_dim: int, c_dim: int, w_dim: int, num_layers: int):
        super().__init__()
        self.z_dim, self.c_dim = z_dim, c_dim
        self.embed = EqualLinear(c_dim, w_dim) if c_dim else None
        widths = [z_dim + (w_dim if c_dim else 0)] + [w_dim] * num_layers
        self.layers = nn.ModuleList(
            EqualLinear(i, o, act="lrelu", lr_mult=LR_MULT) for i, o in itertools.pairwise(widths)
        )

    def forward(self, z: Tensor | None, c: Tensor | None) -> Tensor:
        dtype = next(self.parameters()).dtype
        parts = []
        if self.z_dim:
            if z is None or z.shape[1:] != (self.z_dim,):
                raise ValueError(f"z must be [N,{self.z_dim}], got {None if z is None else list(z.shape)}")
            parts.append(normalise(z.to(dtype)))
        check_label(c, self.c_dim, len(parts[0]) if parts else None)
        if self.embed is not None:
            with full_precision(c):
                parts.append(normalise(self.embed(c.to(dtype))))
        with full_precision(parts[0]):
            x = torch.cat(parts, dim=1)
            for layer in self.layers:
                x = layer(x)
        return x


def check_label(c: Tensor | None, c_dim: int, count: int | None) -> None:
    """Raise ValueError unless c is [count,c_dim]; c may be None when c_dim is 0."""
    if c is None and not c_dim:
        return
    if c is None or c.shape[1:] != (c_dim,):
        got = "None" if c is None else list(c.shape)
        what = f"conditional: c must be [N,{c_dim}]" if c_dim else "unconditional: c must be None or [N,0]"
        raise ValueError(f"the network is {what}, got {got}")
    if count is not None and len(c) != count:
        raise ValueError(f"c has {len(c)} labels for {count} images")
