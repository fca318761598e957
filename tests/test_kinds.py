"""Laws of every kind of generator but CREPS, which has tests of its own."""

import functools

import pytest
import torch
from helpers import error, noise
from test_networks import shaken

import rendering
from dnnlib.console import UserError
from rendering import Shot
from training import losses
from training.networks import (
    AnyGeneratorConfig,
    CIPSConfig,
    Generator,
    GeneratorConfig,
    INRGANConfig,
    StyleGAN2Config,
)
from training.networks.layers import compute_with
from training.snapshot import load_generator, save_generator

TINY = {"img_shape": (16, 16), "z_dim": 6, "w_dim": 8, "mapping_layers": 1, "channel_base": 64, "channel_max": 8}
KINDS = {
    "stylegan2": StyleGAN2Config(**TINY),
    "stylegan2, oblong, grey, conditional": StyleGAN2Config(
        **TINY | {"img_shape": (24, 16), "img_channels": 1, "c_dim": 2}
    ),
    "stylegan2, resnet": StyleGAN2Config(**TINY, architecture="resnet"),
    "stylegan2, orig, no noise": StyleGAN2Config(**TINY, architecture="orig", noise=False),
    "cips": CIPSConfig(**TINY, features=6),
    "cips, oblong, grey, conditional": CIPSConfig(
        **TINY | {"img_shape": (24, 16), "img_channels": 1, "c_dim": 2}, features=6, coords="centers"
    ),
    "inr_gan": INRGANConfig(**TINY | {"img_shape": (64, 64), "channel_base": 256}, rank=2),
}
each_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def fresh(config: AnyGeneratorConfig) -> tuple[Generator, torch.Tensor]:
    """Return a generator in float64 with no weight at a special value, and styles [3,num_ws,w_dim]."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shaken(Generator(config)).double(), noise(3, config.num_ws, config.w_dim)


@each_kind
def test_an_image_depends_on_its_own_style_and_seed_alone(config):
    G, ws = fresh(config)
    seeds = torch.tensor([5, 6, 5])
    together = G.synthesis(ws, noise=seeds)
    assert together.shape == (3, config.img_channels, *config.img_shape)
    for i in range(3):
        assert error(G.synthesis(ws[i : i + 1], noise=seeds[i : i + 1]), together[i : i + 1]) <= 1e-12
    with_noise = any("noise_strength" in name for name, _ in G.named_parameters())
    assert torch.equal(G.synthesis(ws, noise=seeds + 1), together) != with_noise
    assert torch.equal(G.synthesis(ws), G.synthesis(ws))


@each_kind
def test_recomputation_changes_nothing_and_every_parameter_receives_a_gradient(config):
    """The gradients of a loss that contains the path length, so second derivatives."""
    gradients = []
    for recompute in ("none", "all"):
        G, _ = fresh(config)
        compute_with(G, recompute=recompute)
        synthesis = functools.partial(G.synthesis, noise=torch.arange(2))
        ws = G.mapping(noise(2, 6), noise(2, config.c_dim, seed=1))
        image_noise = noise(2, config.img_channels, *config.img_shape)
        lengths = losses.path_lengths(synthesis, ws, image_noise)
        (lengths.sum() + synthesis(ws).square().sum()).backward()
        gradients.append({name: p.grad for name, p in G.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert error(gradients[1][name], gradient) <= 1e-9, name


@each_kind
def test_a_saved_generator_gives_the_same_images(config, tmp_path):
    G = fresh(config)[0].float().eval()
    save_generator(G, tmp_path / "net.safetensors")
    loaded = load_generator(tmp_path / "net.safetensors")
    assert loaded.config == config
    z, c = noise(2, 6).float(), noise(2, config.c_dim).float()
    assert torch.equal(loaded(z, c, 0.7), G(z, c, 0.7))


@each_kind
def test_rendering_equals_the_synthesis(config):
    G, ws = fresh(config)
    G.requires_grad_(False)
    assert error(rendering.render(G, ws, Shot(tile=5)), G.synthesis(ws)) <= 1e-12
    with pytest.raises(UserError, match=rf"kind {config.kind} renders"):
        rendering.render(G, ws, Shot(transform=rendering.rotation(10)))


@pytest.mark.parametrize("config", [GeneratorConfig(**TINY), KINDS["cips, oblong, grey, conditional"]], ids=str)
@pytest.mark.parametrize("supersample", [1, 3])
def test_windows_rendered_at_once_are_those_rendered_alone(config, supersample, monkeypatch):
    G, ws = fresh(config)
    G.requires_grad_(False)
    shots = [Shot((12, 8), window=(x, 0.1, x + 0.4, 0.6), supersample=supersample) for x in (0.0, 0.3, 0.6)]
    alone = torch.cat([rendering.render(G, w, shot) for w, shot in zip(ws.split(1), shots, strict=True)])
    for together in (1, 2 * 12 * 8, 4 * 12 * 8):
        monkeypatch.setattr(rendering, "TOGETHER", together)
        assert error(rendering.render_each(G, ws, shots), alone) <= 1e-12
    with pytest.raises(UserError, match="not finite"):
        rendering.render_each(G, ws * torch.nan, shots)


def test_a_kind_without_positions_says_so():
    G, ws = fresh(KINDS["stylegan2"])
    for shot in (Shot((32, 32)), Shot(window=(0, 0, 0.5, 0.5)), Shot(supersample=2)):
        with pytest.raises(UserError, match="whole image at 16x16 only"):
            rendering.render(G, ws, shot)
    with pytest.raises(ValueError, match="stylegan2 has no positions"):
        G.synthesis(ws, rows=noise(16))
