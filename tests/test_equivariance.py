"""Equivariance of ideal generators, of such that stick to pixels, and of ours."""

import math

import numpy as np
import pytest
import torch

import rendering
from metrics.equivariance import (
    KINDS,
    decibels,
    eqr,
    eqt_frac,
    eqt_int,
    errors,
    rotation,
    shifted,
    shifted_whole,
    translation,
    turned,
)
from torch_utils.randomness import make_rng
from training.networks import Generator, GeneratorConfig


def positions(size, matrix):
    """float64 [H,W] each: the x and y, in pixels from the centre, that each pixel of a moved picture shows."""
    (y, x), (rows, cols) = np.mgrid[: size[0], : size[1]].astype(float), size
    points = np.stack([x - (cols - 1) / 2, y - (rows - 1) / 2, np.ones(size)], -1)
    x, y, _ = np.moveaxis(points @ np.linalg.inv(np.eye(3) if matrix is None else matrix.numpy()).T, -1, 0)
    return x, y


class Waves:
    """Four pictures [4,3,H,W] of one wave, a quarter of a period apart, in float64.

    Their mean over squares of differences is the same at every phase: 2·amplitude²·sin²(δ/2) for phases δ apart.
    """

    amplitude = 0.5

    def __init__(self, size=(96, 128), period=32, angles=(0.5, 2.3, 4), sticky=False):
        self.size, self.sticky, self.moves = size, sticky, []
        self.frequencies = [(math.cos(a) * 2 * math.pi / period, math.sin(a) * 2 * math.pi / period) for a in angles]

    def phases(self, matrix):
        """float64 [3,H,W]"""
        x, y = positions(self.size, matrix)
        return np.stack([u * x + v * y for u, v in self.frequencies])

    def __call__(self, matrix):
        self.moves += [] if matrix is None else [matrix]
        phases = self.phases(None if self.sticky else matrix)
        return torch.from_numpy(np.stack([self.amplitude * np.sin(phases + i * np.pi / 2) for i in range(4)]))

    def error(self, known=(slice(None), slice(None))):
        """The mean squared difference of the pictures as they are from as they should be after the last move."""
        apart = self.phases(None) - self.phases(self.moves[-1])
        return (2 * self.amplitude**2 * np.sin(apart / 2) ** 2)[(slice(None), *known)].mean()


def quality(moved, expected):
    assert moved.shape == expected.shape
    assert moved.numel()
    return (10 * torch.log10(4 / (moved - expected).square().mean())).item()


def random(index=0):
    return make_rng(0, index, "test")


@pytest.mark.parametrize("period", [3, 8, 32])
def test_a_function_of_position_is_equivariant_to_whole_pixels(period):
    waves = Waves(period=period)
    assert quality(*eqt_int(waves, waves(None), random())) > 250
    assert (waves.moves[0][:2, 2] % 1 == 0).all()
    assert waves.moves[0][:2, 2].any()


@pytest.mark.parametrize(
    ("period", "a", "least"), [(8, 3, 56), (16, 3, 56), (32, 3, 60), (8, 48, 100), (16, 48, 100), (32, 48, 100)]
)
def test_a_band_limited_function_is_as_equivariant_to_fractions_as_the_kernel_allows(period, a, least):
    waves = Waves((128, 160), period)
    for index in range(3):
        assert quality(*eqt_frac(waves, waves(None), random(index), a)) > least
        assert (waves.moves[-1][:2, 2] % 1 != 0).all()


@pytest.mark.parametrize(
    ("period", "a", "up", "least"), [(8, 3, 4, 56), (16, 3, 4, 70), (32, 3, 4, 84), (64, 3, 4, 96), (64, 4, 8, 104)]
)
def test_a_band_limited_function_is_as_equivariant_to_rotations_as_the_filter_allows(period, a, up, least):
    waves = Waves(period=period)
    for index in range(2):
        assert quality(*eqr(waves, waves(None), random(index), a, up)) > least


@pytest.mark.parametrize("kind", KINDS)
def test_what_sticks_to_pixels_has_the_closed_form(kind):
    stuck = Waves(period=24, sticky=True)
    moved, expected = KINDS[kind](stuck, stuck(None), random())
    known = slice(None), slice(None)
    if kind == "eqr":
        # The filters reach over 5¾ pixels about the place where a pixel comes from, and 5 about where it goes.
        x, y = (np.abs(t) for t in positions(stuck.size, stuck.moves[-1]))
        known = (x <= 127 / 2 - 5.75) & (y <= 95 / 2 - 5.75)
        known[:5] = known[-5:] = known[:, :5] = known[:, -5:] = False
        known = (known,)
        assert moved[0, 0].numel() == known[0].sum()
    closed = 10 * math.log10(4 / stuck.error(known))
    assert quality(moved, expected) == pytest.approx(closed, abs=1e-9 if kind == "eqt_int" else 0.1)
    assert closed < 25


def measured(paints, kinds):
    parts = [errors(paint, kinds, index=index) for index, paint in enumerate(paints)]
    return {kind: decibels(torch.cat([part[kind] for part in parts])) for kind in kinds}


