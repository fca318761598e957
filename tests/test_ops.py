"""Laws of the operations' references: plain loops, closed forms, scipy, and derivatives of both orders."""

import itertools
import math

import numpy as np
import pytest
import scipy.signal
import torch
from helpers import leaves, noise, pairwise
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from torch_utils.ops.bias_act import ACTIVATIONS, bias_act
from torch_utils.ops.convolution import conv2d, conv_transpose2d
from torch_utils.ops.modulated_linear import EPSILON, modulated_linear
from torch_utils.ops.resample import lowpass
from training import augment, losses
from training.networks import Discriminator, DiscriminatorConfig

SLOPE_AND_GAIN = {"linear": (1.0, 1.0), "lrelu": (0.2, math.sqrt(2))}
LAYOUTS = ["contiguous", "transposed", "sliced", "expanded"]


def test_the_published_constants():
    assert {name: ACTIVATIONS[name] for name in SLOPE_AND_GAIN} == SLOPE_AND_GAIN
    assert EPSILON == 1e-8


def laid_out(x, layout):
    """The values of x, or values of its shape, in another layout of memory."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "sliced":
        return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x


# --- bias_act -----------------------------------------------------------------------------------------------------


def bias_act_by_hand(x, bias, act, gain, clamp, dim):
    slope, default_gain = SLOPE_AND_GAIN[act]
    out = np.empty(x.shape)
    for index in np.ndindex(*x.shape):
        value = x[index] + (0.0 if bias is None else bias[index[dim]])
        value *= (slope if value < 0 else 1) * (default_gain if gain is None else gain)
        out[index] = value if clamp is None else min(max(value, -clamp), clamp)
    return out


PLACES = [((3,), 0), ((3, 5), -1), ((2, 3, 1, 7), -3), ((0, 4), 1)]  # shape, dim


@pytest.mark.parametrize(
    ("place", "act", "gain", "clamp"), pairwise(PLACES, SLOPE_AND_GAIN, (None, 0.7), (None, 0.8)), ids=str
)
def test_bias_act_is_its_formula(place, act, gain, clamp):
    shape, dim = place
    x = noise(*shape)
    for bias in (None, noise(shape[dim], seed=1)):
        got = bias_act(x, bias, act=act, gain=gain, clamp=clamp, dim=dim)
        expected = bias_act_by_hand(x.numpy(), None if bias is None else bias.numpy(), act, gain, clamp, dim)
        assert got.shape == x.shape
        assert np.allclose(got.numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("place", "layout", "act", "clamp"),
    pairwise([((3, 5), -1), ((2, 3, 1), 1), ((0, 4), 1)], LAYOUTS, SLOPE_AND_GAIN, (None, 0.8)),
    ids=str,
)
def test_bias_act_has_the_derivatives_of_finite_differences_in_any_layout(place, layout, act, clamp):
    shape, dim = place

    def f(x, bias):
        return bias_act(laid_out(x, layout), bias, act=act, gain=1.3, clamp=clamp, dim=dim)

    inputs = leaves(noise(*shape), noise(shape[dim], seed=1))
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)
    dense = laid_out(inputs[0], layout).contiguous()
    assert torch.equal(f(*inputs), bias_act(dense, inputs[1], act=act, gain=1.3, clamp=clamp, dim=dim))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bias_act_stays_in_the_dtype_of_x_and_within_the_clamp(dtype):
    x = torch.tensor([-math.inf, -6e4, -256, 0, 256, 6e4, math.inf], dtype=dtype)
    got = bias_act(x, torch.full((7,), 3.0), act="lrelu", clamp=256.0)
    assert got.dtype == dtype
    assert (got.abs() <= 256).all()
    assert got[-1] == got[-2] == 256
    assert got[0] == -256


@pytest.mark.parametrize(("act", "moment"), [("linear", 1.0), ("lrelu", 1.04)])
def test_the_default_gain_keeps_the_second_moment_of_normal_numbers(act, moment):
    """E[(√2·lrelu(x))²] = 2·(1 + 0.2²)/2 = 1.04; a million samples have an error of half a percent."""
    assert bias_act(noise(10**6), act=act).square().mean().item() == pytest.approx(moment, rel=0.005)


def test_operations_leave_their_inputs_alone():
    x, bias = noise(1, 4, 6, 6), noise(4, seed=1)
    before = x.clone(), bias.clone()
    bias_act(x, bias, act="lrelu", clamp=0.5, dim=1)
    lowpass(x, 0)
    assert torch.equal(x, before[0])
    assert torch.equal(bias, before[1])


def test_an_unknown_activation_is_refused():
    with pytest.raises(KeyError, match="relu6"):
        bias_act(noise(2), act="relu6")


# --- modulated_linear ---------------------------------------------------------------------------------------------


def modulated_by_hand(x, weight, style, bias, demodulate, act, clamp):
    (n, p, inputs), outputs = x.shape, weight.shape[0]
    out = np.zeros((n, p, outputs))
    for a, o in itertools.product(range(n), range(outputs)):
        row = [weight[o, i] * style[a, i] for i in range(inputs)]
        if demodulate:
            length = math.sqrt(sum(v * v for v in row) + 1e-8)
            row = [v / length for v in row]
        for b in range(p):
            out[a, b, o] = sum(row[i] * x[a, b, i] for i in range(inputs))
    return bias_act_by_hand(out, bias, act, None, clamp, 2)


SIZES = [(1, 1, 1, 1), (2, 3, 5, 7), (0, 3, 4, 2), (2, 0, 4, 2)]  # N, P, I, O


def modulated_inputs(n, p, i, o):
    return noise(n, p, i), noise(o, i, seed=1), noise(n, i, seed=2), noise(o, seed=3)


@pytest.mark.parametrize(
    ("size", "demodulate", "act", "clamp"), pairwise(SIZES, (True, False), SLOPE_AND_GAIN, (None, 0.9)), ids=str
)
def test_a_modulated_layer_is_its_formula(size, demodulate, act, clamp):
    inputs = modulated_inputs(*size)
    got = modulated_linear(*inputs, demodulate=demodulate, act=act, clamp=clamp)
    assert got.shape == (size[0], size[1], size[3])
    expected = modulated_by_hand(*(t.numpy() for t in inputs), demodulate, act, clamp)
    assert np.allclose(got.numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("size", "demodulate", "act", "clamp"),
    pairwise([(1, 1, 1, 1), (2, 3, 3, 2), (0, 3, 2, 2)], (True, False), SLOPE_AND_GAIN, (None, 0.9)),
    ids=str,
)
def test_a_modulated_layer_has_the_derivatives_of_finite_differences(size, demodulate, act, clamp):
    def f(*inputs):
        return modulated_linear(*inputs, demodulate=demodulate, act=act, clamp=clamp)

    inputs = leaves(*modulated_inputs(*size))
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_modulated_layer_reads_any_layout(layout):
    x, weight, style, bias = modulated_inputs(2, 3, 3, 2)

    def f(x, weight, style):
        return modulated_linear(*(laid_out(t, layout) for t in (x, weight, style)), bias, clamp=0.9)

    inputs = leaves(x, weight, style)
    plain = modulated_linear(*(laid_out(t, layout).contiguous() for t in inputs), bias, clamp=0.9)
    assert torch.allclose(f(*inputs), plain, rtol=0, atol=1e-14)
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


def test_demodulated_weights_have_length_one_at_any_scale():
    """The images of the unit vectors are the columns of the weight."""
    weight, style = noise(5, 6), noise(2, 6, seed=1)
    unit = torch.eye(6).double().expand(2, 6, 6)
    for scale in (1.0, 1e3, 1e6):
        rows = modulated_linear(unit, weight * scale, style / 7, torch.zeros(5).double(), act="linear")
        assert torch.allclose(rows.square().sum(1), torch.ones(2, 5).double(), atol=1e-5)  # ε is 1e-8


def test_a_zero_style_gives_the_bias_and_finite_gradients():
    x, weight, _, bias = modulated_inputs(2, 3, 4, 5)
    inputs = leaves(x, weight, torch.zeros(2, 4).double())
    y = modulated_linear(*inputs, bias, act="linear")
    assert torch.equal(y, bias.expand_as(y))
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in inputs)


@pytest.mark.parametrize(
    ("kind", "how", "scale"),
    pairwise([(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)], ("autocast", "half features"), (1.0, 1e4)),
    ids=str,
)
def test_half_precision_features_are_near_float64_at_any_scale_of_the_weight(kind, how, scale):
    dtype, unit = kind
    x, weight, style, bias = (t.float() for t in modulated_inputs(2, 50, 64, 32))
    expected = modulated_linear(*(t.double() for t in (x, weight, style, bias)))
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        got = modulated_linear(x if how == "autocast" else x.to(dtype), weight * scale, style, bias)
    assert got.dtype == dtype
    assert got.isfinite().all()
    assert (got.double() - expected).abs().max() <= 3 * unit * 8


# --- lowpass ------------------------------------------------------------------------------------------------------

FILTER = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64


@pytest.mark.parametrize(
    ("shape", "padding", "stride"), pairwise([(1, 1, 4, 4), (2, 3, 5, 8)], (0, 1, 2, 3), (1, 2)), ids=str
)
def test_lowpass_is_scipys_convolution(shape, padding, stride):
    x = noise(*shape)
    got = lowpass(x, padding, stride)
    for index in np.ndindex(*shape[:2]):
        expected = scipy.signal.convolve2d(np.pad(x[index].numpy(), padding), FILTER, mode="valid")
        assert got[index].shape == expected[::stride, ::stride].shape
        assert np.allclose(got[index].numpy(), expected[::stride, ::stride], rtol=0, atol=1e-14)


def test_lowpass_keeps_the_mean_and_removes_the_fastest_wave():
    constant = torch.full((1, 1, 9, 9), 2.5).double()
    assert torch.allclose(lowpass(constant, 0), torch.full((1, 1, 6, 6), 2.5).double())
    checkers = (torch.arange(9)[:, None] + torch.arange(9)).remainder(2).double()[None, None] * 2 - 1
    assert lowpass(checkers, 0).abs().max().item() <= 1e-15


@pytest.mark.parametrize(("padding", "layout"), [(0, "contiguous"), (1, "transposed"), (2, "sliced")])
def test_lowpass_has_the_derivatives_of_finite_differences_in_any_layout(padding, layout):
    inputs = leaves(noise(2, 1, 4, 5))
    assert gradcheck(lambda x: lowpass(laid_out(x, layout), padding), inputs)
    assert gradgradcheck(lambda x: lowpass(laid_out(x, layout), padding), inputs)


def test_the_gradient_of_lowpass_is_its_adjoint():
    """⟨lowpass(x), y⟩ = ⟨x, lowpass(y)⟩ when the other pads by 3 − padding: the filter is symmetric."""
    for padding in (0, 1, 2, 3):
        x = noise(1, 1, 6, 7).requires_grad_()
        y = lowpass(x, padding)
        other = noise(*y.shape, seed=1)
        (gradient,) = torch.autograd.grad(y, x, other)
        assert torch.allclose(gradient, lowpass(other, 3 - padding), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lowpass_of_clamped_features_stays_finite(dtype):
    """Features stay within ±256; the sums on the way to the mean pass 256 · 64 = 16384, under float16's 65504."""
    got = lowpass(torch.full((1, 1, 8, 8), 256.0, dtype=dtype), 2)
    assert got.dtype == dtype
    assert got.max().item() == 256


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_an_identity_copies_nothing(impl):
    x = noise(3, 4).float()
    assert bias_act(x, act="linear", impl=impl) is x


