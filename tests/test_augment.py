"""Laws of the augmentations: each transformation against an independent truth, and the map as a whole as linear."""

import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from pydantic import ValidationError

from dnnlib.console import UserError
from training.augment import (
    SYM6,
    Augmentations,
    AugmentConfig,
    adjust,
    augment,
    recolouring,
    rotation,
    sample,
    scaling,
    translation,
)

NO_MOVE = torch.eye(3, dtype=torch.float64)[None]
NO_COLOUR = torch.eye(3, 4, dtype=torch.float64)[None]
# sym6 is centred 0.098 taps = 0.05 pixels beside a tap. A flip or a half turn mirrors that: 0.1 pixels, which on a
# slope of at most 0.45 a pixel (`waves`) makes 0.045. Half a tap off in the code would make 0.2 and more.
FLIPPED = 0.045
LUMA = torch.full((3,), 1 / math.sqrt(3), dtype=torch.float64)


def number(value):
    return torch.tensor([value], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sampled(n, p, *, pipe="bgc", image_shape=(32, 32), seed=0):
    return sample(AugmentConfig(pipe=pipe), n, p, image_shape=image_shape, rng=seeded(seed))


def noise(*shape, dtype=torch.float64):
    return torch.rand(*shape, generator=seeded(99), dtype=dtype) * 2 - 1


def moved(images, matrix):
    return augment(images, Augmentations(matrix.expand(len(images), 3, 3), NO_COLOUR.expand(len(images), 3, 4)))


def recoloured(images, *, brightness=0.0, contrast=1.0, luma_flip=0.0, hue=0.0, saturation=1.0):
    colour = recolouring(*map(number, (brightness, contrast, luma_flip, hue, saturation)))
    return augment(images, Augmentations(NO_MOVE.expand(len(images), 3, 3), colour.expand(len(images), 3, 4)))


def waves(x, y):
    """A smooth image given as a function of pixels from the centre: the fastest wave is 11 pixels long."""
    return 0.5 * torch.sin(0.4 * x + 0.3 * y + 1) + 0.4 * torch.cos(0.2 * x - 0.5 * y)


def centred(height, width):
    """x [1,W] and y [H,1] in pixels from the centre."""
    x = torch.arange(width, dtype=torch.float64)[None, :] - (width - 1) / 2
    y = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2
    return x, y


# The filter.


def test_sym6_is_orthonormal_to_its_even_shifts():
    taps = np.array(SYM6)
    products = [taps[: 12 - 2 * k] @ taps[2 * k :] for k in range(6)]
    np.testing.assert_allclose(products, [1, 0, 0, 0, 0, 0], atol=1e-11)


def test_sym6_passes_constants_and_stops_polynomials_of_degree_below_six():
    taps, k = np.array(SYM6), np.arange(12)
    assert taps.sum() == pytest.approx(math.sqrt(2), abs=1e-12)
    moments = [((-1.0) ** k * (k / 12) ** j) @ taps for j in range(6)]
    np.testing.assert_allclose(moments, 0, atol=1e-10)


# Identity.


def test_p_0_returns_the_images_bit_for_bit():
    images = noise(4, 3, 16, 20).to(torch.bfloat16)
    assert torch.equal(augment(images, sampled(4, 0.0)), images)


def test_an_image_without_a_change_is_untouched_beside_images_with_changes():
    images, samples = noise(32, 3, 16, 16, dtype=torch.float32), sampled(32, 0.1, image_shape=(16, 16))
    untouched = ((samples.geometry == NO_MOVE).all((1, 2))) & ((samples.colour == NO_COLOUR).all((1, 2)))
    assert 0 < untouched.sum() < 32
    result = augment(images, samples)
    same = (result == images).all((1, 2, 3))
    assert torch.equal(same, untouched)


# Geometry.


def test_a_translation_by_whole_pixels_is_roll_inside():
    x, y = -2, 4
    images = noise(2, 3, 24, 32)
    result = moved(images, translation(number(x), number(y)))
    inside = (..., slice(9, -9), slice(9, -9))
    torch.testing.assert_close(result[inside], images.roll((y, x), (2, 3))[inside], atol=1e-9, rtol=0)


def test_flips_and_quarter_turns_are_those_of_torch():
    image = waves(*centred(32, 32)).expand(1, 1, 32, 32)
    inside = (..., slice(6, -6), slice(6, -6))
    flipped = moved(image, scaling(number(-1.0), number(1.0)))
    torch.testing.assert_close(flipped[inside], image.flip(3)[inside], atol=FLIPPED, rtol=0)
    for quarters in (1, 2, 3):
        turned, truth = moved(image, rotation(number(quarters * math.pi / 2))), image.rot90(quarters, (2, 3))
        torch.testing.assert_close(turned[inside], truth[inside], atol=FLIPPED, rtol=0)


@pytest.mark.parametrize(
    ("matrix", "height", "width"),
    [
        (rotation(number(-1.3)), 24, 41),
        (scaling(number(1.2), number(1 / 1.2)), 32, 32),
        (translation(number(2.3), number(-1.6)), 32, 32),
        (translation(number(2.0), number(1.5)) @ rotation(number(0.7)) @ scaling(number(-1.3), number(1.1)), 24, 41),
    ],
)
def test_a_smooth_image_is_moved_as_its_formula_is(matrix, height, width):
    """Content goes from q to matrix · q, so the new image at q is the formula at the inverse."""
    x, y = centred(height, width)
    source = torch.linalg.inv(matrix[0])
    truth = waves(*(source[i, 0] * x + source[i, 1] * y + source[i, 2] for i in range(2)))
    result = moved(waves(x, y).expand(1, 1, height, width), matrix)[0, 0]
    # Where the source lies at least 6 pixels within the image: the formula is not mirrored, the image is.
    inside = ((source[0, 0] * x + source[0, 1] * y + source[0, 2]).abs() < (width - 1) / 2 - 6) & (
        (source[1, 0] * x + source[1, 1] * y + source[1, 2]).abs() < (height - 1) / 2 - 6
    )
    assert inside.sum() > 50
    assert (result - truth)[inside].abs().max() < FLIPPED


def test_whole_images_agree_with_scipy_and_mirror_beyond_their_edges():
    height, width = 40, 56
    rng = np.random.default_rng(5)
    image = scipy.ndimage.gaussian_filter(rng.standard_normal((height, width)), 2.5, mode="mirror")
    image /= np.abs(image).max()
    samples = sampled(12, 0.8, pipe="bg", image_shape=(height, width))
    results = augment(torch.from_numpy(image).expand(12, 1, height, width), samples)[:, 0].numpy()

    to_centre = np.array([[0, 1, -(width - 1) / 2], [1, 0, -(height - 1) / 2], [0, 0, 1]])  # (row, column) -> (x, y)
    for result, geometry in zip(results, samples.geometry.numpy(), strict=True):
        source = np.linalg.inv(to_centre) @ np.linalg.inv(geometry) @ to_centre
        truth = scipy.ndimage.affine_transform(image, source, order=3, mode="mirror")
        assert np.abs(result - truth).max() < 0.06
        assert np.sqrt(np.mean((result - truth) ** 2)) < 0.015


# Colour.


def test_brightness_adds_and_contrast_multiplies():
    images = noise(2, 3, 8, 8)
    torch.testing.assert_close(recoloured(images, brightness=0.3), images + 0.3)
    torch.testing.assert_close(recoloured(images, contrast=1.7), images * 1.7)
    torch.testing.assert_close(recoloured(images, brightness=0.3, contrast=1.7), (images + 0.3) * 1.7)


def test_a_luma_flip_mirrors_luma_and_twice_is_the_identity():
    images = noise(2, 3, 8, 8)
    flipped = recoloured(images, luma_flip=1.0)
    torch.testing.assert_close(flipped, images - 2 * images.mean(1, keepdim=True))
    torch.testing.assert_close(recoloured(flipped, luma_flip=1.0), images)


def test_hue_is_the_rotation_about_the_grey_axis():
    for angle in (-2.0, 0.5, 3.0):
        matrix = recolouring(*map(number, (0.0, 1.0, 0.0, angle, 1.0)))[0, :, :3]
        truth = scipy.spatial.transform.Rotation.from_rotvec(angle * LUMA.numpy()).as_matrix()
        np.testing.assert_allclose(matrix.numpy(), truth, atol=1e-12)
    images = noise(1, 3, 8, 8)
    torch.testing.assert_close(recoloured(images, hue=2 * math.pi / 3), images.roll(1, 1))  # red becomes green
    torch.testing.assert_close(recoloured(images, hue=1.1).mean(1), images.mean(1))


def test_saturation_scales_the_distance_from_grey():
    images = noise(2, 3, 8, 8)
    grey = images.mean(1, keepdim=True)
    torch.testing.assert_close(recoloured(images, saturation=0.0), grey.expand_as(images))
    torch.testing.assert_close(recoloured(images, saturation=2.5), grey + 2.5 * (images - grey))


def test_the_colour_matrix_is_the_product_of_its_steps_in_order():
    images = noise(1, 3, 8, 8)
    steps = {"brightness": 0.2, "contrast": 1.4, "luma_flip": 1.0, "hue": 0.9, "saturation": 1.8}
    one_by_one = images
    for name, value in steps.items():
        one_by_one = recoloured(one_by_one, **{name: value})
    torch.testing.assert_close(recoloured(images, **steps), one_by_one)


def test_grey_images_change_as_grey_colours_do():
    grey, samples = noise(8, 1, 16, 16), sampled(8, 1.0)
    rgb = augment(grey.expand(-1, 3, -1, -1), samples)
    torch.testing.assert_close(augment(grey, samples).expand_as(rgb), rgb)


def test_alpha_moves_with_the_colours_and_keeps_its_values():
    images, samples = noise(8, 4, 16, 16), sampled(8, 1.0)
    result = augment(images, samples)
    torch.testing.assert_close(result[:, :3], augment(images[:, :3], samples))
    only_moved = Augmentations(samples.geometry, NO_COLOUR.expand(8, 3, 4))
    torch.testing.assert_close(result[:, 3:], augment(images[:, 3:], only_moved))


# Gradients.


@pytest.mark.parametrize("channels", [1, 4])
def test_first_and_second_derivatives_are_right(channels):
    samples = sampled(2, 1.0, image_shape=(4, 5))
    images = noise(2, channels, 4, 5).requires_grad_()

    def bent(images):  # a linear map has no second derivative of its own
        return augment(images, samples).pow(2)

    assert torch.autograd.gradcheck(bent, images, fast_mode=True)
    assert torch.autograd.gradgradcheck(bent, images, fast_mode=True)


def test_the_gradient_is_the_transpose_of_the_map():
    samples = sampled(4, 1.0, image_shape=(12, 10))
    samples.colour[:, :, 3] = 0  # leaves the linear part
    images = noise(4, 3, 12, 10).requires_grad_()
    result = augment(images, samples)
    direction = noise(4, 3, 12, 10).flip(0)
    (gradient,) = torch.autograd.grad(result, images, direction)
    torch.testing.assert_close((result * direction).sum(), (images * gradient).sum())


def derivatives(images, samples):
    """The augmented images, a gradient, and the gradient of its square: what R1 asks for."""
    images = images.clone().requires_grad_()
    result = augment(images, samples)
    (gradient,) = torch.autograd.grad(result.pow(3).sum(), images, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), images)
    return result, gradient, second


