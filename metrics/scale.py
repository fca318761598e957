"""Measure scale consistency: is the larger image the same? (paper, table 2: 256² against 512² downsampled to 256²)

A set of images rendered at R is compared, one by one, with the same set rendered at sR and downsampled to R:

    scale_psnr    10 · log₁₀(255² / mean squared error), dB; higher is more consistent
    scale_ssim    structural similarity (Wang et al., 2004), up to 1; higher is more consistent
    scale_lpips   a learned distance (metrics/perceptual.py), from 0; lower is more consistent

Both sets are uint8, as files would hold them. Downsampling (metrics/resize.py) treats pixels as areas, as image files
do, so a network whose outer pixels are on the edges ("endpoints") differs by that offset too.

Legend: N images, C channels, H rows, W columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]  # two uint8 [N,C,H,W] -> [N]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return float64 [N], in dB against a peak of 255, for [N,C,H,W] pairs (0..255); inf for equal images.

    Equals scikit-image's peak_signal_noise_ratio.
    """
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return float64 [N], at most 1, for [N,C,H,W] pairs (0..255): the mean over channels and 11×11 neighbourhoods.

    The settings of Wang et al., https://doi.org/10.1109/TIP.2003.819861: Gaussian weights with σ = 1.5, population
    covariance, K = 0.01 and 0.03, range 255. Equals scikit-image's structural_similarity with gaussian_weights=True,
    sigma=1.5, use_sample_covariance=False, data_range=255 and a channel_axis. Needs 11 pixels per side or more.
    """
    a, b = a.double(), b.double()
    weights = torch.exp(-torch.arange(-5, 6).to(a).square() / (2 * 1.5**2))
    weights /= weights.sum()

    def around(x: Tensor) -> Tensor:
        """Compute weighted means: [N,C,H,W] -> [N,C,H−10,W−10]."""
        return (x.unfold(2, 11, 1) @ weights).unfold(3, 11, 1) @ weights

    mean_a, mean_b = around(a), around(b)
    variances = (around(a * a) - mean_a**2) + (around(b * b) - mean_b**2)
    covariance = around(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).mean(dim=(1, 2, 3))


def on_uint8(distance: Distance) -> Distance:
    """Turn a distance of images in [-1,1] into a distance of uint8 images: x / 127.5 − 1, as StyleGAN reads files."""
    return lambda a, b: distance(a.float() / 127.5 - 1, b.float() / 127.5 - 1)
