"""Laws of building C++ and CUDA sources on first use: once, whole, by the compiler at hand, and what fails is named."""

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from conftest import GPU_TENSOR, ROOT
from helpers import needs_compiler, noise

from dnnlib.console import UserError
from torch_utils import build
from torch_utils.build import library
from torch_utils.ops.bias_act import IMPLS, SOURCE, bias_act
from torch_utils.ops.chain import Chain, Folded
from torch_utils.ops.modulated_linear import modulated_linear


def test_without_a_compiler_the_reference_serves_and_one_line_says_so(fresh_cache, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    layers = [Folded(torch.eye(8), torch.zeros(8)), Folded(torch.ones(3, 8), torch.zeros(3), branch=True)]
    x = noise(8, 5, dtype=torch.float32)
    for _ in range(2):
        assert torch.equal(Chain(layers)(x), Chain(layers, impl="reference")(x))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("chain continues in plain PyTorch")
    assert "no C++ compiler /nowhere/c++; install g++ or clang" in line
    with pytest.raises(UserError, match="install g"):
        Chain(layers, impl="cpp")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ('g++ "', 'CXX=g\\+\\+ " is no command .*; set CXX to a compiler'),
        (r"sh -c 'printf \\351\\n; exit 1'", "failed .*set CXX"),  # not UTF-8
        ("/", "/ .*failed .*set CXX"),
    ],
)
def test_a_variable_that_names_no_compiler_is_a_sentence(fresh_cache, monkeypatch, command, words):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(UserError, match=words):
        library(SOURCE.with_suffix(".cpp"))


@needs_compiler
def test_a_failing_build_shows_the_first_error_and_leaves_nothing(fresh_cache, tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text("int f() { return missing; }\nint g() { return gone; }\n")
    with pytest.raises(UserError, match="missing") as problem:
        library(source)
    assert "gone" not in str(problem.value)
    assert [path for path in fresh_cache.rglob("*") if path.is_file()] == []


@needs_compiler
def test_a_library_is_built_once_for_each_source(fresh_cache, tmp_path):
    source = tmp_path / "number.cpp"
    for number in (1, 1, 2):
        source.write_text(f'extern "C" int number() {{ return {number}; }}')
        assert library(source).number() == number
    assert len(list(fresh_cache.rglob("*.so"))) == 2


@needs_compiler
def test_a_changed_header_builds_anew(fresh_cache, tmp_path):
    source, header = tmp_path / "number.cpp", tmp_path / "number.h"
    source.write_text('#include "number.h"\nextern "C" int number() { return NUMBER; }')
    for number in (1, 2):
        header.write_text(f"#define NUMBER {number}\n")
        assert library(source).number() == number


@needs_compiler
def test_a_damaged_library_is_named(fresh_cache, tmp_path):
    source = tmp_path / "number.cpp"
    source.write_text('extern "C" int number() { return 7; }')
    with multiprocessing.get_context("fork").Pool(1) as pool:  # in another process, which has the file open
        assert pool.apply(build_and_call, (source,)) == 7
    (built,) = fresh_cache.rglob("*.so")
    built.write_bytes(b"not a library")
    with pytest.raises(UserError, match="remove it, and it is built again"):
        library(source)
    built.unlink()
    assert library(source).number() == 7


def build_and_call(source):
    return library(source).number()


@needs_compiler
def test_processes_may_build_at_once(fresh_cache, tmp_path):
    source = tmp_path / "number.cpp"
    source.write_text('extern "C" int number() { return 7; }')
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(build_and_call, [source] * 8) == [7] * 8
    (folder,) = {path.parent for path in fresh_cache.rglob("*.so")}
    assert len(os.listdir(folder)) == 1


# --- CUDA ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def nvrtc():
    try:
        build.nvrtc()
    except UserError as problem:
        pytest.skip(str(problem))


@pytest.mark.usefixtures("nvrtc")
def test_kernels_are_compiled_once_without_a_compiler_on_the_path(fresh_cache, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    first, again = (build.cubin(SOURCE, torch.float32, 90) for _ in range(2))
    assert first == again
    assert first.startswith(b"\x7fELF")
    (file,) = fresh_cache.rglob("*.cubin")
    assert file.read_bytes() == first
    build.cubin(SOURCE, torch.bfloat16, 90)
    assert len(list(fresh_cache.rglob("*.cubin"))) == 2


@pytest.mark.usefixtures("nvrtc")
def test_a_failing_compilation_shows_its_first_error_and_leaves_nothing(fresh_cache, tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void f() { missing(); }\n__global__ void g() { gone(); }\n")
    with pytest.raises(UserError, match='identifier "missing" is undefined') as problem:
        build.cubin(source, torch.float32, 90)
    assert "gone" not in str(problem.value)
    assert [path for path in fresh_cache.rglob("*") if path.is_file()] == []


def test_without_the_driver_the_reference_serves_and_one_line_says_so(fresh_gpu, capfd):
    for _ in range(2):
        assert build.choose("auto", IMPLS, SOURCE, GPU_TENSOR) is None
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("bias_act continues in plain PyTorch, which is slower: the NVIDIA driver cannot be loaded")
    with pytest.raises(UserError, match=r"impl='cuda' of bias_act is unavailable: the NVIDIA driver"):
        build.choose("cuda", IMPLS, SOURCE, GPU_TENSOR)


def test_a_pytorch_for_cpus_has_no_cuda_compiler(fresh_cache, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="install that PyTorch again"):
        build.nvrtc()


def test_nothing_is_built_or_asked_for_at_import():
    code = (
        "import subprocess, torch; subprocess.run = torch.cuda.is_available = torch.cuda.get_device_capability = None;"
    )
    code += "import torch_utils.ops.bias_act, torch_utils.ops.modulated_linear, torch_utils.doctor, training.networks"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ)


# --- choosing ------------------------------------------------------------------------------------------------------


def test_auto_is_the_reference_on_a_cpu_and_says_nothing(capfd):
    x = torch.randn(3, 4)
    assert torch.equal(bias_act(x, act="lrelu"), bias_act(x, act="lrelu", impl="reference"))
    assert capfd.readouterr() == ("", "")


def test_a_requested_implementation_raises_where_there_is_no_gpu():
    for impl in ("cuda", "cublas"):
        with pytest.raises(UserError, match=f"impl='{impl}' of modulated_linear .* the tensors are on cpu"):
            modulated_linear(torch.ones(1, 2, 8), torch.ones(8, 8), torch.ones(1, 8), torch.ones(8), impl=impl)
    with pytest.raises(UserError, match="impl='cuda' of bias_act is unavailable: it needs a CUDA device"):
        bias_act(torch.ones(3), impl="cuda")


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match=r"'triton' is unknown; use one of auto, reference, cpp, cuda$"):
        bias_act(torch.ones(3), impl="triton")


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_shapes_that_do_not_fit_are_refused(impl):
    with pytest.raises(ValueError, match=r"bias must be \[4\], as axis 1 of x \[3, 4\]; got \[1\]"):
        bias_act(torch.ones(3, 4), torch.ones(1), dim=1, impl=impl)
    with pytest.raises(ValueError, match=r"must be \[N,P,I\], \[O,I\], \[N,I\] and \[O\]; got \[2, 3, 8\], \[4, 7\]"):
        modulated_linear(torch.ones(2, 3, 8), torch.ones(4, 7), torch.ones(2, 8), torch.ones(4), impl=impl)
