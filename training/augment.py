"""Adaptive discriminator augmentation: images are transformed at random before the discriminator sees them.

Karras et al., "Training Generative Adversarial Networks with Limited Data" (NeurIPS 2020): transformations and
magnitudes from Appendix B, pipeline `bgc`; the control of the probability from Section 3.

Everything random happens in `sample`, which combines the geometric transformations of each image into one matrix and
its colour changes into another. `augment` is affine in the images, so G can be trained and R1 computed through it.

Legend: N images, C channels, H × W pixels; p the probability of each transformation.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from dnnlib.config import Config, setting
from dnnlib.console import UserError
from torch_utils.ops.convolution import conv2d, conv_transpose2d
from torch_utils.transfer import send

# The twelve taps of the symlet with six vanishing moments (Daubechies, "Ten Lectures on Wavelets", 1992, table 6.3).
# They are orthonormal to their even shifts: doubling and halving an image with the same taps leaves it unchanged.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
# The centre of the filter: its mean is at 5.098 taps, so the error is 0.05 pixels of the image.
CENTRE = 5
# Pixels that the filter reads beyond an edge; mirroring them takes a side of at least one more.
MARGIN = 3


class AugmentConfig(Config):
    """The transformations in use: pixel blitting (b), general geometry (g), colour (c), or several of them."""

    pipe: Literal["blit", "geom", "color", "bg", "bgc"] = setting(
        "bgc", flag="augpipe", description="which augmentations"
    )


@dataclass(frozen=True)
class Augmentations:
    """The transformation of each of N images; slicing selects images.

    geometry: [N,3,3] float64 on the CPU, acts on (x, y, 1) in pixels from the centre of the image, y pointing down, and
        maps content to its new place: translation(5, 0) moves it 5 pixels to the right.
    colour: [N,3,4] float64 on the CPU, acts on (r, g, b, 1) with colours in [-1, 1].
    """

    geometry: torch.Tensor
    colour: torch.Tensor

    def __len__(self) -> int:
        return len(self.geometry)

    def __getitem__(self, part: slice) -> "Augmentations":
        return Augmentations(self.geometry[part], self.colour[part])

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        return augment(images, self)


def adjust(p: float, sign_mean: float, *, images: int, target: float = 0.6, kimg: float = 500) -> float:
    """Return the next probability of augmentation, in [0, 1] (Section 3, r_t).

    `sign_mean`, in [-1, 1], is the mean sign of D(real) over the `images` real images since the last call. Above
    `target` the discriminator overfits and p grows; below it p shrinks. From 0 to 1 takes `kimg` thousand images.
    """
    direction = (sign_mean > target) - (sign_mean < target)
    return min(max(p + direction * images / (kimg * 1000), 0.0), 1.0)


def sample(
    config: AugmentConfig, n: int, p: float, *, image_shape: tuple[int, int], rng: torch.Generator
) -> Augmentations:
    """Sample for `n` images of `image_shape` = (H, W), each transformation with probability `p` in [0, 1].

    Row i is a function of the state of `rng` (on the CPU) and of i alone; neither the config nor p changes how many
    numbers are consumed. Raises UserError when p is not a probability.
    """
    if not 0 <= p <= 1:
        raise UserError(f"p={p} is not a probability; augmentation needs a value from 0 to 1")
    height, width = image_shape
    blit = p if config.pipe in ("blit", "bg", "bgc") else 0.0
    geom = p if config.pipe in ("geom", "bg", "bgc") else 0.0
    color = p if config.pipe in ("color", "bgc") else 0.0

    # 13 decisions and 15 magnitudes, a row for each image.
    numbers = iter(torch.rand(n, 28, generator=rng, dtype=torch.float64).unbind(1))
    if p == 0:
        return Augmentations(*(torch.eye(3, k, dtype=torch.float64).expand(n, -1, -1) for k in (3, 4)))

    def uniform(low, high):
        return low + (high - low) * next(numbers)

    def normal(sigma):
        # Clamped at six sigma, because the uniform number may be 0 and its quantile -inf.
        return sigma * torch.special.ndtri(next(numbers).clamp(1e-9, 1 - 1e-9))

    def one_of(count):
        return torch.floor(count * next(numbers))

    def sometimes(probability, value):
        """Return `value` with `probability`, else 0, which means no change for each of the quantities below."""
        return torch.where(next(numbers) < probability, value, 0.0)

    # Pixel blitting. A flip is sampled from {no, yes} and a turn from four, so p = 1 flips one image in two.
    flip = sometimes(blit, one_of(2))
    quarter_turns = sometimes(blit, one_of(4))
    whole = sometimes(blit, torch.stack([uniform(-0.125, 0.125) * width, uniform(-0.125, 0.125) * height]).round())
    # General geometry. Each rotation has probability p_rot, so that at least one has 1 - (1 - p_rot)² = p.
    p_rot = 1 - math.sqrt(1 - geom)
    zoom = sometimes(geom, normal(0.2 * math.log(2))).exp()
    before = sometimes(p_rot, uniform(-math.pi, math.pi))
    stretch = sometimes(geom, normal(0.2 * math.log(2))).exp()
    after = sometimes(p_rot, uniform(-math.pi, math.pi))
    fraction = sometimes(geom, torch.stack([normal(0.125) * width, normal(0.125) * height]))
    # Colour.
    brightness = sometimes(color, normal(0.2))
    contrast = sometimes(color, normal(0.5 * math.log(2))).exp()
    luma_flip = sometimes(color, one_of(2))
    hue = sometimes(color, uniform(-math.pi, math.pi))
    saturation = sometimes(color, normal(math.log(2))).exp()

    # The rightmost is applied first.
    geometry = (
        translation(*fraction)
        @ rotation(-after)
        @ scaling(stretch, 1 / stretch)
        @ rotation(-before)
        @ scaling(zoom, zoom)
        @ translation(*whole)
        @ rotation(-quarter_turns * (math.pi / 2))
        @ scaling(1 - 2 * flip, torch.ones(n))
    )
    return Augmentations(geometry, recolouring(brightness, contrast, luma_flip, hue, saturation))


def translation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[N], [N] pixels -> [N,3,3]."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrices([one, zero, x], [zero, one, y], [zero, zero, one])


def scaling(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[N], [N] factors -> [N,3,3]; a negative factor is a flip."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrices([x, zero, zero], [zero, y, zero], [zero, zero, one])


def rotation(angle: torch.Tensor) -> torch.Tensor:
    """[N] radians -> [N,3,3]: counter-clockwise on the screen, where y points down, as rendering.rotation."""
    zero, one, cos, sin = torch.zeros_like(angle), torch.ones_like(angle), angle.cos(), angle.sin()
    return _matrices([cos, sin, zero], [-sin, cos, zero], [zero, zero, one])


def recolouring(
    brightness: torch.Tensor,
    contrast: torch.Tensor,
    luma_flip: torch.Tensor,
    hue: torch.Tensor,
    saturation: torch.Tensor,
) -> torch.Tensor:
    """Five [N] vectors -> [N,3,4]: add brightness, multiply by contrast, flip luma, rotate hue, multiply saturation.

    Brightness is an offset to r, g and b; luma_flip is 0 or 1; hue is an angle in radians; 1 is neutral contrast and
    saturation. Luma is the direction v = (1, 1, 1) / √3. Each of the five maps luma to luma, and the plane orthogonal
    to it (hue and saturation) to itself, so their product is a factor on luma and a scaled rotation in the plane.
    """
    luma = torch.full((3, 3), 1 / 3, dtype=torch.float64)  # v vᵀ
    plane = torch.eye(3, dtype=torch.float64) - luma
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / math.sqrt(3)  # x -> v × x

    def times(factor, matrix):
        return factor[:, None, None] * matrix

    luma_factor = contrast * (1 - 2 * luma_flip)
    plane_factor = contrast * saturation
    linear = times(luma_factor, luma) + times(plane_factor * hue.cos(), plane) + times(plane_factor * hue.sin(), cross)
    offset = times(luma_factor * brightness, torch.ones(3, 1, dtype=torch.float64))
    return torch.cat([linear, offset], dim=2)


def augment(images: torch.Tensor, augmentations: Augmentations) -> torch.Tensor:
    """Apply `augmentations` to `images` [N,C,H,W] in [-1, 1]: same shape, type and device; colours may leave [-1, 1].

    C is 1 (grey: r = g = b, hue and saturation have no effect), 3, or 4 (RGBA: alpha moves with the image and keeps its
    values). Rotations are rigid in rectangles too. Edges are mirrored. Differentiable any number of times in `images`.
    Computes in at least float32, also inside autocast. The identity returns an image bit for bit; a shift by whole
    pixels is exact to rounding; a flip or a quarter turn is not, because sym6 is not quite symmetric (0.02 to 0.03 rms
    on a sharp 64×64 image, less on larger ones).
    Raises UserError for another C, for another number of augmentations than images, and when H or W is below 4.
    """
    n, channels, height, width = images.shape
    if channels not in (1, 3, 4):
        raise UserError(f"cannot augment images with {channels} channels; use 1 (grey), 3 (RGB) or 4 (RGBA)")
    if len(augmentations) != n:
        raise UserError(f"{len(augmentations)} augmentations for {n} images; slice both in the same way")
    if min(height, width) <= MARGIN:
        raise UserError(f"cannot augment images of {height}x{width} pixels; at least 4x4 are needed")

    with torch.autocast(images.device.type, enabled=False):
        result = images.to(torch.promote_types(images.dtype, torch.float32))
        result = _change(_move, result, augmentations.geometry, torch.eye(3, dtype=torch.float64))
        result = _change(_recolour, result, augmentations.colour, torch.eye(3, 4, dtype=torch.float64))
    return result.to(images.dtype)


def _change(transform, images, matrices, identity):
    """Return transform(images, matrices), computed only for the images whose matrix is not the identity."""
    changed = (matrices != identity).flatten(1).any(1).nonzero().squeeze(1)
    if len(changed) == 0:
        return images
    rows = send(changed, images.device)
    return images.index_copy(0, rows, transform(images.index_select(0, rows), matrices[changed]))


def _move(images, geometry):
    """[N,C,H,W], [N,3,3] -> [N,C,H,W]: double, sample each pixel of the doubled result from its source, halve."""
    height, width = images.shape[2:]
    source = torch.linalg.inv(geometry)

    # Positions in pixels from the centre. `_halve` reads 2H + 10 samples half a pixel apart, beginning CENTRE samples
    # before the first pixel.
    def positions(size):
        return (torch.arange(2 * size + len(SYM6) - 2, dtype=torch.float64) - CENTRE) / 2 - (size - 1) / 2

    # For grid_sample, -1 and 1 are the centres of the first and last pixel. The sources along a row and a column are
    # computed in float64; only their sum, which has the size of the image, has the type of the images.
    unit = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)
    across = positions(width)[:, None] * source[:, None, :2, 0] / unit  # [N,2W+10,2]
    down = (positions(height)[:, None] * source[:, None, :2, 1] + source[:, None, :2, 2]) / unit  # [N,2H+10,2]
    across, down = (send(x, images.device, images.dtype) for x in (across, down))
    grid = across[:, None, :, :] + down[:, :, None, :]
    return _halve(_Sample.apply(_double(images), grid))


def _double(images):
    """[N,C,H,W] -> [N,C,2H-1,2W-1]: a sample at each pixel and one halfway to the next.

    The first and last samples are the outermost pixels, about which grid_sample mirrors.
    """
    n, channels, height, width = images.shape
    taps = math.sqrt(2) * torch.tensor(SYM6, dtype=images.dtype, device=images.device)
    padded = F.pad(images, (MARGIN, MARGIN, MARGIN, MARGIN), mode="reflect")
    planes = padded.reshape(n * channels, 1, height + 2 * MARGIN, width + 2 * MARGIN)
    cut = 2 * MARGIN + CENTRE
    size = 2 * height, width + 2 * MARGIN
    planes = conv_transpose2d(planes, taps.reshape(1, 1, -1, 1), size, stride=(2, 1), padding=(cut, 0))
    size = 2 * height, 2 * width
    planes = conv_transpose2d(planes, taps.reshape(1, 1, 1, -1), size, stride=(1, 2), padding=(0, cut))
    return planes[:, :, :-1, :-1].reshape(n, channels, 2 * height - 1, 2 * width - 1)


def _halve(images):
    """[N,C,2H+10,2W+10] -> [N,C,H,W]: filter and keep every other sample; the inverse of `_double`."""
    n, channels, height, width = images.shape
    taps = torch.tensor(SYM6, dtype=images.dtype, device=images.device) / math.sqrt(2)
    planes = images.reshape(n * channels, 1, height, width)
    planes = conv2d(planes, taps.reshape(1, 1, -1, 1), stride=(2, 1))
    planes = conv2d(planes, taps.reshape(1, 1, 1, -1), stride=(1, 2))
    return planes.unflatten(0, (n, channels)).squeeze(2)


def _bilinear(images, grid):
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=True)


class _Sample(torch.autograd.Function):
    """Sample [N,C,H,W] bilinearly at [N,h,w,2] -> [N,C,h,w], linear in the images for a fixed grid.

    grid_sample has no second derivative. The gradient of a linear map is its transpose, and the gradient of the
    transpose is the map again, so these two functions are closed under differentiation.
    """

    @staticmethod
    def forward(ctx, images, grid):
        ctx.save_for_backward(grid)
        ctx.shape = images.shape
        return _bilinear(images, grid)

    @staticmethod
    def backward(ctx, gradient):
        (grid,) = ctx.saved_tensors
        return _Spread.apply(gradient, grid, ctx.shape), None


class _Spread(torch.autograd.Function):
    """Spread [N,C,h,w] with the bilinear weights over [N,C,H,W] (`shape`): the transpose of `_Sample`."""

    @staticmethod
    def forward(ctx, samples, grid, shape):
        ctx.save_for_backward(grid)
        with torch.enable_grad():
            canvas = samples.new_zeros(shape, requires_grad=True)
            (spread,) = torch.autograd.grad(_bilinear(canvas, grid), canvas, samples)
        return spread

    @staticmethod
    def backward(ctx, gradient):
        (grid,) = ctx.saved_tensors
        return _Sample.apply(gradient, grid), None, None


def _recolour(images, colour):
    """[N,C,H,W], [N,3,4] -> [N,C,H,W]."""
    if images.shape[1] == 1:
        # Each row acts on r = g = b; the three rows agree, and the first stands for all.
        colour = torch.cat([colour[:, :1, :3].sum(2, keepdim=True), colour[:, :1, 3:]], dim=2)
    colour = send(colour, images.device, images.dtype)
    colours, alpha = images[:, :3], images[:, 3:]
    # Products and sums one by one: an einsum would round to TF32 where that is on for matrix products.
    mixed = sum(colour[:, :, i, None, None] * colours[:, i, None] for i in range(colours.shape[1]))
    return torch.cat([mixed + colour[:, :, -1, None, None], alpha], dim=1)


def _matrices(*rows):
    """Rows of [N] vectors -> [N,rows,columns] float64."""
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1).to(torch.float64)
