"""Laws of the projected discriminator: its images one by one, colour channels, labels, gradients and settings."""

import pytest
import torch
from conftest import RECIPE

from dnnlib.config import merge
from dnnlib.console import UserError
from training.config import resolve
from training.data import ImageArchive
from training.networks.projected import ProjectedConfig, ProjectedDiscriminator


def build(**settings) -> ProjectedDiscriminator:
    torch.manual_seed(0)
    small = {"img_shape": (16, 16), "channel_base": 128, "feature_size": 64, "mbstd_group": 1, "mapping_layers": 2}
    return ProjectedDiscriminator(ProjectedConfig(**(small | settings))).double()


def images(count: int, channels: int = 3, shape: tuple[int, int] = (16, 16)) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, *shape, generator=random, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize(("c_dim", "shape"), [(0, (16, 16)), (3, (16, 16)), (0, (16, 24)), (0, (96, 80))])
def test_a_batch_is_its_images_one_by_one(c_dim, shape):
    D, x, c = build(c_dim=c_dim, img_shape=shape), images(3, shape=shape), torch.eye(3, dtype=torch.float64)[:, :c_dim]
    together = D(x, c)
    assert together.shape == (3, 8)
    for n in range(3):
        assert (D(x[n : n + 1], c[n : n + 1]) - together[n]).abs().max() < 1e-10


def test_every_parameter_receives_a_gradient_and_no_frozen_tensor_is_one():
    D = build(c_dim=3)
    D(images(3), torch.eye(3, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in D.parameters())
    assert not any("projection" in name for name, _ in D.named_parameters())
    assert set(D.projection.state_dict()) == {f"{kind}{i}" for kind in ("mix", "fuse") for i in range(4)}


def test_the_gradient_of_an_image_is_that_of_finite_differences():
    D, x = build(), images(1).requires_grad_()
    D(x).sum().backward()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-9  # smaller than the distance to most kinks of ReLU6
    with torch.no_grad():
        slope = (D(x + step * direction) - D(x - step * direction)).sum() / (2 * step)
    assert (x.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)


def test_grey_is_seen_as_rgb_and_transparency_over_white():
    D, grey = build(img_channels=1), images(2, channels=1)
    opaque = torch.cat([images(2), torch.ones(2, 1, 16, 16, dtype=torch.float64)], dim=1)
    logits = torch.cat([head(x) for head, x in zip(D.heads, D.projection(grey.expand(-1, 3, -1, -1)), strict=True)], 1)
    assert torch.equal(D(grey)[:, :4], logits)
    D = build(img_channels=4)
    clear = opaque.clone()
    clear[:, 3] = -1
    white = torch.ones_like(opaque)
    assert torch.equal(D(clear)[:, :4], D(white)[:, :4])
    assert not torch.equal(D(opaque)[:, :4], D(white)[:, :4])


def test_labels_change_every_logit():
    D, x = build(c_dim=2), images(1)
    one, other = (D(x, c[None]) for c in torch.eye(2, dtype=torch.float64))
    assert (one != other).all()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"kind": "protected"}, "D.kind='protected' is unknown; use one of residual, projected"),
        ({"kind": "projected", "feature_sise": 3}, "there is no setting D.feature_sise; did you mean feature_size?"),
        ({"kind": "projected", "feature_size": 3}, "D.feature_size=3: "),
        ({"feature_size": 64}, "there is no setting D.feature_size"),  # of the residual kind, which is the default
    ],
)
def test_wrong_settings_are_named(tiny, setting, sentence):
    settings = merge(RECIPE, {"data": {"path": str(tiny.archive)}})
    settings["D"] = setting
    with pytest.raises(UserError) as error:
        resolve(settings, ImageArchive(str(tiny.archive)), "test")
    assert sentence in str(error.value)
