"""Measure path length in W: how far images move for a small step of the style (Karras et al., 2019 and 2020).

    PPL = E[d(g(w), g(lerp(w, w', ε))) / ε²],   w = f(z), w' = f(z') with the same label

at the ends of paths (t = 0; `ppl2_wend` of StyleGAN2 and its successors, whose settings these are): ε = 10⁻⁴, whole
images averaged down by the largest integer that leaves 256 pixels on the shorter side, d = LPIPS with VGG16
(metrics/perceptual.py), and the mean without the lowest and the highest 1 %. Lower is smoother. Styles, images and
the distance must be float32 or better: in bfloat16 a step of 10⁻⁴ rounds to 0.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-4  # ε, in W


def path_lengths(
    mapping: Callable[[Tensor, Tensor], Tensor],
    synthesis: Callable[[Tensor], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    z_towards: Tensor,
    c: Tensor,
) -> Tensor:
    """Return float64 [N], on the CPU, for latents z [N,z_dim], z_towards [N,z_dim] and labels c [N,c_dim].

    mapping: (z, c) -> styles [N,num_ws,w_dim]. synthesis: styles -> images [N,C,H,W] about [-1,1].
    distance: of two such batches -> [N].
    """
    start, end = mapping(torch.cat([z, z_towards]), torch.cat([c, c])).chunk(2)
    images = synthesis(torch.cat([start, start.lerp(end, EPSILON)]))
    factor = min(images.shape[-2:]) // 256
    if factor > 1:
        images = F.avg_pool2d(images, factor)
    return distance(*images.chunk(2)).double().cpu() / EPSILON**2


def trimmed(lengths: Tensor) -> Tensor:
    """Return the values of float64 [N] from the 1st to the 99th percentile, both included."""
    low = lengths.quantile(0.01, interpolation="lower")
    high = lengths.quantile(0.99, interpolation="higher")
    return lengths[(lengths >= low) & (lengths <= high)]
