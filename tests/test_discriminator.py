"""Laws of the discriminator, and its arithmetic against scipy's convolutions."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.signal
import torch
from helpers import error, noise

from training import losses
from training.networks import Discriminator, DiscriminatorConfig
from training.networks.discriminator import EqualConv2d, minibatch_std

TINY = {"img_shape": (16, 16), "channel_base": 64, "channel_max": 8, "mapping_layers": 2}  # channels 4, 8, 8
VARIANTS = {
    "plain": {},
    "conditional": {"c_dim": 3},
    "label without mapping": {"c_dim": 3, "mapping_layers": 0},
    "groups of two": {"mbstd_group": 2},
    "grey": {"img_channels": 1},
    "24x16": {"img_shape": (16, 24)},
    "20x28": {"img_shape": (28, 20)},  # halved twice, to 5x7
}


def fresh(dtype=torch.float64, seed=0, **changes):
    """Make a discriminator whose biases are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        D = Discriminator(DiscriminatorConfig(**TINY | changes))
        with torch.no_grad():
            for name, p in D.named_parameters():
                if name.endswith("bias"):
                    p += torch.randn(p.shape) * (30 if name.startswith("mapping.layers") else 0.3)
    return D.to(dtype)


@functools.cache
def frozen(dtype=torch.float64, **changes):
    return fresh(dtype, **changes).requires_grad_(False)


def judged(D, n, seed=1):
    """Return images, and labels where D takes them."""
    dtype, c = D.from_rgb.weight.dtype, D.config
    img = noise(n, c.img_channels, *c.img_shape, seed=seed, dtype=dtype)
    return img, noise(n, c.c_dim, seed=seed + 1, dtype=dtype) if c.c_dim else None


# --- The same arithmetic, written a second time -------------------------------------------------------------------


FILTER = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64


def lrelu(y):
    return np.where(y > 0, y, 0.2 * y) * math.sqrt(2)


def correlate(x, weight, padding, stride=1):
    """[N,I,H,W], [O,I,k,k] -> [N,O,·,·]: one plane at a time."""
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    planes = [
        [sum(scipy.signal.correlate2d(plane, k, mode="valid") for plane, k in zip(n, o, strict=True)) for o in weight]
        for n in x
    ]
    return np.array(planes)[:, :, ::stride, ::stride]


def filtered(x, padding):
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    return np.array([[scipy.signal.convolve2d(plane, FILTER, mode="valid") for plane in n] for n in x])


