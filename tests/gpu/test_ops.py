"""Laws of the kernels: they are their references, with derivatives of both orders, for any shape and type.

The laws of the references, in tests/test_ops.py, are then theirs.

Here they run on a GPU; tests/test_kernels.py runs them on a CPU.
"""

import itertools
import math

import pytest
import torch
from helpers import distance, leaves, pairwise
from helpers import noise as noise_on_cpu
from torch.autograd import grad

from dnnlib.console import UserError
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.modulated_linear import NARROW, modulated_linear

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
HALF = [torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", UNIT, ids=str)
each_half = pytest.mark.parametrize("dtype", HALF, ids=str)
FORMULAS = [("linear", None), ("lrelu", None), ("lrelu", 0.8)]  # activation, clamp


def noise(device, *shape, seed=0, dtype=torch.float64):
    return noise_on_cpu(*shape, seed=seed).to(device, dtype)


def steps(device, *shape, seed=0, dtype=torch.float64):
    """Multiples of 1/4 in ±2: sums and products of a few are exact in every type."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, shape, generator=random) / 4).to(device, dtype)


# --- bias_act ---------------------------------------------------------------------------------------------------------

# Packs hold 2, 4 or 8 elements, and a block 256 packs.
SHAPES = [((3,), 0), ((3, 5), -1), ((2, 3, 5), 1), ((2, 3, 4, 4), -3), ((2, 5, 8, 30), 1), ((5, 1, 129), 1),
          ((41, 7, 64), -1), ((0, 4), 1)]  # fmt: skip
each_grid = pytest.mark.parametrize(("place", "dtype", "formula"), pairwise(SHAPES, UNIT, FORMULAS), ids=str)


@each_grid
def test_bias_act_is_the_reference(device, place, dtype, formula):
    (shape, dim), (act, clamp) = place, formula
    for bias, gain in itertools.product((None, noise(device, shape[dim], seed=1)), (None, 0.7)):
        x = noise(device, *shape, dtype=dtype)
        got = bias_act(x, bias, act=act, gain=gain, clamp=clamp, dim=dim, impl="cuda")
        truth = bias_act(x.double(), bias, act=act, gain=gain, clamp=clamp, dim=dim, impl="reference")
        assert got.shape == x.shape
        assert got.dtype == dtype
        if dtype == torch.float64:
            assert torch.equal(got, truth)
        else:  # in float32 the bias, the sum, the slope and the gain are rounded; then the result
            assert torch.allclose(got.double(), truth, rtol=UNIT[dtype] + 4 * UNIT[torch.float32], atol=1e-6)


@each_grid
def test_bias_act_has_the_gradients_of_the_reference(device, place, dtype, formula):
    """Pre-activations are exact, so that both see the same signs, zeros and edges of the clamp."""
    (shape, dim), (act, clamp) = place, formula
    clamp = clamp and 1.0
    g = noise(device, *shape, seed=2, dtype=dtype)
    for gain in (1.0, 0.5):
        found = []
        for impl in ("cuda", "reference"):
            x, bias = leaves(steps(device, *shape, dtype=dtype), steps(device, shape[dim], seed=1, dtype=dtype))
            y = bias_act(x, bias, act=act, gain=gain, clamp=clamp, dim=dim, impl=impl)
            (w,) = leaves(g)
            gx, gb = grad(y, (x, bias), w, create_graph=True)
            (gw,) = grad(gx, w, g)  # linear: the same again
            found.append((y, gx, gb, gw))
        for got, expected in zip(*found, strict=True):
            assert got.dtype == expected.dtype
            assert torch.allclose(
                got, expected, rtol=3 * UNIT[dtype], atol=100 * UNIT[dtype] if got is found[0][2] else 0
            )


@each_dtype
def test_derivatives_at_zero_and_at_the_clamp_are_pytorchs(device, dtype):
    values = [-8.0, -4.0, -0.8, -0.0, 0.0, 0.5, 2.0, 4.0, math.inf, -math.inf]
    grads = []
    for impl in ("cuda", "reference"):
        (x,) = leaves(torch.tensor(values, dtype=dtype, device=device))
        y = bias_act(x, act="lrelu", gain=0.5, clamp=1.0, impl=impl)
        grads.append((y, *grad(y.sum(), x)))
    for got, expected in zip(*grads, strict=True):
        assert torch.equal(got, expected)


def test_bias_act_passes_nan_on(device):
    x = torch.tensor([math.nan, 1.0], device=device)
    assert bias_act(x, act="lrelu", clamp=1.0, impl="cuda").isnan().tolist() == [True, False]


def test_bias_act_reads_any_layout_and_keeps_dense_ones(device):
    x, bias = noise(device, 4, 6, 5, 3, dtype=torch.float32), noise(device, 6, seed=1, dtype=torch.float32)
    odd = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)  # begins at 4 bytes
    layouts = {
        "channels last": x.to(memory_format=torch.channels_last),
        "transposed": x.mT.contiguous().mT,
        "sliced": x.repeat_interleave(2, -1)[..., ::2],
        "expanded": x[:1].expand_as(x),
        "unaligned": odd,
        "permuted": x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    }
    for name, laid in layouts.items():
        (leaf,) = leaves(laid)
        got = bias_act(leaf, bias, act="lrelu", clamp=0.8, dim=1, impl="cuda")
        expected = bias_act(leaf, bias, act="lrelu", clamp=0.8, dim=1, impl="reference")
        assert torch.equal(got, expected), name
        g = noise(device, *x.shape, seed=3, dtype=torch.float32)
        assert torch.equal(*(grad(y, leaf, g)[0] for y in (got, expected))), name
        if name not in ("sliced", "expanded"):
            assert got.stride() == laid.stride(), name


def test_bias_act_of_a_number(device):
    x = torch.tensor(-2.0, device=device, requires_grad=True)
    y = bias_act(x, act="lrelu", gain=1.0, impl="cuda")
    assert y.item() == pytest.approx(-0.4)
    assert grad(y, x)[0].item() == pytest.approx(0.2)


@each_dtype
def test_bias_act_keeps_two_bits_of_each_element_for_the_gradient(device, dtype):
    """A sixteenth of a half type; other types leave some of the bits unused."""
    kept = []

    def pack(t):
        kept.append(t.numel() * t.element_size())
        return t

    (x,) = leaves(noise(device, 64, 100, dtype=dtype))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        bias_act(x, noise(device, 100), act="lrelu", clamp=1.0, impl="cuda")
    assert sum(kept) == 64 * 100 * dtype.itemsize // 8


# --- modulated_linear -------------------------------------------------------------------------------------------------

# N, P, I, O; the own product has tiles of 128 positions × 64 outputs × 32 inputs.
ODD = [(2, 3, 5, 7), (3, 9, 33, 3), (0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8)]
EIGHTS = [(1, 1, 8, 8), (2, 130, 40, 72), (3, 200, 32, 64), (1, 128, 96, 136)]
RUNS = pairwise(("cublas", "auto"), UNIT, ODD + EIGHTS, (True, False))
RUNS += pairwise(("cuda",), HALF, EIGHTS, (True, False))
each_run = pytest.mark.parametrize(("impl", "dtype", "size", "demodulate"), RUNS, ids=str)


def layer_inputs(device, n, p, i, o, dtype=torch.float64, make=noise):
    x = make(device, n, p, i, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return x, *(make(device, *shape, seed=k + 1, dtype=wide) for k, shape in enumerate([(o, i), (n, i), (o,)]))


@each_run
def test_a_modulated_layer_is_the_reference(device, impl, dtype, size, demodulate):
    inputs = layer_inputs(device, *size, dtype)
    for act, clamp in (("linear", None), ("lrelu", 0.9)):
        got = modulated_linear(*inputs, demodulate=demodulate, act=act, clamp=clamp, impl=impl)
        truth = modulated_linear(
            *(t.double() for t in inputs), demodulate=demodulate, act=act, clamp=clamp, impl="reference"
        )
        assert got.shape == truth.shape
        assert got.dtype == dtype
        # Roundings of w', of the product (the library rounds it) and of the result; and of sums in float32.
        rounding = 4 * UNIT[dtype] + size[2] * min(UNIT[torch.float32], UNIT[dtype])
        assert distance(got, truth) <= rounding


@each_run
def test_a_modulated_layer_has_the_derivatives_of_the_reference(device, impl, dtype, size, demodulate):
    """Of both orders: those of the length of the gradient, as R1 and the path length need."""
    found = []
    for how, kind in ((impl, dtype), ("reference", torch.float64)):
        inputs = leaves(*(t.to(kind) if t.dtype == dtype else t.to(torch.promote_types(kind, torch.float32))
                          for t in layer_inputs(device, *size, dtype)))  # fmt: skip
        # In half types too many elements would be on the other side of the clamp; the next law is about its edges.
        clamp = None if dtype in HALF else 2.0
        y = modulated_linear(*inputs, demodulate=demodulate, act="lrelu", clamp=clamp, impl=how)
        first = grad(y, inputs, noise(device, *y.shape, seed=9, dtype=y.dtype), create_graph=True)
        lengths = sum(g.double().square().sum() for g in first)
        second = grad(lengths, inputs, allow_unused=True, materialize_grads=True)
        found.append([*first, *second])
    for got, truth in zip(*found, strict=True):
        # Flipped signs: a share of about one unit of the elements, so its root in the distance.
        assert distance(got, truth) <= 20 * UNIT[dtype] + 1.5 * UNIT[dtype] ** 0.5 * (dtype in HALF)


@each_half
@pytest.mark.parametrize("size", EIGHTS, ids=str)
def test_the_epilogue_is_exact_where_numbers_are(device, dtype, size):
    """Positions one-hot, weights and biases of few digits: no rounding, and edges of the clamp are met exactly."""
    n, p, i, o = size
    found = []
    for impl in ("cuda", "reference"):
        x = torch.nn.functional.one_hot(torch.arange(n * p, device=device) % i, i).to(dtype).view(n, p, i)
        _, weight, style, bias = layer_inputs(device, *size, dtype, make=steps)
        inputs = leaves(x, weight, style.ceil(), bias)
        y = modulated_linear(*inputs, demodulate=False, act="linear", clamp=1.0, impl=impl)
        found.append((y, *grad(y, (inputs[0], inputs[3]), steps(device, n, p, o, seed=5, dtype=dtype))))
    (y, gx, gb), (y_, gx_, gb_) = found
    assert torch.equal(y, y_)
    assert distance(gx, gx_) <= UNIT[dtype]
    assert distance(gb, gb_) <= 8 * UNIT[dtype]  # the reference rounds the sum


@pytest.mark.parametrize("demodulate", [True, False])
def test_freezing_some_inputs_leaves_the_gradients_of_the_others(device, demodulate):
    inputs = leaves(*layer_inputs(device, 2, 9, 8, 16))
    together = grad(modulated_linear(*inputs, demodulate=demodulate, impl="cublas").sum(), inputs)
    for leaf, expected in zip(inputs, together, strict=True):
        others_frozen = [t if t is leaf else t.detach() for t in inputs]
        (got,) = grad(modulated_linear(*others_frozen, demodulate=demodulate, impl="cublas").sum(), leaf)
        assert distance(got, expected) <= 8 * UNIT[torch.float64]


@pytest.mark.parametrize(
    ("impl", "dtype"), [("cuda", torch.float16), ("cublas", torch.float16), ("cublas", torch.float32)]
)
def test_a_modulated_layer_reads_any_layout(device, impl, dtype):
    x, weight, style, bias = layer_inputs(device, 2, 24, 40, 16, dtype)
    plain = modulated_linear(x, weight, style, bias, impl=impl)
    layouts = [lambda t: t.mT.contiguous().mT, lambda t: t.repeat_interleave(2, -1)[..., ::2],
               lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)]  # fmt: skip
    for laid in layouts:  # for which the library may sum in another order
        got = modulated_linear(laid(x), laid(weight), laid(style), bias, impl=impl)
        assert distance(got, plain) <= 8 * UNIT[dtype]
    got = modulated_linear(x[:1].expand_as(x), weight, style, bias, impl=impl)
    assert distance(got[0], plain[0]) <= 8 * UNIT[dtype]


@each_half
def test_demodulated_weights_are_right_at_any_scale(device, dtype):
    x, weight, style, bias = layer_inputs(device, 2, 50, 64, 32, dtype)
    plain = modulated_linear(x, weight, style, bias, impl="cuda")
    for scale in (1e-2, 1e6):
        got = modulated_linear(x, weight * scale, style, bias, impl="cuda")
        assert distance(got, plain) <= 4 * UNIT[dtype]


def test_a_zero_style_gives_the_bias_and_finite_gradients(device):
    x, weight, _, bias = layer_inputs(device, 2, 3, 8, 16, torch.float16)
    inputs = leaves(x, weight, torch.zeros(2, 8, device=device))
    for impl in ("cuda", "cublas"):
        y = modulated_linear(*inputs, bias, act="linear", impl=impl)
        assert torch.equal(y, bias.half().expand_as(y))
        assert all(g.isfinite().all() for g in grad(y.sum(), inputs))


@each_half
def test_autocast_makes_it_half(device, dtype):
    x, weight, style, bias = layer_inputs(device, 2, 50, 64, 32, torch.float32)
    inputs = leaves(x, weight, style, bias)
    truth = modulated_linear(*inputs, impl="reference")
    for impl in ("auto", "cuda", "cublas"):
        with torch.autocast(device.type, dtype):
            got = modulated_linear(*inputs, impl=impl)
        assert got.dtype == dtype
        assert distance(got, truth) <= 4 * UNIT[dtype]
        for leaf, g in zip(inputs, grad(got.float().sum(), inputs), strict=True):
            assert g.dtype == leaf.dtype


def test_auto_takes_its_own_product_for_narrow_layers(device):
    """Both are the same to rounding, not bitwise: the library rounds the product before the bias is added."""
    for inputs, own in ((NARROW, True), (NARROW + 8, False)):
        layer = layer_inputs(device, 1, 20, inputs, 24, torch.float16)
        auto, cuda, cublas = (modulated_linear(*layer, impl=impl) for impl in ("auto", "cuda", "cublas"))
        assert torch.equal(auto, cuda if own else cublas)
        assert not torch.equal(cuda, cublas)


def test_a_named_one_that_cannot_serve_raises(device):
    with pytest.raises(UserError, match=r"for half types, not torch.float32; use impl='cublas'"):
        modulated_linear(*layer_inputs(device, 1, 2, 8, 8, torch.float32), impl="cuda")
    with pytest.raises(UserError, match="multiples of 8 inputs and outputs, not 12 and 8"):
        modulated_linear(*layer_inputs(device, 1, 2, 12, 8, torch.float16), impl="cuda")
    with pytest.raises(UserError, match=r"not torch\.int64"):
        bias_act(torch.ones(3, device=device, dtype=torch.int64), impl="cuda")
