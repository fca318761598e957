"""Laws of CIPS. `released` is its arithmetic in float64 with PyTorch's convolutions and grid_sample, from tensors under
their released names. It agrees to 5e-6 with images that the released networks computed; that file has 8 MB.
"""

import itertools
import math
import os
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import distance, error, noise

from dnnlib.config import read_yaml
from dnnlib.console import UserError
from training import losses
from training.networks import Generator
from training.networks.base import sample_noise
from training.networks.cips import CIPSConfig
from training.networks.layers import compute_with
from training.networks.official import discriminator_from_official, generator_from_official
from training.networks.released import load_released
from training.snapshot import load_generator, read_trained

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


# --- files ------------------------------------------------------------------------------------------------------------


def discriminator_tensors() -> dict[str, torch.Tensor]:
    """Return random tensors of a discriminator for 32×32 images."""
    shapes = {"convs.0.0.weight": (4, 3, 1, 1), "convs.0.1.bias": (4,)}
    for j, (i, o) in enumerate(((4, 6), (6, 6), (6, 6)), 1):
        shapes |= {f"convs.{j}.conv1.0.weight": (i, i, 3, 3), f"convs.{j}.conv1.1.bias": (i,)}
        shapes |= {f"convs.{j}.conv2.1.weight": (o, i, 3, 3), f"convs.{j}.conv2.2.bias": (o,)}
        shapes |= {f"convs.{j}.skip.1.weight": (o, i, 1, 1)}
    shapes |= {"final_conv.0.weight": (6, 7, 3, 3), "final_conv.1.bias": (6,)}
    shapes |= {"final_linear.0.weight": (6, 96), "final_linear.0.bias": (6,)}
    shapes |= {"final_linear.1.weight": (1, 6), "final_linear.1.bias": (1,)}
    tensors = {name: noise(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    taps = torch.tensor([1, 3, 3, 1], dtype=torch.float64)
    names = (f"convs.{j}.{part}.0.kernel" for j in (1, 2, 3) for part in ("conv2", "skip"))
    return tensors | dict.fromkeys(names, torch.outer(taps, taps) / 64)


def judge(t: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return the logits of the released discriminator for images [N,3,32,32], N at most 4."""

    def convolve(name: str, x: torch.Tensor, **options) -> torch.Tensor:
        weight = t[f"{name}.weight"]
        return F.conv2d(x, weight / math.sqrt(weight[0].numel()), **options)

    def activate(x: torch.Tensor, bias: str) -> torch.Tensor:
        return F.leaky_relu(x + t[bias].view(-1, *[1] * (x.ndim - 2)), 0.2) * math.sqrt(2)

    def blur(x: torch.Tensor, name: str, pad: int) -> torch.Tensor:
        return F.conv2d(x, t[f"{name}.kernel"].expand(x.shape[1], 1, 4, 4), padding=pad, groups=x.shape[1])

    x = activate(convolve("convs.0.0", x), "convs.0.1.bias")
    for j in (1, 2, 3):
        name = f"convs.{j}"
        y = activate(convolve(f"{name}.conv1.0", x, padding=1), f"{name}.conv1.1.bias")
        y = convolve(f"{name}.conv2.1", blur(y, f"{name}.conv2.0", 2), stride=2)
        y = activate(y, f"{name}.conv2.2.bias")
        x = (y + convolve(f"{name}.skip.1", blur(x, f"{name}.skip.0", 1), stride=2)) / math.sqrt(2)
    deviation = (x.var(dim=0, correction=0) + 1e-8).sqrt().mean()
    x = torch.cat([x, deviation.expand(len(x), 1, 4, 4)], dim=1)
    x = activate(convolve("final_conv.0", x, padding=1), "final_conv.1.bias").flatten(1)
    x = activate(x @ t["final_linear.0.weight"].T / math.sqrt(96), "final_linear.0.bias")
    return x @ t["final_linear.1.weight"].T / math.sqrt(6) + t["final_linear.1.bias"]


def floats(tensors: dict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((name, t.float()) for name, t in tensors.items())


def test_the_released_discriminator_gives_the_released_logits():
    tensors, images = discriminator_tensors(), noise(3, 3, 32, 32)
    D = discriminator_from_official(floats(tensors), {}).to(torch.float64)
    assert error(D(images), judge(tensors, images)) <= 1e-6
    with pytest.raises(UserError, match=r"convs\.1\.skip\.0\.kernel is not the filter"):
        discriminator_from_official(floats(tensors | {"convs.1.skip.0.kernel": torch.ones(4, 4)}), {})


def test_released_files_are_read(tmp_path, tensors, G):
    bare, full = tmp_path / "bare.pt", tmp_path / "full.pt"
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.002, "params": [0]}]}
    other = floats({name: 2 * t for name, t in tensors.items()})
    torch.save(floats(tensors), bare)
    full_content = {"g": other, "d": floats(discriminator_tensors()), "g_ema": floats(tensors)}
    torch.save(full_content | {"g_optim": optimizer, "d_optim": optimizer}, full)
    z = noise(2, 7)
    for path in (bare, full):
        assert torch.equal(load_generator(path).double()(z), G(z))
        assert read_trained(path) == {}
    networks = load_released(full)
    assert error(networks["G"].double()(z), generator_from_official(other, {}).double()(z)) == 0
    images = noise(3, 3, 32, 32)
    assert error(networks["D"].double()(images), judge(discriminator_tensors(), images)) <= 1e-6


def test_a_run_begins_from_a_released_file(tiny):
    path = tiny.folder / "cips.pt"
    g, d = floats(released_tensors()), floats(discriminator_tensors())
    torch.save({"g": g, "d": d, "g_ema": g}, path)
    G, D = generator_from_official(g, {}).config, discriminator_from_official(d, {}).config
    settings = {"G": G.model_dump(mode="json"), "D": D.model_dump(mode="json")}
    tiny.recipe.write_text(yaml.safe_dump(read_yaml(tiny.recipe) | settings))
    images = tiny.images("large", size=(32, 32), count=8)
    result = tiny.call(*tiny.new("--init-from", path, "--kimg", 0.008, data=images))
    assert result.exit_code == 0, result.output
    for name in ("G", "G_ema", "D"):
        assert re.search(rf"^{name}: (\d+) of \1 tensors from {path}$", result.output, re.MULTILINE)


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def hostile(good: dict[str, torch.Tensor], marker: Path) -> dict[str, tuple[object, str]]:
    """Return contents of torch files, and words of the sentences that refuse them."""
    side = torch.zeros(1).expand(1, 5, 10**6, 10**6)
    return {
        "code": (good | {"x": Attack(marker)}, "is not an intact file of CIPS"),
        "code beside": ({"g_ema": good, "g_optim": Attack(marker)}, "is not an intact file of CIPS"),
        "a list": ([1, 2], "its content is not a dict"),
        "nothing known": ({"G": good}, "neither a training state of this project nor networks of CIPS"),
        "a number": (good | {"x": 3}, "other things than names and tensors"),
        "a list of tensors": ({"g_ema": [torch.ones(3)]}, "G_ema is not a dict"),
        "integers": (good | {"conv1.noise.weight": torch.ones(1, dtype=torch.int64)}, "other things than names"),
        "claims": (good | {"emb.input": side}, "does not store in full"),
        "one storage": (good | dict.fromkeys(map(str, range(9)), torch.ones(9999)), "does not store in full"),
        "sparse": (good | {"emb.input": torch.ones(1, 5, 32, 32).to_sparse()}, "names torch.serialization"),
        "missing": ({n: t for n, t in good.items() if n != "conv1.conv.weight"}, "cannot be used: .*conv1.conv.weight"),
        "unexpected": (good | {"x": torch.ones(3)}, "cannot be used: .*unexpected x"),
        "no style": (good | {"style.1.weight": torch.ones(())}, "cannot be used: .*style.1.weight"),
        "another style": (good | {"style.1.weight": torch.ones(7, 9)}, "cannot be used: .*style.1.weight"),
        "another shape": (good | {"emb.input": torch.ones(1, 5, 16, 16)}, "cannot be used: "),
        "infinite": (good | {"conv1.activate.bias": torch.full((6,), torch.inf)}, "not finite"),
    }


@pytest.mark.filterwarnings("ignore:Sparse")
def test_hostile_files_are_refused_in_one_sentence(tmp_path, tensors):
    marker = tmp_path / "pwned"
    for name, (content, words) in hostile(floats(tensors), marker).items():
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        with pytest.raises(UserError, match=words) as refusal:
            load_generator(path)
        assert str(path) in str(refusal.value), name
        assert len(str(refusal.value).splitlines()) == 1, name
    assert not marker.exists()


def test_a_file_that_unpacks_to_more_than_its_bytes_is_refused(tmp_path, tensors):
    torch.save(floats(tensors) | {"x": torch.zeros(10**6)}, tmp_path / "plain.pt")
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    with pytest.raises(UserError, match="claims more bytes than it has"):
        load_generator(packed)
