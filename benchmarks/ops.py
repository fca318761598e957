"""Time the operations against their references: python -m benchmarks.ops --help

Shapes are from the paper's 512² network. For each, the methods take turns; times are medians. Two floors are
measured in the same run: the bytes of an operation at the bandwidth of a copy, and its FLOPs at the rate of a large
matrix product. The share of the floor can exceed 1 if tensors stay in the cache.
"""

import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor

from benchmarks.machine import describe, device_name, interleaved
from benchmarks.rendering import flops
from dnnlib.console import UserError, brief
from dnnlib.files import atomic_write
from rendering.network import FoldedGenerator
from torch_utils.build import choose
from torch_utils.command import command
from torch_utils.ops import bias_act, modulated_linear
from training.networks import Generator, GeneratorConfig
from training.networks.layers import CLAMP

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LINES, PIXELS = 8 * (512 + 512), 512**2  # positions per image


class Case(NamedTuple):
    op: str
    name: str
    inputs: Callable[[torch.device, torch.dtype], list[Tensor]]  # the first is large, in this dtype; the rest float32
    call: Callable[..., Tensor]  # (*inputs, impl=…)
    impls: tuple[str, ...]
    bytes: dict[str, float]  # minimum number of elements moved, by kind of run
    flops: dict[str, float]


def normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def bias_act_case(*shape: int, dim: int = -1) -> Case:
    size = math.prod(shape)
    return Case(
        "bias_act",
        "×".join(map(str, shape)) + (", channels first" if dim == 1 else ""),
        lambda device, dtype: [normal(device, dtype, *shape), normal(device, torch.float32, shape[dim])],
        lambda x, bias, impl: bias_act.bias_act(x, bias, act="lrelu", clamp=CLAMP, dim=dim, impl=impl),
        ("auto",),
        {"forward": 2 * size, "gradient": 2 * size, "training": 4 * size},
        {"forward": 0, "gradient": 0, "training": 0},
    )


def modulated_case(n: int, p: int, i: int, o: int) -> Case:
    return Case(
        "modulated_linear",
        f"{n}×{p}, {i}→{o}",
        lambda device, dtype: [
            normal(device, dtype, n, p, i),
            *(normal(device, torch.float32, *shape) for shape in ((o, i), (n, i), (o,))),
        ],
        lambda *inputs, impl: modulated_linear.modulated_linear(*inputs, clamp=CLAMP, impl=impl),
        ("auto", "cuda", "cublas"),
        {"forward": n * p * (i + o), "training": n * p * (3 * i + 2 * o)},
        {"forward": 2 * n * p * i * o, "training": 6 * n * p * i * o},
    )


# Tiles and warps of the Triton kernel that are measured next to the default.
TILES = {"8×16, 4 warps": ((8, 16), 4), "8×16, 8 warps": ((8, 16), 8), "16×16, 8 warps": ((16, 16), 8)}


def pixel_path_case(side: int) -> Case:
    """An image from its lines. Products are in the dtype; lines and colours are float32."""
    config = GeneratorConfig()

    @functools.cache
    def folded(device: torch.device, dtype: torch.dtype, impl: str) -> FoldedGenerator:
        torch.manual_seed(0)
        with device:
            G = Generator(config).requires_grad_(False)
            w = torch.zeros(config.num_ws, config.w_dim)
        made = FoldedGenerator(G, w, dtype, impl="triton" if impl in TILES else impl)
        if impl in TILES:
            made.pixels.kernel.tile, made.pixels.kernel.warps = TILES[impl]
        return made

    def inputs(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        t = torch.linspace(0, 1, side, dtype=torch.float64, device=device)
        line = folded(device, dtype, "reference").line
        return [line(0, t), line(1, t), torch.empty(0, dtype=dtype)]

    lines = 2 * side * config.num_fusions * config.biline_channels * config.thickness
    with torch.device("meta"):
        work = flops(Generator(config), side)["pixels"]
    return Case(
        "pixel_path",
        f"{side}×{side}",
        inputs,
        lambda rows, cols, like, impl: folded(rows.device, like.dtype, impl).pixels(rows, cols),
        ("auto", *TILES),
        {"forward": 2 * (lines + config.img_channels * side**2)},
        {"forward": work},
    )


def cases(share: int) -> list[Case]:
    """Return the paper's layers, with the number of positions divided by `share`."""
    lines, pixels, side = LINES // share, PIXELS // share, 512 // math.isqrt(share)
    found = [pixel_path_case(side), pixel_path_case(2 * side)]
    for i, o in ((1024, 1024), (512, 512), (256, 256), (1024, 32)):
        found.append(modulated_case(8, lines, i, o))
    for i, o in ((32, 128), (128, 128), (128, 64), (64, 64), (128, 3)):
        found.append(modulated_case(4, pixels, i, o))
    found += [bias_act_case(8, lines, 1024), bias_act_case(4, pixels, 128), bias_act_case(4, pixels, 32)]
    return [*found, bias_act_case(4, 64, side, side, dim=1)]


# --- measuring --------------------------------------------------------------------------------------------------------


class Clock(NamedTuple):
    device: torch.device
    rounds: int

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, tasks: dict[str, Callable]) -> dict[str, list[float]]:
        """Time each task in each round. Short ones are repeated for 2 ms, so that synchronising is negligible."""
        for task in tasks.values():  # compiles, and grows the memory pool
            task()
        repeats = {}
        for name, (once,) in interleaved(tasks, 1, self.sync).items():
            repeats[name] = max(1, min(100, math.ceil(2e-3 / once)))

        def repeated(name: str) -> Callable:
            return lambda: [tasks[name]() for _ in range(repeats[name])][:0]

        times = interleaved({name: repeated(name) for name in tasks}, self.rounds, self.sync)
        return {name: [t / repeats[name] for t in values] for name, values in times.items()}

    def median(self, task: Callable) -> float:
        (values,) = self.seconds({"": task}).values()
        return statistics.median(values)


