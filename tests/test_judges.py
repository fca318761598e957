"""The judges on letters-like archives whose answers are known."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks import judges
from torch_utils.randomness import make_rng
from training.data import ImageArchive
from training.networks import Generator, GeneratorConfig
from training.snapshot import save_generator

TINY = {
    "img_resolution": 16,
    "channel_base": 64,
    "channel_max": 8,
    "z_dim": 6,
    "w_dim": 6,
    "mapping_layers": 1,
    "biline_channels": 4,
    "thickness": 2,
}


def bars(num, seed=0):
    """uint8 [num,1,16,16] and classes [num]: a bar upright (0), lying (1) or neither (2), on noise."""
    random = np.random.default_rng(seed)
    images, classes = random.integers(0, 120, (num, 16, 16), dtype=np.uint8), np.arange(num) % 3
    for image, k, place in zip(images, classes, random.integers(3, 12, num), strict=True):
        if k < 2:
            (image if k else image.T)[place : place + 2] = 255
    return images, classes


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive") / "bars"
    folder.mkdir()
    images, classes = bars(judges.MIN_IMAGES)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    labels = [[f"{i:03}.png", int(k)] for i, k in enumerate(classes)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


@pytest.fixture(autouse=True)
def cache(archive, monkeypatch):
    """Keep the features of the archive from one test to the next, and generate few images."""
    monkeypatch.setenv("CREPS_CACHE", str(archive.parent / "cache"))
    monkeypatch.setattr(judges, "CHOSEN", 4)
    return archive.parent / "cache"


def save(path, **settings):
    torch.manual_seed(0)
    save_generator(Generator(GeneratorConfig(**TINY | settings)), path)
    return path


def call(*arguments):
    return CliRunner().invoke(judges.main, [str(a) for a in arguments])


def test_the_classifier_learns_reads_and_depends_on_its_seed_alone():
    images, classes = bars(300)
    x, y = judges.shrink(torch.from_numpy(images)[:, None]), torch.from_numpy(classes)
    nets = [judges.train_classifier(x[:64], y[:64], 3, seed, seen=128) for seed in (0, 0, 1)]
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    net = judges.train_classifier(x[:240], y[:240], 3, 0, seen=2000)
    found = judges.read_right(judges.apply(net, x[240:]), y[240:])
    assert found["share of images"] > 0.9
    assert found["classes"] == 3
    wrong = judges.read_right(judges.apply(net, x[240:]), torch.zeros(60).long())
    assert wrong["classes"] == 0  # a third of the images called 0 looks like it


def test_a_class_is_read_right_when_most_of_its_images_are():
    logits = torch.eye(3)[[0, 0, 1, 1, 1, 0, 2, 0]]
    found = judges.read_right(logits, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]))
    assert found["share of each class"] == pytest.approx([2 / 3, 2 / 3, 1 / 2])
    assert (found["classes"], found["of classes"], found["share of images"]) == (2, 3, 5 / 8)


def test_copies_have_ratio_0_and_fresh_samples_ratio_1():
    points = torch.randn(800, 5, generator=make_rng(0, 0, "points"))
    reals, fresh = points[:500], points[500:]
    copies = judges.compare_neighbours(reals[[3, 1, 4]], reals, seed=0)
    assert (copies["ratio"], copies["images"]) == (0, [3, 1, 4])
    assert judges.compare_neighbours(fresh, reals, seed=0)["ratio"] == pytest.approx(1, abs=0.1)
    all_pairs = (reals[:, None] - reals).norm(dim=2).fill_diagonal_(torch.inf)
    usual = judges.compare_neighbours(fresh, reals, seed=0)["median of the archive"]
    assert usual == pytest.approx(all_pairs.min(1).values.median().item(), rel=1e-6)


def test_the_command_judges_a_conditional_and_an_unconditional_network(tmp_path, archive, cache, monkeypatch):
    monkeypatch.setattr(judges, "SEEN", 640)
    networks = save(tmp_path / "cond.safetensors", c_dim=3), save(tmp_path / "plain.safetensors", img_channels=1)
    options = [f"--data={archive}", f"--out={tmp_path / 'judges.json'}", "--samples=4"]
    result = call(*options, *(f"--network={path}" for path in networks))
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads((tmp_path / "judges.json").read_text())
    assert (found["classifier"]["images"], found["classifier"]["compared"]) == (90, 10)
    first, second = found["networks"]
    assert len(first["read right"]["share of each class"]) == 3
    assert "read right" not in second
    for one in (first, second):
        assert one["Fréchet distance"] > found["classifier"]["Fréchet distance"]
        assert len(one["pixels"]["images"]) == len(one["lite0"]["distances"]) == judges.CHOSEN
    (kept,) = (cache / "statistics").iterdir()
    assert kept.name.startswith("features-")


def test_an_archive_without_labels_has_neighbours_and_a_grid(tmp_path, archive):
    archive = shutil.copytree(archive, tmp_path / "bars", ignore=shutil.ignore_patterns("dataset.json"))
    network = save(tmp_path / "plain.safetensors")
    options = [f"--data={archive}", f"--network={network}", f"--out={tmp_path / 'judges.json'}"]
    result = call(*options, f"--grid={tmp_path / 'grid.png'}")
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads((tmp_path / "judges.json").read_text())
    assert "classifier" not in found
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (3 * 16, judges.CHOSEN * 16, 3)
    index = found["networks"][0]["lite0"]["images"][2]
    assert np.array_equal(grid[32:, 32:48].transpose(2, 0, 1), ImageArchive(archive, channels=3)[index][0].numpy())


def test_a_wrong_call_is_a_sentence_and_writes_nothing(tmp_path, archive):
    other = save(tmp_path / "five.safetensors", c_dim=5)
    rgba = save(tmp_path / "rgba.safetensors", img_channels=4)
    out = tmp_path / "judges.json"
    for options, words in (
        ([f"--network={other}"], "takes 5 classes"),
        ([f"--network={rgba}"], "4 channels"),
        ([f"--grid={tmp_path / 'grid.png'}"], "give one --network"),
        (["--network=gone.safetensors"], "does not exist"),
    ):
        result = call(f"--data={archive}", f"--out={out}", *options)
        assert result.exit_code == 2, (result.output, result.exception)
        assert words in result.output
    assert not out.exists()
