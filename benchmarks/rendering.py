"""Compare the rendering engine with plain synthesis of whole images: python -m benchmarks.rendering --help

The network is the paper's for 512², with random weights; times do not depend on them. For each size the methods take
turns in one fresh process, so that no size inherits the allocator's state from another; peak memory is also measured in
fresh processes. FLOPs count the matrix products: 2 for each multiplication and addition.
"""

import copy
import functools
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch

import rendering
from benchmarks.machine import describe, device_name, interleaved, matmul_rate, peak_mib
from dnnlib.console import UserError
from dnnlib.files import atomic_write
from rendering import Shot
from rendering.engine import Tiling
from torch_utils.command import command
from training.networks import COORDS, Generator, GeneratorConfig
from training.networks.layers import compute_with

LIMIT = 2048**2  # pixels at once: plain synthesis keeps several layers of up to 128 channels, 2 GiB each there


def network() -> Generator:
    torch.manual_seed(0)
    return Generator(GeneratorConfig()).eval().requires_grad_(False)


def styles(G: Generator, batch: int) -> torch.Tensor:
    z = torch.randn(batch, G.config.z_dim, generator=torch.Generator().manual_seed(1))
    return G.mapping(z.to(G.mapping.w_avg.device))


def plain(G: Generator, ws: torch.Tensor, size: int) -> torch.Tensor:
    t = COORDS[G.config.coords].positions(size, torch.float64)
    return G.synthesis(ws, rows=t, cols=t)


def plain_fp16(G: Generator, ws: torch.Tensor, size: int) -> torch.Tensor:
    with torch.autocast("cuda", torch.float16):
        return plain(G, ws, size)


def engine(dtype: torch.dtype) -> Callable:
    return lambda G, ws, size: rendering.render(G, ws, Shot((size, size)), dtype=dtype)


METHODS = {"plain": plain, "engine fp32": engine(torch.float32), "engine bf16": engine(torch.bfloat16)}
GPU_METHODS = {"plain": plain_fp16, "engine bf16": engine(torch.bfloat16), "engine fp16": engine(torch.float16)}


def flops(G: Generator, size: int) -> dict[str, float]:
    """Count the FLOPs of one image's matrix products, in its two stages."""
    modules = {name: m for name, m in G.synthesis.named_modules() if hasattr(m, "weight") and "affine" not in name}
    per = {
        stage: sum(2 * m.weight.numel() for name, m in modules.items() if name.startswith(stage) and m.weight.ndim == 2)
        for stage in ("lines", "pixels")
    }
    fusion = 2 * G.config.num_fusions * G.config.biline_channels * G.config.thickness
    return {"lines": per["lines"] * 2 * size * G.config.thickness, "pixels": (per["pixels"] + fusion) * size**2}