def floors(clock: Clock, dtypes: list[str]) -> dict:
    cuda = clock.device.type == "cuda"
    a = torch.randn(2**28 if cuda else 2**24, device=clock.device)
    b = torch.empty_like(a)
    result = {"copy bytes/s": 2 * a.numel() * 4 / clock.median(lambda: b.copy_(a)), "matmul FLOP/s": {}}
    side = 8192 if cuda else 1024
    for name in dtypes:
        m = torch.randn(side, side, device=clock.device, dtype=DTYPES[name])
        result["matmul FLOP/s"][name] = 2 * side**3 / clock.median(lambda m=m: m @ m)
    return result


def compiled(call: Callable) -> Callable:
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # gradients are computed repeatedly
    return torch.compile(lambda *inputs: call(*inputs, impl="reference"), dynamic=False)


def tasks(case: Case, kind: str, methods: dict[str, Callable], inputs: list[Tensor]) -> dict[str, Callable]:
    """Return the tasks to time: forward without a graph, the gradient of the first input, or training (all of both)."""
    if kind == "forward":
        return {name: torch.no_grad()(lambda m=method: m(*inputs)) for name, method in methods.items()}
    leaves = [t.detach().requires_grad_(kind == "training" or t is inputs[0]) for t in inputs]
    wanted = [t for t in leaves if t.requires_grad]
    g = torch.randn_like(case.call(*inputs, impl="reference"))
    if kind == "gradient":
        outputs = {name: method(*leaves) for name, method in methods.items()}
        return {name: lambda y=y: torch.autograd.grad(y, wanted, g, retain_graph=True) for name, y in outputs.items()}
    return {name: lambda m=method: torch.autograd.grad(m(*leaves), wanted, g) for name, method in methods.items()}


def leave_out(method: str, problem: Exception) -> None:
    click.echo(f"{method} is left out: {brief(problem)}", err=True)


def measure(case: Case, dtype: str, clock: Clock, rates: dict, compile: bool) -> list[dict]:
    inputs = case.inputs(clock.device, DTYPES[dtype])
    methods = {"eager": lambda *t: case.call(*t, impl="reference")}
    if compile and case.op != "pixel_path":  # it would also compile the creation of the weights
        try:
            fast = compiled(case.call)
            fast(*inputs)
            methods["compile"] = fast
        except Exception as problem:  # it requires its own compilers
            leave_out("torch.compile", problem)
    for impl in case.impls:
        try:
            case.call(*inputs, impl=impl)
        except UserError:  # not for this type, shape or device
            continue
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # a kernel that does not compile or run
            leave_out(impl, problem)
            continue
        methods[impl] = lambda *t, impl=impl: case.call(*t, impl=impl)
    runs = []
    for kind in case.bytes:
        seconds = clock.seconds(tasks(case, kind, methods, inputs))
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        floor = max(
            case.bytes[kind] * DTYPES[dtype].itemsize / rates["copy bytes/s"],
            case.flops[kind] / rates["matmul FLOP/s"][dtype],
        )
        runs.append(
            {
                "op": case.op,
                "shape": case.name,
                "dtype": dtype,
                "kind": kind,
                "seconds": seconds,
                "median": middle,
                "floor": floor,
                "share of floor": {name: floor / value for name, value in middle.items()},
                "times faster": {name: middle["eager"] / value for name, value in middle.items()},
            }
        )
    return runs


