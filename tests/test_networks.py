"""Laws of the generator and its settings; its arithmetic against a second, dense, channels-first writing of it."""

import copy
import functools
import io
import math
import re

import numpy as np
import pytest
import torch
from helpers import error, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from training import losses
from training.networks import COORDS, Discriminator, DiscriminatorConfig, Generator, GeneratorConfig
from training.networks.creps import grow, thicken, widen
from training.networks.layers import EqualLinear, Head, SynthesisLayer, compute_with
from training.networks.mapping import normalise

TINY = {
    "img_shape": (16, 16),
    "channel_base": 128,  # widths 16, 16, 8: the blocks differ
    "channel_max": 16,
    "thickness": 3,
    "z_dim": 10,
    "w_dim": 12,
    "mapping_layers": 2,
    "biline_channels": 8,
}
VARIANTS = {
    "skip": {},
    "no decoders": {"decoders": False},
    "orig": {"architecture": "orig"},
    "conditional": {"c_dim": 3},
    "deep": {"depth": 4, "img_shape": (10, 10), "coords": "centers"},
    "oblong": {"img_shape": (12, 20)},
    "shallow": {"depth": 2, "img_channels": 1},
}
TIGHT = {torch.float64: 1e-12, torch.float32: 1e-5}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def positions(count, coords, dtype=torch.float32):
    return COORDS[coords].positions(count, dtype)