def test_autocast_changes_nothing():
    images, samples = noise(4, 3, 16, 16, dtype=torch.float32), sampled(4, 1.0, image_shape=(16, 16))
    plain = derivatives(images, samples)
    with torch.autocast("cpu", torch.bfloat16):
        cast = derivatives(images, samples)
    for ours, truth in zip(cast, plain, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, truth)


def test_low_precision_images_are_computed_in_float32_and_rounded_once():
    images, samples = noise(4, 3, 16, 16).to(torch.bfloat16), sampled(4, 1.0, image_shape=(16, 16))
    assert torch.equal(augment(images, samples), augment(images.float(), samples).to(torch.bfloat16))


# Samples.


def test_the_shares_of_two_processes_are_the_whole():
    images, samples = noise(6, 3, 16, 12), sampled(6, 0.7, image_shape=(16, 12))
    whole = augment(images, samples)
    for rank in range(2):
        share = samples[rank::2]
        assert len(share) == 3
        torch.testing.assert_close(augment(images[rank::2], share), whole[rank::2], rtol=0, atol=1e-12)


def test_the_sample_of_an_image_depends_on_its_place_and_not_on_the_count():
    few, many = sampled(3, 0.6), sampled(50, 0.6)[:3]
    assert torch.equal(few.geometry, many.geometry)
    assert torch.equal(few.colour, many.colour)