def test_noise_that_sticks_to_pixels_is_twice_its_variance_apart():
    noise = 2 * torch.rand(20, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    result = measured([lambda matrix: noise], ["eqt_int"])["eqt_int"]
    assert result.mean == pytest.approx(10 * math.log10(4 / (2 / 3)), abs=0.1)
    assert result.num == 20
    # The mean of all is that of the pictures, give or take its standard error.
    assert abs(result.mean - result.values.mean().item()) < result.standard_error < 0.1


def test_the_drawn_moves_are_spread_as_published():
    waves = Waves((40, 80), 16)
    for index in range(60):
        for kind in ("eqt_int", "eqt_frac"):
            KINDS[kind](waves, waves(None), random(index))
    shifts = torch.stack([m[:2, 2] for m in waves.moves])
    assert (shifts.abs().amax(0) <= torch.tensor([10, 5])).all()
    assert (shifts.abs().amax(0) > torch.tensor([9, 4.5])).all()
    assert (shifts.mean(0).abs() < torch.tensor([2, 1])).all()


def test_whole_shifts_and_quarter_turns_move_pixels():
    image = torch.rand(1, 2, 40, 40, dtype=torch.float64)
    part, (rows, cols) = shifted_whole(image, 3, -2)
    assert torch.equal(part, image.roll((-2, 3), (2, 3))[..., rows, cols])
    assert part.shape == (1, 2, 38, 37)
    fine, (rows, cols) = shifted(image, 3, -2)
    torch.testing.assert_close(fine, image.roll((-2, 3), (2, 3))[..., rows, cols])
    # Turning filters too, but no wave of 20 pixels.
    waves = Waves((40, 40), 20)(None)
    for quarters in range(4):
        found, known = turned(waves, quarters * math.pi / 2)
        assert 28**2 <= known.sum() < 31**2
        torch.testing.assert_close(found[..., known], waves.rot90(quarters, (2, 3))[..., known], rtol=0, atol=2e-3)


def test_shifts_beyond_the_picture_know_nothing():
    image = torch.rand(1, 1, 10, 10, dtype=torch.float64)
    for x in (-13, -10, -9.5, 9.5, 10, 13):
        part, (rows, cols) = shifted(image, x, 0)
        assert part.numel() == 0
        assert image[..., rows, cols].shape == part.shape
    assert shifted_whole(image, -12, 0)[0].numel() == shifted_whole(image, 12, 0)[0].numel() == 0


def test_the_transform_of_a_picture_depends_on_its_kind_number_and_seed_alone():
    paints = [Waves(period=p, sticky=True, size=(40, 48)) for p in (9, 14, 20)]
    for index, paint in enumerate(paints):
        together = errors(paint, seed=1, index=index)
        assert list(together) == list(KINDS)
        for kind, rows in together.items():
            assert torch.equal(errors(paint, [kind], seed=1, index=index)[kind], rows)
            assert not torch.equal(errors(paint, [kind], seed=2, index=index)[kind], rows)
            assert not torch.equal(errors(paint, [kind], seed=1, index=index + 1)[kind], rows)


def test_the_standard_error_is_that_of_the_mean_squared_error():
    squares = torch.tensor([1.0, 2, 4, 3], dtype=torch.float64)
    result = decibels(torch.stack([squares * 50, torch.full([4], 50.0, dtype=torch.float64)], 1))
    assert result.mean == pytest.approx(10 * math.log10(4 / 2.5))
    slope = 10 / math.log(10) / 2.5
    assert result.standard_error == pytest.approx(slope * squares.std().item() / 2)
    assert result.values.tolist() == pytest.approx((10 * torch.log10(4 / squares)).tolist())
    perfect = decibels(torch.tensor([[0.0, 5.0]], dtype=torch.float64))
    assert math.isinf(perfect.mean)
    assert math.isnan(perfect.standard_error)


@pytest.mark.parametrize("coords", ["endpoints", "centers"])
def test_our_generator_follows_its_coordinates(coords):
    torch.manual_seed(0)
    G = Generator(
        GeneratorConfig(
            img_resolution=32,
            channel_base=64,
            channel_max=8,
            z_dim=6,
            w_dim=6,
            mapping_layers=1,
            biline_channels=4,
            thickness=2,
            bandwidth=0.3,
            coords=coords,
        )
    ).eval()
    ws = G.mapping(torch.randn(2, 6))
    step = 1 / 32 if coords == "centers" else 1 / 31

    def paint(matrix):
        if matrix is not None:
            matrix = matrix.clone()
            matrix[:2, 2] *= step
        with torch.no_grad():
            return rendering.render(G, ws, transform=matrix, exact=True)

    assert measured([paint], ["eqt_int"])["eqt_int"].mean > 100
    # Its pictures are not band-limited, which is what the others measure.
    results = measured([paint], ["eqt_frac", "eqr"])
    assert all(35 < result.mean < 100 for result in results.values()), results


@pytest.mark.parametrize(
    ("paint", "kinds", "words"),
    [
        (lambda matrix: torch.zeros(1, 3, 64, 64), ["eqt"], "use one of eqt_int, eqt_frac, eqr"),
        (lambda matrix: torch.zeros(1, 3, 8, 8), ["eqr"], "8x8 are too small"),
        (lambda matrix: torch.zeros(1, 3, 5, 8), ["eqt_frac"], "8x5 are too small"),
        (lambda matrix: torch.full((1, 3, 64, 64), math.nan), ["eqt_int"], "NaN or infinite"),
    ],
)
def test_a_wrong_call_is_a_sentence(paint, kinds, words):
    with pytest.raises(ValueError, match=words):
        measured([paint], kinds)


def test_moves_are_those_of_rendering():
    assert torch.equal(translation(0.25, -0.5), rendering.translation(0.25, -0.5))
    torch.testing.assert_close(rotation(math.radians(130)), rendering.rotation(130))
