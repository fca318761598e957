"""Laws of the chain of layers: float64, and what must not matter; then of its building, on a compiler and without."""

import itertools
import math
import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rendering
from dnnlib.console import UserError
from torch_utils.build import cpp_compiler, library
from torch_utils.ops.chain import Chain, Layer, build
from training.networks import Generator, GeneratorConfig

needs_compiler = pytest.mark.skipif(not shutil.which(cpp_compiler()[0]), reason="there is no C++ compiler")
CPP = pytest.param("cpp", marks=needs_compiler)


@pytest.fixture
def fresh():
    """The next chain looks for its library again."""
    build.cache_clear()
    yield
    build.cache_clear()


def layers(widths, branches=(), terms=(), slope=0.2, clamp=math.inf, seed=0):
    """Layers of these widths; after layer i, `branches[i]` outputs leave (0: none) and `terms[i]` are added."""
    random = torch.Generator().manual_seed(seed)

    def layer(inputs, outputs, **more):
        weight = torch.randn(outputs, inputs, generator=random) / math.sqrt(inputs)
        return Layer(weight, torch.randn(outputs, generator=random), **more)

    made = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        count = terms[i] if i < len(terms) else 0
        made.append(layer(inputs, outputs, slope=slope, clamp=clamp, terms=count))
        if i < len(branches) and branches[i]:
            made.append(layer(outputs, branches[i], branch=True))
    return made


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_float64(made, x, terms, every):
    """The definition, one position at a time being no different from all."""
    x, terms, total, sums = x.double(), iter(terms), 0, []
    for layer in made:
        y = layer.weight.double() @ x + layer.bias.double()[:, None]
        y = torch.where(y < 0, y * layer.slope, y).clamp(-layer.clamp, layer.clamp)
        if layer.branch:
            total = total + y
            sums.append(total)
        else:
            x = y + sum(next(terms).double() for _ in range(layer.terms))
    return torch.stack(sums) if every else sums[-1]


def error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item() if b.numel() else 0.0


@pytest.mark.parametrize("impl", ["reference", CPP])
@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    outputs=st.sampled_from([1, 3, 6, 7, 32]),
    positions=st.sampled_from([0, 1, 11, 12, 13, 24, 47, 63, 64, 65, 200]),
    slope=st.sampled_from([1.0, 0.2]),
    clamp=st.sampled_from([math.inf, 0.5]),
    terms=st.lists(st.integers(0, 2), max_size=4),
    every=st.booleans(),
    data=st.data(),
)
def test_chain_is_its_definition(impl, widths, outputs, positions, slope, clamp, terms, every, data):
    last = len(widths) - 2
    branches = [data.draw(st.sampled_from([0, outputs])) for _ in range(last)] + [outputs]
    made = layers(widths, branches, terms, slope, clamp)
    added = [noise(m.weight.shape[0], positions, seed=i) for i, m in enumerate(made) for _ in range(m.terms)]
    x = noise(widths[0], positions)
    y = Chain(made, every=every, impl=impl)(x, added)
    truth = in_float64(made, x, added, every)
    assert y.shape == truth.shape
    assert y.dtype == torch.float32
    assert error(y, truth) < 1e-5