def test_the_config_and_p_leave_the_rng_in_the_same_state():
    states = []
    for pipe, p in (("bgc", 0.0), ("bgc", 1.0), ("blit", 0.5)):
        generator = seeded(4)
        sample(AugmentConfig(pipe=pipe), 5, p, image_shape=(16, 16), rng=generator)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize(
    ("pipe", "blits", "bends", "colours"),
    [
        ("blit", True, False, False),
        ("color", False, False, True),
        ("bg", True, True, False),
    ],
)
def test_the_pipe_names_the_groups_in_use(pipe, blits, bends, colours):
    samples = sampled(200, 1.0, pipe=pipe)
    linear = samples.geometry[:, :2, :2]
    assert bool((linear - linear.round()).abs().max() > 0.01) == bends
    if not bends:
        assert bool((samples.geometry != NO_MOVE).any()) == blits
    assert bool((samples.colour != NO_COLOUR).any()) == colours
    assert (linear.det() < 0).any() == blits  # only a flip makes the determinant negative


# Statistics of many samples. Five sigma of a binomial: a false alarm in 10⁶ seeds, and the seed is fixed anyway.

MANY = 20_000


def assert_frequency(happened, probability):
    assert abs(happened.double().mean() - probability) < 5 * math.sqrt(probability * (1 - probability) / MANY)


