"""Laws of the chain of layers: it is its definition in float64 for any shapes, processor and threads."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import CPP, error, needs_compiler
from helpers import noise as noise64
from hypothesis import given, settings
from hypothesis import strategies as st

from dnnlib.console import UserError
from rendering.engine import Tiling, render_tiles
from rendering.grid import Shot
from torch_utils import build
from torch_utils.ops.chain import Chain, Folded
from training.networks import Generator, GeneratorConfig
from training.networks.layers import compute_with


def layers(widths, branches=(), terms=(), slope=0.2, clamp=math.inf):
    """Return layers of these widths. After layer i, `branches[i]` outputs leave, and a term is added if `terms[i]`."""
    rng = torch.Generator().manual_seed(0)

    def layer(inputs, outputs, **more):
        weight = torch.randn(outputs, inputs, generator=rng) / math.sqrt(inputs)
        return Folded(weight, torch.randn(outputs, generator=rng), **more)

    made = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        made.append(layer(inputs, outputs, slope=slope, clamp=clamp, term=i < len(terms) and terms[i]))
        if i < len(branches) and branches[i]:
            made.append(layer(outputs, branches[i], branch=True))
    return made


def noise(*shape, seed=1):
    return noise64(*shape, seed=seed, dtype=torch.float32)


def in_float64(made, x, terms, every=False):
    x, terms, total, sums = x.double(), iter(terms), 0, []
    for layer in made:
        y = layer.weight.double() @ x + layer.bias.double()[:, None]
        y = torch.where(y < 0, y * layer.slope, y).clamp(-layer.clamp, layer.clamp)
        if layer.branch:
            total = total + y
            sums.append(total)
        else:
            x = y + next(terms).double() if layer.term else y
    return torch.stack(sums) if every else sums[-1]


@pytest.mark.parametrize("impl", ["reference", CPP])
@settings(max_examples=40)
@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    outputs=st.sampled_from([1, 3, 6, 7, 32]),
    positions=st.sampled_from([0, 1, 11, 12, 13, 24, 47, 63, 64, 65, 200]),
    slope=st.sampled_from([1.0, 0.2]),
    clamp=st.sampled_from([math.inf, 0.5]),
    terms=st.lists(st.booleans(), max_size=4),
    every=st.booleans(),
    data=st.data(),
)
def test_a_chain_is_its_definition(impl, widths, outputs, positions, slope, clamp, terms, every, data):
    branches = [data.draw(st.sampled_from([0, outputs])) for _ in widths[2:]] + [outputs]
    made = layers(widths, branches, terms, slope, clamp)
    added = [noise(len(m.bias), positions, seed=i) for i, m in enumerate(made) if m.term]
    x = noise(widths[0], positions)
    y = Chain(made, every=every, impl=impl)(x, added)
    truth = in_float64(made, x, added, every)
    assert y.shape == truth.shape
    assert y.dtype == torch.float32
    assert error(y, truth) < 1e-5


@needs_compiler
@pytest.mark.parametrize("compiler", ["c++ -mno-avx512f", "c++ -mno-avx", "c++"])
def test_a_chain_is_the_same_on_processors_with_narrower_vectors(compiler, fresh_cache, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    made = layers([33, 64, 13], [0, 3], [True])
    x, added = noise(33, 150), [noise(64, 150, seed=2)]
    try:
        chain = Chain(made, impl="cpp")
    except UserError as problem:
        pytest.skip(str(problem))  # a processor of another family, whose compiler has no such flag
    assert error(chain(x, added), in_float64(made, x, added)) < 1e-5


@needs_compiler
def test_a_position_does_not_depend_on_its_neighbours_nor_a_thread_on_others():
    chain = Chain(layers([20, 50, 30], [0, 5]), impl="cpp")
    x = noise(20, 333)
    y = chain(x)
    parts = [(0, 1), (5, 70), (64, 128), (100, 333)] * 4
    with ThreadPoolExecutor(4) as pool:
        made = pool.map(lambda part: chain(x[:, part[0] : part[1]]), parts)
    for (start, stop), part in zip(parts, made, strict=True):
        assert torch.equal(part, y[:, start:stop])


@pytest.mark.parametrize("impl", ["reference", CPP])
def test_nan_propagates_and_infinity_is_clamped(impl):
    first = Folded(torch.ones(6, 1), torch.zeros(6), slope=0.2, clamp=2.0)
    x = torch.tensor([[math.nan, math.inf, -math.inf]])
    y = Chain([first, Folded(torch.eye(6), torch.zeros(6), branch=True)], impl=impl)(x)
    assert y[:, 0].isnan().all()
    assert torch.equal(y[:, 1:], torch.tensor([[2.0, -2.0]]).expand(6, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_sum_in_at_least_float32(dtype):
    made = layers([16, 32, 16], [4, 4], [True])
    x, added = noise(16, 50), [noise(32, 50, seed=2)]
    y = Chain([m.to(dtype) for m in made])(x, added)
    assert y.dtype == torch.promote_types(dtype, torch.float32)
    assert error(y, in_float64(made, x, added)) < 3 * torch.finfo(dtype).eps


def test_float16_does_not_overflow_where_terms_are_added():
    weight = torch.eye(2, dtype=torch.float16)
    chain = Chain([Folded(weight, weight[0] * 0, term=True), Folded(weight * 0.5, weight[0] * 0, branch=True)])
    y = chain(torch.full((2, 3), 4e4), [torch.full((2, 3), 4e4)])
    assert torch.equal(y, torch.full((2, 3), 3e4))


@needs_compiler
def test_wrong_calls_are_refused():
    made = layers([8, 8], [3], [True])
    with pytest.raises(UserError, match=r"'cpp' of chain is unavailable: it is for torch\.float32, not torch\.float64"):
        Chain([m.to(torch.float64) for m in made], impl="cpp")
    chain = Chain(made, impl="cpp")
    for x, added in ((noise(7, 5), [noise(8, 5)]), (noise(8, 5), []), (noise(8, 5), [noise(8, 4)])):
        with pytest.raises(ValueError, match=r"the chain takes x \[8,P\] and terms \[8,P\]"):
            chain(x, added)


@needs_compiler
def test_images_are_those_of_the_reference(fresh_cache, monkeypatch):
    config = GeneratorConfig(img_resolution=32, z_dim=16, w_dim=16, channel_base=1024, channel_max=64)
    G = Generator(config).eval().requires_grad_(False)
    ws = G.mapping(noise(2, 16))

    def render(impl):
        compute_with(G, impl)
        parts = render_tiles(G, ws, Tiling.of(G, Shot((70, 50))))
        return torch.cat([colours.flatten() for _, colours in parts])

    assert error(render("cpp"), render("reference")) < 1e-5
    build.kernels.cache_clear()
    monkeypatch.setenv("CXX", "/elsewhere/c++")
    render("reference")
    with pytest.raises(UserError, match="/elsewhere/c"):  # so the two above were not the same code
        render("cpp")
