"""Laws of building C++ and CUDA sources on first use: once, whole, by the compiler at hand, and what fails is named."""

import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


def toolkit(folder, script):
    """Make a directory for CUDA_HOME whose nvcc is a shell script."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return str(folder)


def test_kernels_are_built_once_and_loaded(fresh_gpu, monkeypatch):
    if not shutil.which("nvcc"):
        pytest.skip("there is no nvcc on the PATH")
    monkeypatch.setattr(build.Kernels, "call", lambda self, name: None)  # the probe, which needs a GPU
    for _ in range(2):
        build.kernels.cache_clear()
        found, reason = build.kernels(SOURCE, GPU_TENSOR.device)
        assert reason == ""
        assert found.functions.bias_act
        assert found.capability == 90
    assert len(list(fresh_gpu.rglob("*.so"))) == 1


def test_a_failing_nvcc_shows_its_first_error_and_the_fix(fresh_gpu, monkeypatch, tmp_path, capfd):
    script = 'case "$*" in *--version*) echo fake 1.0; exit;; esac\n' + "\n".join(
        f'echo "{line}" >&2'
        for line in ("a.cu(1): warning #177", "a.cu(7): error: no such thing", "a.cu(8): error: more")
    )
    monkeypatch.setenv("CUDA_HOME", toolkit(tmp_path / "cuda", f"{script}\nexit 2"))
    for _ in range(2):
        assert build.choose("auto", IMPLS, SOURCE, GPU_TENSOR) is None
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("bias_act continues in plain PyTorch, which is slower: ")
    assert "no such thing" in line
    assert "more" not in line
    assert "set CUDA_HOME to another CUDA toolkit" in line
    with pytest.raises(UserError, match=r"impl='cuda' of bias_act is unavailable: .*no such thing"):
        build.choose("cuda", IMPLS, SOURCE, GPU_TENSOR)
    assert [path for path in fresh_gpu.rglob("*") if path.is_file()] == []


def test_without_nvcc_the_line_says_where_it_was_looked_for(fresh_gpu, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(build.os, "access", lambda path, mode: False)
    assert build.choose("auto", IMPLS, SOURCE, GPU_TENSOR) is None
    line = capfd.readouterr().err
    assert "no CUDA compiler nvcc in CUDA_HOME, on the PATH or in pip's wheels" in line
    assert "pip install 'cuda-toolkit[" in line


def test_nvcc_is_that_of_cuda_home_then_of_the_path_then_of_wheels(fresh_gpu, monkeypatch, tmp_path):
    homes = [Path(toolkit(tmp_path / name, "exit 1")) for name in ("home", "path", "site/nvidia/cu13")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(
        submodule_search_locations=[str(tmp_path / "site" / name)]))  # fmt: skip
    (homes[2] / "lib").mkdir()
    (homes[2] / "lib" / "libcudart_static.a").touch()
    monkeypatch.setenv("PATH", str(homes[1] / "bin"))
    assert build.cuda_compiler() == [str(homes[1] / "bin" / "nvcc")]
    monkeypatch.setenv("CUDA_HOME", str(homes[0]))
    assert build.cuda_compiler() == [str(homes[0] / "bin" / "nvcc")]
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", "/nowhere")
    assert build.cuda_compiler() == [str(homes[2] / "bin" / "nvcc"), f"-L{homes[2] / 'lib'}"]


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