@needs_compiler
@pytest.mark.parametrize("compiler", ["c++ -mno-avx512f", "c++ -mno-avx", "c++"])
def test_chain_is_the_same_on_lesser_processors(compiler, fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("CREPS_CACHE", str(tmp_path))
    made = layers([33, 64, 13], [0, 3], [1])
    x, added = noise(33, 150), [noise(64, 150, seed=2)]
    try:
        chain = Chain(made, impl="cpp")
    except UserError as problem:
        pytest.skip(str(problem))  # a processor of another family, whose compiler has no such flag
    assert error(chain(x, added), in_float64(made, x, added, False)) < 1e-5


@needs_compiler
def test_a_position_does_not_depend_on_its_neighbours():
    chain = Chain(layers([20, 50, 30], [0, 5]), impl="cpp")
    x = noise(20, 333)
    y = chain(x)
    for start, stop in ((0, 1), (5, 70), (64, 128), (100, 333)):
        assert torch.equal(chain(x[:, start:stop]), y[:, start:stop])


@needs_compiler
def test_threads_do_not_disturb_each_other():
    chain = Chain(layers([64, 128, 64], [0, 3]), impl="cpp")
    xs = [noise(64, 500, seed=i) for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(chain, xs))
    assert all(torch.equal(y, chain(x)) for x, y in zip(xs, together, strict=True))


@pytest.mark.parametrize("impl", ["reference", CPP])
def test_nan_is_passed_on_and_infinity_is_clamped(impl):
    made = layers([4, 6, 6], [0, 6], clamp=2.0)
    made[0].weight.zero_()
    made[0].weight[:, 0] = 1
    x = torch.zeros(4, 3)
    x[0] = torch.tensor([math.nan, math.inf, -math.inf])
    x[1:] = 0
    y = Chain([made[0], Layer(torch.eye(6), torch.zeros(6), branch=True)], impl=impl)(x)
    assert y[:, 0].isnan().all()
    assert torch.equal(y[:, 1:], torch.tensor([[2.0, -2.0]]).expand(6, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_sum_in_float32_at_least(dtype):
    made = layers([16, 32, 16], [4, 4], [1])
    cast = [m._replace(weight=m.weight.to(dtype), bias=m.bias.to(dtype)) for m in made]
    x, added = noise(16, 50), [noise(32, 50, seed=2)]
    y = Chain(cast)(x, added)
    assert y.dtype == torch.promote_types(dtype, torch.float32)
    assert error(y, in_float64(made, x, added, False)) < 3 * torch.finfo(dtype).eps


def test_float16_does_not_overflow_where_terms_are_added():
    weight = torch.eye(2, dtype=torch.float16)
    chain = Chain([Layer(weight, weight[0] * 0, terms=1), Layer(weight * 0.5, weight[0] * 0, branch=True)])
    y = chain(torch.full((2, 3), 4e4), [torch.full((2, 3), 4e4)])
    assert torch.equal(y, torch.full((2, 3), 3e4))


@needs_compiler
def test_wrong_calls_are_refused():
    made = layers([8, 8], [3], [1])
    with pytest.raises(UserError, match="'triton' is unknown; use one of auto, reference, cpp"):
        Chain(made, impl="triton")
    with pytest.raises(UserError, match="float32 on CPUs"):
        Chain([m._replace(weight=m.weight.double(), bias=m.bias.double()) for m in made], impl="cpp")
    chain = Chain(made, impl="cpp")
    for x, added in ((noise(7, 5), [noise(8, 5)]), (noise(8, 5), []), (noise(8, 5), [noise(8, 4)])):
        with pytest.raises(ValueError, match=r"the chain takes \[8,P\] and terms \[8,P\]"):
            chain(x, added)


@needs_compiler
def test_pictures_are_those_of_the_reference(fresh, monkeypatch, tmp_path):
    config = GeneratorConfig(img_resolution=32, z_dim=16, w_dim=16, channel_base=1024, channel_max=64)
    G = Generator(config).eval().requires_grad_(False)
    ws = G.mapping(noise(2, 16), torch.zeros(2, 0))

    def paint(impl):
        parts = rendering.paint(G, ws, rendering.plan(G, (70, 50)), impl=impl)
        return torch.cat([colours.flatten() for _, colours in parts])

    assert error(paint("cpp"), paint("reference")) < 1e-5
    build.cache_clear()
    monkeypatch.setenv("CXX", "/elsewhere/c++")
    monkeypatch.setenv("CREPS_CACHE", str(tmp_path))
    paint("reference")
    with pytest.raises(UserError, match="/elsewhere/c"):  # so the two above were not one
        paint("cpp")


# --- building ------------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_reference_serves_and_one_line_says_so(fresh, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("CREPS_CACHE", str(tmp_path))
    made = layers([8, 8], [3])
    x = noise(8, 5)
    for _ in range(2):
        assert torch.equal(Chain(made)(x), Chain(made, impl="reference")(x))
    (line,) = capfd.readouterr().err.splitlines()
    assert "without its C++ code" in line
    assert "no C++ compiler /nowhere/c++; install g++ or clang" in line
    with pytest.raises(UserError, match="install g"):
        Chain(made, impl="cpp")


@needs_compiler
def test_a_failing_build_shows_the_first_error_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("CREPS_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "broken.cpp"
    source.write_text("int f() { return missing; }\nint g() { return gone; }\n")
    with pytest.raises(UserError, match="missing") as problem:
        library(source)
    assert "gone" not in str(problem.value)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@needs_compiler
def test_a_library_is_built_once_for_each_source(monkeypatch, tmp_path):
    monkeypatch.setenv("CREPS_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "number.cpp"
    for number in (1, 1, 2):
        source.write_text(f'extern "C" int number() {{ return {number}; }}')
        assert library(source).number() == number
    built = list((tmp_path / "cache").rglob("*.so"))
    assert len(built) == 2


@needs_compiler
def test_a_damaged_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CREPS_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "number.cpp"
    source.write_text('extern "C" int number() { return 7; }')
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # in another process, which has the file open
        assert pool.apply(build_and_call, (source,)) == 7
    (built,) = (tmp_path / "cache").rglob("*.so")
    built.write_bytes(b"not a library")
    with pytest.raises(UserError, match="remove it, and it is built again"):
        library(source)
    built.unlink()
    assert library(source).number() == 7


def build_and_call(source):
    return library(source).number()


@needs_compiler
def test_processes_may_build_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("CREPS_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "number.cpp"
    source.write_text('extern "C" int number() { return 7; }')
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(build_and_call, [source] * 8) == [7] * 8
    (folder,) = {path.parent for path in (tmp_path / "cache").rglob("*.so")}
    assert len(os.listdir(folder)) == 1
