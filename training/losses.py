"""The terms of the training loss. Tensors in, one value per image out; no backward, no logging.

Legend: N images, w the style dimension; K styles or logits of an image. Logits are [N,K] or [N].
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops.resample import lowpass


def logistic_G(fake_logits: Tensor) -> Tensor:
    """[N,K] -> [N]: softplus(−D(G(z))), the non-saturating loss (Goodfellow et al., NeurIPS 2014)."""
    return per_image(F.softplus(-fake_logits))


def logistic_D(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """[N,K], [N,K] -> [N]: softplus(−D(real)) + softplus(D(fake))."""
    return per_image(F.softplus(-real_logits)) + per_image(F.softplus(fake_logits))


def hinge_G(fake_logits: Tensor) -> Tensor:
    """[N,K] -> [N]: −D(G(z)) (Lim and Ye, "Geometric GAN", 2017)."""
    return per_image(-fake_logits)


def hinge_D(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """[N,K], [N,K] -> [N]: max(0, 1 − D(real)) + max(0, 1 + D(fake))."""
    return per_image(F.relu(1 - real_logits)) + per_image(F.relu(1 + fake_logits))


def relativistic_G(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """[N,K], [N,K] -> [N]: softplus(D(real) − D(G(z))), each generated image beside one real image.

    Relativistic pairing (Jolicoeur-Martineau, ICLR 2019). R3GAN (Huang et al., NeurIPS 2024) adds R1 and R2.
    """
    return per_image(F.softplus(real_logits - fake_logits))


def relativistic_D(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """[N,K], [N,K] -> [N]: softplus(D(fake) − D(real))."""
    return per_image(F.softplus(fake_logits - real_logits))


def pyramid(x: Tensor, levels: int) -> Iterator[Tensor]:
    """[N,C,H,W] -> x and its smaller versions, `levels` in all, each half the one before: filtered by [1,3,3,1]/8.

    Beyond an edge its pixels are repeated.
    """
    yield x
    for _ in range(levels - 1):
        x = lowpass(F.pad(x, (1, 1, 1, 1), mode="replicate"), padding=0, stride=2)
        yield x


def per_image(x: Tensor) -> Tensor:
    """[N,…] -> [N]: the mean over all logits of an image."""
    return x.flatten(1).mean(dim=1) if x.ndim > 1 else x


class Adversarial(NamedTuple):
    """G(fake_logits), or G(fake_logits, real_logits) of a loss of pairs, and D(real_logits, fake_logits)."""

    G: Callable[..., Tensor]
    D: Callable[[Tensor, Tensor], Tensor]
    pairs: bool = False


ADVERSARIAL = {
    "logistic": Adversarial(logistic_G, logistic_D),
    "hinge": Adversarial(hinge_G, hinge_D),
    "relativistic": Adversarial(relativistic_G, relativistic_D, pairs=True),
}


def r1(D: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """images [N,C,H,W] -> [N]: ‖∂ΣD(images)/∂images‖², to be weighted by γ/2.

    R1 where the images are real, R2 where they are generated (Mescheder et al., ICML 2018).
    """
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(D(images).sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3))


def path_lengths(synthesis: Callable[[Tensor], Tensor], ws: Tensor, noise: Tensor) -> Tensor:
    """ws [N,K,w], noise N(0,1) [N,C,H,W] -> [N]: √(mean over K of ‖∂Σ(image · noise/√(HW))/∂ws‖²). Differentiable.

    StyleGAN2 (CVPR 2020), section 3.2. The penalty is (length − a)² with `a` a running mean of the lengths.
    """
    noise = noise / (noise.shape[2] * noise.shape[3]) ** 0.5
    (gradient,) = torch.autograd.grad((synthesis(ws) * noise).sum(), ws, create_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()


def path_penalty(lengths: Tensor, mean: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """lengths [N], running mean [] -> penalty [N], the new running mean [].

    a ← a + decay · (mean length − a); penalty (length − a)² with the new a. As in the released code, the gradient also
    flows through the new a, so `lengths` must be those of the whole batch.
    """
    mean = mean.lerp(lengths.mean(), decay)
    return (lengths - mean).square(), mean.detach()