def shaken(module, seed=5):
    """Move every weight from special values, such as the zeros and ones of new biases."""
    rng = seeded(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            # lr_mult 0.01 makes the mapping's biases count a hundredth
            scale = 30 if re.search(r"mapping\.layers\.\d+\.bias", name) else 0.3
            p += scale * torch.randn(p.shape, generator=rng, dtype=p.dtype)
        if hasattr(module, "mapping") and hasattr(module.mapping, "w_avg"):
            module.mapping.w_avg.copy_(torch.randn(module.mapping.w_avg.shape, generator=rng))
    return module


def fresh(dtype=torch.float64, seed=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return shaken(Generator(GeneratorConfig(**TINY | changes))).to(dtype)


@functools.cache
def frozen(dtype=torch.float64, **changes):
    return fresh(dtype, **changes).requires_grad_(False)


def styles(G, n, seed=2):
    """Return ws that differ between layers, so that a layer that reads the wrong one shows."""
    dtype = G.mapping.w_avg.dtype
    return noise(n, G.config.num_ws, G.config.w_dim, dtype=dtype, seed=seed)


def labels(G, n):
    return noise(n, G.config.c_dim, dtype=G.mapping.w_avg.dtype, seed=4) if G.config.c_dim else None


# --- An image is a function of position --------------------------------------------------------------------------


@functools.cache
def whole(coords, dtype):
    """Return an image that is not square, its positions and its lines."""
    G = frozen(dtype, coords=coords)
    rows, cols = positions(11, coords, dtype), positions(14, coords, dtype)
    ws = styles(G, 2)
    return G, ws, rows, cols, G.synthesis(ws, rows, cols), G.synthesis.lines(ws, rows, cols)


some_rows = st.lists(st.integers(0, 10), min_size=1, max_size=6)
some_cols = st.lists(st.integers(0, 13), min_size=1, max_size=6)
each_grid = pytest.mark.parametrize("coords", COORDS)
each_kind = pytest.mark.parametrize(("coords", "dtype"), [("endpoints", torch.float64), ("centers", torch.float32)])


@each_kind
@settings(max_examples=15, deadline=None, derandomize=True)
@given(i=some_rows, j=some_cols)
def test_any_rows_by_any_columns_are_that_part_of_the_image(coords, dtype, i, j):
    G, ws, rows, cols, image, _ = whole(coords, dtype)
    part = G.synthesis(ws, rows=rows[i], cols=cols[j])
    assert part.shape == (2, 3, len(i), len(j))
    assert part.dtype == dtype
    assert error(part, image[:, :, i][..., j]) <= TIGHT[dtype]


@each_kind
@settings(max_examples=15, deadline=None, derandomize=True)
@given(top=st.integers(0, 10), left=st.integers(0, 13), height=st.integers(1, 11), width=st.integers(1, 14))
def test_a_window_of_the_image_equals_the_image_of_the_window(coords, dtype, top, left, height, width):
    G, ws, _, _, image, lines = whole(coords, dtype)
    window = slice(top, top + height), slice(left, left + width)
    part = G.synthesis.pixels(lines.window(*window), ws[:, -1])
    assert error(part, image[:, :, window[0], window[1]]) <= TIGHT[dtype]


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_each_image_may_have_its_own_rows_and_columns(recompute):
    G, ws = copy.deepcopy(frozen()), styles(frozen(), 2)
    compute_with(G, recompute=recompute)
    rows, cols = noise(2, 5), noise(2, 7, seed=1)
    alone = [G.synthesis(*one) for one in zip(ws.split(1), rows, cols, strict=True)]
    with torch.set_grad_enabled(recompute == "all"):
        assert error(G.synthesis(ws.requires_grad_(), rows, cols), torch.cat(alone)) <= 1e-12
        assert error(G.synthesis(ws, rows[0], cols)[:1], alone[0]) <= 1e-12


@each_grid
def test_the_default_grid_is_the_one_trained_at(coords):
    G = frozen(coords=coords)
    t = positions(16, coords, torch.float64)
    ws = styles(G, 1)
    assert torch.equal(G.synthesis(ws), G.synthesis(ws, rows=t, cols=t))
    z = noise(2, 10)
    assert error(G(z, rows=t[2:5], cols=t[4:5]), G(z)[:, :, 2:5, 4:5]) <= 1e-12


def test_the_image_continues_beyond_its_edges():
    G, ws, rows, cols, image, _ = whole("endpoints", torch.float64)
    wider = torch.cat([torch.tensor([-0.7, -0.1]).double(), rows, torch.tensor([1.2]).double()])
    more = G.synthesis(ws, wider, cols)
    assert more.isfinite().all()
    assert error(more[:, :, 2:-1], image) <= 1e-12
    assert (more[:, :, 0] - image[:, :, 0]).abs().max() > 1e-3


def test_rows_and_columns_are_not_exchanged():
    """Two rows at one position are equal, and so are columns; the transposed image is another one."""
    G, ws, rows, cols, image, _ = whole("endpoints", torch.float64)
    flat = G.synthesis(ws, rows[:1].repeat(3), cols)
    assert error(flat, flat[:, :, :1].expand_as(flat)) <= 1e-12
    upright = G.synthesis(ws, rows, cols[:1].repeat(3))
    assert error(upright, upright[..., :1].expand_as(upright)) <= 1e-12
    assert error(flat[..., 1:], flat[..., :-1]) > 0.1
    assert error(upright[:, :, 1:], upright[:, :, :-1]) > 0.1
    assert error(G.synthesis(ws, cols, rows).mT, image) > 0.1


@pytest.mark.parametrize("side", [2, 7])
def test_a_refined_grid_agrees_with_the_coarse_one(side):
    centres, ends = ((lambda n, c=c: positions(n, c, torch.float64)) for c in ("centers", "endpoints"))
    assert torch.allclose(centres(2 * side).unflatten(0, (-1, 2)).mean(1), centres(side), atol=1e-15)
    assert torch.allclose(ends(2 * side - 1)[::2], ends(side), atol=1e-15)


def test_positions_cover_the_image():
    assert positions(5, "endpoints").tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert positions(4, "centers").tolist() == [0.125, 0.375, 0.625, 0.875]
    assert positions(3, "centers").dtype == torch.float32


@each_grid
def test_a_convention_is_evenly_spaced_about_the_middle(coords):
    for count in (1, 2, 9):
        t = positions(count, coords, torch.float64)
        assert t.diff().tolist() == pytest.approx([1 / COORDS[coords].steps(count)] * (count - 1), abs=1e-15)
        assert count == 1 or t.mean().item() == pytest.approx(0.5)


# --- A batch equals its images one by one -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_equals_its_images_one_by_one(variant):
    G = frozen(**VARIANTS[variant])
    z, c = noise(3, 10), labels(G, 3)
    ws, image = G.mapping(z, c), G(z, c)
    assert image.shape == (3, G.config.img_channels, *G.config.img_shape)
    for n in range(3):
        one = slice(n, n + 1)
        label = None if c is None else c[one]
        assert error(G.mapping(z[one], label), ws[one]) <= 1e-12
        assert error(G(z[one], label), image[one]) <= 1e-11
    mixed = styles(G, 3)
    assert error(G.synthesis(mixed)[1:2], G.synthesis(mixed[1:2])) <= 1e-12


def test_an_empty_batch_is_an_empty_image():
    assert frozen()(noise(0, 10)).shape == (0, 3, 16, 16)


# --- Every parameter learns ---------------------------------------------------------------------------------------


each_topology = pytest.mark.parametrize("variant", ["skip", "no decoders", "orig", "conditional"])


@each_topology
def test_every_parameter_receives_a_gradient(variant):
    G = fresh(**VARIANTS[variant])
    c = labels(G, 2)
    losses.logistic_G(G(noise(2, 10), c).square().mean(dim=(1, 2, 3))).sum().backward()
    still = [n for n, p in G.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


@each_topology
def test_path_lengths_move_every_parameter_but_what_is_only_added_to_the_image(variant):
    G = fresh(**VARIANTS[variant])
    ws = G.mapping(noise(2, 10), labels(G, 2))
    image = noise(2, G.config.img_channels, *G.config.img_shape)
    losses.path_lengths(G.synthesis, ws, image).sum().backward()
    still = {n for n, p in G.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    added = {"decoder_img.bias", "refinement.0.head.bias", "refinement.1.head.bias"}
    assert still == {f"synthesis.pixels.{name}" for name in added}


def test_the_game_gives_both_players_a_gradient():
    G = fresh()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        D = Discriminator(DiscriminatorConfig(img_resolution=16, channel_max=8)).double()
    losses.logistic_G(D(G(noise(2, 10)))).mean().backward()
    for module in (G, D):
        assert [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


# --- The same arithmetic, written a second time -------------------------------------------------------------------


class Dense:
    """The generator from its published description: numpy, float64, channels first, every weight made per image."""

    def __init__(self, G):
        self.p = {name: tensor.numpy() for name, tensor in G.state_dict().items()}
        self.c = G.config

    def linear(self, name, x, *, lr_mult=1.0, act=False):
        """[N,I,…] -> [N,O,…]"""
        weight, bias = self.p[f"{name}.weight"], self.p[f"{name}.bias"]
        y = np.einsum("oi,ni...->no...", weight * lr_mult / math.sqrt(weight.shape[1]), x)
        y = y + lr_mult * bias.reshape(1, -1, *[1] * (x.ndim - 2))
        return np.where(y > 0, y, 0.2 * y) * math.sqrt(2) if act else y

    def modulated(self, name, x, w, *, head=False):
        """[N,I,A,B] -> [N,O,A,B]"""
        style = self.linear(f"{name}.affine", w)
        weight = self.p[f"{name}.weight"][None] * style[:, None, :]
        if head:
            weight = weight / math.sqrt(weight.shape[2])
        else:
            weight = weight / np.sqrt(np.sum(weight**2, axis=2, keepdims=True) + 1e-8)
        y = np.einsum("noi,niab->noab", weight, x) + self.p[f"{name}.bias"].reshape(1, -1, 1, 1)
        return np.clip(y if head else np.where(y > 0, y, 0.2 * y) * math.sqrt(2), -256, 256)

    def mapping(self, z, c, psi, cutoff):
        x = z / np.sqrt(np.mean(z**2, axis=1, keepdims=True) + 1e-8)
        if c is not None:
            y = self.linear("mapping.embed", c)
            x = np.concatenate([x, y / np.sqrt(np.mean(y**2, axis=1, keepdims=True) + 1e-8)], axis=1)
        for i in range(self.c.mapping_layers):
            x = self.linear(f"mapping.layers.{i}", x, lr_mult=0.01, act=True)
        blocks = self.c.depth or int(math.log2(max(self.c.img_shape))) - 1
        ws = np.stack([x] * (2 * blocks + 1), axis=1)
        average = self.p["mapping.w_avg"]
        ws[:, :cutoff] = average + psi * (ws[:, :cutoff] - average)
        return ws

    def line(self, axis, t, w):
        """[R] -> [N,C,R,D]"""
        name = "synthesis.lines.input"
        frequencies = self.p[f"{name}.freqs"].T  # [C/2,D]
        channels, thickness = 2 * frequencies.shape[0], frequencies.shape[1]
        phase = 2 * np.pi * t[None, :, None] * frequencies[:, None, :]
        wave = np.concatenate([np.sin(phase), np.sin(phase + np.pi / 2)])
        # our layout of the released [C,1,2D] is [rows or columns, D, C]
        style = self.linear(f"{name}.affine", w).reshape(-1, 2, thickness, channels)[:, axis]
        weight = self.p[f"{name}.weight"][axis] * style / math.sqrt(channels)
        return wave[None] * weight.transpose(0, 2, 1)[:, :, None, :]

    def lines(self, ws, rows, cols):
        """The summed pairs of lines after every fusion."""
        pair = [self.line(0, rows, ws[:, 0]), self.line(1, cols, ws[:, 0])]
        sums, total, read = [], None, 1
        for i in range(self.c.num_blocks):
            for j in range(1 if i == 0 else 2):
                pair = [self.modulated(f"synthesis.lines.blocks.{i}.layers.{j}", x, ws[:, read + j]) for x in pair]
            # the head's style is the one after the last layer's; the second block starts again where the first did
            at = read + (1 if i == 0 else 2)
            if i == self.c.num_blocks - 1 or (i > 0 and self.c.architecture == "skip"):
                out = [self.modulated(f"synthesis.lines.blocks.{i}.head", x, ws[:, at], head=True) for x in pair]
                total = out if total is None else [a + b for a, b in zip(total, out, strict=True)]
                sums.append(total)
            read = 1 if i == 0 else at
        return sums

    def decoder(self, name, x):
        for i in range(4):
            x = self.linear(f"synthesis.pixels.{name}.{i}", x, act=True)
        return x

    def image(self, ws, rows, cols):
        feature = None
        for k, (r, c) in enumerate(self.lines(ws, rows, cols)):
            fusion = np.einsum("ncid,ncjd->ncij", r * math.sqrt(0.5), c * math.sqrt(0.5))
            feature = fusion if k == 0 else self.decoder(f"decoders.{k - 1}", feature) + fusion
        feature = self.decoder("decoder_last", feature)
        image = self.linear("synthesis.pixels.decoder_img", feature)
        for i in range(2):
            for j in range(2):
                feature = self.modulated(f"synthesis.pixels.refinement.{i}.layers.{j}", feature, ws[:, -1])
            image = image + self.modulated(f"synthesis.pixels.refinement.{i}.head", feature, ws[:, -1], head=True)
        return image


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "no decoders"])
def test_the_image_is_the_published_arithmetic(variant):
    G = frozen(**VARIANTS[variant])
    dense, ws = Dense(G), styles(G, 2)
    rows, cols = noise(5, seed=7).sigmoid(), noise(4, seed=8).sigmoid()
    for (r, c), got_r, got_c in zip(
        dense.lines(ws.numpy(), rows.numpy(), cols.numpy()), *G.synthesis.lines(ws, rows, cols), strict=True
    ):
        assert error(got_r.movedim(-1, 1), torch.from_numpy(r)) <= 1e-10
        assert error(got_c.movedim(-1, 1), torch.from_numpy(c)) <= 1e-10
    expected = dense.image(ws.numpy(), rows.numpy(), cols.numpy())
    assert error(G.synthesis(ws, rows, cols), torch.from_numpy(expected)) <= 1e-10


@pytest.mark.parametrize(
    ("variant", "psi", "cutoff"),
    [("skip", 1, None), ("conditional", 0.7, None), ("conditional", 0.5, 3), ("skip", -1, 2)],
)
def test_the_mapping_is_the_published_arithmetic(variant, psi, cutoff):
    G = frozen(**VARIANTS[variant])
    z, c = noise(3, 10), labels(G, 3)
    expected = Dense(G).mapping(z.numpy(), None if c is None else c.numpy(), psi, cutoff)
    assert error(G.mapping(z, c, psi, cutoff), torch.from_numpy(expected)) <= 1e-12


def test_without_decoders_the_fusions_are_added():
    G = frozen(decoders=False)
    ws, t = styles(G, 2), positions(6, "endpoints", torch.float64)
    rows, cols = G.synthesis.lines(ws, t, t)
    seen = []
    hook = G.synthesis.pixels.decoder_last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    G.synthesis(ws, t, t)
    hook.remove()
    expected = 0.5 * torch.einsum("knhdc,knwdc->nhwc", rows, cols).flatten(1, 2)
    assert error(torch.cat(seen), expected) <= 1e-12


@pytest.mark.parametrize("kind", [SynthesisLayer, Head, EqualLinear])
def test_a_layer_folded_for_a_style_is_the_layer(kind):
    layer = shaken(EqualLinear(5, 6, act="lrelu", lr_mult=0.1) if kind is EqualLinear else kind(5, 7, 4)).double()
    x, w = noise(2, 9, 5), noise(2, 4, seed=1)
    for n in range(2):
        folded = layer.folded(w[n])
        expected = layer(x[n]) if isinstance(layer, EqualLinear) else layer(x[n : n + 1], w[n : n + 1])[0]
        assert error(folded.activate(x[n] @ folded.weight.mT + folded.bias), expected) <= 1e-12


def test_a_normalised_latent_has_a_mean_square_of_one():
    x = noise(4, 10) * torch.tensor([1e-2, 1, 30, 1e3])[:, None]
    assert torch.allclose(normalise(x).square().mean(1), torch.ones(4).double(), atol=1e-3)  # ε = 1e-8 beside 1e-4
    assert torch.allclose(normalise(x)[1:], normalise(x[1:] * 7), atol=1e-7)
    assert torch.equal(normalise(torch.zeros(1, 5)), torch.zeros(1, 5))


# --- Styles and truncation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["skip", "orig", "deep", "shallow"])
def test_each_style_moves_the_lines_from_its_layer_on_and_the_last_one_only_the_refinement(variant):
    G = frozen(**VARIANTS[variant])
    ws, t = styles(G, 1), positions(4, "endpoints", torch.float64)
    before, depth = G.synthesis.lines(ws, t, t), G.config.num_blocks
    assert G.config.num_ws == ws.shape[1] == 2 * depth + 1
    # Fusion f comes after the block at index f + 1, whose head reads the style 2f + 3.
    last_read = [2 * depth - 1] if variant == "orig" else [2 * f + 3 for f in range(depth - 1)]
    for k in range(2 * depth + 1):
        other = ws.clone()
        other[:, k] += 1
        after = G.synthesis.lines(other, t, t)
        for f, last in enumerate(last_read):
            for a, b in zip(before, after, strict=True):
                assert torch.equal(a[f], b[f]) == (k > last), (k, f)
        assert not torch.equal(G.synthesis(other, t, t), G.synthesis(ws, t, t)), k


def test_no_truncation_changes_nothing_and_full_truncation_gives_the_average():
    G = frozen()
    z, average = noise(3, 10), G.mapping.w_avg
    ws = G.mapping(z)
    assert ws.shape == (3, 7, 12)
    assert torch.equal(ws, ws[:, :1].expand_as(ws))
    for cutoff in (None, 0, 3, 7):
        assert torch.equal(G.mapping(z, None, 1, cutoff), ws)
        first = 7 if cutoff is None else cutoff
        got = G.mapping(z, truncation_psi=0, truncation_cutoff=cutoff)
        assert torch.allclose(got[:, :first], average.expand(3, first, 12), rtol=0, atol=1e-14)
        assert torch.equal(got[:, first:], ws[:, first:])


# --- Half precision -----------------------------------------------------------------------------------------------


def signal_to_noise(got, expected):
    """Decibels between the deviation of the image and that of the error."""
    return 20 * math.log10(expected.std().item() / (got.double() - expected).square().mean().sqrt().item())


# Measured over 8 seeds and two sizes: float16 50 … 61 dB, bfloat16 34 … 42: three bits less, 18 dB. An 8-bit image
# whose deviation is a quarter of the range has a rounding error of 47 dB.
@pytest.mark.parametrize(
    ("dtype", "decibels", "seed"), [(torch.float32, 95, 0), (torch.float16, 47, 1), (torch.bfloat16, 30, 0)]
)
def test_autocast_gives_nearly_the_float64_image_in_float32(dtype, decibels, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        G = Generator(GeneratorConfig(**TINY)).requires_grad_(False)
    z = noise(2, 10, dtype=torch.float32)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        ws, image = G.mapping(z), G(z)
    assert ws.dtype == image.dtype == torch.float32
    assert image.isfinite().all()
    expected = G.double()(z.double())
    assert signal_to_noise(image, expected) >= decibels
    assert error(ws.double(), G.mapping(z.double())) <= 1e-5


HUGE = {
    "layers": r"synthesis.*layers\.\d\.weight",
    "styles of layers": r"layers\.\d\.affine\.weight",
    "heads of colours": r"refinement.*head\.weight",
}


@pytest.mark.parametrize("part", HUGE)
def test_huge_weights_stay_finite_in_float16(part):
    G = fresh(torch.float32)
    touched = [p for name, p in G.named_parameters() if re.search(HUGE[part], name)]
    assert touched
    with torch.no_grad():
        for p in touched:
            p *= 1e4
        with torch.autocast("cpu", torch.float16):
            image = G(noise(2, 10, dtype=torch.float32))
    assert image.dtype == torch.float32
    assert image.isfinite().all()


def test_layers_of_any_scale_give_one_image():
    """Demodulation divides the scale of a weight out, so its float16 copy must not care either."""
    G = frozen(torch.float32)
    big = fresh(torch.float32)
    with torch.no_grad():
        for name, p in big.named_parameters():
            if re.search(HUGE["layers"], name):
                p *= 1e4
        z = noise(2, 10, dtype=torch.float32)
        expected = G(z)
        with torch.autocast("cpu", torch.float16):
            got = big(z)
    assert error(got, expected) <= 0.01


def test_float64_positions_reach_below_float32_in_a_float32_model():
    """A 10⁹-fold zoom: float32 cannot distinguish these rows, float64 can."""
    G = frozen(torch.float32)
    rows = 0.5 + torch.arange(4).double() * 1e-9
    ws = styles(G, 1)
    for dtype, distinct in ((torch.float32, False), (torch.float64, True)):
        lines = G.synthesis.lines.input.features(rows.to(dtype))
        assert lines.dtype == torch.float32
        assert bool((lines[0] != lines[-1]).any()) == distinct
    assert error(G.synthesis(ws, rows, rows), frozen().synthesis(ws.double(), rows, rows).float()) <= 1e-3


# --- Settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolution", "widths"),
    [(128, [1024] * 5 + [512]), (512, [1024] * 5 + [512, 256, 128]), (1024, [1024] * 5 + [512, 256, 128, 64])],
)
def test_published_sizes(resolution, widths):
    c = GeneratorConfig(img_resolution=resolution)
    assert c.widths == widths == [min(65536 // 2**i, 1024) for i in range(2, 2 + len(widths))]
    assert c.num_blocks == len(widths) == math.log2(resolution) - 1
    assert c.num_ws == 2 * len(widths) + 1
    assert c.num_fusions == len(widths) - 1
    assert GeneratorConfig(img_resolution=resolution, architecture="orig").num_fusions == 1


def test_defaults_are_the_published_ones():
    c = GeneratorConfig()
    assert (c.img_shape, c.z_dim, c.w_dim, c.mapping_layers) == ((512, 512), 512, 512, 8)
    assert (c.channel_base, c.channel_max, c.biline_channels, c.thickness, c.bandwidth) == (65536, 1024, 32, 8, 10)
    assert (c.architecture, c.decoders, c.coords, c.c_dim) == ("skip", True, "endpoints", 0)


def test_the_refinement_and_the_decoders_have_the_published_widths():
    G = Generator(GeneratorConfig(**TINY | {"biline_channels": 32}))
    shapes = {name: tuple(p.shape) for name, p in G.synthesis.pixels.named_parameters()}
    assert [shapes[f"decoder_last.{i}.weight"] for i in range(4)] == [(64, 32), (128, 64), (64, 128), (32, 64)]
    layers = [shapes[f"refinement.{i}.layers.{j}.weight"] for i in range(2) for j in range(2)]
    assert layers == [(128, 32), (128, 128), (64, 128), (64, 64)]
    assert shapes["decoder_img.weight"] == (3, 32)
    assert (shapes["refinement.0.head.weight"], shapes["refinement.1.head.weight"]) == ((3, 128), (3, 64))
    assert len(G.synthesis.pixels.decoders) == G.config.num_blocks - 2


def test_depth_is_set_apart_from_the_size_trained_at():
    G = frozen(depth=4, img_shape=(10, 10))
    assert G.config.num_ws == 9
    assert G(noise(1, 10)).shape == (1, 3, 10, 10)
    assert GeneratorConfig(img_resolution=512).num_blocks == GeneratorConfig(img_resolution=900, depth=8).num_blocks


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_thicker_generator_renders_the_same_images(variant):
    changes = VARIANTS[variant]
    G = frozen(**changes)
    thickness = G.config.thickness
    thick = Generator(GeneratorConfig(**TINY | changes | {"thickness": 3 * thickness})).double()
    thick.load_state_dict(thicken(G.state_dict(), 3 * thickness, noise=0))
    ws = styles(G, 2)
    torch.testing.assert_close(thick.synthesis(ws), G.synthesis(ws), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wider", [{"biline_channels": 7}, {"channel_base": 256}], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_wider_generator_renders_the_same_images_and_trains(variant, wider):
    narrow = {"channel_base": 32, "channel_max": 8, "biline_channels": 4} | VARIANTS[variant]  # widths 8, 4, …
    G = frozen(**narrow)
    wide = Generator(GeneratorConfig(**TINY | narrow | wider)).double()
    fresh = {name: t.clone() for name, t in wide.state_dict().items()}
    wide.load_state_dict(widen(G.state_dict(), fresh))
    ws = styles(G, 2)
    images = wide.synthesis(ws)
    torch.testing.assert_close(images, G.synthesis(ws), rtol=1e-10, atol=1e-10)
    images.square().sum().backward()
    grown = [p for (n, p), old in zip(wide.named_parameters(), G.parameters(), strict=True) if p.shape != old.shape]
    assert grown
    assert sum(p.grad is not None and bool(p.grad.any()) for p in grown) == len(grown)


def test_only_a_generator_that_is_larger_in_every_way_grows():
    G = frozen(thickness=2, biline_channels=4)
    old = G.state_dict()
    for changes, how in (
        ({"thickness": 4, "biline_channels": 6}, ["thickness 2 copied to 4", "tensors widened"]),
        ({"thickness": 2, "biline_channels": 3}, []),
        ({"thickness": 3, "biline_channels": 4}, []),
        ({"thickness": 2, "biline_channels": 4, "img_channels": 4}, []),
        ({"thickness": 2, "biline_channels": 6, "w_dim": 2 * G.config.w_dim}, []),
        ({"thickness": 2, "biline_channels": 4}, []),
    ):
        weights, grown = grow(old, Generator(GeneratorConfig(**TINY | changes)).double().state_dict())
        assert len(grown) == len(how)
        assert all(word in line for word, line in zip(how, grown, strict=True))
        assert grown or weights is old


def test_the_copies_of_a_thicker_generator_differ():
    G = frozen(thickness=2)
    weights = thicken(G.state_dict(), 6)
    for name, axis in (("weight", 1), ("freqs", 0)):
        first, second, third = weights[f"synthesis.lines.input.{name}"].chunk(3, axis)
        assert torch.equal(first, G.state_dict()[f"synthesis.lines.input.{name}"])
        assert (second != first).all()
        assert (third != second).all()


def test_a_resolution_stands_for_a_square():
    assert GeneratorConfig(img_resolution=32) == GeneratorConfig(img_shape=(32, 32))
    with pytest.raises(ValueError, match=r"img_resolution=32 and img_shape=\(32, 48\) differ"):
        GeneratorConfig(img_resolution=32, img_shape=(32, 48))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"thicknes": 3}, ["thicknes", "not permitted"]),
        ({"img_shape": (4, 4)}, ["img_shape=(4, 4)", "too small", "depth"]),
        ({"img_shape": (16.5, 16)}, ["img_shape", "integer"]),
        ({"img_channels": 0}, ["img_channels", "greater than or equal to 1"]),
        ({"depth": 20}, ["empty last block", "larger channel_base"]),
        ({"channel_max": 7}, ["channel_max=7", "odd first block", "even channel_max"]),
        ({"bandwidth": math.nan}, ["bandwidth"]),
        ({"coords": "centres"}, ["coords", "'endpoints' or 'centers'"]),
    ],
    ids=str,
)
def test_nonsense_settings_are_refused_in_a_sentence(change, words):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the words are compared below)
        GeneratorConfig(**TINY | change)
    for word in words:
        assert word in str(refusal.value)


def test_every_size_is_positive():
    for name in [*TINY.keys() - {"img_shape"}, "img_channels", "depth", "bandwidth"]:
        with pytest.raises(ValidationError, match=name):
            GeneratorConfig(**TINY | {name: 0})


# --- Bad input ----------------------------------------------------------------------------------------------------


def some(*shape):
    return torch.zeros(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda G, _: G.synthesis(some(2, 6, 12)), ["ws must be [N,7,12]", "[2, 6, 12]"]),
        (lambda G, _: G.synthesis(some(2, 7, 12), rows=some(4, 1)), ["rows", "[N,R]", "[4, 1]"]),
        (lambda G, _: G.synthesis(some(2, 7, 12), cols=some(0)), ["cols", "[0]"]),
        (lambda G, _: G.synthesis(some(2, 7, 12), rows=torch.arange(4)), ["rows", "float"]),
        (lambda G, _: G(some(2, 11)), ["z must be [N,10]", "[2, 11]"]),
        (lambda _, C: C(some(2, 10)), ["conditional", "c must be [N,3]", "None"]),
        (lambda _, C: C(some(2, 10), some(3)), ["conditional", "c must be [N,3]", "[3]"]),
        (lambda G, _: G(some(2, 10), some(2, 3)), ["unconditional"]),
        (lambda _, C: C(some(2, 10), some(3, 3)), ["c ", "2", "3"]),
    ],
)
def test_a_wrong_shape_is_refused_in_a_sentence(call, words):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the words are compared below)
        call(frozen(), frozen(c_dim=3))
    for word in words:
        assert word in str(refusal.value)


