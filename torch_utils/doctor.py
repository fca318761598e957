"""One page about this machine and its implementations of every operation: python -m torch_utils.doctor

Each implementation of each operation is built, run on a small example and compared with its reference in float64.
"""

import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterator

import click
import torch
from torch import Tensor

from dnnlib.console import UserError, brief
from dnnlib.files import cache_dir
from rendering.pixel_path import PixelPath
from torch_utils import build
from torch_utils.command import Command, command
from torch_utils.distributed import check_capability, count_gpus
from torch_utils.ops import bias_act, modulated_linear
from torch_utils.ops.chain import Chain, Folded
from torch_utils.precision import disable_tf32
from training.colours import ENDINGS, HINTS
from training.networks.fused_pixels import fused_pixels


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# Examples of the operations: (implementation, device, type of the input) -> result.


def fused_bias_act(impl: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    x, bias = noise(3, 40, 32).to(device, dtype), noise(32).to(device)
    return bias_act.bias_act(x, bias, act="lrelu", clamp=1.0, impl=impl)


def fused_modulated_linear(impl: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    x, *rest = noise(2, 200, 40).to(dtype), noise(72, 40), noise(2, 40), noise(72)
    return modulated_linear.modulated_linear(*(t.to(device) for t in (x, *rest)), impl=impl)


def native_chain(impl: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    layer = Folded(noise(32, 40), noise(32), branch=True).to(device, dtype)
    return Chain([layer], impl=impl)(noise(40, 200).to(device, dtype))


def gradient_of_fused_pixels(impl: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    layer = Folded(noise(3, 16), noise(3), branch=True).to(device, dtype)
    rows, cols = noise(1, 2, 8, 4, 16).to(device, dtype).requires_grad_(), noise(1, 2, 20, 4, 16).to(device, dtype)
    return torch.autograd.grad(fused_pixels(rows, cols, [layer], impl=impl).square().sum(), rows)[0]


def whole_pixel_path(impl: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Run two decoders and a refinement, on 16 channels."""
    decoder = [(32, 16), (64, 32), (32, 64), (16, 32)]
    shapes = [*decoder, *decoder, (3, 16), (64, 16), (64, 64), (3, 64), (32, 64), (32, 32), (3, 32)]
    slope = bias_act.ACTIVATIONS["lrelu"].slope
    layers = [Folded(noise(o, i) / i**0.5, noise(o), 1 if o == 3 else slope, branch=o == 3) for o, i in shapes]
    layers[3] = layers[3]._replace(term=True)
    wide = torch.promote_types(dtype, torch.float32)
    lines = (noise(2, 16, 4, length).to(device, wide) for length in (20, 30))
    return PixelPath([layer.to(device, dtype) for layer in layers], impl=impl)(*(line / 2 for line in lines))


# Operation, implementation, its device and types, and an example.
CHECKS: list[tuple[str, str, str, tuple[torch.dtype, ...], Callable]] = [
    ("bias_act", "reference", "cpu", (torch.float32,), fused_bias_act),
    ("bias_act", "cpp", "cpu", (torch.float32, torch.bfloat16), fused_bias_act),
    ("bias_act", "cuda", "cuda", (torch.float32, torch.float16, torch.bfloat16), fused_bias_act),
    ("modulated_linear", "reference", "cpu", (torch.float32,), fused_modulated_linear),
    ("modulated_linear", "cuda", "cuda", (torch.float16, torch.bfloat16), fused_modulated_linear),
    ("modulated_linear", "cublas", "cuda", (torch.float32, torch.float16, torch.bfloat16), fused_modulated_linear),
    ("chain", "reference", "cpu", (torch.float32,), native_chain),
    ("chain", "cpp", "cpu", (torch.float32,), native_chain),
    ("fused_pixels", "reference", "cpu", (torch.float32,), gradient_of_fused_pixels),
    ("fused_pixels", "cpp", "cpu", (torch.float32,), gradient_of_fused_pixels),
    ("pixel_path", "reference", "cpu", (torch.float32,), whole_pixel_path),
    ("pixel_path", "cpp", "cpu", (torch.float32,), whole_pixel_path),
    ("pixel_path", "triton", "cuda", (torch.float16, torch.bfloat16), whole_pixel_path),
]


def verdict(impl: str, kind: str, dtypes: tuple[torch.dtype, ...], example: Callable) -> str:
    """Return whether an implementation works here, and why not."""
    if kind == "cuda" and not torch.cuda.is_available():
        return "no: it needs a CUDA device"
    device, names = torch.device(kind, 0 if kind == "cuda" else None), []
    for dtype in dtypes:
        try:
            got = example(impl, device, dtype)
            truth = example("reference", torch.device("cpu"), torch.float64)
            error = ((got.cpu().double() - truth).norm() / truth.norm()).item()
        except UserError as problem:
            return f"no: {problem}"
        except Exception as problem:  # any failure in a driver or a kernel: the page continues
            return f"FAILS in {dtype}: {brief(problem)}"
        if not error <= 10 * torch.finfo(dtype).eps:
            return f"WRONG in {dtype}: its distance to the reference is {error:.1e}"
        names.append(f"{str(dtype).removeprefix('torch.')} {error:.0e}")
    return f"works (distance to float64: {', '.join(names)})"


def cpp_compiler() -> str:
    """Return the C++ compiler's version line and path. Raises UserError."""
    command = build.cpp_compiler()
    lines = build.version(command).splitlines()
    return f"{lines[0] if lines else 'unknown version'} ({command[0]})"


def describe_or_explain(describe: Callable[[], str]) -> str:
    """Return describe(), or why there is none."""
    try:
        return describe()
    except UserError as problem:
        return f"none: {problem}"


def devices() -> Iterator[str]:
    yield f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"
    if torch.version.cuda is None:
        yield "no CUDA: this PyTorch is built without it; install one for CUDA to use an NVIDIA GPU"
    try:
        count = count_gpus()
    except UserError as problem:
        count = 0
        yield f"no CUDA device: {problem}"
    if torch.version.cuda and not torch.cuda.device_count():
        yield "no CUDA device: there is no NVIDIA GPU, or no driver for it"
    for i in range(count):
        card = torch.cuda.get_device_properties(i)
        size = f"{card.total_memory / 2**30:.0f} GiB"
        yield f"cuda:{i}: {card.name}, {size}, compute capability {card.major}.{card.minor}"
        try:
            check_capability((card.major, card.minor), torch.cuda.get_arch_list())
        except UserError as problem:
            yield f"cuda:{i} cannot be used: {problem}"


def triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none: pip install triton"


@click.command(cls=Command)
@command()
def main():
    """Show what this machine has, and which implementation of each operation works on it."""
    disable_tf32()
    facts = {
        "Python": [f"{platform.python_version()} ({sys.executable})"],
        "PyTorch": [f"{torch.__version__}, for CUDA {torch.version.cuda or '(none)'}"],
        "devices": list(devices()),
        "CUDA compiler": [describe_or_explain(lambda: f"NVRTC {build.nvrtc_version()}")],
        "C++ compiler": [describe_or_explain(cpp_compiler)],
        "Triton": [triton()],
        "image files": [", ".join(ENDINGS), *(f".{e}: {what}" for e, what in HINTS.items() if e not in ENDINGS)],
        "libraries": [f"are built on first use and kept in {cache_dir() / 'libraries'}"],
    }
    for name, lines in facts.items():
        for i, line in enumerate(lines):
            click.echo(f"{'' if i else name:<18}{line}")
    click.echo("\nEvery operation works in plain PyTorch (reference). What makes it faster:")
    last = ""
    for name, impl, kind, dtypes, example in CHECKS:
        click.echo(f"{'' if name == last else name:<18}{impl:<11}{verdict(impl, kind, dtypes, example)}")
        last = name


if __name__ == "__main__":
    main()