def test_blits_happen_as_often_as_the_paper_says():
    # 64 pixels: |t| ≤ 8, and a drawn shift rounds to (0, 0) once in 16² samples.
    p, geometry = 0.3, sampled(MANY, 0.3, pipe="blit", image_shape=(64, 64)).geometry
    linear, shift = geometry[:, :2, :2], geometry[:, :2, 2]
    assert_frequency(linear.det() < 0, p / 2)
    assert_frequency(linear[:, 0, 0].abs() < 0.5, p / 2)  # a quarter turn to either side
    assert_frequency((linear[:, 1, 1] < -0.5), p / 4)  # a half turn
    assert_frequency((shift != 0).any(1), p * (1 - 1 / 16**2))
    assert torch.equal(shift, shift.round())
    assert shift.abs().max() == 8


def test_general_geometry_has_the_frequencies_and_sizes_of_the_paper():
    p, size = 0.3, 100
    geometry = sampled(MANY, p, pipe="geom", image_shape=(size, size)).geometry
    linear, shift = geometry[:, :2, :2], geometry[:, :2, 2]

    # det = zoom², whatever else happened.
    zoom = linear.det().sqrt().log()
    scaled = zoom.abs() > 1e-9
    assert_frequency(scaled, p)
    assert scipy.stats.kstest(zoom[scaled], scipy.stats.norm(0, 0.2 * math.log(2)).cdf).pvalue > 0.001

    # The singular values of the rest are stretch and 1 / stretch.
    stretch = torch.linalg.svdvals(linear)[:, 0].log() - zoom
    stretched = stretch > 1e-6
    assert_frequency(stretched, p)
    assert scipy.stats.kstest(stretch[stretched], scipy.stats.halfnorm(0, 0.2 * math.log(2)).cdf).pvalue > 0.001

    # Without stretch the two rotations add up; at least one of them happens with probability p.
    still = linear[~stretched]
    turned = torch.atan2(still[:, 1, 0], still[:, 0, 0])
    frequency = (turned.abs() > 1e-9).double().mean()
    assert abs(frequency - p) < 5 * math.sqrt(p * (1 - p) / len(still))
    angles = turned[turned.abs() > 1e-9]
    assert scipy.stats.kstest(angles, scipy.stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 0.001

    shifted = (shift != 0).any(1)
    assert_frequency(shifted, p)
    for axis in range(2):
        assert scipy.stats.kstest(shift[shifted, axis] / size, scipy.stats.norm(0, 0.125).cdf).pvalue > 0.001


def test_colours_have_the_frequencies_and_sizes_of_the_paper():
    p, colour = 0.3, sampled(MANY, 0.3, pipe="color").colour
    linear, offset = colour[:, :, :3], colour[:, 0, 3]
    signed = torch.einsum("i,nij,j->n", LUMA, linear, LUMA)  # contrast × (-1 where luma is flipped)
    assert_frequency(signed < 0, p / 2)

    brightness, contrast = offset / signed, signed.abs().log()
    # In the plane across luma: contrast × saturation × a rotation, seen on two orthonormal directions.
    across = torch.tensor([[1.0, -1, 0], [1, 1, -2]], dtype=torch.float64)
    across /= across.norm(dim=1, keepdim=True)
    plane = across @ linear @ across.T
    saturation = plane.det().sqrt().log() - contrast
    hue = torch.atan2(plane[:, 1, 0] - plane[:, 0, 1], plane[:, 0, 0] + plane[:, 1, 1])
    for value, truth in (
        (brightness, scipy.stats.norm(0, 0.2)),
        (contrast, scipy.stats.norm(0, 0.5 * math.log(2))),
        (saturation, scipy.stats.norm(0, math.log(2))),
        (hue, scipy.stats.uniform(-math.pi, 2 * math.pi)),
    ):
        happened = value.abs() > 1e-9
        assert_frequency(happened, p)
        assert scipy.stats.kstest(value[happened], truth.cdf).pvalue > 0.001


# The controller.


def test_p_moves_by_images_over_kimg_towards_the_target_and_stays_a_probability():
    assert adjust(0.2, 0.9, images=5000) == pytest.approx(0.21)
    assert adjust(0.2, 0.1, images=5000) == pytest.approx(0.19)
    assert adjust(0.2, 0.6, images=5000) == 0.2
    assert adjust(0.2, 0.55, images=64, target=0.5, kimg=100) == pytest.approx(0.2 + 64 / 100_000)
    assert adjust(0.001, -1.0, images=5000) == 0
    assert adjust(0.999, 1.0, images=5000) == 1
    p = 0.0
    for _ in range(500_000 // 1000):
        p = adjust(p, 1.0, images=1000)
    assert p == pytest.approx(1)


# Mistakes.


def test_mistakes_are_sentences():
    with pytest.raises(UserError, match=r"p=1\.5 is not a probability"):
        sampled(2, 1.5)
    with pytest.raises(UserError, match="images with 2 channels"):
        augment(noise(1, 2, 8, 8), sampled(1, 1.0))
    with pytest.raises(UserError, match="3 augmentations for 2 images"):
        augment(noise(2, 3, 8, 8), sampled(3, 1.0))
    with pytest.raises(UserError, match="at least 4x4"):
        augment(noise(1, 3, 3, 8), sampled(1, 1.0))
    with pytest.raises(ValidationError, match="pipe"):
        AugmentConfig(pipe="bgcfnc")
