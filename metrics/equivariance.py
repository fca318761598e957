"""Equivariance: is the picture of a moved scene the moved picture? (Karras et al., Alias-Free GAN, 2021)

EQ-T and EQ-R of section 2 and appendix E of that paper, https://arxiv.org/abs/2106.12423. With a generator g, a
transform t of scenes and pictures, and the pixels V that t(g(x)) knows from the picture g(x) alone,

    EQ = 10 · log₁₀(2² / E[(g(t(x)) − t(g(x)))²]) dB,    the mean over pictures, transforms, colours and V;

2 is the width of the range of colours, [-1,1]. They are neither clamped nor rounded, and compared in float64. Higher is
better, infinite is perfect.

    eqt_int    translation by whole pixels; V is where both pictures overlap
    eqt_frac   translation by fractions of pixels; pictures are resampled by Lanczos kernels 2a pixels wide, and V is
               about a pixels smaller on every side
    eqr        rotation by any angle; pictures are resampled by an oriented filter 4a pixels wide, g(t(x)) passes the
               same band limits, and V is about 2a pixels smaller on every side

Translations are uniform within ±12.5 % of each side, angles within ±180°; one is drawn for each batch, as the authors'
code does. The resampling itself bounds eqt_frac and eqr: with a = 3, as published, an ideal generator of waves of 8,
16, 32 and 64 pixels and amplitude ½ reaches 56, 58, 63 and 69 dB of eqt_frac at the worst of 8 draws, and 57, 74, 88
and 100 dB of eqr at the worst of 5. Wider kernels lift the bound: a = 48 gives eqt_frac 107 dB and more.

Legend: N pictures, C colours, H rows, W columns; x runs to the right and y down, in pixels, from the picture's centre.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.measure import Measure
from torch_utils.randomness import make_rng

# The same N pictures [N,C,H,W], moved by a matrix float64 [3,3] (in pixels, about their centre), or as they are.
Paint = Callable[[Tensor | None], Tensor]

FARTHEST = 0.125  # of a side: translations are within ± this
WIDTH = 3  # a, half the width of the Lanczos kernels
UP = 4  # samples per pixel of pictures to be turned


def translation(x: float, y: float) -> Tensor:
    """float64 [3,3], in pixels to the right and down."""
    return torch.tensor([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=torch.float64)


def rotation(angle: float) -> Tensor:
    """float64 [3,3], counter-clockwise, in radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], dtype=torch.float64)


def shifted_whole(images: Tensor, x: int, y: int) -> tuple[Tensor, tuple[slice, slice]]:
    """[N,C,H,W] moved by whole pixels -> its known part [N,C,h,w], and the rows and columns where that lies."""

    def kept(length: int, shift: int) -> slice:
        return slice(max(shift, 0), max(length + shift, 0) if shift < 0 else length)

    height, width = images.shape[-2:]
    return images[..., kept(height, -y), kept(width, -x)], (kept(height, y), kept(width, x))


def shifted(images: Tensor, x: float, y: float, a: int = WIDTH) -> tuple[Tensor, tuple[slice, slice]]:
    """As `shifted_whole` for float64 and any x and y, by sinc kernels under sinc windows (appendix E.2).

    Kernels are scaled to sum to 1. At most this is lost, at any fraction, of waves of f/2 to f cycles per pixel, in dB:

        f       1/4   1/8   1/16   1/32   1/64
        a = 3   −31   −43    −45    −49    −54
        a = 8   −51   −59    −61    −61    −64
        a = 48  −81   −89    −92    −92    −92

    Raises ValueError when a side has less than 2a pixels.
    """
    if min(images.shape[-2:]) < 2 * a:
        raise ValueError(
            f"pictures of {images.shape[-1]}x{images.shape[-2]} are too small for kernels of {2 * a} pixels"
        )

    def along_last(images: Tensor, shift: float) -> tuple[Tensor, slice]:
        whole = math.floor(-shift)
        taps = torch.arange(1 - a, a + 1, dtype=torch.float64, device=images.device) + shift + whole
        kernel = torch.sinc(taps) * torch.sinc(taps / a)
        known = images.unfold(-1, 2 * a, 1) @ (kernel / kernel.sum())
        first = a - 1 - whole  # where element 0 of `known` lies
        start, stop = max(first, 0), min(first + known.shape[-1], images.shape[-1])
        return known[..., start - first : max(stop, start) - first], slice(start, max(stop, start))

    moved, cols = along_last(images, x)
    moved, rows = along_last(moved.mT, y)
    return moved.mT, (rows, cols)


