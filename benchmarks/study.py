"""Compare recipes after the same training time: python -m benchmarks.study --help

    python -m benchmarks.study --data=clothing64.zip --minutes=15 --seeds=3 --runs=runs --out=study.json \\
        --recipe projected "--cfg=projected --mirror" --recipe residual "--cfg=projected --mirror -o D.kind=residual"

Each run is a fresh process with one thread. Minutes are processor time, which other work on the machine hardly affects.
Recipes take turns, seed by seed, so that a busy hour affects all of them. --out is written after each run; started
again, the study goes on with the next one.
"""

import itertools
import json
import os
import resource
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import click

from benchmarks.machine import describe
from dnnlib.console import UserError
from dnnlib.files import atomic_write
from torch_utils.command import command
from training.snapshot import load_generator, read_trained, snapshots

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
MEASURE = "--metrics=fd_lite0_1k_full,lines1k_full"
CONSISTENCY = ",scale_psnr_100"  # of generators that render other sizes
KIMG = 0.5  # between snapshots; the last one within the time is measured


def train(data: Path, options: str, seed: int, minutes: float, folder: Path) -> tuple[Path, dict[str, float]]:
    """Train for minutes of processor time; return the run's last snapshot, and its kimg, speed and memory.

    The images per second are those of processor time, with starting.
    """
    command = [sys.executable, "train.py", f"--data={data}", f"--seed={seed}", f"--outdir={folder}", "--kimg=100000"]
    command += [f"--tick={KIMG}", "--snap=1", *shlex.split(options)]

    def limit():
        seconds = round(60 * minutes)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 60))  # the kernel sends SIGXCPU at the first limit
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    ran = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, preexec_fn=limit)
    if ran.returncode != -signal.SIGXCPU:
        raise UserError(f"train.py {options} ended early with code {ran.returncode}: {ran.stderr[-1000:]}")
    found = [path for run in sorted(folder.glob("*"))[-1:] for path in snapshots(run)]  # the last attempt
    kimg = read_trained(found[-1])["kimg"] if found else 0
    if not kimg:
        raise UserError(f"train.py {options} wrote no trained snapshot in {minutes:g} minutes; give it more")
    last = json.loads((found[-1].parent / "stats.jsonl").read_text().splitlines()[-1])
    images = 1000 * kimg / (60 * minutes)
    return found[-1], {"kimg": kimg, "images/s": images, "peak GiB": last["Resources/peak_mem_gib"]}


def measure(data: Path, asked: str | None, network: Path) -> dict[str, float]:
    """Measure a snapshot in its run's directory, with options of calc_metrics.py; return each metric."""
    run, options = network.parent, asked or MEASURE + CONSISTENCY * load_generator(network).config.any_position
    command = [sys.executable, "calc_metrics.py", f"--network={network}", f"--data={data}", f"--outdir={run}"]
    command += shlex.split(options)
    ran = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)
    if ran.returncode:
        raise UserError(f"calc_metrics.py could not measure {network}: {ran.stderr[-1000:]}")
    records = [json.loads(path.read_text().splitlines()[-1]) for path in sorted(run.glob("metric-*.jsonl"))]
    return {name: value for record in records for name, value in record["results"].items()}


def show(runs: list[dict]) -> str:
    """Return a Markdown table of each recipe's medians and, with several seeds, ranges."""
    keys = [key for key in dict.fromkeys(itertools.chain(*runs)) if key not in ("recipe", "seed", "network")]
    lines = [f"| recipe | {' | '.join(keys)} |", "| --- " * (len(keys) + 1) + "|"]
    for recipe in dict.fromkeys(run["recipe"] for run in runs):
        columns = [[run[key] for run in runs if run["recipe"] == recipe and key in run] for key in keys]
        texts = [
            f"{statistics.median(values):.3g}" + (f" ({min(values):.3g}–{max(values):.3g})" if len(values) > 1 else "")
            if values
            else "–"
            for values in columns
        ]
        lines.append(f"| {recipe} | {' | '.join(texts)} |")
    return "\n".join(lines)


@click.command()
@click.option("--data", metavar="ZIP|DIR", required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), required=True, help="Processor time of each training."
)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Trainings of each recipe.")
@click.option(
    "--runs", "folder", metavar="DIR", required=True, type=click.Path(path_type=Path), help="Where to write the runs."
)
@click.option("--out", metavar="JSON", required=True, type=click.Path(path_type=Path))
@click.option(
    "--recipe",
    "recipes",
    type=(str, str),
    multiple=True,
    required=True,
    metavar="NAME OPTIONS",
    help="A name and the options of train.py, quoted; may be repeated.",
)
@click.option(
    "--measure",
    "asked",
    metavar="OPTIONS",
    help=f"Options of calc_metrics.py, quoted.  [default: {MEASURE}, with {CONSISTENCY[1:]} if G renders other sizes]",
)
@command()
def main(data, minutes, seeds, folder, out, recipes, asked):
    """Train recipes for the same time and measure them."""
    result = {"machine": describe(), "data": data.name, "minutes": minutes, "recipes": dict(recipes), "runs": []}
    if out.exists():
        before = json.loads(out.read_text())
        if any(before[key] != result[key] for key in ("data", "minutes", "recipes")):
            raise UserError(f"{out} is of another study; give another --out")
        result["runs"] = before["runs"]
    done = {(run["recipe"], run["seed"]) for run in result["runs"]}
    for seed in range(seeds):
        for name, options in recipes:
            if (name, seed) in done:
                continue
            network, trained = train(data, options, seed, minutes, folder / f"{name}-{seed}")
            found = {
                "recipe": name,
                "seed": seed,
                **trained,
                **measure(data, asked, network),
                "network": str(network),
            }
            click.echo(json.dumps(found))
            result["runs"].append(found)
            with atomic_write(out) as temporary:
                temporary.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(show(result["runs"]))


if __name__ == "__main__":
    main()
