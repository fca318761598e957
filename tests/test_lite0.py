"""The frozen features: numbers, not classes, for a wrong padding still names the right animal."""

import pytest
import torch

from dnnlib.console import UserError
from torch_utils import lite0

# (mean, deviation) of each feature, from timm 1.0.22's tf_efficientnet_lite0 with these weights.
EXPECTED = [(0.594545, 9.779658), (-0.163517, 8.865546), (0.009110, 5.995442), (0.005116, 2.515925)]


@pytest.fixture(scope="module")
def features():
    return lite0.Lite0()


def test_features_are_those_of_timm(features):
    rows, cols = torch.linspace(-1, 1, 96)[:, None], torch.linspace(-1, 1, 130)[None]
    image = torch.stack([(7 * rows + 3 * cols).sin(), (5 * rows * cols).cos() * 0.7, (rows - 9 * cols).sin() * 0.5])[
        None
    ]
    found = [(f.shape[1:], f.mean().item(), f.std().item()) for f in features(image)]
    assert [shape for shape, *_ in found] == [(24, 24, 33), (40, 12, 17), (112, 6, 9), (320, 3, 5)]
    for (_, *moments), expected in zip(found, EXPECTED, strict=True):
        assert moments == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_no_state_dict_holds_the_frozen_weights(features):
    assert not features.state_dict()
    assert not list(features.parameters())


def test_an_altered_file_is_refused(monkeypatch):
    monkeypatch.setattr(lite0, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="SHA-256 differs"):
        lite0.read_weights()
