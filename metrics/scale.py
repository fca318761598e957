"""Scale consistency: is the larger picture the same picture? (paper, table 2: 256² against 512² brought down to 256²)

A set of pictures rendered at R is compared, one by one, with the same set rendered at sR and brought down to R:

    scale_psnr    10 · log₁₀(255² / mean squared error), dB; higher is more consistent
    scale_ssim    structural similarity (Wang et al., 2004), up to 1; higher is more consistent
    scale_lpips   a learned distance (metrics/perceptual.py), from 0; lower is more consistent

Both sets are uint8, as files would hold them: StyleGAN's 127.5·x + 128, clamped to 0 … 255 and truncated, of colours x
in [-1,1] (`torch_utils.images.to_uint8`). What is brought down is computed in float64, rounded to the nearest integer
(halves to the even one), clamped, and uint8 again. Bringing down takes pixels for areas, as image files do, so that a
network whose outer pixels lie on the edges ("endpoints") differs by that too.

Legend: N pictures, C colours, H rows, W columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]  # two uint8 [N,C,H,W] -> [N]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """[N,C,H,W] pairs (0..255) -> float64 [N] in dB against a peak of 255; inf for equal pictures.

    Equals scikit-image's peak_signal_noise_ratio. Raises ValueError for different shapes.
    """
    check_alike(a, b)
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """[N,C,H,W] pairs (0..255) -> float64 [N], at most 1: the mean over colours and whole 11×11 neighbourhoods.

    The settings of Wang et al., https://doi.org/10.1109/TIP.2003.819861: Gaussian weights with σ = 1.5, population
    covariance, K = 0.01 and 0.03, range 255. Equals scikit-image's structural_similarity with gaussian_weights=True,
    sigma=1.5, use_sample_covariance=False, data_range=255 and a channel_axis. Raises ValueError for different shapes,
    and for less than 11 pixels per side.
    """
    check_alike(a, b)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM looks at 11×11 pixels at once; pictures of {a.shape[-1]}x{a.shape[-2]} are too small")
    a, b = a.double(), b.double()
    weights = torch.exp(-torch.arange(-5, 6).to(a).square() / (2 * 1.5**2))
    weights /= weights.sum()

    def around(x: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,C,H−10,W−10], weighted means."""
        return (x.unfold(2, 11, 1) @ weights).unfold(3, 11, 1) @ weights

    mean_a, mean_b = around(a), around(b)
    variances = (around(a * a) - mean_a**2) + (around(b * b) - mean_b**2)
    covariance = around(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).mean(dim=(1, 2, 3))


def check_alike(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"pictures to compare are [N,C,H,W] of one shape; got {list(a.shape)} and {list(b.shape)}")


def box(distance: Tensor, ratio: float) -> Tensor:
    """The part of each large pixel that the small one covers."""
    return ((ratio + 1) / 2 - distance.abs()).clamp(0, 1)


def bicubic(distance: Tensor, ratio: float) -> Tensor:
    """Keys' cubic with a = −½, over ±2 small pixels."""
    t = distance.abs() / ratio
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t < 1, near, torch.where(t < 2, far, 0))


def lanczos(distance: Tensor, ratio: float) -> Tensor:
    """A sinc under a sinc window, over ±3 small pixels."""
    t = distance / ratio
    return torch.where(t.abs() < 3, torch.sinc(t) * torch.sinc(t / 3), 0)


# name -> function(distance of the centres in pixels of before, how many of them a pixel of after takes, 1 or more) ->
# weight, whatever its sum. bicubic and lanczos widen with the ratio and are those of Pillow's Image.resize. For smaller
# pictures box is the exact area, for larger ones linear between pixels.
FILTERS = {"box": box, "bicubic": bicubic, "lanczos": lanczos}


def resize(images: Tensor, size: tuple[int, int], filter: str) -> Tensor:
    """uint8 [N,C,H',W'] -> uint8 [N,C,H,W] for size = (H, W), smaller or larger.

    filter: "box" (each small pixel is the mean of its area; of 2×2 pixels at half the size), "bicubic" or "lanczos"
        (both with antialiasing).
    Raises ValueError for another filter.
    """
    if filter not in FILTERS:
        raise ValueError(f"filter={filter!r} is unknown; use one of {', '.join(FILTERS)}")

    def weights(before: int, after: int) -> Tensor:
        """float64 [after,before], rows that sum to 1."""
        ratio = before / after
        centres, pixels = (torch.arange(count, dtype=torch.float64) + 0.5 for count in (after, before))
        matrix = FILTERS[filter](pixels - centres[:, None] * ratio, max(ratio, 1))
        return (matrix / matrix.sum(1, keepdim=True)).to(images.device)

    rows, cols = (weights(*lengths) for lengths in zip(images.shape[-2:], size, strict=True))
    return (rows @ images.double() @ cols.mT).round().clamp(0, 255).to(torch.uint8)


def bring_down(images: Tensor, size: tuple[int, int], filter: str = "box") -> Tensor:
    """As `resize`. Raises ValueError too for a size larger than the images."""
    large = tuple(images.shape[-2:])
    if large[0] < size[0] or large[1] < size[1]:
        raise ValueError(
            f"pictures of {large[1]}x{large[0]} cannot be brought down to {size[1]}x{size[0]}; "
            "name the smaller size first"
        )
    return resize(images, size, filter)


def on_uint8(distance: Distance) -> Distance:
    """A distance of colours in [-1,1] as one of uint8: x / 127.5 − 1, as StyleGAN reads files."""
    return lambda a, b: distance(a.float() / 127.5 - 1, b.float() / 127.5 - 1)
