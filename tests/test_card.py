"""docs.card: what it says about a network is true, and handwritten text stays."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import Tiny
from PIL import Image

import train
from docs import card, figures
from rendering import render
from rendering.styles import Styles
from torch_utils.images import to_uint8
from training.letters import Letters
from training.networks import Generator, GeneratorConfig
from training.networks.layers import SynthesisLayer
from training.snapshot import load_generator, save_generator

WORDS = ("--data=Noise, drawn for a test.", "--licence=None.", "--weaknesses=It shows | noise.")


def make(run: Path, *arguments: str):
    return CliRunner().invoke(card.main, ["--run", str(run), "--name=noise", *arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A conditional run with a second, better snapshot, and measurements of both."""
    tiny = Tiny(tmp_path_factory.mktemp("card"))
    folder = tiny.run("--cond", "--mirror", "-o", "optim.eps=1e-9", data=tiny.labelled)
    first, better = (folder / f"network-snapshot-00000{i}.safetensors" for i in range(2))
    torch.manual_seed(1)
    save_generator(Generator(load_generator(first).config), better, step=1, kimg=1.0)
    lines = [
        {"metric": "fid1k_full@custom", "results": {"fid1k_full@custom": value}, "network": path.name, "num_fake": 1000}
        for path, value in ((first, 50.5), (better, 40.25))
    ]
    lines = [line | {"step": i, "kimg": float(i)} for i, line in enumerate(lines)] + [
        lines[0] | {"results": {"fid1k_full": 1.0}}
    ]
    (folder / "metric-fid1k_full.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_card_says_how_to_train_and_render_what_it_shows(models, run, monkeypatch):
    result = make(run, *WORDS, "--by=fid1k_full", "--trunc=0.7")
    assert result.exit_code == 0, (result.output, result.exception)
    assert {p.name for p in models.iterdir()} == {"noise.safetensors", "noise.md"}
    text = (models / "noise.md").read_text()
    assert "40.25" in text
    assert "50.5" not in text
    assert "(../docs/images/noise-fid1k_full.png)" in text
    assert Image.open(models.parent / "docs" / "images" / "noise-fid1k_full.png").size == (600, 250)

    training, drawing = (shlex.split(line) for line in text.splitlines() if line.startswith("python "))
    monkeypatch.chdir(run.parents[1])
    result = CliRunner().invoke(train.main, [*training[2:], "--dry-run"])
    assert result.exit_code == 0, result.output
    found, wanted = yaml.safe_load(result.output), yaml.safe_load((run / "options.yaml").read_text())
    assert found | {"data": None} == wanted | {"data": None}
    assert found["data"] == wanted["data"] | {"path": "labelled"}

    G = load_generator("noise")
    classes = [str(i % 3) for i in range(64)]
    ws = Styles(0.7, classes=classes).map(G, list(range(64)))
    grid = np.array(Image.open(models.parent / "docs" / "images" / "noise.png"))
    cells = torch.from_numpy(grid.reshape(8, 8, 8, 8, 3)).permute(0, 2, 4, 1, 3).flatten(0, 1)
    assert (cells.int() - to_uint8(render(G, ws)).int()).abs().max() <= 1
    assert drawing[2:] == ["--network=noise", "--seeds=0-63", "--trunc=0.7", "--grid=docs/images/noise.png"]


def test_a_recipe_in_the_name_of_the_run_leaves_nothing_to_say(models):
    settings = card.gather("demo", {"data": {"path": "x.zip"}})
    images = card.SimpleNamespace(shape=(3, 64, 64), label_dim=0, summary=lambda: "")
    config = card.resolve(settings, images, "")
    found = card.training_command(Path("runs/00012-demo-x-once-more"), config)
    assert found == "python train.py --outdir=runs --cfg=demo --data=x.zip"


def test_made_again_a_card_keeps_what_people_wrote(models, run):
    by = "--by=fid1k_full"
    assert make(run, *WORDS, by).exit_code == 0
    path = models / "noise.md"
    assert path.read_text().endswith("## Weaknesses\nIt shows | noise.\n")
    path.write_text(path.read_text() + "\nAnd it hums.\n")
    before = path.read_text()
    assert make(run, by).exit_code == 0
    assert path.read_text() == before
    assert make(run, by, "--trunc=0.5").exit_code == 0
    changed = [a for a, b in zip(path.read_text().splitlines(), before.splitlines(), strict=True) if a != b]
    assert len(changed) == 1
    assert "--trunc=0.5" in changed[0]


@pytest.mark.parametrize("factor", [1, 1e6])
def test_a_network_is_float16_where_that_is_not_seen(models, factor):
    """Demodulation hides the scale of a layer's weights, but float16 ends at 65504."""
    torch.manual_seed(0)
    small = {"img_resolution": 16, "channel_base": 1024, "channel_max": 64, "z_dim": 8, "w_dim": 8, "bandwidth": 1}
    G = Generator(GeneratorConfig(**small, mapping_layers=1, biline_channels=4, thickness=2)).requires_grad_(False)
    next(layer.weight for layer in G.modules() if isinstance(layer, SynthesisLayer)).mul_(factor)
    path = models / "a.safetensors"
    said = card.write_network(G, path)
    ws = Styles().map(G, list(range(16)))
    loaded = load_generator("a")
    change = (render(G, ws) - render(loaded, Styles().map(loaded, list(range(16))))).abs().max()
    weights = sum(p.numel() for p in G.state_dict().values())
    if factor == 1:
        assert "in float16" in said
        assert 0 < change / 2 < 1 / 255
        assert 2 * weights < path.stat().st_size < 3 * weights
    else:
        assert "in float32" in said
        assert change < 1e-6
        assert path.stat().st_size > 4 * weights


def test_walks_lead_from_seed_to_seed_one_network_below_the_other(models, tmp_path):
    G = Generator(GeneratorConfig(img_resolution=16, c_dim=3, channel_base=64, channel_max=8, z_dim=8, w_dim=8))
    save_generator(G, models / "noise.safetensors")
    call = [
        "--network=noise",
        "--network=noise",
        "--figure=walks",
        "--seed=5",
        "--trunc=0.7",
        "--out",
        str(tmp_path / "walks.png"),
    ]
    result = CliRunner().invoke(figures.main, call)
    assert result.exit_code == 0, (result.output, result.exception)
    page, again = np.split(np.array(Image.open(tmp_path / "walks.png")), 2)
    assert np.array_equal(page, again)
    ws = Styles(0.7).map(load_generator("noise"), [5, 6, 7, 8])
    seeds = to_uint8(render(G.eval(), ws)).movedim(1, -1).numpy()
    step, row = 16 + figures.GAP, figures.CAPTION + 16 + figures.GAP
    for wanted, top, left in zip(seeds, (0, 0, row, row), (0, 7 * step, 0, 7 * step), strict=True):
        cell = page[top + figures.CAPTION :, left + figures.GAP :][:16, :16]
        assert np.abs(cell.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a new card needs --data, --licence, --weaknesses"),
        ([*WORDS, "--name=../noise"], "--name=../noise"),
        ([*WORDS, "--trunc=nan"], "--trunc=nan"),
        ([*WORDS, "--scale=nan"], "--scale=nan"),
        ([*WORDS, "--by=is1k"], "not a distance"),
        ([*WORDS, "--by=kid1k_full"], "no snapshot with kid1k_full"),
        ([*WORDS, "--run=none"], "none/options.yaml"),
    ],
)
def test_a_wrong_call_is_a_sentence_and_writes_nothing(models, run, arguments, words):
    result = make(run, *arguments)
    assert result.exit_code == 2, result.exception
    assert words in result.output
    assert not list(models.iterdir())


