"""Measure equivariance: is the image of a moved scene the moved image? (Karras et al., Alias-Free GAN, 2021)

EQ-T and EQ-R of section 2 and appendix E of that paper, https://arxiv.org/abs/2106.12423. With a generator g, a
transform t of scenes and images, and the pixels V that t(g(x)) knows from the image g(x) alone,

    EQ = 10 · log₁₀(2² / E[(g(t(x)) − t(g(x)))²]) dB,    the mean over images, transforms, channels and V;

2 is the width of the range of values, [-1,1]. They are neither clamped nor rounded, and compared in float64. Higher is
better, infinite is perfect.

    eqt_int    translation by whole pixels; V is where both images overlap
    eqt_frac   translation by fractions of pixels; images are resampled by Lanczos kernels 2a pixels wide, and V is
               about a pixels smaller on every side
    eqr        rotation by any angle; images are resampled by an oriented filter 4a pixels wide, g(t(x)) passes the
               same band limits, and V is about 2a pixels smaller on every side

Translations are uniform within ±12.5 % of each side, angles within ±180°. The resampling itself bounds eqt_frac and
eqr: with a = 3, as published, an ideal generator of waves of 8, 16, 32 and 64 pixels and amplitude ½ reaches 56, 58, 63
and 69 dB of eqt_frac at the worst of 8 samples, and 57, 74, 88 and 100 dB of eqr at the worst of 5. Wider kernels lift
the bound: a = 48 gives eqt_frac 107 dB and more.

Legend: N images, C channels, H rows, W columns; x runs to the right and y down, in pixels, from the image's centre.
Matrices and angles are as in rendering: counter-clockwise, in degrees.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.estimate import Estimate
from rendering import rotation, translation
from torch_utils.randomness import make_rng

# The same N images [N,C,H,W], moved by a matrix float64 [3,3] (in pixels, about their centre), or as they are.
Render = Callable[[Tensor | None], Tensor]

FARTHEST = 0.125  # of a side: translations are within ± this
WIDTH = 3  # a, half the width of the Lanczos kernels
UP = 4  # samples per pixel of images to be rotated
REACH = 64  # pixels to each side in which the oriented filter is computed, before it is cut


def shifted_whole(images: Tensor, x: int, y: int) -> tuple[Tensor, tuple[slice, slice]]:
    """Move [N,C,H,W] by whole pixels: return its known part [N,C,h,w], and the rows and columns of that part."""

    def kept(length: int, shift: int) -> slice:
        return slice(max(shift, 0), max(length + shift, 0) if shift < 0 else length)

    height, width = images.shape[-2:]
    return images[..., kept(height, -y), kept(width, -x)], (kept(height, y), kept(width, x))


def shifted(images: Tensor, x: float, y: float, a: int = WIDTH) -> tuple[Tensor, tuple[slice, slice]]:
    """Move float64 [N,C,H,W] like `shifted_whole`, by any x and y, with sinc kernels under sinc windows (appendix E.2).

    Kernels are scaled to sum to 1. The largest error for any fraction, for waves of f/2 to f cycles per pixel, in dB:

        f       1/4   1/8   1/16   1/32   1/64
        a = 3   −31   −43    −45    −49    −54
        a = 8   −51   −59    −61    −61    −64
        a = 48  −81   −89    −92    −92    −92

    Needs 2a pixels per side or more.
    """

    def along_last(images: Tensor, shift: float) -> tuple[Tensor, slice]:
        whole = math.floor(-shift)
        taps = torch.arange(1 - a, a + 1, dtype=torch.float64, device=images.device) + shift + whole
        kernel = torch.sinc(taps) * torch.sinc(taps / a)
        known = images.unfold(-1, 2 * a, 1) @ (kernel / kernel.sum())
        first = a - 1 - whole  # the position of element 0 of `known`
        start, stop = max(first, 0), min(first + known.shape[-1], images.shape[-1])
        return known[..., start - first : max(stop, start) - first], slice(start, max(stop, start))

    moved, cols = along_last(images, x)
    moved, rows = along_last(moved.mT, y)
    return moved.mT, (rows, cols)


def oriented_filter(matrix: Tensor, up: int, device: torch.device) -> Tensor:
    """Return float64 [2p+1,2p+1], p = 2·WIDTH·up − 1: the band limits of pixels both before and after `matrix`.

    It is the convolution of two square sincs, one rotated by `matrix`, under the convolution of two Lanczos windows
    rotated alike, sampled at 1/up pixels; each of its up² phases sums to 1 (appendix E.3, and the extents of its code).
    """
    taps = torch.arange(1 - REACH * up, REACH * up, dtype=torch.float64, device=device) / up
    y, x = torch.meshgrid(taps, taps, indexing="ij")
    x_after, y_after = (matrix[i, 0] * x + matrix[i, 1] * y for i in (0, 1))

    def convolved(function: Callable[[Tensor], Tensor]) -> Tensor:
        before, after = (
            torch.fft.fft2(torch.fft.ifftshift(function(u) * function(v))) for u, v in ((x, y), (x_after, y_after))
        )
        return torch.fft.fftshift(torch.fft.ifft2(before * after).real)

    kernel = convolved(torch.sinc) * convolved(lambda t: torch.where(t.abs() < WIDTH, torch.sinc(t / WIDTH), 0))
    cut, size = (REACH - 2 * WIDTH) * up, 4 * WIDTH * up
    kernel = F.pad(kernel[cut:-cut, cut:-cut], (0, 1, 0, 1)).view(size // up, up, size // up, up)
    return (kernel / kernel.sum((0, 2), keepdim=True)).view(size, size)[:-1, :-1]


def convolve(images: Tensor, kernel: Tensor) -> Tensor:
    """Convolve [N,C,H,W] with [h,w] into [N,C,H+h−1,W+w−1], by Fourier transforms."""
    size = [image + part - 1 for image, part in zip(images.shape[-2:], kernel.shape, strict=True)]
    return torch.fft.irfft2(torch.fft.rfft2(images, s=size) * torch.fft.rfft2(kernel, s=size), s=size)


def rotated(images: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """Rotate float64 [N,C,H,W] about its centre: return the same shape, and a mask bool [H,W] of the known pixels.

    The filtered image has UP samples per pixel and is interpolated linearly between them, which loses up to
    (2πf / UP)² / 8 of a wave with f cycles per pixel: −46 dB at 1/8, −70 dB at 1/32.
    """
    matrix = rotation(degrees)
    kernel = oriented_filter(matrix, UP, images.device)
    height, width = images.shape[-2:]
    dense = images.new_zeros(*images.shape[:2], (height - 1) * UP + 1, (width - 1) * UP + 1)
    dense[..., ::UP, ::UP] = images
    dense = convolve(dense, kernel)
    margin = kernel.shape[-1] // 2  # sample k of a row of `dense` is at (k − margin) / UP
    y, x = torch.meshgrid(*(torch.arange(n).to(images) for n in (height, width)), indexing="ij")
    extent = torch.tensor([width - 1, height - 1]).to(images)
    # Where pixels come from: the inverse of a rotation is its transpose, and rows times a matrix transpose it again.
    places = (torch.stack([x, y], -1) - extent / 2) @ matrix[:2, :2].to(images) + extent / 2
    known = ((places >= margin / UP) & (places <= extent - margin / UP)).all(-1)
    grid = (2 * (places * UP + margin) / (extent * UP + 2 * margin) - 1).expand(len(images), -1, -1, -1)
    return F.grid_sample(dense, grid, mode="bilinear", align_corners=True), known


def band_limited(images: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """Filter float64 [N,C,H,W] of a rotated scene as `rotated` does: return the same shape and the mask."""
    kernel = oriented_filter(rotation(-degrees), 1, images.device)
    margin = kernel.shape[-1] // 2
    known = torch.zeros(images.shape[-2:], dtype=torch.bool, device=images.device)
    known[margin:-margin, margin:-margin] = True
    return convolve(images, kernel)[..., margin:-margin, margin:-margin], known


# Each moves a scene at random: (render, its images as float64, rng) -> g(t(x)) and t(g(x)) where known, [N,C,...] each.


def sample_shift(images: Tensor, rng: torch.Generator) -> tuple[float, float]:
    """Sample x and y of a translation, in pixels."""
    height, width = images.shape[-2:]
    x, y = ((2 * torch.rand(2, dtype=torch.float64, generator=rng) - 1) * FARTHEST).tolist()
    return x * width, y * height


def eqt_int(render: Render, images: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = map(round, sample_shift(images, rng))
    expected, (rows, cols) = shifted_whole(images, x, y)
    return render(translation(x, y)).double()[..., rows, cols], expected


def eqt_frac(render: Render, images: Tensor, rng: torch.Generator, a: int = WIDTH) -> tuple[Tensor, Tensor]:
    x, y = sample_shift(images, rng)
    expected, (rows, cols) = shifted(images, x, y, a)
    return render(translation(x, y)).double()[..., rows, cols], expected


def eqr(render: Render, images: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    degrees = (2 * torch.rand([], dtype=torch.float64, generator=rng) - 1).item() * 180
    expected, known = rotated(images, degrees)
    moved, known_too = band_limited(render(rotation(degrees)).double(), degrees)
    known &= known_too
    return moved[..., known], expected[..., known]


def errors(render: Render, move: Callable, seed: int = 0, number: int = 0) -> Tensor:
    """Return float64 [N,2], on the CPU: each image's sum of squared differences, and the number of terms.

    render: renders the N images, about [-1,1], after a transform. move: eqt_int, eqt_frac or eqr.
    number: the number of these N images in the set. Their transform depends on (move, seed, number) alone, so the
        concatenated rows of several processes equal those of one process.
    Images have 32 pixels per side or more.
    """
    images = render(None).double()
    found, expected = move(render, images, make_rng(seed, number, move.__name__))
    squares = (found - expected).square().flatten(1)
    return torch.stack([squares.sum(1), squares.new_full([len(squares)], squares.shape[1])], 1).cpu()


def decibels(rows: Tensor) -> Estimate:
    """Return the equivariance in dB, from the mean squared error over all values, for the `errors` [N,2] of one kind.

    The standard error assumes independent images; the slope of the logarithm converts it to dB.
    """
    squares, counts = rows.unbind(1)
    error = squares.sum() / counts.sum()
    spread = (squares - error * counts).square().sum() * len(rows) / (len(rows) - 1) if len(rows) > 1 else math.nan
    relative = spread**0.5 / squares.sum()
    return Estimate((10 * (4 / error).log10()).item(), (10 / math.log(10) * relative).item())
