"""Laws of building C++ and CUDA sources on first use: once, whole, by the compiler at hand, and what fails is named."""

import multiprocessing
import os

import pytest
import torch
from helpers import needs_compiler, noise

from dnnlib.console import UserError
from torch_utils.build import library
from torch_utils.ops.chain import Chain, Folded


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
def test_a_damaged_library_is_named(fresh_cache, tmp_path):
    source = tmp_path / "number.cpp"
    source.write_text('extern "C" int number() { return 7; }')
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # in another process, which has the file open
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
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(build_and_call, [source] * 8) == [7] * 8
    (folder,) = {path.parent for path in fresh_cache.rglob("*.so")}
    assert len(os.listdir(folder)) == 1