def fresh(*arguments: object) -> dict | float:
    """Run this file in a new process and return what it prints as JSON."""
    command = [sys.executable, "-m", "benchmarks.rendering", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def errors(G: Generator, ws: torch.Tensor, size: int, methods: dict[str, Callable] = METHODS) -> dict:
    """Return the largest difference from plain float64 synthesis over its largest value, and PSNR of colours in ±1."""
    truth = plain(copy.deepcopy(G).double(), ws.double(), size)
    result = {}
    for name, method in methods.items():
        image = method(G, ws, size).double()
        squares = (image.clamp(-1, 1) - truth.clamp(-1, 1)).square().mean()
        result[name] = {
            "relative": ((image - truth).abs().max() / truth.abs().max()).item(),
            "psnr_db": (10 * torch.log10(4 / squares)).item(),
        }
    return result


def median(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(G: Generator, size: int, batch: int, rounds: int, rates: dict[str, float]) -> dict:
    seconds = fresh("--turns", size, batch, rounds)
    middle = median(seconds)
    work = {stage: batch * amount for stage, amount in flops(G, size).items()}
    return {
        "size": size,
        "batch": batch,
        "seconds": seconds,
        "median": middle,
        "times faster": {n: middle["plain"] / s for n, s in middle.items()},
        "flop": work,
        "share of matmul rate": {
            n: sum(work.values()) / s / rates["bf16" if "bf16" in n else "fp32"] for n, s in middle.items()
        },
        "peak MiB": {n: fresh("--once", n, size, batch) for n in METHODS},
    }


def on_gpu(G: Generator, sizes: list[int], batches: list[int], rounds: int) -> Iterator[dict]:
    """Yield the results so far after each image. Peak memory excludes the network's weights."""

    def peak(method: Callable, ws: torch.Tensor, size: int) -> float:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method(G, ws, size)
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    G = G.cuda()
    compute_with(G, "reference")  # for plain synthesis; the engine has its own layers
    result: dict = {"errors": {"256": errors(G, styles(G, 1), 256, GPU_METHODS)}, "pictures": []}
    for size, batch in itertools.product(sizes, batches):
        ws = styles(G, batch)
        tasks = {name: functools.partial(method, G, ws, size) for name, method in GPU_METHODS.items()}
        seconds = interleaved(tasks, rounds, torch.cuda.synchronize)
        middle = median(seconds)
        run = {"size": size, "batch": batch, "seconds": seconds, "median": middle}
        run["times faster"] = {name: middle["plain"] / s for name, s in middle.items()}
        run["peak MiB"] = {name: peak(method, ws, size) for name, method in GPU_METHODS.items()}
        result["pictures"].append(run)
        click.echo(json.dumps({key: run[key] for key in ("size", "batch", "median", "times faster", "peak MiB")}))
        yield result
    name, ws = "engine bf16", styles(G, 1)
    seconds = interleaved({name: functools.partial(GPU_METHODS[name], G, ws, 6144)}, 3, torch.cuda.synchronize)
    large = {"size": 6144, "batch": 1, "seconds": seconds, "median": median(seconds)}
    result["pictures"].append({**large, "peak MiB": {name: peak(GPU_METHODS[name], ws, 6144)}})
    click.echo(json.dumps(result["pictures"][-1]))
    yield result


def compare_rotated(G: Generator, size: int, rounds: int) -> dict:
    """Time a rotation between lines sampled densely and the upright image, and measure its error at exact points."""
    ws, upright, rotated = styles(G, 1), Shot((size, size)), Shot((size, size), transform=rendering.rotation(30))
    tasks = {
        "upright": lambda: rendering.render(G, ws, upright),
        "rotated": lambda: rendering.render(G, ws, rotated),
    }
    seconds = interleaved(tasks, rounds)
    tiling = Tiling.of(G, rotated)
    every = size * size // 512
    positions = [t.flatten()[::every] for t in tiling.view.points(tiling.whole)]
    exact = rendering.render_points(G, ws, *positions)
    fast = rendering.render(G, ws, rotated).flatten(2)[..., ::every]
    squares = (exact.clamp(-1, 1) - fast.clamp(-1, 1)).square().mean()
    return {"size": size, "median": median(seconds), "psnr_db": (10 * torch.log10(4 / squares)).item()}


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, key, title in zip(panels, ("median", "peak MiB"), ("seconds", "peak MiB"), strict=True):
        for name in METHODS:
            runs = [run for run in result["pictures"] if run["batch"] == 1 and name in run[key]]
            panel.plot([run["size"] for run in runs], [run[key][name] for run in runs], "o-", label=name)
        panel.set(xscale="log", yscale="log", xlabel="image side, pixels", title=title)
        sides = sorted({run["size"] for run in result["pictures"]})
        panel.set_xticks(sides, [str(side) for side in sides])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    floor = [sum(r["flop"].values()) / result["matmul FLOP/s"]["fp32"] for r in result["pictures"] if r["batch"] == 1]
    sides = [r["size"] for r in result["pictures"] if r["batch"] == 1]
    panels[0].plot(sides, floor, "k--", lw=1, label="fp32 matrix products alone")
    panels[0].legend()
    machine = result["machine"]
    figure.suptitle(f"one image, paper's widths · {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="benchmarks/results/rendering.json", show_default=True)
@click.option("--sizes", default="64,256,512,1024,2048", show_default=True)
@click.option("--batches", default="1,4", show_default=True)
@click.option("--device", "kind", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--once", nargs=3, hidden=True)
@click.option("--turns", nargs=3, type=int, hidden=True)
@command()
def main(out, sizes, batches, kind, rounds, once, turns):
    """Measure time, memory and error of the engine and of plain synthesis; write JSON and a plot next to it."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device to measure; use --device=cpu")
    torch.set_grad_enabled(False)
    G = network()
    if once:
        method, size, batch = once[0], int(once[1]), int(once[2])
        METHODS[method](G, styles(G, batch), size)
        click.echo(peak_mib())
        return
    if turns:
        size, batch, rounds = turns
        ws = styles(G, batch)
        tasks = {name: lambda m=method: m(G, ws, size) for name, method in METHODS.items()}
        # Large images take minutes and need no warm-up.
        click.echo(json.dumps(interleaved(tasks, rounds, warm=size <= 512)))
        return
    result = {"machine": describe()}
    if kind == "cuda":
        for part in on_gpu(G, *([int(n) for n in numbers.split(",")] for numbers in (sizes, batches)), rounds):
            with atomic_write(out.with_stem(f"{out.stem}-{device_name(kind)}")) as temporary:
                temporary.write_text(json.dumps(result | part, indent=1) + "\n")
        return
    result["matmul FLOP/s"] = {"fp32": matmul_rate(torch.float32), "bf16": matmul_rate(torch.bfloat16)}
    click.echo(json.dumps(result, indent=1))
    result["errors"] = {"256": errors(G, styles(G, 1), 256)}
    click.echo(json.dumps(result["errors"]))
    result["tiles"] = {
        f"512x512, tile {tile}": value
        for tile, value in median(
            interleaved(
                {
                    t: lambda t=t: rendering.render(G, styles(G, 1), Shot((512, 512), tile=t))
                    for t in (16, 32, 64, 128, 256)
                },
                rounds,
            )
        ).items()
    }
    click.echo(json.dumps(result["tiles"]))
    result["rotation"] = compare_rotated(G, 512, rounds)
    click.echo(json.dumps(result["rotation"]))
    result["pictures"] = []
    runs = [(int(batch), int(size)) for batch in batches.split(",") for size in sizes.split(",")]
    for batch, size in sorted(runs, key=lambda run: (run[0] * run[1] ** 2, run[0])):
        if batch * size**2 > LIMIT:
            continue
        result["pictures"].append(compare(G, size, batch, rounds, result["matmul FLOP/s"]))
        brief = ("size", "batch", "median", "times faster", "share of matmul rate", "peak MiB")
        click.echo(json.dumps({key: value for key, value in result["pictures"][-1].items() if key in brief}))
        with atomic_write(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        plot(result, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
