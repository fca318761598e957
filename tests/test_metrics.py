"""Metrics against other libraries and closed forms."""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from skimage.metrics import peak_signal_noise_ratio

import calc_metrics
from metrics.scale import bring_down, psnr
from training.networks import Generator, GeneratorConfig
from training.snapshot import save_generator

TINY = GeneratorConfig(
    img_resolution=8, channel_base=64, channel_max=8, z_dim=6, w_dim=6, mapping_layers=1, biline_channels=4, thickness=2
)


def pictures(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_psnr_equals_scikit_image():
    a, b = pictures(3, 3, 9, 7), pictures(3, 3, 9, 7).roll(1, 2)
    expected = [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=255) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-12)


def test_a_picture_enlarged_by_repetition_is_perfectly_consistent():
    small = pictures(4, 3, 8, 8)
    large = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert psnr(small, bring_down(large, (8, 8))).isinf().all()


def test_a_known_offset_has_its_closed_form():
    small = torch.full((5, 3, 8, 8), 100, dtype=torch.uint8)
    large = torch.full((5, 3, 16, 16), 110, dtype=torch.uint8)
    values = psnr(small, bring_down(large, (8, 8)))
    assert values.tolist() == pytest.approx([20 * math.log10(255 / 10)] * 5, rel=1e-12)


def test_calc_metrics_adds_a_line_beside_the_network(tmp_path):
    torch.manual_seed(0)
    save_generator(Generator(TINY), tmp_path / "net.safetensors")
    for _ in range(2):
        result = CliRunner().invoke(calc_metrics.main, ["--network", str(tmp_path / "net.safetensors"), "--num", "4"])
        assert result.exit_code == 0, result.output
    first, second = (json.loads(line) for line in (tmp_path / "metric-scale_psnr_4.jsonl").read_text().splitlines())
    assert first["results"] == second["results"]
    assert first["num_fake"] == 4
    assert 0 < first["results"]["scale_psnr_4"] < 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metrics", "scale_psnrr"], ["scale_psnrr", "did you mean scale_psnr?"]),
        (["--num", "1"], ["scale_psnr takes 2 pictures or more"]),
        (["--network", "gone.safetensors"], ["gone.safetensors", "does not exist"]),
    ],
)
def test_a_wrong_call_is_a_sentence(tmp_path, options, words):
    save_generator(Generator(TINY), tmp_path / "net.safetensors")
    result = CliRunner().invoke(calc_metrics.main, ["--network", str(tmp_path / "net.safetensors"), *options])
    assert result.exit_code == 2
    assert all(word in result.output for word in words)
    assert "Traceback" not in result.output
