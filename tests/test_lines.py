"""Line artefacts: closed forms of the share of energy on the frequency axes."""

import numpy as np
import pytest
import torch

from metrics.lines import line_share, masks

SIZES = [(32, 32), (64, 64), (48, 80), (30, 50)]


def random(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_a_sum_of_a_function_of_the_row_and_one_of_the_column_has_share_1(size):
    rows, cols = random(3, 3, size[0], 1) // 2, random(3, 3, 1, size[1], seed=1) // 2
    assert line_share(rows + cols).tolist() == pytest.approx([1] * 3, abs=1e-12)
    assert line_share(rows + cols * 0).tolist() == pytest.approx([1] * 3, abs=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_white_noise_has_the_share_of_the_bins(size):
    counted, on_axes = masks(*size)
    found = line_share(random(200, 1, *size))
    error = found.std().item() / 200**0.5
    assert found.mean().item() == pytest.approx((on_axes.sum() / counted.sum()).item(), abs=4 * error)


def test_a_wave_counts_when_its_frequency_lies_beyond_a_tenth_of_the_side_and_off_the_axes():
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")

    def wave(v, u):
        return (128 + 100 * torch.sin(2 * torch.pi * (v * y + u * x) / 64)).round().to(torch.uint8)

    # The last is within a tenth of the side: what counts is the rounding to uint8 alone, near white noise's share.
    shares = line_share(torch.stack([wave(0, 16), wave(16, 1), wave(16, 16), wave(10, 3), wave(3, 3)])[:, None])
    assert shares[:2].tolist() == pytest.approx([1, 0.83], abs=0.01)  # bins 0 ± 1: all; 1 ± 1 of power 1, 4, 1: 5/6
    assert shares[2:4].max() < 1e-3
    assert shares[4] < 0.5


def test_the_share_is_the_definition_written_out():
    image = random(1, 3, 20, 24)
    x = image[0].numpy().astype(float).mean(0)
    window = np.outer(*(np.sin(np.pi * np.arange(n) / n) ** 2 for n in (20, 24)))
    power = np.abs(np.fft.fft2((x - x.mean()) * window)) ** 2
    energy = lines = 0
    for v in range(-10, 10):
        for u in range(-12, 12):
            if np.hypot(v / 20, u / 24) > 0.1 + 1e-9:
                energy += power[v, u]
                lines += power[v, u] * (min(abs(u), abs(v)) <= 1)
    assert line_share(image).item() == pytest.approx(lines / energy, rel=1e-9)


def test_contrast_brightness_and_the_batch_change_nothing_and_a_flat_image_has_no_lines():
    images = random(5, 3, 32, 32) // 3
    expected = line_share(images)
    torch.testing.assert_close(line_share(images * 2 + 7), expected)
    torch.testing.assert_close(torch.cat([line_share(images[:2]), line_share(images[2:])]), expected)
    torch.testing.assert_close(line_share(images.mT), expected)
    flat = torch.tensor([[1, 3, 77]], dtype=torch.uint8)[..., None, None].expand(1, 3, 33, 35)
    assert line_share(flat).item() == 0