class Dense:
    def __init__(self, D):
        self.p = {name: tensor.numpy() for name, tensor in D.state_dict().items()}
        self.c = D.config

    def conv(self, name, x, *, halve=False, gain=1.0):
        weight = self.p[f"{name}.weight"]
        k = weight.shape[-1]
        weight = weight / math.sqrt(weight.shape[1] * k * k)
        if halve and k == 3:
            y = correlate(filtered(x, 2), weight, 0, stride=2)
        elif halve:
            y = correlate(filtered(x, 1)[:, :, ::2, ::2], weight, 0)
        else:
            y = correlate(x, weight, k // 2)
        if f"{name}.bias" not in self.p:
            return y * gain
        return np.clip(lrelu(y + self.p[f"{name}.bias"].reshape(1, -1, 1, 1)), -256, 256) * gain

    def linear(self, name, x, *, lr_mult=1.0, act=True):
        weight = self.p[f"{name}.weight"]
        y = x @ weight.T * (lr_mult / math.sqrt(weight.shape[1])) + lr_mult * self.p[f"{name}.bias"]
        return lrelu(y) if act else y

    def logits(self, img, c):
        x, half = self.conv("from_rgb", img), math.sqrt(0.5)
        while min(x.shape[2:]) > 7:
            r = 2 ** int(math.log2(min(x.shape[2:])))
            main = self.conv(f"blocks.{r}.conv1", self.conv(f"blocks.{r}.conv0", x), halve=True, gain=half)
            x = main + self.conv(f"blocks.{r}.skip", x, halve=True, gain=half)
        x = self.conv("epilogue.conv", deviations(x, self.c.mbstd_group))
        x = self.linear("epilogue.out", self.linear("epilogue.fc", x.reshape(len(x), -1)), act=False)
        if c is not None:
            y = self.linear("mapping.embed", c, act=False)
            y = y / np.sqrt(np.mean(y**2, axis=1, keepdims=True) + 1e-8)
            for i in range(self.c.mapping_layers):
                y = self.linear(f"mapping.layers.{i}", y, lr_mult=0.01)
            x = np.sum(x * y, axis=1, keepdims=True) / math.sqrt(x.shape[1])
        return x


def deviations(x, group):
    """Minibatch standard deviation, image by image: n goes with n ± N/G, n ± 2N/G, …"""
    count = len(x)
    stride = count // min(group, count)
    out = []
    for n in range(count):
        friends = x[n % stride :: stride]
        deviation = np.sqrt(((friends - friends.mean(axis=0)) ** 2).mean(axis=0) + 1e-8).mean()
        out.append(np.concatenate([x[n], np.full((1, *x.shape[2:]), deviation)]))
    return np.array(out)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_logits_are_the_published_arithmetic(variant):
    D = frozen(**VARIANTS[variant])
    img, c = judged(D, 4)
    got = D(img, c)
    assert got.shape == (4, 1)
    expected = Dense(D).logits(img.numpy(), None if c is None else c.numpy())
    assert error(got, torch.from_numpy(expected)) <= 1e-10


@pytest.mark.parametrize(
    ("kernel", "halve", "size"), [(1, False, (8, 8)), (1, True, (4, 10)), (3, False, (4, 10)), (3, True, (8, 8))]
)
def test_a_convolution_is_scipys(kernel, halve, size):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = EqualConv2d(3, 2, kernel, halve=halve, act="linear", bias=False).double().requires_grad_(False)
    x = noise(2, 3, *size)
    got, weight = layer(x).numpy(), layer.weight.numpy() / math.sqrt(3 * kernel**2)
    if halve:
        full = filtered(x.numpy(), {1: 1, 3: 2}[kernel])
        expected = correlate(full, weight, 0, stride=2)  # for 1×1, filtering all and keeping half is the same
        assert got.shape == (2, 2, size[0] // 2, size[1] // 2)
    else:
        expected = correlate(x.numpy(), weight, kernel // 2)
    assert np.allclose(got, expected, rtol=0, atol=1e-12)


def test_both_paths_of_a_block_carry_half_the_variance_and_only_the_main_one_a_clamp():
    block = frozen().blocks["16"]
    x = noise(1, 4, 16, 16)
    assert block.conv1(block.conv0(x * 1e9)).abs().max().item() == pytest.approx(256 * math.sqrt(0.5))
    assert torch.allclose(block.skip(x * 1e9), block.skip(x) * 1e9, rtol=1e-10)
    assert torch.equal(block(x), block.conv1(block.conv0(x)) + block.skip(x))


# --- Minibatch standard deviation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "group"), [(1, 4), (4, 4), (12, 4), (4, 1), (5, 9)])
def test_the_minibatch_deviation_is_its_closed_form(count, group):
    x = noise(count, 3, 2, 5)
    got = minibatch_std(x, group)
    assert got.shape == (count, 4, 2, 5)
    assert np.allclose(got.numpy(), deviations(x.numpy(), group), rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", ["plain", "conditional"])
def test_several_batches_in_one_call_are_judged_as_in_calls_of_their_own(variant):
    D = frozen(**VARIANTS[variant])
    img, c = judged(D, 24)
    parts = [D(img[i : i + 8], None if c is None else c[i : i + 8]) for i in (0, 8, 16)]
    assert torch.allclose(D(img, c, batches=3), torch.cat(parts), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="do not divide"):
        D(img, c, batches=5)


def test_equal_images_deviate_by_the_root_of_epsilon():
    x = noise(1, 3, 4, 4).expand(4, 3, 4, 4)
    assert torch.allclose(minibatch_std(x, 4)[:, 3], torch.full((4, 4, 4), 1e-4).double(), rtol=1e-9)


def test_groups_of_several_processes_are_those_of_the_whole_batch():
    """Two batches of eight images; each of four processes has two of each, and groups hold four."""
    x = noise(16, 3, 4, 4)

    def own(x, rank):
        return x.unflatten(0, (2, 8))[:, rank::4].flatten(0, 1)

    for rank in range(4):
        everyone = torch.stack([own(x, r).unflatten(0, (2, 2)) for r in range(4)])
        procs = SimpleNamespace(rank=rank, world=4, gather=lambda mine, everyone=everyone: everyone)
        assert torch.equal(minibatch_std(own(x, rank), 4, 2, procs), own(minibatch_std(x, 4, 2), rank))


@pytest.mark.parametrize(("variant", "group"), [("plain", 4), ("conditional", 4), ("plain", 1)])
def test_a_batch_equals_its_groups_one_by_one(variant, group):
    D = frozen(**VARIANTS[variant], mbstd_group=group)
    img, c = judged(D, 3 * group)
    logits = D(img, c)
    for first in range(3):
        members = slice(first, None, 3)
        alone = D(img[members], None if c is None else c[members])
        assert error(alone, logits[members]) <= 1e-12


def test_ranks_that_split_a_batch_see_whole_groups():
    """Image i goes to rank i mod P: 2 or 3 ranks of 4 equal one of 8 or 12."""
    D = frozen()
    for ranks in (2, 3):
        img, _ = judged(D, 4 * ranks)
        logits = D(img)
        for rank in range(ranks):
            assert error(D(img[rank::ranks]), logits[rank::ranks]) <= 1e-12


def test_an_image_is_judged_with_its_group_and_no_other():
    D = frozen()
    img, _ = judged(D, 8)
    before = D(img)
    img[0] += 1
    moved = (D(img) - before).abs().flatten() > 1e-9
    assert moved.tolist() == [True, False] * 4


POOLED = {
    2: lambda x: x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5)),
    0.5: lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3),
}


@pytest.mark.parametrize(("variant", "factor"), [("plain", 2), ("20x28", 2), ("plain", 0.5)])
def test_images_of_other_sizes_are_judged_by_the_means_of_their_last_features(variant, factor):
    D = frozen(**VARIANTS[variant])
    img = noise(4, 3, *(int(side * factor) for side in D.config.img_shape))
    x = D.from_rgb(img)
    for block in D.blocks.values():
        x = block(x)
    assert error(D(img), D.epilogue(POOLED[factor](x))) <= 1e-12


# --- Learning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "conditional", "label without mapping", "20x28"])
def test_every_parameter_receives_a_gradient(variant):
    D = fresh(**VARIANTS[variant])
    (real, c), (fake, _) = judged(D, 4), judged(D, 4, seed=9)
    losses.logistic_D(D(real, c), D(fake, c)).mean().backward()
    still = {n for n, p in D.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert still == set()


@pytest.mark.parametrize("variant", ["plain", "conditional", "label without mapping", "20x28"])
def test_r1_moves_every_parameter_but_the_biases_after_the_deviation(variant):
    """Leaky ReLUs are linear in pieces, so a bias bends the gradient only through the minibatch deviation."""
    D = fresh(**VARIANTS[variant])
    real, c = judged(D, 4)
    losses.r1(lambda x: D(x, c), real).mean().backward()
    still = {n for n, p in D.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert still == {"epilogue.conv.bias", "epilogue.fc.bias", "epilogue.out.bias"}


@pytest.mark.parametrize("variant", ["plain", "conditional"])
def test_the_gradient_of_the_image_is_that_of_finite_differences(variant):
    D = frozen(**VARIANTS[variant])
    img, c = judged(D, 2)
    img.requires_grad_()
    (gradient,) = torch.autograd.grad(D(img, c).sum(), img)
    direction = noise(*img.shape, seed=5)
    step = 1e-6
    with torch.no_grad():
        slope = (D(img + step * direction, c) - D(img - step * direction, c)).sum() / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_autocast_gives_nearly_the_float64_logits_in_float32(dtype, bound):
    D = frozen(torch.float32, c_dim=3)
    img, c = judged(D, 4)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        got = D(img, c)
    assert got.dtype == torch.float32
    assert error(got.double(), frozen(c_dim=3)(img.double(), c.double())) <= bound


# --- Settings, bad input, state -----------------------------------------------------------------------------------


def test_published_widths():
    """channel_base 32768, channel_max 512."""
    c = DiscriminatorConfig()
    assert [c.channels(2**i) for i in range(2, 11)] == [512] * 5 + [256, 128, 64, 32]
    assert (c.img_shape, c.mbstd_group, c.mapping_layers) == ((512, 512), 4, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"img_shape": (4, 4)}, ["4x4", "8x8 or more"]),
        ({"img_shape": (90, 90)}, ["90x90", "multiples of 16", "--resolution=80x80"]),
        ({"img_shape": (64, 100)}, ["100x64", "multiples of 16", "--resolution=96x64"]),
        ({"img_shape": (128, 128)}, ["channel_base=64", "no channel at resolution 128", "128 or more"]),
        ({"mbstd_group": 0}, ["mbstd_group", "greater than or equal to 1"]),
        ({"architecture": "resnet"}, ["architecture", "not permitted"]),
    ],
    ids=str,
)
def test_nonsense_settings_are_refused_in_a_sentence(change, words):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the words are compared below)
        DiscriminatorConfig(**TINY | change)
    for word in words:
        assert word in str(refusal.value)


def some(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda D, _: D(some(2, 3, 16, 8)), ["img must be [N,3,16,16]", "[2, 3, 16, 8]"]),
        (lambda D, _: D(some(2, 3, 3, 3)), ["img must be [N,3,16,16]", "halved 2 times", "[2, 3, 3, 3]"]),
        (lambda D, _: D(some(6, 3, 16, 16)), ["6 images", "groups of 4"]),
        (lambda _, C: C(some(2, 3, 16, 16)), ["conditional", "c must be [N,3]", "None"]),
        (lambda _, C: C(some(1, 3, 16, 16), some(4, 3)), ["c ", "4", "1"]),
        (lambda D, _: D(some(2, 3, 16, 16), some(2, 3)), ["unconditional"]),
        (lambda D, _: D(some(0, 3, 16, 16)), ["img", "empty"]),
    ],
)
def test_a_wrong_shape_is_refused_in_a_sentence(call, words):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the words are compared below)
        call(frozen(), frozen(c_dim=3))
    for word in words:
        assert word in str(refusal.value)


def test_a_seed_gives_one_discriminator():
    first, second, third = (fresh(seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], third[name]) for name in first)