def oriented_filter(matrix: Tensor, a: int, up: int) -> Tensor:
    """float64 [2p+1,2p+1], p = 2a·up − 1: what passes the band limits of the pixels before and after `matrix` both.

    It is the convolution of two square sincs, one turned by `matrix`, under the convolution of two Lanczos windows
    turned alike, sampled at 1/up pixels; each of its up² phases sums to 1 (appendix E.3, and the extents of its code).
    """
    reach = max(64, 4 * a)
    taps = torch.arange(1 - reach * up, reach * up, dtype=torch.float64) / up
    y, x = torch.meshgrid(taps, taps, indexing="ij")
    x_after, y_after = (matrix[i, 0] * x + matrix[i, 1] * y for i in (0, 1))

    def convolved(function: Callable[[Tensor], Tensor]) -> Tensor:
        before, after = (
            torch.fft.fft2(torch.fft.ifftshift(function(u) * function(v))) for u, v in ((x, y), (x_after, y_after))
        )
        return torch.fft.fftshift(torch.fft.ifft2(before * after).real)

    kernel = convolved(torch.sinc) * convolved(lambda t: torch.where(t.abs() < a, torch.sinc(t / a), 0))
    cut, size = (reach - 2 * a) * up, 4 * a * up
    kernel = F.pad(kernel[cut:-cut, cut:-cut], (0, 1, 0, 1)).view(size // up, up, size // up, up)
    return (kernel / kernel.sum((0, 2), keepdim=True)).view(size, size)[:-1, :-1]


def convolve(images: Tensor, kernel: Tensor) -> Tensor:
    """[N,C,H,W] * [h,w] -> [N,C,H+h−1,W+w−1], by Fourier transforms."""
    size = [image + part - 1 for image, part in zip(images.shape[-2:], kernel.shape, strict=True)]
    return torch.fft.irfft2(torch.fft.rfft2(images, s=size) * torch.fft.rfft2(kernel, s=size), s=size)


def turned(images: Tensor, angle: float, a: int = WIDTH, up: int = UP) -> tuple[Tensor, Tensor]:
    """float64 [N,C,H,W] turned counter-clockwise by `angle` radians -> the same shape, and bool [H,W]: where known.

    The filtered picture has `up` samples per pixel and is taken for linear between them, which loses up to
    (2πf / up)² / 8 of a wave of f cycles per pixel: −46 dB at 1/8, −70 dB at 1/32.
    """
    matrix = rotation(angle)
    kernel = oriented_filter(matrix, a, up).to(images)
    height, width = images.shape[-2:]
    dense = images.new_zeros(*images.shape[:2], (height - 1) * up + 1, (width - 1) * up + 1)
    dense[..., ::up, ::up] = images
    dense = convolve(dense, kernel)
    margin = kernel.shape[-1] // 2  # sample k of a row of `dense` lies at (k − margin) / up
    y, x = torch.meshgrid(*(torch.arange(n).to(images) for n in (height, width)), indexing="ij")
    extent = torch.tensor([width - 1, height - 1]).to(images)
    # Where pixels come from: the inverse of a rotation is its transpose, and rows times a matrix transpose it again.
    places = (torch.stack([x, y], -1) - extent / 2) @ matrix[:2, :2].to(images) + extent / 2
    known = ((places >= margin / up) & (places <= extent - margin / up)).all(-1)
    grid = (2 * (places * up + margin) / (extent * up + 2 * margin) - 1).expand(len(images), -1, -1, -1)
    return F.grid_sample(dense, grid, mode="bilinear", align_corners=True), known


def as_if_turned(images: Tensor, angle: float, a: int = WIDTH) -> tuple[Tensor, Tensor]:
    """float64 [N,C,H,W] of a turned scene -> what `turned` would leave of its frequencies, and where known, [H,W]."""
    kernel = oriented_filter(rotation(-angle), a, 1).to(images)
    margin = kernel.shape[-1] // 2
    known = torch.zeros(images.shape[-2:], dtype=torch.bool, device=images.device)
    known[margin:-margin, margin:-margin] = True
    return convolve(images, kernel)[..., margin:-margin, margin:-margin], known


def draw(images: Tensor, random: torch.Generator) -> tuple[float, float]:
    """x and y of a translation, in pixels."""
    height, width = images.shape[-2:]
    x, y = ((2 * torch.rand(2, dtype=torch.float64, generator=random) - 1) * FARTHEST).tolist()
    return x * width, y * height


def eqt_int(paint: Paint, images: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = map(round, draw(images, random))
    expected, (rows, cols) = shifted_whole(images, x, y)
    return paint(translation(x, y)).double()[..., rows, cols], expected


def eqt_frac(paint: Paint, images: Tensor, random: torch.Generator, a: int = WIDTH) -> tuple[Tensor, Tensor]:
    x, y = draw(images, random)
    expected, (rows, cols) = shifted(images, x, y, a)
    return paint(translation(x, y)).double()[..., rows, cols], expected


def eqr(paint: Paint, images: Tensor, random: torch.Generator, a: int = WIDTH, up: int = UP) -> tuple[Tensor, Tensor]:
    angle = (2 * torch.rand([], dtype=torch.float64, generator=random) - 1).item() * math.pi
    expected, known = turned(images, angle, a, up)
    painted, known_too = as_if_turned(paint(rotation(angle)).double(), angle, a)
    known &= known_too
    return painted[..., known], expected[..., known]


# kind -> function(paint, its pictures as float64, random numbers) -> g(t(x)) and t(g(x)) where known, [N,C,...] each
KINDS = {"eqt_int": eqt_int, "eqt_frac": eqt_frac, "eqr": eqr}


def errors(paint: Paint, kinds: Iterable[str] = tuple(KINDS), seed: int = 0, index: int = 0) -> dict[str, Tensor]:
    """kind -> float64 [N,2], on the CPU: each picture's sum of squared differences, and how many numbers it sums.

    paint: the N pictures, about [-1,1], moved as asked. `rendering` takes such a matrix with its last column in units
        of the longer side of the picture trained at: times 1/R where pixels are areas, 1/(R − 1) where the outer ones
        lie on the edges.
    index: the number of these N in the set. Their one transform per kind depends on (kind, seed, index) alone, so that
        the rows of several processes, concatenated, are those of one.
    Raises ValueError for other kinds, for pictures so small that nothing is known, and for colours that are not finite.
    """
    images = paint(None).double()
    rows = {}
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is unknown; use one of {', '.join(KINDS)}")
        moved, expected = KINDS[kind](paint, images, make_rng(seed, index, kind))
        if not moved.numel():
            raise ValueError(
                f"{kind}: pictures of {images.shape[-1]}x{images.shape[-2]} are too small, use 32x32 or more"
            )
        squares = (moved - expected).square().flatten(1)
        rows[kind] = torch.stack([squares.sum(1), squares.new_full([len(squares)], squares.shape[1])], 1).cpu()
        if not rows[kind].isfinite().all():
            raise ValueError(f"{kind}: the pictures have NaN or infinite colours")
    return rows


def decibels(rows: Tensor) -> Measure:
    """The `errors` [N,2] of one kind -> the equivariance in dB.

    `mean` belongs to the mean squared error of all numbers, `values` to that of each picture. The standard error takes
    pictures for independent, and is carried from the error to its logarithm by the slope of the latter.
    """
    squares, counts = rows.unbind(1)
    error = squares.sum() / counts.sum()
    spread = (squares - error * counts).square().sum() * len(rows) / (len(rows) - 1) if len(rows) > 1 else math.nan
    relative = spread**0.5 / squares.sum()
    peak = 10 * math.log10(2**2)
    return Measure(
        (peak - 10 * error.log10()).item(),
        (10 / math.log(10) * relative).item(),
        len(rows),
        peak - 10 * (squares / counts).log10(),
    )
