"""Measure line artefacts: the share of an image's spectral energy on the frequency axes.

An image that is a sum of a function of the row and a function of the column (plaid) has all its energy there. With the
mean over channels less its mean over pixels, x[i,j], and the power spectrum at v cycles per height and u per width

    P[v,u] = |DFT(x · h hᵀ)|²,    h the periodic Hann window, which spreads a frequency over 3 bins,

    share = Σ P where |u| ≤ 1 or |v| ≤ 1  /  Σ P,    both beyond a tenth of the side: (u/W)² + (v/H)² > 0.1²

that is, beyond 0.1 cycles per pixel. Plaid has share 1; white noise has the share of the bins (0.15 at 32², 0.077 at
64²).
"""

import math

import torch
from torch import Tensor

from dnnlib.console import UserError
from metrics.estimate import Estimate
from metrics.images import Activations
from metrics.moments import Moments

LOWEST = 0.1  # cycles per pixel


def masks(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return which bins of a DFT count, and which of these are on the axes: bool [H,W] each."""
    v, u = torch.fft.fftfreq(height, dtype=torch.float64)[:, None], torch.fft.fftfreq(width, dtype=torch.float64)
    counted = u.square() + v.square() > LOWEST**2
    return counted, counted & ((u.abs() * width < 1.5) | (v.abs() * height < 1.5))


def line_share(images: Tensor) -> Tensor:
    """Return float64 [N] from 0 to 1 for uint8 [N,C,H,W]; 0 for a uniform image, which has no energy."""
    x = images.double().sum(1)  # whole numbers: a flat image less its mean is exactly 0
    x = x - x.mean((1, 2), keepdim=True)
    rows, cols = (torch.hann_window(n, dtype=torch.float64, device=x.device) for n in x.shape[1:])
    power = torch.fft.fft2(x * rows[:, None] * cols).abs().square()
    energy, on_axes = (power[:, mask.to(x.device)].sum(1) for mask in masks(*x.shape[1:]))
    return torch.where(energy > 0, on_axes / energy, 0)


class LineShare:
    """A stand-in for metrics.features.Detector, with line_share as its only feature and no weights."""

    name, digest, standard, num_features = "lines", None, True, 1

    def __call__(self, images: Tensor) -> Activations:
        return Activations(line_share(images)[:, None])


def line_ratio(fake: Moments, real: Moments) -> dict[str, Estimate]:
    """Return the mean shares of generated images, `_fake`, and of real images, `_real`, and their `_ratio`.

    fake, real: moments of the share. Raises UserError if the real images have no energy beyond the limit.
    """
    shares = [Estimate(m.mean.item(), math.sqrt(m.covariance.item() / m.count)) for m in (fake, real)]
    if not shares[1].value:
        raise UserError("lines: the real images have no fine detail to compare with; leave this metric out")
    ratio = shares[0].value / shares[1].value
    # The relative variances of independent factors add up.
    errors = (s.standard_error / s.value if s.value else 0.0 for s in shares)
    return {"_fake": shares[0], "_real": shares[1], "_ratio": Estimate(ratio, ratio * math.hypot(*errors))}