# --- convolutions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), [
    ((4, 3), (3, 3), (1, 1), (1, 1)), ((4, 5), (2, 1), (2, 1), (3, 0)),
])  # fmt: skip
def test_convolutions_and_their_transposes_are_pytorchs_in_value_and_derivatives(size, kernel, stride, padding):
    x, weight = leaves(noise(1, 2, *size), noise(1, 2, *kernel, seed=1))
    y = torch.conv2d(x, weight, None, stride, padding)
    (g,) = leaves(noise(*y.shape, seed=2))
    assert torch.equal(conv2d(x, weight, stride, padding), y)
    assert torch.allclose(conv_transpose2d(g, weight, size, stride, padding), torch.autograd.grad(y, x, g)[0])
    assert gradcheck(conv2d, (x, weight, stride, padding))
    assert gradgradcheck(conv2d, (x, weight, stride, padding))
    assert gradgradcheck(conv_transpose2d, (g, weight, size, stride, padding))


class Kernels(TorchDispatchMode):
    """Collects the largest side of the kernels of all convolutions."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function.overloadpacket)
        if "convolution" in name:
            self.largest = max(self.largest, *arguments[2 if "backward" in name else 1].shape[2:])
        return function(*arguments, **options or {})


def test_no_derivative_of_an_augmented_discriminator_has_a_kernel_as_large_as_an_image():
    """R1's gradient by the weights, which cuDNN would take seconds for."""
    D = Discriminator(DiscriminatorConfig(img_resolution=16, channel_base=64, channel_max=4))
    augmentations = augment.sample(augment.AugmentConfig(), 2, 1.0, image_shape=(16, 16), rng=torch.Generator())
    with Kernels() as kernels:
        losses.r1(lambda x: D(augmentations.apply(x)), noise(2, 3, 16, 16).float()).sum().backward()
    assert kernels.largest == len(augment.SYM6)
