"""DiffAugment: what each part does, and that a batch's augmentations can be split over processes."""

import pytest
import torch

from training.diffaug import Augmentations, sample

ALL = ("color", "translation", "cutout")


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, channels: int = 3, size: tuple[int, int] = (16, 24)) -> torch.Tensor:
    return torch.rand(count, channels, *size, generator=random(9), dtype=torch.float64) * 2 - 1


def test_no_policy_changes_nothing():
    x = images(4)
    assert torch.equal(sample((), 4, x.shape[2:], random()).apply(x), x)


def test_a_part_of_the_samples_transforms_a_part_of_the_images():
    x, samples = images(6), sample(ALL, 6, (16, 24), random())
    whole = samples.apply(x)
    for rank in range(2):
        assert torch.equal(samples[rank::2].apply(x[rank::2]), whole[rank::2])


@pytest.mark.parametrize("policy", [("translation",), ("cutout",), ALL])
def test_it_is_the_same_whatever_else_the_policy_does(policy):
    """So that a policy can change without changing what another part does."""
    every, some = sample(ALL, 5, (16, 24), random()), sample(policy, 5, (16, 24), random())
    if "translation" in policy:
        assert torch.equal(every.shift, some.shift)
    if "cutout" in policy:
        assert torch.equal(every.cut, some.cut)


def test_translation_moves_pixels_by_at_most_an_eighth_and_brings_in_zeros():
    x = images(200)
    samples = sample(("translation",), 200, (16, 24), random())
    assert samples.shift.abs().amax(dim=0).tolist() == [2, 3]
    moved = samples.apply(x)
    for n, (down, right) in enumerate(samples.shift.tolist()):
        expected = torch.zeros_like(x[n])
        for i in range(16):
            for j in range(24):
                if 0 <= i - down < 16 and 0 <= j - right < 24 and n < 20:
                    expected[:, i, j] = x[n, :, i - down, j - right]
        if n < 20:
            assert torch.equal(moved[n], expected)


def test_cutout_zeroes_one_rectangle_of_up_to_half_the_sides():
    x = torch.ones(300, 1, 16, 24)
    zeros = sample(("cutout",), 300, (16, 24), random()).apply(x) == 0
    rows, cols = zeros.any(dim=3).sum(dim=2), zeros.any(dim=2).sum(dim=2)
    assert torch.equal(zeros.sum(dim=(1, 2, 3)), (rows * cols).flatten())  # a full rectangle
    assert (rows.max().item(), cols.max().item()) == (8, 12)
    assert rows.min() < 8  # some reach over an edge


def test_colour_is_its_formula_and_leaves_alpha_alone():
    x = images(1, channels=4)
    colour = torch.tensor([[0.25, 1.5, 0.5]])
    none = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)
    made = Augmentations(colour, *none).apply(x)
    assert torch.equal(made[:, 3], x[:, 3])
    bright = x[:, :3] + 0.25
    grey = bright.mean(dim=1, keepdim=True)
    saturated = grey + 1.5 * (bright - grey)
    assert (made[:, :3] - (saturated + saturated.mean()) / 2).abs().max() < 1e-12


def test_gradients_reach_every_pixel_that_is_seen():
    x = images(3).requires_grad_()
    samples = sample(("translation", "cutout"), 3, (16, 24), random())
    samples.apply(x).sum().backward()
    assert torch.equal(x.grad.sum(dim=(1, 2, 3)), samples.apply(torch.ones_like(x)).sum(dim=(1, 2, 3)))
