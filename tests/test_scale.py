"""Scale consistency and resizing: against scikit-image and Pillow, and closed forms."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from metrics.resize import FILTERS, fit, resize
from metrics.scale import on_uint8, psnr, ssim


def photograph(name, left=60, top=20, width=240, height=200):
    """uint8 [1,3,H,W]"""
    with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
        pixels = np.array(image.convert("RGB").crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def pairs():
    """Three photographs, and each with a blur, noise and an offset: uint8 [3,3,200,240]."""
    originals = torch.cat([photograph(f"{name}.png") for name in ("astronaut", "chelsea", "coffee")])
    random = torch.Generator().manual_seed(0)
    changed = originals.float()
    changed[0] = F.avg_pool2d(changed[0], 3, 1, 1)
    changed[1] += 20 * torch.randn(changed[1].shape, generator=random)
    changed[2] += 15
    return originals, changed.clamp(0, 255).to(torch.uint8)


def test_psnr_and_ssim_equal_scikit_image(pairs):
    a, b = (t.numpy() for t in pairs)
    similarity = partial(
        structural_similarity,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=0,
    )
    # scikit-image computes floats in their own precision, and bytes in float64.
    for ours, theirs in ((psnr, partial(peak_signal_noise_ratio, data_range=255)), (ssim, similarity)):
        expected = [theirs(x, y) for x, y in zip(a, b, strict=True)]
        assert len(set(expected)) == 3
        np.testing.assert_allclose(ours(*pairs), expected, rtol=1e-9)


def test_equal_images_are_most_similar(pairs):
    assert torch.equal(ssim(pairs[0], pairs[0]), torch.ones(3, dtype=torch.float64))
    assert torch.equal(psnr(pairs[0], pairs[0]), torch.full([3], torch.inf, dtype=torch.float64))


def test_constants_have_the_closed_form_of_luminance():
    a, b = torch.full((1, 1, 11, 13), 100), torch.full((1, 1, 11, 13), 120)
    c1 = 2.55**2
    assert ssim(a, b).item() == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1), rel=1e-9)


def test_the_box_is_the_exact_area():
    image = photograph("coffee.png")
    assert torch.equal(resize(image, (100, 120), "box"), F.avg_pool2d(image.double(), 2).round().to(torch.uint8))
    image = torch.tensor([[[[10, 40, 90]]]], dtype=torch.uint8)
    # Each of two pixels covers one and a half: (10 + 40 / 2) / 1.5 and (40 / 2 + 90) / 1.5.
    assert resize(image, (1, 2), "box").tolist() == [[[[20, 73]]]]


@pytest.mark.parametrize(
    ("filter", "size"),
    [("bicubic", (77, 131)), ("bicubic", (13, 480)), ("lanczos", (100, 120)), ("lanczos", (300, 90))],
)
def test_the_other_filters_are_those_of_pillow(filter, size):
    image = photograph("astronaut.png")
    resampling = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}[filter]
    theirs = [Image.fromarray(c.astype(np.float32)).resize(size[::-1], resampling) for c in image[0].numpy()]
    theirs = np.clip(np.stack([np.array(c) for c in theirs]), 0, 255)
    # Half for our rounding; Pillow adds up in float64 and keeps float32.
    np.testing.assert_allclose(resize(image, size, filter)[0].numpy(), theirs, rtol=0, atol=0.501)


@given(st.sampled_from(sorted(FILTERS)), st.tuples(*[st.integers(1, 40)] * 4), st.integers(0, 255))
def test_a_constant_stays_itself_at_any_ratio(filter, sides, colour):
    image = torch.full((1, 2, *sides[:2]), colour, dtype=torch.uint8)
    assert torch.equal(resize(image, sides[2:], filter), torch.full((1, 2, *sides[2:]), colour, dtype=torch.uint8))


@pytest.mark.parametrize("filter", FILTERS)
def test_the_same_size_stays_itself(filter):
    image = photograph("chelsea.png")
    assert torch.equal(resize(image, (200, 240), filter), image)


def test_overshoots_are_clamped():
    image = torch.zeros(1, 1, 1, 64, dtype=torch.uint8)
    image[..., 32:] = 255
    small = resize(image, (1, 32), "lanczos")
    assert small[..., :16].min() == 0
    assert small[..., :16].max() < 20
    assert small[..., 16:].min() > 235
    assert small[..., 16:].max() == 255


@pytest.mark.parametrize("size", [(20, 40), (80, 160)])
def test_an_image_of_another_shape_is_cropped_about_its_centre(size):
    image = photograph("coffee.png", width=60, height=90)
    assert torch.equal(fit(image, size, "lanczos"), resize(image[..., 30:60, :], size, "lanczos"))
    assert fit(image, (90, 60), "lanczos") is image


def test_a_distance_of_colours_is_given_colours(pairs):
    def absolute(a, b):
        assert a.dtype == b.dtype == torch.float32
        assert -1 <= a.min() < a.max() <= 1
        return (a - b).abs().mean((1, 2, 3))

    expected = (pairs[0].double() - pairs[1].double()).abs().mean((1, 2, 3)) / 127.5
    torch.testing.assert_close(on_uint8(absolute)(*pairs).double(), expected, rtol=1e-5, atol=0)
