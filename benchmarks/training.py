"""Measure a training step with and without recomputation: python -m benchmarks.training --help

Networks: the paper's, at their published widths, with random images, in float32 on a CPU and bfloat16 on GPUs with it.
Each setting runs in a fresh process, and they take turns. A step is the mean over its schedule: G and D in each, path
lengths in every 4th, R1 in every 16th.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

from benchmarks.machine import describe, device_name, peak_mib, write_images
from dnnlib.config import merge
from dnnlib.console import UserError
from dnnlib.files import atomic_write
from torch_utils.command import command
from torch_utils.distributed import processes
from torch_utils.precision import multiplies_bfloat16_fast
from training.config import resolve
from training.data import Batch, ImageArchive
from training.state import new_state
from training.trainer import Trainer

# What the networks recompute; on GPUs also plain PyTorch without the project's kernels.
SETTINGS = {name: {"train": {"recompute": name}} for name in ("none", "pixels", "all")}
EAGER = {"eager": {"train": {"recompute": "none", "impl": "reference"}}}


def phases(folder: str, name: str, batch: int, rounds: int) -> dict:
    """Measure the seconds of each phase, `rounds` times, and the peak memory in MiB."""
    gpu = torch.cuda.is_available()
    images = ImageArchive(folder)
    fixed = {"data": {"path": folder}, "train": {"batch": batch}, "loss": {"r1_gamma": 10}, "augment": {"mode": "none"}}
    config = resolve(merge(fixed, (SETTINGS | EAGER)[name]), images, "this benchmark")
    with processes() as procs:
        device = procs.device
        half = gpu and multiplies_bfloat16_fast(device)
        config = config.with_train(precision="bfloat16" if half else "float32")
        trainer = Trainer(config, new_state(config, device), images, procs)
        pixels = torch.stack([images[i][0] for i in range(batch)]).to(device, trainer.dtype) / 127.5 - 1
        real = Batch(pixels, torch.zeros(batch, 0, device=device))
        work = dict(zip(("G", "path length", "D", "R1"), trainer.phases, strict=True))
        before = peak_mib()
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(rounds):
            for name, phase in work.items():
                start = time.perf_counter()
                trainer.run(phase, real)
                if gpu:
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
                trainer.state.step += 1  # new latents
        return {
            "seconds": seconds,
            "peak MiB": torch.cuda.max_memory_allocated() / 2**20 if gpu else peak_mib(),
            "before MiB": 0 if gpu else before,
        }


def step_seconds(seconds: dict[str, list[float]]) -> float:
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return middle["G"] + middle["D"] + middle["path length"] / 4 + middle["R1"] / 16


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="benchmarks/results", show_default=True)
@click.option("--sizes", default="256,512", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True)
@click.option("--turns", type=click.IntRange(1), default=2, show_default=True, help="Processes of each setting.")
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Repetitions of each phase in a process."
)
@click.option("--once", nargs=2, hidden=True)
@command()
def main(out, sizes, batch, turns, rounds, once):
    """Measure time and memory of a training step with each setting; write JSON."""
    if once:
        click.echo(json.dumps(phases(*once, batch, rounds)))
        return
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    result = {"machine": describe(), "batch": batch, "steps": []}
    failed = []
    for size in map(int, sizes.split(",")):
        runs: dict[str, list[dict]] = {name: [] for name in [*(EAGER if kind == "cuda" else ()), *SETTINGS]}
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), batch, size)
            for _ in range(turns):
                for name in runs:
                    command = [sys.executable, "-m", "benchmarks.training", "--batch", batch, "--rounds", rounds]
                    command += ["--once", folder, name]
                    ran = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
                    if ran.returncode:
                        failed.append(f"{name!r} at {size}² ended with code {ran.returncode}")
                    else:
                        runs[name].append(json.loads(ran.stdout))
        for name, parts in runs.items():
            if not parts:
                continue
            seconds = {
                phase: [value for part in parts for value in part["seconds"][phase]] for phase in parts[0]["seconds"]
            }
            summary = {
                "size": size,
                "setting": name,
                "step seconds": step_seconds(seconds),
                "peak MiB": max(part["peak MiB"] for part in parts),
                "before MiB": parts[0]["before MiB"],
            }
            click.echo(json.dumps(summary))
            result["steps"].append({**summary, "seconds": seconds})
        with atomic_write(out / f"training-{device_name(kind)}.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    if failed:
        raise UserError(f"{'; '.join(failed)}: left out (see the errors above; -9 usually means a lack of memory)")


if __name__ == "__main__":
    main()
