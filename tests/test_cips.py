"""Laws of CIPS. `released` is its arithmetic in float64 with PyTorch's convolutions and grid_sample, from tensors under
their released names. It agrees to 5e-6 with images that the released networks computed; that file has 8 MB.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import distance, error, noise

from training import losses
from training.networks import Generator
from training.networks.base import sample_noise
from training.networks.cips import CIPSConfig
from training.networks.layers import compute_with
from training.networks.official import generator_from_official

SIDE, WIDTHS = 32, [6, 6, 6, 4]


def released_tensors() -> dict[str, torch.Tensor]:
    """Return random tensors of a network of 5 features and 7 style numbers."""
    shapes = {"emb.input": (1, 5, SIDE, SIDE), "lff.ffm.conv.weight": (5, 2, 1, 1), "lff.ffm.conv.bias": (5,)}
    shapes |= {f"style.{i}.{x}": s for i in (1, 2) for x, s in (("weight", (7, 7)), ("bias", (7,)))}
    names = ["conv1", *(f"linears.{i}" for i in range(8))]
    for name, (i, o) in zip(names, itertools.pairwise([10, 6, *(c for c in WIDTHS for _ in range(2))]), strict=True):
        shapes |= modulated(name, i, o) | {f"{name}.noise.weight": (1,), f"{name}.activate.bias": (o,)}
    for j, width in enumerate(WIDTHS):
        shapes |= modulated(f"to_rgbs.{j}", width, 3) | {f"to_rgbs.{j}.bias": (1, 3, 1, 1)}
    return {name: noise(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def modulated(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.conv.weight": (1, outputs, inputs, 1, 1),
        f"{name}.conv.modulation.weight": (inputs, 7),
        f"{name}.conv.modulation.bias": (inputs,),
    }


def released(t: dict[str, torch.Tensor], z: torch.Tensor, side: int, noises=(0,) * 9, as_is: bool = False):
    w = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for i in (1, 2):
        w = w @ (t[f"style.{i}.weight"] * 0.01).T / math.sqrt(7) + t[f"style.{i}.bias"] * 0.01
        w = F.leaky_relu(w, 0.2) * math.sqrt(2)

    def convolve(name: str, x: torch.Tensor, demodulate: bool) -> torch.Tensor:
        style = w @ t[f"{name}.conv.modulation.weight"].T / math.sqrt(7) + t[f"{name}.conv.modulation.bias"]
        weight = t[f"{name}.conv.weight"] * style[:, None, :, None, None] / math.sqrt(style.shape[1])
        if demodulate:
            weight = weight / (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
        return torch.cat([F.conv2d(image[None], kernel) for image, kernel in zip(x, weight, strict=True)])

    line = torch.linspace(-1, 1, side, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    grid = torch.stack([x, y])[None].expand(len(z), -1, -1, -1)
    sines = F.conv2d(grid, t["lff.ffm.conv.weight"], t["lff.ffm.conv.bias"]).sin()
    embedding = t["emb.input"].expand(len(z), -1, -1, -1)
    if not as_is:
        embedding = F.grid_sample(embedding, grid.movedim(1, -1), padding_mode="border", align_corners=False)
    x, image = torch.cat([sines, embedding], dim=1), 0
    for i, name in enumerate(["conv1", *(f"linears.{i}" for i in range(8))]):
        x = convolve(name, x, True) + t[f"{name}.noise.weight"] * noises[i]
        x = F.leaky_relu(x + t[f"{name}.activate.bias"][:, None, None], 0.2) * math.sqrt(2)
        if i and i % 2 == 0:
            image = image + convolve(f"to_rgbs.{i // 2 - 1}", x, False) + t[f"to_rgbs.{i // 2 - 1}.bias"]
    return image


@pytest.fixture(scope="module")
def tensors():
    return released_tensors()


@pytest.fixture
def G(tensors):
    G = generator_from_official({name: t.float() for name, t in tensors.items()}, {})
    return G.to(torch.float64)


def test_released_weights_give_the_released_images_at_any_size(tensors, G):
    z = noise(2, 7)
    for side in (SIDE, 2 * SIDE, 40):
        t = torch.linspace(0, 1, side, dtype=torch.float64)
        assert error(G(z, rows=t, cols=t), released(tensors, z, side)) <= 1e-6


def test_training_reads_the_embedding_as_it_is(tensors, G):
    config = CIPSConfig(**G.config.model_dump() | {"embedding_coords": "endpoints"})
    own = Generator(config).to(torch.float64)
    own.load_state_dict(G.state_dict())
    z = noise(2, 7)
    assert error(own(z), released(tensors, z, SIDE, as_is=True)) <= 1e-6


def test_noise_is_added_in_every_layer_and_depends_on_the_seed_of_an_image(tensors, G):
    z, seeds = noise(3, 7), torch.tensor([5, 8, 5])
    noises = sample_noise(seeds, 9 * SIDE * SIDE, z).view(3, 9, 1, SIDE, SIDE).unbind(1)
    image = G(z, noise=seeds)
    assert error(image, released(tensors, z, SIDE, noises)) <= 1e-6
    assert error(torch.cat([G(z[i : i + 1], noise=seeds[i : i + 1]) for i in range(3)]), image) <= 1e-12


def test_the_average_style_of_released_weights_is_always_the_same(tensors, G):
    again = generator_from_official({name: t.float() for name, t in tensors.items()}, {})
    assert torch.equal(again.mapping.w_avg.double(), G.mapping.w_avg)
    assert error(G.mapping(noise(4000, 7, seed=1))[:, 0].mean(0), G.mapping.w_avg) <= 0.1


def test_a_window_is_a_part_of_the_image(G):
    ws, t = G.mapping(noise(2, 7)), torch.linspace(0, 1, 90, dtype=torch.float64)
    image = G.synthesis(ws, t, t)
    assert error(G.synthesis(ws, t[20:31], t[60:]), image[:, :, 20:31, 60:]) <= 1e-12
    windows = G.synthesis(ws, torch.stack([t[:9], t[50:59]]), torch.stack([t[70:75], t[2:7]]))
    assert error(windows, torch.stack([image[0, :, :9, 70:75], image[1, :, 50:59, 2:7]])) <= 1e-12


def test_recomputing_changes_no_derivative(G):
    G.requires_grad_()
    seeds, found = torch.arange(2), {}
    for recompute in ("none", "pixels"):
        compute_with(G, recompute=recompute)
        G.zero_grad()
        ws = G.mapping(noise(2, 7))
        lengths = losses.path_lengths(lambda ws: G.synthesis(ws, noise=seeds), ws, noise(2, 3, SIDE, SIDE))
        (lengths.square().sum() + G.synthesis(ws, noise=seeds).square().sum()).backward()
        found[recompute] = torch.cat([p.grad.flatten() for p in G.parameters()])
    assert distance(found["pixels"], found["none"]) <= 1e-12


def test_the_published_widths():
    config = CIPSConfig(img_shape=(256, 256))
    assert config.widths == [512] * 5 + [256, 128]
    assert (config.num_ws, config.features, config.coords) == (1, 512, "endpoints")
    with pytest.raises(ValueError, match="channel_base"):
        CIPSConfig(img_shape=(256, 256), channel_base=255)
