"""Kernels without a GPU: the CUDA sources compile, and run on a CPU (tests/emulator). Building is in test_build.py."""

import ctypes
import functools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import GPU_TENSOR
from gpu.test_ops import *  # noqa: F403  the laws of the kernels
from torch.autograd import grad

from benchmarks import ops
from dnnlib.console import UserError
from torch_utils import build, doctor
from torch_utils.ops import bias_act as bias_act_module
from torch_utils.ops import modulated_linear as modulated_linear_module
from torch_utils.ops.bias_act import bias_act
from training.networks import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig

SOURCES = [bias_act_module.SOURCE, modulated_linear_module.SOURCE]
EMULATOR = Path(__file__).parent / "emulator" / "emulator.cpp"


KERNELS = {"bias_act": ["bias_act", "bias_act_gradient"], "modulated_linear": ["modulate"]}


class Emulated(build.CudaKernels):
    """The kernels on a driver of tests/emulator."""

    def __init__(self, source: Path):
        self.source, self.device, self.capability, self.threads = source, torch.device("cpu"), 90, 2048
        self.modules, self.functions, self.context, self.driver = {}, {}, None, build.driver()

    def launch(self, name, dtype, blocks, threads, *arguments):
        self.start(0, name, dtype, blocks, threads, arguments)


@pytest.fixture(scope="session")
def emulate(tmp_path_factory):
    """Returns a function that compiles a source for the emulator and returns the path of the library."""
    compiler, folder = shutil.which("g++"), tmp_path_factory.mktemp("emulated")
    if compiler is None:
        pytest.skip("there is no g++, whose _Float16 the emulator needs")

    @functools.lru_cache
    def compile(source: Path, dtype: torch.dtype, capability: int) -> bytes:
        number = build.DTYPES[dtype]
        path = folder / f"{source.stem}-{number}.so"
        product = ["modulated_product"] if number >= 2 and source.stem == "modulated_linear" else []
        kernels = " ".join(f"KERNEL({name})" for name in KERNELS[source.stem] + product)
        macros = {"TYPE": number, "__CUDA_ARCH__": 10 * capability, "SOURCE": f'"{source}"', "KERNELS": kernels}
        flags = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
        flags += [f"-D{name}={value}" for name, value in macros.items()]
        subprocess.run([compiler, *flags, str(EMULATOR), "-o", str(path)], check=True)
        return bytes(path)

    return compile


@pytest.fixture
def emulated(emulate, monkeypatch):
    """The driver and the compiler are those of the emulator."""
    library = ctypes.CDLL(os.fsdecode(emulate(bias_act_module.SOURCE, torch.float32, 90)))
    monkeypatch.setattr(build, "driver", lambda: library)
    monkeypatch.setattr(build, "cubin", emulate)


@pytest.fixture
def device(emulated, monkeypatch):
    """The kernels run on the CPU, and `auto` chooses them there."""
    real = build.kernels
    found = {source: (Emulated(source), "") for source in SOURCES}
    monkeypatch.setattr(build, "kernels", lambda source, *args: found.get(source) or real(source, *args))
    return torch.device("cpu")


# --- sources and choices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
@pytest.mark.parametrize(("capability", "number"), [(75, 1), (75, 3), (80, 2), (90, 3), (100, 0), (120, 3)])
def test_cuda_sources_compile_without_a_warning_or_a_spill(source, capability, number):
    try:
        build.nvrtc()
    except UserError as problem:
        pytest.skip(str(problem))
    strict = f"--gpu-architecture=sm_{capability}", f"-DTYPE={number}", "--ptxas-options=--warn-on-spills"
    made, warnings = build.compile_cuda(source, *strict)
    assert made.startswith(b"\x7fELF")
    assert warnings == ""


@pytest.mark.usefixtures("emulated", "fresh_gpu")
def test_kernels_that_the_driver_refuses_are_not_used(monkeypatch, capfd):
    source = bias_act_module.SOURCE
    found, reason = build.kernels(source, GPU_TENSOR.device)
    assert (found.capability, found.threads, reason) == (90, 2048, "")
    build.kernels.cache_clear()
    monkeypatch.setattr(build, "cubin", lambda *_: b"/nowhere")
    for _ in range(2):
        assert build.choose("auto", bias_act_module.IMPLS, source, GPU_TENSOR) is None
    (line,) = capfd.readouterr().err.splitlines()
    assert "slower: CUDA's cuModuleLoadData failed: device kernel image is invalid; update the NVIDIA driver" in line
    with pytest.raises(UserError, match=r"impl='cuda' of bias_act is unavailable: .* is invalid; update"):
        build.choose("cuda", bias_act_module.IMPLS, source, GPU_TENSOR)


