"""Equivariance of ideal generators, of such that stick to pixels, and of ours."""

import math

import numpy as np
import pytest
import torch

import rendering
from metrics.equivariance import decibels, eqr, eqt_frac, eqt_int, errors, rotated, shifted, shifted_whole
from torch_utils.randomness import make_rng
from training.networks import Generator, GeneratorConfig

MOVES = (eqt_int, eqt_frac, eqr)


def positions(size, matrix):
    """float64 [H,W] each: the x and y, in pixels from the centre, that each pixel of a moved image shows."""
    (y, x), (rows, cols) = np.mgrid[: size[0], : size[1]].astype(float), size
    points = np.stack([x - (cols - 1) / 2, y - (rows - 1) / 2, np.ones(size)], -1)
    x, y, _ = np.moveaxis(points @ np.linalg.inv(np.eye(3) if matrix is None else matrix.numpy()).T, -1, 0)
    return x, y


class Waves:
    """Four images [4,3,H,W] of one wave, a quarter of a period apart, in float64.

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
        """The mean squared difference of the images as they are from as they should be after the last move."""
        apart = self.phases(None) - self.phases(self.moves[-1])
        return (2 * self.amplitude**2 * np.sin(apart / 2) ** 2)[(slice(None), *known)].mean()


def quality(moved, expected):
    assert moved.shape == expected.shape
    assert moved.numel()
    return (10 * torch.log10(4 / (moved - expected).square().mean())).item()


def rng(index=0):
    return make_rng(0, index, "test")


@pytest.mark.parametrize(
    ("move", "size", "period", "a", "least"),
    [
        (eqt_int, (96, 128), 3, None, 250),
        (eqt_int, (96, 128), 32, None, 250),
        (eqt_frac, (128, 160), 8, 3, 56),
        (eqt_frac, (128, 160), 32, 3, 60),
        (eqt_frac, (128, 160), 8, 48, 100),
        (eqt_frac, (128, 160), 32, 48, 100),
        (eqr, (96, 128), 8, None, 56),
        (eqr, (96, 128), 16, None, 70),
        (eqr, (96, 128), 64, None, 96),
    ],
)
def test_a_band_limited_function_of_position_is_as_equivariant_as_the_filters_allow(move, size, period, a, least):
    waves = Waves(size, period)
    for index in range(2):
        assert quality(*move(waves, waves(None), rng(index), *([a] if a else []))) > least
        if move is not eqr:
            assert ((waves.moves[-1][:2, 2] % 1 == 0) == (move is eqt_int)).all()
    assert waves.moves[0][:2].any()


@pytest.mark.parametrize("move", MOVES)
def test_what_sticks_to_pixels_has_the_closed_form(move):
    stuck = Waves(period=24, sticky=True)
    moved, expected = move(stuck, stuck(None), rng())
    known = slice(None), slice(None)
    if move is eqr:
        # The filters reach over 5¾ pixels about the place where a pixel comes from, and 5 about where it goes.
        x, y = (np.abs(t) for t in positions(stuck.size, stuck.moves[-1]))
        known = (x <= 127 / 2 - 5.75) & (y <= 95 / 2 - 5.75)
        known[:5] = known[-5:] = known[:, :5] = known[:, -5:] = False
        known = (known,)
        assert moved[0, 0].numel() == known[0].sum()
    closed = 10 * math.log10(4 / stuck.error(known))
    assert quality(moved, expected) == pytest.approx(closed, abs=1e-9 if move is eqt_int else 0.1)
    assert closed < 25


def test_noise_that_sticks_to_pixels_is_twice_its_variance_apart():
    noise = 2 * torch.rand(20, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    rows = errors(lambda matrix: noise, eqt_int)
    found = decibels(rows)
    assert found.value == pytest.approx(10 * math.log10(4 / (2 / 3)), abs=0.1)
    # The mean of all is that of the images, give or take its standard error.
    each = (10 * (4 * rows[:, 1] / rows[:, 0]).log10()).mean().item()
    assert abs(found.value - each) < found.standard_error < 0.1


def test_the_moves_are_spread_as_published():
    waves = Waves((40, 80), 16)
    for index in range(60):
        for move in (eqt_int, eqt_frac):
            move(waves, waves(None), rng(index))
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
    # Rotating filters too, but no wave of 20 pixels.
    waves = Waves((40, 40), 20)(None)
    for quarters in range(4):
        found, known = rotated(waves, 90 * quarters)
        assert 28**2 <= known.sum() < 31**2
        torch.testing.assert_close(found[..., known], waves.rot90(quarters, (2, 3))[..., known], rtol=0, atol=2e-3)


def test_shifts_beyond_the_image_know_nothing():
    image = torch.rand(1, 1, 10, 10, dtype=torch.float64)
    for x in (-13, -10, -9.5, 9.5, 10, 13):
        part, (rows, cols) = shifted(image, x, 0)
        assert part.numel() == 0
        assert image[..., rows, cols].shape == part.shape
    assert shifted_whole(image, -12, 0)[0].numel() == shifted_whole(image, 12, 0)[0].numel() == 0


def test_the_transform_of_an_image_depends_on_its_kind_number_and_seed_alone():
    stuck = Waves(period=9, sticky=True, size=(40, 48))
    for move in MOVES:
        rows = errors(stuck, move, seed=1, number=2)
        assert torch.equal(errors(stuck, move, seed=1, number=2), rows)
        assert not torch.equal(errors(stuck, move, seed=2, number=2), rows)
        assert not torch.equal(errors(stuck, move, seed=1, number=3), rows)


def test_the_standard_error_is_that_of_the_mean_squared_error():
    squares = torch.tensor([1.0, 2, 4, 3], dtype=torch.float64)
    found = decibels(torch.stack([squares * 50, torch.full([4], 50.0, dtype=torch.float64)], 1))
    assert found.value == pytest.approx(10 * math.log10(4 / 2.5))
    assert found.standard_error == pytest.approx(10 / math.log(10) / 2.5 * squares.std().item() / 2)
    perfect = decibels(torch.tensor([[0.0, 5.0]], dtype=torch.float64))
    assert math.isinf(perfect.value)
    assert math.isnan(perfect.standard_error)


@pytest.mark.parametrize("coords", ["endpoints", "centers"])
def test_our_generator_follows_its_coordinates(coords):
    torch.manual_seed(0)
    widths = {"channel_base": 64, "channel_max": 8, "z_dim": 6, "w_dim": 6, "biline_channels": 4, "thickness": 2}
    config = GeneratorConfig(img_shape=(32, 32), mapping_layers=1, bandwidth=0.3, coords=coords, **widths)
    G = Generator(config).eval()
    ws = G.mapping(torch.randn(2, 6))
    step = 1 / 32 if coords == "centers" else 1 / 31

    def render(matrix):
        if matrix is not None:
            matrix = matrix.clone()
            matrix[:2, 2] *= step
        with torch.no_grad():
            return rendering.render(G, ws, rendering.Shot(transform=matrix, exact=True))

    found = [decibels(errors(render, move)).value for move in MOVES]
    assert found[0] > 100
    # Its images are not band-limited, which is what the others measure.
    assert all(35 < value < 100 for value in found[1:]), found