# --- State --------------------------------------------------------------------------------------------------------


def test_a_saved_generator_gives_the_same_image():
    G, file = fresh(c_dim=3), io.BytesIO()
    torch.save(G.state_dict(), file)
    file.seek(0)
    other = fresh(seed=9, c_dim=3)
    z, c = noise(1, 10), labels(G, 1)
    assert error(other(z, c), G(z, c)) > 0.01
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(z, c, truncation_psi=0.5), G(z, c, truncation_psi=0.5))


def test_the_state_holds_everything_that_a_seed_samples():
    """Two seeds share no sampled tensor, so none is missing from the state; one seed gives equal tensors."""
    first, again, second = (fresh(seed=s).state_dict() for s in (0, 0, 1))
    assert {"synthesis.lines.input.freqs", "mapping.w_avg"} <= set(first)
    for name in first:
        assert torch.equal(first[name], again[name])
        if name.endswith(("weight", "freqs")):
            assert not torch.equal(first[name], second[name])


def test_weights_are_sampled_as_published():
    """Mean 0, deviation 1 (100 in the mapping, 10 for the frequencies); affine biases 1, every other bias 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G = Generator(GeneratorConfig(**TINY | {"w_dim": 64, "z_dim": 64, "channel_max": 64, "channel_base": 2048}))
    for name, tensor in G.state_dict().items():
        if name.endswith("bias"):
            assert torch.equal(tensor, torch.full_like(tensor, float("affine" in name))), name
        elif name != "mapping.w_avg":
            deviation = 100 if name.startswith("mapping") else 10 if name.endswith("freqs") else 1
            spread = 5 / math.sqrt(tensor.numel())
            assert abs(tensor.mean().item()) <= deviation * spread, name
            assert abs(tensor.std().item() / deviation - 1) <= spread, name
