"""The paper's tables: what is published is there, what is measured is kept, and failures are rows."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks import paper
from benchmarks.paper import Results
from training.networks import CIPSConfig, Generator, GeneratorConfig, INRGANConfig, StyleGAN2Config
from training.snapshot import save_generator

TINY = {"img_resolution": 32, "z_dim": 8, "w_dim": 8, "mapping_layers": 1, "channel_base": 256, "channel_max": 8}
CREPS = TINY | {"biline_channels": 4, "thickness": 2, "coords": "centers"}

# As printed in the slides and the supplement, and in INR-GAN's and CIPS's README.
PUBLISHED = {
    "256×256, batch 1, CREPS": "2.3 GB, 0.03 s",
    "256×256, batch 4, CIPS": "10.2 GB, 0.23 s",
    "512×512, batch 1, StyleGAN2": "1.7 GB, 0.04 s",
    "512×512, batch 4, CIPS": "out of memory",
    "512×512, batch 4, CREPS": "14.6 GB, 0.16 s",
    "INR-GAN": "266.5 images/s (batch 50), 23.5 GB",
    "FFHQ-512": "StyleGAN2 3.41, CIPS 6.18, CREPS 4.43, AnyresGAN 3.71, ScaleParty 6.23",
    "FFHQ-1024": "StyleGAN2 2.84, CIPS 10.07, CREPS 4.09, AnyresGAN 4.06, ScaleParty 10.91",
    "LSUN-Church-256": "StyleGAN2 3.86, CIPS 2.92, CREPS 5.5, INR-GAN 4.45, INR-GAN-bil 4.04, AnyresGAN 3.84",
    "MetFaces-1024": "StyleGAN2 18.22, CREPS 20.52, CIPS out of memory",
    "Scenery-256": "StyleGAN2 6.4, CIPS 8.49, CREPS 7.21",
    "AFHQ-Dog": "StyleGAN2-ADA 7.4, CREPS 9.7",
    "AnyresGAN": "24.19, 0.73, 0.07",
    "ScaleParty": "24.50, 0.70, 0.08",
    "CIPS": "33.33, 0.93, 0.05",
    "CREPS": "34.65, 0.96, 0.01",
    "Linear(64, 128)": "64 → 128",
    "+ bi-line and d=8 (`ablation-single-fusion`)": "FID 8.23, 1.6 GB, 0.03 s",
    "+ no decoders and d=8 (`ablation-no-decoders`)": "FID 6.91, 1.7 GB, 0.03 s",
    "+ multiple decoders and d=4 (`ablation-thin`)": "FID 6.46, 1.6 GB, 0.03 s",
    "+ multiple decoders and d=8 (`ffhq128`)": "FID 4.66, 1.7 GB, 0.04 s",
    "3687×3687, CREPS by rendering.render": "in a single run (slides)",
}


def rows_of(page: str) -> dict[str, list[str]]:
    """Return the other cells of each row, by its first one; of equal first cells, those of the last row."""
    table = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in table}


def test_the_published_numbers_are_there_before_anything_is_measured(tmp_path):
    page = paper.page(Results(tmp_path / "none.json", "cpu"), [], [])
    rows = rows_of(page)
    assert {name: rows[name][0] for name in PUBLISHED} == PUBLISHED
    measured = {name: row[1] for name, row in rows.items() if len(row) == 3 and name not in paper.LAYERS}
    assert set(measured.values()) <= {"–", "measured", "---", "any size: docs/rendering.md"}
    assert all(
        rows[layer][1].split() == rows[layer][0].split()[:3] for layer in paper.LAYERS if "named" not in rows[layer][0]
    )


@pytest.fixture
def tiny(monkeypatch):
    """Let the systems be tiny, and measure them in this process."""
    monkeypatch.setattr(
        paper,
        "SYSTEMS",
        {
            "StyleGAN2": lambda side: StyleGAN2Config(**TINY),
            "CIPS": lambda side: CIPSConfig(**TINY, features=4),
            "INR-GAN": lambda side: INRGANConfig(**TINY, rank=2),
            "CREPS": lambda side: GeneratorConfig(**CREPS),
            paper.ENGINE: lambda side: GeneratorConfig(**CREPS),
        },
    )
    monkeypatch.setattr(paper, "ablation", lambda recipe: lambda side: GeneratorConfig(**CREPS))
    monkeypatch.setattr(paper, "fresh", paper.measure)


def test_every_measured_cell_is_filled_and_kept(tmp_path, tiny, monkeypatch):
    torch.manual_seed(0)
    for name, G in (("creps", Generator(GeneratorConfig(**CREPS))), ("fixed", Generator(StyleGAN2Config(**TINY)))):
        save_generator(G, tmp_path / f"{name}.safetensors")
    run = tmp_path / "00000-demo"
    run.mkdir()
    lines = [
        {"results": {"fid1k_full": value}, "metric": "fid1k_full", "kimg": kimg} for kimg, value in ((8, 9), (4, 70.5))
    ]
    (run / "metric-fid1k_full.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, page = tmp_path / "paper.json", tmp_path / "docs" / "paper.md"
    options = ["--sizes=32", "--batches=1,2", "--large=48", "--seconds=0", "--num=2", "--device=cpu"]
    options += [f"--network={tmp_path / name}.safetensors" for name in ("creps", "fixed")]
    options += ["--run", "FFHQ-512", str(run), "--run", "ffhq128", str(run), f"--out={out}", f"--page={page}"]

    result = CliRunner().invoke(paper.main, options)
    assert result.exit_code == 0, (result.output, result.exception)
    rows = rows_of(page.read_text())
    found = json.loads(out.read_text())
    assert len(found["processes"]) == 2 * 5 + 4 + 1
    for process, turns in found["processes"].items():
        if "48" not in process:
            assert list(turns) == ["turn 1", "turn 2"] + ["activations kept"] * (paper.ENGINE not in process)
        for turn in turns.values():
            assert all(0 < value < math.inf for value in (*turn["seconds"], turn["peak MiB"]))
    assert " GB, " in rows["32×32, batch 2, CIPS"][1]
    assert rows["32×32, batch 2, CIPS"][2] == "random weights; 2 calls in 2 processes"
    assert rows["FFHQ-512"][1:] == ["`fid1k_full` 9", "00000-demo, 8 kimg"]
    assert rows["+ multiple decoders and d=8 (`ffhq128`)"][1].startswith("`fid1k_full` 9; ")
    (creps,) = (row for name, row in rows.items() if name.startswith("CREPS, creps ("))
    assert creps[2] == "32×32 against 64×64, 2 images"
    (fixed,) = (row for name, row in rows.items() if name.startswith("StyleGAN2, fixed ("))
    assert "renders its whole image at 32x32 only" in fixed[1]
    for drawn in ("bi-line", "creps-scales", "creps-lanczos", "creps-transforms"):
        assert Image.open(page.parent / "images" / f"paper-{drawn}.png").width > 100
        assert f"(images/paper-{drawn}.png)" in page.read_text()

    monkeypatch.setattr(paper, "fresh", None)
    before = out.read_text(), page.read_text()
    result = CliRunner().invoke(paper.main, options)
    assert result.exit_code == 0, (result.output, result.exception)
    assert (out.read_text(), page.read_text()) == before
    out.write_text(out.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    result = CliRunner().invoke(paper.main, options)
    assert (result.exit_code, "another device" in result.output) == (2, True)


def test_the_fit_with_thick_lines_is_the_nearest_one():
    """Eckart and Young: its squared error is the sum of the squares of the singular values left out."""
    _, found = paper.draw_bilines()
    import skimage

    with Image.open(f"{skimage.__path__[0]}/data/camera.png") as file:
        pixels = np.asarray(file.convert("L").resize((256, 256), Image.Resampling.LANCZOS)) / 127.5 - 1
    values = np.linalg.svd(pixels, compute_uv=False)
    for d in (1, 4, 8, 32):
        expected = 10 * math.log10(4 * pixels.size / np.square(values[d:]).sum())
        assert found[f"D = {d}"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_process_without_memory_is_a_row_that_says_so(tmp_path):
    code = f"""
import pathlib, resource
from benchmarks import paper
resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30,) * 2)
results = paper.Results(pathlib.Path({str(tmp_path / "paper.json")!r}), "cpu")
paper.measure_processes(results, [paper.Process("CIPS", 4096)], 2, "cpu", 0)
print(paper.page(results, [(4096, 1)], []))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert ran.returncode == 0, ran.stderr
    assert rows_of(ran.stdout)["4096×4096, batch 1, CIPS"][1].startswith("failed: the memory of this machine is full")