# --- report ----------------------------------------------------------------------------------------------------------


def table(result: dict) -> str:
    """Return Markdown: milliseconds, and for "auto" its share of the floor and its speed relative to eager."""
    machine, names = result["machine"], list(dict.fromkeys(name for run in result["runs"] for name in run["median"]))
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in result["matmul FLOP/s"].items())
    lines = [
        f"{machine['gpu'] or machine['cpu']}, driver {machine['driver']}, torch {machine['torch']}. "
        f"Floors: copies {result['copy bytes/s'] / 1e9:.4g} GB/s; products {rates}.",
        "",
        "| op | shape | dtype | run | "
        + " | ".join(f"{name}, ms" for name in names)
        + " | floor, ms | share | × eager |",
        "| --- " * (7 + len(names)) + "|",
    ]
    for run in result["runs"]:
        times = [f"{1e3 * run['median'][name]:.3g}" if name in run["median"] else "" for name in names]
        cells = [run["op"], run["shape"], run["dtype"], run["kind"], *times, f"{1e3 * run['floor']:.3g}"]
        cells += [f"{run['share of floor']['auto']:.0%}", f"{run['times faster']['auto']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    for op, dtype in dict.fromkeys((run["op"], run["dtype"]) for run in result["runs"]):
        gains = [run["times faster"]["auto"] for run in result["runs"] if (run["op"], run["dtype"]) == (op, dtype)]
        mean = statistics.geometric_mean(gains)
        lines.append(f"\n{op} in {dtype}: auto is {mean:.2f} × as fast as eager (geometric mean).")
    if result["left out"]:
        lines.append(f"\nLeft out, for lack of time unless another reason is given: {'; '.join(result['left out'])}.")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="benchmarks/results", show_default=True)
@click.option("--device", "kind", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtypes", default=None, help="Any of bf16, fp16 and fp32. [default: bf16,fp32 on a GPU, fp32 on a CPU]")
@click.option("--ops", "wanted", default="bias_act,modulated_linear,pixel_path", show_default=True)
@click.option("--share", type=click.IntRange(1), default=1, help="Divide the positions by this square. [default: 1]")
@click.option("--rounds", type=click.IntRange(1), default=11, show_default=True)
@click.option(
    "--minutes", type=click.FloatRange(0), default=5, show_default=True, help="Start no new case after this time."
)
@click.option("--compile/--no-compile", default=True, show_default=True, help="Also measure torch.compile.")
@command()
def main(out, kind, dtypes, wanted, share, rounds, minutes, compile):
    """Time each operation, and compare it with its floor. Writes ops-<device>.json and a table next to it."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device to measure; use --device=cpu --share=64")
    start, clock = time.monotonic(), Clock(torch.device(kind, 0) if kind == "cuda" else torch.device(kind), rounds)
    names = (dtypes or ("bf16,fp32" if kind == "cuda" else "fp32")).split(",")
    result = {"machine": describe(), **floors(clock, names), "runs": [], "left out": []}
    for module in (bias_act, modulated_linear) if kind == "cuda" else ():
        choose(
            "cuda", module.IMPLS, module.SOURCE, torch.empty(0, device=clock.device)
        )  # raises an error if unavailable
    for dtype in names:
        for case in (case for case in cases(share) if case.op in wanted.split(",")):
            if time.monotonic() - start > 60 * minutes:
                result["left out"].append(f"{case.op} {case.name} {dtype}")
                continue
            try:
                result["runs"] += measure(case, dtype, clock, result, compile)
            except torch.OutOfMemoryError:
                result["left out"].append(f"{case.op} {case.name} {dtype} (out of memory)")
                continue
            for run in result["runs"][-len(case.bytes) :]:
                brief = {name: f"{1e3 * value:.3g} ms" for name, value in run["median"].items()}
                click.echo(f"{case.op} {case.name} {dtype} {run['kind']}: {json.dumps(brief)}")
            for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", table(result))):
                with atomic_write(out / f"ops-{device_name(kind)}{suffix}") as temporary:
                    temporary.write_text(text)
    click.echo(table(result))


if __name__ == "__main__":
    main()
