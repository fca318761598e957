"""Laws of the C++ code that trains on a CPU: fused_pixels, bias_act and lowpass are the reference, derived twice."""

import functools
import itertools
import math

import pytest
import torch
from helpers import distance, needs_compiler, noise, pairwise

from dnnlib.console import UserError
from torch_utils import build
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.chain import Folded
from torch_utils.ops.resample import lowpass
from training.networks import Generator, GeneratorConfig
from training.networks.fused_pixels import fused_pixels, with_tensors
from training.networks.layers import compute_with

pytestmark = needs_compiler


def example(images, fusions, channels, thickness, height, width, clamp, terms):
    """Return lines and layers in float64. `terms` of the fusions are added; every other weight is per image."""
    seeds = itertools.count()
    rows = noise(fusions, images, height, thickness, channels, seed=next(seeds)) / thickness**0.5
    cols = noise(fusions, images, width, thickness, channels, seed=next(seeds)) / thickness**0.5
    layers, inputs = [], channels
    for i in range(terms + 2):
        for outputs, own in ((2 * channels + 1, i % 2), (channels, not i % 2)):
            weight = noise(*[images] * own, outputs, inputs, seed=next(seeds)) / math.sqrt(inputs)
            last = outputs == channels and i < terms
            layers.append(Folded(weight, noise(outputs, seed=next(seeds)), 0.2, clamp, term=last))
            inputs = outputs
        if i >= terms - 1:
            weight = noise(images, 3, inputs, seed=next(seeds)) / math.sqrt(inputs)
            layers.append(Folded(weight, noise(3, seed=next(seeds)), clamp=clamp, branch=True))
    return rows, cols, layers


def both_derivatives(function, inputs, dtype):
    """Return value, gradients, and gradients of a weighted sum of the gradients, in float64."""
    inputs = [t.to(dtype).requires_grad_() for t in inputs]
    value = function(*inputs)
    sent = noise(*value.shape, seed=100).to(dtype).requires_grad_()
    first = torch.autograd.grad(value, inputs, sent, create_graph=True)
    total = sum((g * noise(*g.shape, seed=101 + i).to(dtype)).sum() for i, g in enumerate(first))
    second = torch.autograd.grad(total, [sent, *inputs], allow_unused=True, materialize_grads=True)
    return [t.double() for t in (value, *first, *second)]


# The last two are computed in parts, whose last rows do not fill a strip.
SHAPES = [(2, 3, 8, 4, 5, 20), (1, 2, 3, 1, 2, 70), (3, 1, 17, 8, 1, 1), (1, 2, 5, 3, 150, 64), (1, 2, 3, 2, 501, 9)]


@pytest.mark.parametrize(
    ("shape", "clamp"), list(zip(SHAPES, (1.0, math.inf, 1.0, math.inf, 1.0), strict=True)), ids=str
)
def test_pixels_are_the_reference_with_derivatives_of_both_orders(shape, clamp):
    rows, cols, layers = example(*shape, clamp, terms=max(0, shape[1] - 2))
    inputs = [rows, cols, *(t for layer in layers for t in (layer.weight, layer.bias))]

    def run(impl, dtype):
        return both_derivatives(
            lambda r, c, *ts: fused_pixels(r, c, with_tensors(layers, ts), impl=impl), inputs, dtype
        )

    for got, truth in zip(run("cpp", torch.float32), run("reference", torch.float64), strict=True):
        assert distance(got, truth) < 1e-4


def test_threads_do_not_change_the_gradient():
    rows, cols, layers = example(3, 2, 8, 4, 20, 30, 1.0, terms=1)
    inputs = [t.float() for t in (rows, cols, *(t for layer in layers for t in (layer.weight, layer.bias)))]
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaves = [t.requires_grad_() for t in inputs]
            value = fused_pixels(*leaves[:2], with_tensors(layers, leaves[2:]), impl="cpp")
            made.append([value, *torch.autograd.grad(value.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("decoders", [True, False])
def test_a_generator_is_that_of_the_reference(decoders):
    torch.manual_seed(0)
    config = GeneratorConfig(img_resolution=16, channel_base=128, channel_max=16, z_dim=8, w_dim=8, decoders=decoders)
    G = Generator(config)
    plain = Generator(config)
    compute_with(plain, "reference")
    plain.load_state_dict(G.state_dict())
    images, gradients = [], []
    for network in (G, plain):
        parameters = list(network.parameters())
        image = network(noise(2, 8, seed=0).to(parameters[0].dtype))
        images.append(image.double())
        gradients.append(torch.cat([g.double().flatten() for g in torch.autograd.grad(image.sum(), parameters)]))
    assert distance(*images) < 1e-5
    assert distance(*gradients) < 1e-4


@pytest.mark.parametrize(
    ("dtype", "dim", "channels_last"), pairwise((torch.float32, torch.bfloat16), (1, -1), (False, True)), ids=str
)
def test_bias_act_is_the_reference_with_derivatives_of_both_orders(dtype, dim, channels_last):
    x, bias = noise(3, 7, 45, 38, seed=0), noise({1: 7, -1: 38}[dim], seed=1)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def run(impl, dtype):
        arguments = {"act": "lrelu", "clamp": 0.8, "dim": dim, "impl": impl}
        return both_derivatives(lambda x, b: bias_act(x, b, **arguments), [x.to(dtype), bias], dtype)

    # Truth is float64 on the same rounded numbers; the second derivative by x is zero, and exact.
    for got, truth in zip(run("cpp", dtype), run("reference", torch.float64), strict=True):
        assert distance(got, truth) < (1e-6 if dtype == torch.float32 else 0.1)
    if dtype == torch.float32:
        value, by_x = ([made[i] for made in (run("cpp", dtype), run("reference", dtype))] for i in (0, 1))
        assert torch.equal(*value)
        assert torch.equal(*by_x)


@pytest.mark.parametrize(
    ("shape", "how", "dtype"),
    pairwise(
        [(2, 3, 9, 12), (1, 40, 100, 90), (0, 2, 8, 8)],
        [(2, 1), (1, 2), (0, 2), (3, 1)],
        (torch.float32, torch.bfloat16),
    ),
    ids=str,
)
def test_lowpass_is_the_reference_with_derivatives_of_both_orders(shape, how, dtype):
    """The second shape is work for several threads."""
    inputs = [noise(*shape, seed=0)]
    call = functools.partial(lowpass, padding=how[0], stride=how[1])
    got = both_derivatives(lambda x: call(x, impl="cpp"), inputs, dtype)
    truth = both_derivatives(lambda x: call(x, impl="reference"), inputs, torch.float64)
    for a, b in zip(got, truth, strict=True):
        assert a.shape == b.shape
        assert distance(a, b) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_a_requested_implementation_never_falls_back(fresh_cache, monkeypatch):
    rows, cols, layers = example(1, 1, 2, 1, 2, 2, 1.0, terms=0)
    with pytest.raises(UserError, match=r"not torch\.float64"):
        fused_pixels(rows, cols, layers, impl="cpp")
    build.kernels.cache_clear()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    layers = [layer.to(torch.float32) for layer in layers]
    with pytest.raises(UserError, match="there is no C"):
        fused_pixels(rows.float(), cols.float(), layers, impl="cpp")
    with pytest.raises(UserError, match="there is no C"):
        bias_act(torch.ones(3), impl="cpp")
    assert fused_pixels(rows.float(), cols.float(), layers).shape == (1, 3, 2, 2)