def test_a_network_too_large_replaces_nothing(models, run, monkeypatch):
    assert make(run, *WORDS).exit_code == 0
    before = {p.name: p.read_bytes() for p in models.iterdir()}
    monkeypatch.setattr(card, "LIMIT", 1000)
    result = make(run, "--by=fid1k_full")
    assert result.exit_code == 2
    assert "1,000 at most" in result.output
    assert {p.name: p.read_bytes() for p in models.iterdir()} == before
    result = make(run, *WORDS)
    assert result.exit_code == 2
    assert "leave --data out" in result.output


def test_the_figure_of_sizes_finds_the_outline_and_its_edges():
    """A drawing in other colours is nearest to itself; every window is in the image, on an edge."""
    size = (figures.PANEL, figures.PANEL)
    drawings = Letters("G", size, 21)
    names = drawings.names()
    own = drawings.image(names[5], 3)
    inverted = Image.fromarray(255 - np.asarray(own))
    assert min(names, key=lambda name: figures.distance(drawings.image(name, 3), inverted)) == names[5]
    grey = np.asarray(own.convert("L"), float)
    for side, (left, top, right, bottom) in figures.find_edges(own):
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        assert (right - left) * side == pytest.approx(min(side, figures.PANEL))
        part = grey[int(top * 256) : int(np.ceil(bottom * 256)) + 1, int(left * 256) : int(np.ceil(right * 256)) + 1]
        assert np.ptp(part) > 0.3 * np.ptp(grey)
