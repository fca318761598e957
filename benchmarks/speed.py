"""Measure images per second and memory of train.py in several checkouts: python -m benchmarks.speed --help

Each run is a fresh process on random images, and the checkouts take turns. The first report of a run, which includes
building the kernels and the first allocations, is excluded.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.machine import describe, write_images
from dnnlib.console import UserError
from dnnlib.files import atomic_write
from torch_utils.command import command

SPIN = "while True: pass"


def train(checkout: Path, cfg: Path, data: Path, kimg: float, outdir: Path, options: list[str]) -> dict[str, float]:
    """Train `kimg` thousand images twice in one run; return the images per second of the second half and peak MiB."""
    command = [sys.executable, "train.py", f"--outdir={outdir}", f"--cfg={cfg}", f"--data={data}"]
    command += [f"--kimg={2 * kimg:g}", f"--tick={kimg:g}", "--snap=1000", *options]
    ran = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if ran.returncode:
        raise UserError(f"train.py in {checkout} ended with code {ran.returncode}: {ran.stderr[-2000:]}")
    (stats,) = outdir.glob("*/stats.jsonl")
    last = json.loads(stats.read_text().splitlines()[-1])
    return {
        "images/s": 1000 / last["Timing/sec_per_kimg"],
        "peak MiB": 1024 * last["Resources/peak_mem_gib"],
    }


@click.command()
@click.option(
    "--checkout",
    "checkouts",
    type=(str, Path),
    multiple=True,
    metavar="NAME DIR",
    help="Another checkout: a name and a folder, e.g. before ../old.",
)
@click.option("--cfg", type=click.Path(exists=True, path_type=Path), required=True, help="A recipe for all of them.")
@click.option("--size", type=click.IntRange(8), default=64, show_default=True, help="Side of the images.")
@click.option("--kimg", type=float, default=0.5, show_default=True, help="Thousands of images between two reports.")
@click.option("--turns", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--busy", type=click.IntRange(0), default=0, show_default=True, help="Processes that keep other cores busy."
)
@click.option("--out", metavar="JSON", type=click.Path(path_type=Path), required=True)
@click.argument("options", nargs=-1)
@command()
def main(checkouts, cfg, size, kimg, turns, busy, out, options):
    """Compare this checkout with others. OPTIONS go to train.py, after --."""
    folders = dict(checkouts) | {"this": Path(__file__).parents[1]}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    neighbours = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(busy)]
    try:
        with tempfile.TemporaryDirectory() as temporary:
            data = Path(temporary) / "images"
            data.mkdir()
            write_images(data, 64, size)
            for turn in range(turns):
                for name, folder in folders.items():
                    outdir = Path(temporary) / f"{name}-{turn}"
                    runs[name].append(train(folder, cfg.resolve(), data, kimg, outdir, list(options)))
                    click.echo(f"{name}: {json.dumps(runs[name][-1])}")
    finally:
        for process in neighbours:
            process.kill()
    medians = {name: {key: statistics.median(r[key] for r in rs) for key in rs[0]} for name, rs in runs.items()}
    result = {
        "machine": describe() | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "recipe": cfg.read_text(),
        "options": options,
        "busy": busy,
        "medians": medians,
        "runs": runs,
    }
    with atomic_write(out) as file:
        file.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(medians))


if __name__ == "__main__":
    main()