def test_torch_compile_sees_the_reference(device):
    x, bias = torch.randn(6, 4), torch.randn(4)
    compiled = torch.compile(lambda x, b: bias_act(x, b, act="lrelu", clamp=1.0), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, bias), bias_act(x, bias, act="lrelu", clamp=1.0, impl="reference"))


def test_tensors_on_another_device_are_refused(device):
    with pytest.raises(ValueError, match="all tensors must be on cpu; got one on meta"):
        bias_act(torch.ones(3), torch.ones(3, device="meta"), impl="cuda")


# --- the networks on kernels ------------------------------------------------------------------------------------------


def test_networks_have_the_derivatives_of_the_reference_of_both_orders(device, monkeypatch):
    torch.manual_seed(0)
    config = GeneratorConfig(img_resolution=8, z_dim=8, w_dim=8, channel_base=64, channel_max=8, biline_channels=4,
                             thickness=2, mapping_layers=2)  # fmt: skip
    G = Generator(config).double()
    D = Discriminator(DiscriminatorConfig(img_resolution=8, channel_base=64, channel_max=8)).double()
    parameters = [*G.parameters(), *D.parameters()]

    def losses():
        ws = G.mapping(noise(device, 4, 8))  # noqa: F405
        image = G.synthesis(ws)
        (lengths,) = grad((image * noise(device, *image.shape, seed=1)).sum(), ws, create_graph=True)  # noqa: F405
        logits = D(image)
        (slopes,) = grad(logits.sum(), image, create_graph=True)
        return logits.sum() + lengths.square().sum() + slopes.square().sum()

    fused = grad(losses(), parameters, allow_unused=True)
    monkeypatch.setattr(build, "kernels", lambda source, device, impl: (None, "not here"))
    plain = grad(losses(), parameters, allow_unused=True)
    for got, expected in zip(fused, plain, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.allclose(got, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


# --- the doctor and the benchmark -------------------------------------------------------------------------------------


def test_the_doctor_finds_every_kernel_working(device):
    for name, impl, kind, dtypes, example in doctor.CHECKS:
        if impl == "triton":  # tests/test_pixel_path.py has it
            continue
        found = doctor.verdict(impl, "cpu", dtypes, example)
        assert found.startswith("works (distance to float64: "), (name, impl, kind, found)


def test_the_doctor_reports_wrong_results_and_crashes():
    def wrong(impl, device, dtype):
        return torch.full([3], 1.0 if impl == "cuda" else 2.0, dtype=dtype)

    def crashing(impl, device, dtype):
        raise RuntimeError("the CUDA function f failed: out of memory")

    assert doctor.verdict("cuda", "cpu", (torch.float32,), wrong).startswith("WRONG in torch.float32")
    assert "FAILS in torch.float16: the CUDA function f failed" in doctor.verdict(
        "cuda", "cpu", (torch.float16,), crashing
    )


def test_the_doctor_needs_neither_a_gpu_nor_compilers(fresh_gpu, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    page = CliRunner().invoke(doctor.main, catch_exceptions=False)
    assert page.exit_code == 0
    assert "no CUDA: this PyTorch is built without it" in page.output
    assert "none: there is no NVRTC" in page.output
    assert "none: there is no C++ compiler /nowhere/c++; install g++" in page.output
    assert page.output.count("no: it needs a CUDA device") == 4


def test_the_benchmark_measures_whatever_can_run(device, tmp_path):
    arguments = ["--device=cpu", "--share=4096", "--rounds=1", "--no-compile", f"--out={tmp_path}"]
    arguments.append("--ops=bias_act,pixel_path")
    ran = CliRunner().invoke(ops.main, arguments, catch_exceptions=False)
    assert ran.exit_code == 0
    result = json.loads((tmp_path / "ops-cpu.json").read_text())
    assert {"cpu", "torch", "driver"} <= set(result["machine"])
    cases = [(run["op"], run["shape"], run["kind"]) for run in result["runs"]]
    assert len(set(cases)) == len(cases)
    assert {kind for _, _, kind in cases} == {"forward", "gradient", "training"}
    assert ("pixel_path", "8×8", "forward") in cases
    for run in result["runs"]:
        assert {"eager", "auto"} <= set(run["median"])
        assert run["share of floor"]["eager"] == pytest.approx(run["floor"] / run["median"]["eager"])
    assert "| bias_act | 8×2×1024 | fp32 | forward |" in (tmp_path / "ops-cpu.md").read_text()
