"""Laws of the engine: whatever it renders, in whatever parts, is the network's image, position by position.

The truth is `G.synthesis(ws, rows=…, cols=…)` in float64, at positions written out here a second time.
"""

import contextlib
import copy
import functools
import math
import os
import re
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rendering
from dnnlib.console import UserError
from rendering import Shot, engine, lens, perspective, points, render_points, rotation, shear, translation, zoom
from rendering.engine import Tiling, render_tiles
from rendering.grid import View
from torch_utils.images import to_uint8
from training.networks import Generator, GeneratorConfig

TINY = {
    "img_shape": (16, 16),
    "channel_base": 128,  # widths 16, 16, 8: the blocks differ
    "channel_max": 16,
    "thickness": 3,
    "z_dim": 10,
    "w_dim": 12,
    "mapping_layers": 1,
    "biline_channels": 8,
}
VARIANTS = {
    "skip": {},
    "orig": {"architecture": "orig"},
    "no decoders": {"decoders": False},
    "deep, grey": {"depth": 5, "img_channels": 1},
    "shallow, RGBA": {"depth": 2, "img_channels": 4},
    "one channel": {"biline_channels": 1, "thickness": 1},
    "thick": {"thickness": 8, "coords": "centers"},
}
TIGHT = {torch.float64: 1e-12, torch.float32: 1e-5}
each_dtype = pytest.mark.parametrize("dtype", TIGHT)
each_grid = pytest.mark.parametrize("coords", ["endpoints", "centers"])
some = functools.partial(settings, deadline=None, derandomize=True)
sides = st.integers(1, 23)


@functools.cache
def tiny(dtype=torch.float32, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G = Generator(GeneratorConfig(**TINY | changes)).eval().requires_grad_(False)
        for p in G.parameters():  # no weight left at a special value
            p += 0.3 * torch.randn(p.shape)
    return G.to(dtype)


def styles(G, n=2, seed=1):
    """Another style for every image and layer, so that one read in the wrong place shows."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, G.config.num_ws, G.config.w_dim, generator=rng).to(G.mapping.w_avg.dtype)


def render(G, ws, size=None, dtype=None, **shot):
    return rendering.render(G, ws, Shot(size, **shot), dtype=dtype)


@functools.cache
def double(G):
    return copy.deepcopy(G).double()


def plain(G, ws, rows, cols):
    with torch.no_grad():
        return double(G).synthesis(ws.double(), rows=rows, cols=cols)


def each_place(G, ws, x, y):
    """float64 [h,w] each -> [N,C,h,w]: every pixel an image of its own."""
    colours = [plain(G, ws, b[None], a[None]) for a, b in zip(x.flatten(), y.flatten(), strict=True)]
    return torch.cat(colours, dim=3).unflatten(3, x.shape).squeeze(2)


def across(count, coords, low=0.0, high=1.0):
    """`count` positions over [low,high], in Python's floats."""
    if coords == "centers":
        return torch.tensor([low + (i + 0.5) / count * (high - low) for i in range(count)], dtype=torch.float64)
    middle = [(low + high) / 2]
    each = middle if count == 1 else [low + i / (count - 1) * (high - low) for i in range(count)]
    return torch.tensor(each, dtype=torch.float64)


def mesh(rows, cols):
    """x and y of every pixel."""
    return torch.meshgrid(rows, cols, indexing="ij")[::-1]


def error(got, expected):
    assert got.shape == expected.shape
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


def psnr(got, expected):
    """Against the range of the image."""
    assert got.shape == expected.shape
    peak = expected.max() - expected.min()
    return 10 * math.log10(peak**2 / (got.double() - expected).square().mean())


@contextlib.contextmanager
def small(block=8, piece=9, points_block=8, density=64):
    """The engine's parts so small that tiny images are many of them, and points lie between few samples."""
    with (
        mock.patch.multiple(engine, BLOCK=block, PIECE={"cpu": piece}, POINTS_BLOCK=points_block),
        mock.patch.object(points, "DENSITY", density),
    ):
        yield


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- Tiles are the image ----------------------------------------------------------------------------------------


# Pairs: every variant in float64, one in float32 too.
each_network = pytest.mark.parametrize(
    ("variant", "dtype"), [(variant, torch.float64) for variant in VARIANTS] + [("skip", torch.float32)]
)


@each_network
@some(max_examples=10)
@given(
    size=st.tuples(sides, sides),
    tile=st.none() | st.integers(1, 30),
    block=st.integers(1, 40),
    piece=st.integers(1, 60),
    n=st.integers(1, 3),
)
def test_tiles_of_any_side_cover_any_image_once_and_equal_it(dtype, variant, size, tile, block, piece, n):
    G = tiny(dtype, **VARIANTS[variant])
    ws = styles(G, n)
    image, numbers = torch.zeros(n, G.config.img_channels, *size, dtype=dtype), {}
    with small(block, piece):
        tiling = Tiling.of(G, Shot(size, fit="stretch", tile=tile))
        for box, colours in render_tiles(G, ws, tiling):
            assert colours.shape[2:] == box.shape
            image[(..., *box.slices)] += colours
            numbers[tiling.number(box)] = box
    corners = [(numbers[i].y0, numbers[i].x0) for i in range(tiling.tiles)]  # numbered row by row
    assert corners == [(y, x) for y in range(0, size[0], tiling.tile) for x in range(0, size[1], tiling.tile)]
    assert error(image, plain(G, ws, *(across(side, G.config.coords) for side in size))) <= TIGHT[dtype]


@pytest.mark.parametrize(
    "changes",
    # The last has features of up to 300 cycles' phase, as the paper's network.
    [{"coords": "endpoints"}, {"coords": "centers"}, {"img_shape": (512, 512), "channel_base": 8192}],
)
def test_the_default_is_the_image_trained_at(changes):
    G = tiny(**changes)
    ws = styles(G, 1)
    assert error(render(G, ws), G.synthesis(ws)) <= 1e-4  # float32 positions there


def test_features_beyond_the_clamp_are_clamped_alike():
    G = copy.deepcopy(tiny())
    for name, p in G.synthesis.named_parameters():
        if "affine" not in name and name.endswith("bias"):
            p *= 400
    ws = styles(G)
    at = across(12, "endpoints")
    expected = plain(G, ws, at, at)
    with mock.patch("training.networks.layers.ModulatedLayer.clamp", math.inf):
        assert error(plain(G, ws, at, at), expected) > 0.01  # so something was clamped
    assert error(render(G, ws, (12, 12)), expected) <= 1e-5
    assert error(render(G, ws, (12, 12), transform=lambda x, y: (x, y), exact=True), expected) <= 1e-5


# --- Windows, fits ------------------------------------------------------------------------------------------------


@each_grid
@some(max_examples=25)
@given(data=st.data(), height=st.integers(2, 23), width=st.integers(2, 23), tile=st.integers(3, 12))
def test_a_window_is_that_part_of_the_larger_image(coords, data, height, width, tile):
    G = tiny(coords=coords)
    ws = styles(G, 1)
    between = coords == "endpoints"  # a window runs from pixel to pixel, or from edge to edge
    (y0, y1), (x0, x1) = (
        sorted(data.draw(st.lists(st.integers(0, side - between), min_size=2, max_size=2, unique=True)))
        for side in (height, width)
    )
    window = (x0 / (width - between), y0 / (height - between), x1 / (width - between), y1 / (height - between))
    with small():
        whole = render(G, ws, (height, width), fit="stretch")[:, :, y0 : y1 + between, x0 : x1 + between]
        part = render(G, ws, tuple(whole.shape[2:]), window=window, fit="stretch", tile=tile)
    assert error(part, whole) <= 1e-5


windows = st.tuples(*[st.floats(-2, 2)] * 2, *[st.floats(0.01, 3)] * 2).map(
    lambda w: (w[0], w[1], w[0] + w[2], w[1] + w[3])
)


@each_grid
@some(max_examples=60)
@given(size=st.tuples(sides, sides), window=windows)
def test_fits(coords, size, window):
    less = coords == "endpoints"  # a window runs from pixel to pixel, or from edge to edge
    lows, highs = window[1::-1], window[:1:-1]
    pitches = [(high - low) / max(n - less, 1) for low, high, n in zip(lows, highs, size, strict=True)]
    for fit, pitch in [("crop", [min(pitches)] * 2), ("extend", [max(pitches)] * 2), ("stretch", pitches)]:
        shown = View.of(tiny(coords=coords).config, Shot(size, window=window, fit=fit))
        for axis, n, step, low, high in zip((shown.rows, shown.cols), size, pitch, lows, highs, strict=True):
            t = axis.positions(0, n)
            exact = [(low + high) / 2 + (i - (n - 1) / 2) * step for i in range(n)]
            assert (t - torch.tensor(exact, dtype=torch.float64)).abs().max() <= 1e-14
            edge = (not less) * step / 2
            if fit == "crop":
                assert low - 1e-14 <= t[0] - edge
                assert t[-1] + edge <= high + 1e-14
            elif fit == "extend" and min(size) > 1:  # with both ends, a single pixel has no extent
                assert t[0] - edge <= low + 1e-14
                assert t[-1] + edge >= high - 1e-14


@pytest.mark.parametrize(("coords", "shape"), [("endpoints", (12, 20)), ("centers", (20, 12))])
def test_images_of_a_network_trained_on_rectangles(coords, shape):
    """In pixels of the training size, for any shape: the grid, a window, a turn by 90° and one by 30°."""
    height, width = shape
    G = tiny(torch.float64, img_shape=shape, coords=coords)
    ws = styles(G)
    image = plain(G, ws, across(height, coords), across(width, coords))
    assert error(render(G, ws), image) <= 1e-12
    steps = (height - 1, width - 1) if coords == "endpoints" else (height, width)
    down, right = (max(steps) / side / 2 for side in steps)
    square = {"size": (max(shape), max(shape)), "window": (0.5 - right, 0.5 - down, 0.5 + right, 0.5 + down)}
    assert error(render(G, ws, **square, transform=rotation(90)), render(G, ws, **square).rot90(dims=(2, 3))) <= 1e-12
    moved = render(G, ws, transform=translation(2 / max(steps), 3 / max(steps)))
    assert error(moved[..., 3:, 2:], image[..., :-3, :-2]) <= 1e-12
    # By 30° about the centre, pixel by pixel, in pixels.
    y, x = torch.meshgrid(*(torch.arange(n).double() - (n - 1) / 2 for n in shape), indexing="ij")
    cos, sin = math.cos(math.radians(30)), math.sin(math.radians(30))
    source = (x * cos - y * sin) / steps[1] + 0.5, (x * sin + y * cos) / steps[0] + 0.5
    rotated = render(G, ws, transform=rotation(30), exact=True)
    assert error(rotated[..., ::3, ::3], each_place(G, ws, *(t[::3, ::3] for t in source))) <= 1e-10


# --- Supersampling ------------------------------------------------------------------------------------------------


@some(max_examples=15)
@given(height=sides, width=sides, tile=st.none() | st.integers(1, 30), samples=st.integers(1, 4))
def test_supersampling_is_the_larger_image_box_filtered(height, width, tile, samples):
    G = tiny(coords="centers")
    ws = styles(G)
    with small():
        got = render(G, ws, (height, width), supersample=samples, tile=tile)
        larger = render(G, ws, (height * samples, width * samples))
    assert error(got, F.avg_pool2d(larger, samples)) <= 1e-5


@pytest.mark.parametrize("transform", [None, rotation(90), rotation(33)], ids=["plain", "transposed", "field"])
def test_samples_spread_evenly_over_the_pixel_whatever_the_convention(transform):
    G = tiny(coords="endpoints")
    ws = styles(G, 1)
    # Three samples of a pixel lie at its middle and a third of its pitch to both sides.
    rows, cols = (
        torch.tensor([t + k / 3 / 3 for t in across(count, "endpoints", low, high).tolist() for k in (-1, 0, 1)])
        for count, low, high in ((4, 0.0, 1.0), (3, 1 / 6, 5 / 6))
    )
    x, y = mesh(rows.double(), cols.double())
    if transform is not None:
        back = transform.mT  # the inverse of a rotation
        x, y = (row[0] * (x - 0.5) + row[1] * (y - 0.5) + 0.5 for row in back[:2])
    expected = F.avg_pool2d(each_place(G, ws, x, y), 3)
    with small():
        got = render(G, ws, (4, 3), supersample=3, transform=transform, exact=True, tile=3)
    assert error(got, expected) <= 1e-5


def test_a_pixel_may_have_more_samples_than_a_tile():
    G = tiny(coords="centers")
    ws = styles(G, 1)
    larger = render(G, ws, (140, 70))
    assert error(render(G, ws, (2, 1), supersample=70), F.avg_pool2d(larger, 70)) <= 1e-5


# --- Transforms ---------------------------------------------------------------------------------------------------


def test_translation_by_whole_tiles_shifts_the_bytes():
    """Sizes are powers of two, so that positions are exact, and the same pieces are computed."""
    G = tiny(coords="centers")
    ws = styles(G)
    with small(piece=8 * G.config.thickness):
        base = render(G, ws, (32, 64), fit="extend", tile=8)
        moved = render(G, ws, (32, 64), fit="extend", tile=8, transform=translation(3 * 8 / 32, -8 / 32))
    assert torch.equal(to_uint8(moved[:, :, :24, 24:]), to_uint8(base[:, :, 8:, :40]))


@each_grid
def test_flips_and_quarter_turns_are_those_of_the_array(coords):
    G = tiny(coords=coords)
    ws = styles(G)
    with small():
        for fit in ("crop", "extend"):
            base = render(G, ws, (13, 10), fit=fit)
            for axis, matrix in ((3, zoom(-1, 1)), (2, zoom(1, -1))):
                assert error(render(G, ws, (13, 10), fit=fit, transform=matrix), base.flip(axis)) <= 1e-5
            for quarters in range(-4, 5):
                size = (10, 13) if quarters % 2 else (13, 10)
                rotated = render(G, ws, size, fit=fit, transform=rotation(90 * quarters))
                assert error(rotated, base.rot90(quarters, (2, 3))) <= 1e-5
        assert torch.equal(render(G, ws, (13, 10), fit="extend", transform=rotation(360)), base)
        assert torch.equal(render(G, ws, (13, 10), fit="extend", transform=zoom(1)), base)


# Where the colour at (x, y), from the centre, comes from: each written out by hand.
RADIANS = math.radians(33)
COS, SIN = math.cos(RADIANS), math.sin(RADIANS)
SOURCES = {
    "translation": (translation(0.25, -0.1), lambda x, y: (x - 0.25, y + 0.1)),
    "zoom": (zoom(4, 0.5), lambda x, y: (x / 4, y / 0.5)),
    "rotation": (rotation(33), lambda x, y: (COS * x - SIN * y, SIN * x + COS * y)),
    "rotation in two steps": (rotation(20) @ rotation(13), lambda x, y: (COS * x - SIN * y, SIN * x + COS * y)),
    "shear": (shear(0.4), lambda x, y: (x - 0.4 * y, y)),
    "shear down": (shear(0, -0.3), lambda x, y: (x, y + 0.3 * x)),
    "perspective": (perspective(0.5, -0.3), lambda x, y: (x / (1 - 0.5 * x + 0.3 * y), y / (1 - 0.5 * x + 0.3 * y))),
    "lens": (lens(0.5), lambda x, y: (x * (1 + 0.5 * (x * x + y * y)), y * (1 + 0.5 * (x * x + y * y)))),
    # The right one first: what it moves, the left one moves on. So going back, the left one comes first.
    "shift of a turn": (translation(0.3, 0.1) @ rotation(90), lambda x, y: (-(y - 0.1), x - 0.3)),
    "turn of a shift": (rotation(90) @ translation(0.3, 0.1), lambda x, y: (-y - 0.3, x - 0.1)),
    "shear of a zoom": (shear(0.4) @ zoom(2, 3), lambda x, y: ((x - 0.4 * y) / 2, y / 3)),
}


@each_grid
@pytest.mark.parametrize("name", SOURCES)
def test_transforms_show_the_places_written_out_by_hand(coords, name):
    transform, source = SOURCES[name]
    G = tiny(coords=coords)
    ws = styles(G, 1)
    x, y = mesh(across(7, coords), across(7, coords))
    x, y = (t + 0.5 for t in source(x - 0.5, y - 0.5))
    with small(points_block=4):
        got = render(G, ws, (7, 7), transform=transform, exact=True, tile=3)
    assert error(got, each_place(G, ws, x, y)) <= 1e-5


@some(max_examples=50)
@given(a=st.floats(-720, 720), b=st.floats(-720, 720))
def test_rotations_add_up(a, b):
    assert (rotation(a) @ rotation(b) - rotation(a + b)).abs().max() <= 1e-12
    assert torch.equal(rotation(360), torch.eye(3, dtype=torch.float64))


# --- Points -------------------------------------------------------------------------------------------------------


@each_network
def test_points_are_pixels_one_by_one(dtype, variant):
    G = tiny(dtype, **VARIANTS[variant])
    ws = styles(G)
    x, y = torch.rand(2, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 - 1
    x[5:9], y[7:11] = x[0], y[30]  # shared positions
    x[20], y[20] = x[1], y[1]  # and a point twice
    expected = each_place(G, ws, x, y)
    with mock.patch.dict(engine.POINTS_TILE, cpu=3):
        got = render_points(G, ws, x, y)
    assert got.dtype == dtype
    assert error(got, expected) <= TIGHT[dtype]


@pytest.mark.parametrize("shape", [[], [1], [2, 1, 3]])
def test_points_keep_their_shape(shape):
    G = tiny()
    ws = styles(G)
    x, y = torch.rand(2, *shape)
    got = render_points(G, ws, x, y)
    assert got.shape == (2, 3, *shape)
    expected = each_place(G, ws, x.double().reshape(-1), y.double().reshape(-1))
    assert error(got.reshape(2, 3, -1), expected) <= 1e-5


# --- Between samples ----------------------------------------------------------------------------------------------

FAST = {
    "rotation by 33°": rotation(33),
    "rotation by 1°": rotation(1),
    "shear": shear(0.4, 0.2),
    "perspective": perspective(0.5, -0.3),
    "lens": lens(0.5),
    "a wave": lambda x, y: (x + 0.1 * torch.sin(6 * y), y + 0.1 * torch.cos(5 * x)),
}


@functools.cache
def between(name, density):
    """Pictures in fast mode, and exactly."""
    G = tiny()
    ws = styles(G, 3)
    with mock.patch.object(points, "DENSITY", density):
        fast = render(G, ws, (80, 80), transform=FAST[name])
    exact = render(G, ws, (80, 80), transform=FAST[name], exact=True)
    assert not torch.equal(fast, exact)  # else there was nothing between samples
    return fast, exact


@pytest.mark.parametrize("name", FAST)
def test_between_samples_lie_nearly_the_exact_colours(name):
    fast, exact = between(name, points.DENSITY)
    assert min(map(psnr, fast, exact)) >= 60  # 65 to 79 dB measured, as the style goes
    assert error(fast, exact) <= 3e-2  # 1.3e-2 measured: at the kinks of the leaky ReLUs


@pytest.mark.parametrize("name", FAST)
def test_denser_samples_are_nearer(name):
    """Twice as dense gains 9 dB, a factor of 2^1.5: the kinks of the leaky ReLUs limit it."""
    decibels = [psnr(*between(name, density)) for density in (256, 512, 1024)]
    assert all(gain >= 6 for gain in torch.tensor(decibels).diff().tolist())


def test_points_too_can_lie_between_samples():
    G = tiny()
    ws = styles(G)
    x, y = torch.rand(2, 5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact, fast = (render_points(G, ws, x, y, exact=exact) for exact in (True, False))
    assert not torch.equal(exact, fast)
    assert psnr(fast, exact) >= 60
    order = torch.randperm(5000)
    assert psnr(render_points(G, ws, x[order], y[order], exact=False), exact[:, :, order]) >= 60
    once = render_points(G, ws, x[:1], y[:1])
    many = render_points(G, ws, x[:1].expand(3000), y[:1].expand(3000), exact=False)  # all the same
    assert error(many, once.double().expand(-1, -1, 3000)) <= 1e-3


@pytest.mark.parametrize("dtype", TIGHT)
@some(max_examples=15)
@given(
    a=st.floats(-3, 3),
    b=st.floats(-3, 3),
    c=st.floats(-3, 3),
    low=st.floats(-5, 5),
    step=st.floats(1e-3, 1),
    seed=st.integers(0, 99),
)
def test_interpolation_is_exact_for_parabolas(dtype, a, b, c, low, step, seed):
    """Keys' kernel with a = −½ has third order; a cubic it would not reproduce."""
    t = low + torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 20 * step
    t[:2] = torch.tensor([low, low + 20 * step])
    grid = low + torch.arange(-points.MARGIN, 21 + points.MARGIN + 1, dtype=torch.float64) * step

    def parabola(t):
        u = (t - low) / (20 * step)
        return (a + b * u + c * u * u)[:, None, None, None]

    samples = points.Samples(grid[0].item(), step, parabola(grid).to(dtype).expand(-1, 2, 3, 4))
    got = samples.at(t)
    assert got.shape == (40, 2, 3, 4)
    scale = max(abs(a), abs(b), abs(c), 1e-3)
    assert (got - parabola(t)).abs().max() <= scale * {torch.float64: 1e-11, torch.float32: 1e-5}[dtype]


@some(max_examples=50)
@given(seed=st.integers(0, 999), count=st.integers(1, 3000), log=st.integers(-12, 3), middle=st.floats(-3, 3))
def test_samples_surround_all_points_with_neighbours(seed, count, log, middle):
    t = middle + 10.0**log * torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = points.Spread.of(t).grid()
    if found is not None:
        first, step, samples = found
        left = ((t - first) / step).floor()
        assert left.min() >= 1
        assert left.max() + 2 <= samples - 1
        assert samples <= min(count, points.LONGEST) + 2


# --- Types of numbers ---------------------------------------------------------------------------------------------

# The image, rows and columns transposed, and a field: whatever holds for all of them.
WAYS = {
    "plain": {},
    "transposed": {"transform": rotation(90)},
    "exact": {"transform": rotation(20), "exact": True},
    "between": {"transform": rotation(20)},
    "supersampled": {"supersample": 2},
}
each_way = pytest.mark.parametrize("way", WAYS)


@each_way
@pytest.mark.parametrize("variant", ["skip", "orig", "no decoders"])
def test_bfloat16_is_near(variant, way):
    G = tiny(**VARIANTS[variant])
    ws = styles(G, 1)
    expected = render(G, ws, (48, 48), dtype=torch.float64, **WAYS[way])
    got = render(G, ws, (48, 48), dtype=torch.bfloat16, **WAYS[way])
    assert got.dtype == torch.float32
    least = 43 if variant == "no decoders" else 45  # 44 to 56 dB measured; the network under autocast has 44.5 to 52
    assert least <= psnr(got, expected) <= 80


@each_way
def test_other_dtypes_than_the_generators(way):
    G = tiny()
    ws = styles(G)
    got = render(G, ws, (24, 24), dtype=torch.float64, **WAYS[way])
    assert got.dtype == torch.float64
    assert torch.equal(got, render(double(G), ws.double(), (24, 24), **WAYS[way]))
    assert next(G.parameters()).dtype == torch.float32
    back = render(double(G), ws.double(), (24, 24), dtype=torch.float32, **WAYS[way])
    assert back.dtype == torch.float32
    assert error(back, got) <= 1e-5


# --- The same bytes -----------------------------------------------------------------------------------------------


@each_way
def test_any_number_of_threads_gives_the_same_bytes(way):
    G = tiny()
    ws = styles(G)
    images = []
    for count in (1, 2, 5):
        with threads(count), small(16, 20, 32):
            images.append(render(G, ws, (70, 60), **WAYS[way]))
            assert torch.get_num_threads() == count
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


@each_way
def test_a_batch_is_its_images_one_by_one(way):
    G = tiny()
    ws = styles(G, 3)
    with small(16, 20, 32):
        together = render(G, ws, (40, 60), **WAYS[way])
        assert torch.equal(together, torch.cat([render(G, w[None], (40, 60), **WAYS[way]) for w in ws]))
    x, y = torch.rand(2, 100)
    together = render_points(G, ws, x, y)
    assert torch.equal(together, torch.cat([render_points(G, w[None], x, y) for w in ws]))


@each_way
@some(max_examples=6)
@given(seed=st.integers(0, 999), share=st.floats(0, 1), tile=st.integers(4, 25))
def test_any_part_of_the_tiles_has_the_bytes_that_all_have(way, seed, share, tile):
    G = tiny()
    ws = styles(G)
    with small(24, 20, 48):
        tiling = Tiling.of(G, Shot((40, 50), tile=tile, **WAYS[way]))
        mine = torch.rand(tiling.tiles, generator=torch.Generator().manual_seed(seed)) < share
        whole = dict(render_tiles(G, ws, tiling))
        parts = [dict(render_tiles(G, ws, tiling, only=only)) for only in (mine.tolist(), (~mine).numpy())]
    assert len(parts[0]) == mine.sum()
    assert parts[0].keys() | parts[1].keys() == whole.keys()
    assert len(whole) == tiling.tiles == len(parts[0]) + len(parts[1])
    for part in parts:
        assert all(torch.equal(colours, whole[box]) for box, colours in part.items())


def other_process(code, **environment):
    """What `code` prints that imports this file."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    return subprocess.run(
        [sys.executable, "-c", f"import test_rendering; {code}"],
        env=os.environ | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def test_images_rendered_at_once_are_those_rendered_alone():
    G = tiny()
    ws = styles(G, 4)[:, None]
    with threads(2):
        alone = [render(G, w, (40, 40), transform=rotation(9), exact=True) for w in ws]
        with ThreadPoolExecutor(4) as pool:
            at_once = list(pool.map(lambda w: render(G, w, (40, 40), transform=rotation(9), exact=True), ws))
        streams = [rendering.tiles(G, w, Shot((40, 40), transform=rotation(9), exact=True, tile=10)) for w in ws]
        for tiles in zip(*streams, strict=True):  # and in turns
            for (box, colours), image in zip(tiles, alone, strict=True):
                assert error(colours, image[:, :, box.y0 : box.y1, box.x0 : box.x1].double()) <= 1e-5
    assert all(map(torch.equal, alone, at_once))


# --- Deep zoom ----------------------------------------------------------------------------------------------------


def relief(image):
    return image.double() - image.double().mean((2, 3), keepdim=True)


@each_grid
@each_dtype
@pytest.mark.parametrize(("log", "x", "y"), [(3, 1234.3, -567.8), (5, 0.3, 0.6), (7, 1234.3, -567.8), (9, 0.3, 0.6)])
def test_deep_zoom_and_far_away(dtype, coords, log, x, y):
    """Float32 keeps seven digits of the colours: a relief below that needs dtype=float64, positions or not."""
    G = tiny(coords=coords)
    ws = styles(G)
    window = x, y, x + 10.0**-log, y + 10.0**-log
    expected = plain(G, ws, across(32, coords, y, window[3]), across(32, coords, x, window[2]))
    wander = abs(x) * 2**-52 / (10.0**-log / 32)  # of float64 positions, in pixels
    for transform in (None, lambda x, y: (x, y)):
        for exact in (True, False):
            got = render(G, ws, (32, 32), window=window, transform=transform, exact=exact, dtype=dtype, tile=11)
            if dtype == torch.float64:
                assert error(got, expected) <= 1e-12 * max(abs(x), 1)
                assert error(relief(got), relief(expected)) <= max(1e-6, wander)
                assert (got.diff(dim=2) != 0).all()
                assert (got.diff(dim=3) != 0).all()
            else:
                assert error(got, expected) <= 1e-5  # 3e-6 measured
                assert error(relief(got), relief(expected)) <= 2e-2 or log > 5  # 6e-3 measured, at 1e-5 of the image


# --- Wrong calls --------------------------------------------------------------------------------------------------

nan, inf = math.nan, math.inf
FIELD = r"shape it is given, \[12, 12\]; got \[\[12, 12\], \[12\]\]"
WRONG = [
    ({"size": (0, 3)}, "size=0,3"),
    ({"size": (3, -1)}, "size=3,-1"),
    ({"fit": "cover"}, "'cover' is unknown; use one of crop, extend, stretch"),
    ({"window": (0, 0, 0, 1)}, "left < right"),
    ({"window": (0, 1, 1, 0)}, "left < right"),
    ({"window": (0, nan, 1, 1)}, "left < right"),
    ({"window": (0, 0, inf, 1)}, "left < right"),
    ({"window": (-1e308, 0, 1e308, 1), "fit": "stretch"}, "float64 cannot resolve"),
    ({"window": (0.3, 0.6, 0.3 + 1e-13, 0.6 + 1e-13)}, "float64 cannot resolve"),
    ({"window": (1e6, 0, 1e6 + 1e-8, 1), "fit": "stretch"}, "float64 cannot resolve"),
    ({"transform": zoom(1e15)}, "float64 cannot resolve"),
    ({"transform": translation(1e14, 0)}, "float64 cannot resolve"),
    ({"supersample": 0}, "supersample=0"),
    ({"tile": 0}, "tile=0"),
    ({"transform": torch.ones(3, 3)}, "invertible"),
    ({"transform": torch.eye(2)}, "invertible"),
    ({"transform": torch.eye(3) * nan}, "invertible"),
    ({"transform": lambda x, y: (x, y[0])}, FIELD),
    ({"transform": lambda x, y: (x,)}, "x and y of the shape"),
    ({"transform": lambda x, y: (x, y * nan)}, "not finite"),
    ({"transform": lambda x, y: (x / 0, y), "exact": True}, "not finite"),
    ({"transform": perspective(4, 0), "size": (5, 5)}, "not finite"),
    ({"dtype": torch.float16}, "float16 is for GPUs"),
    ({"dtype": torch.int32}, "dtype=torch.int32 is not one of torch.float32"),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_wrong_arguments_are_sentences(wrong, words):
    G = tiny(coords="endpoints")
    with small(), pytest.raises(UserError, match=words):
        render(G, styles(G), **{"size": (12, 12)} | wrong)


@pytest.mark.parametrize("shape", [[7, 12], [1, 6, 12], [1, 7, 11], [0, 7, 12]])
def test_styles_of_another_shape_are_sentences(shape):
    G = tiny()
    x = torch.rand(4)
    for call in (lambda ws: render(G, ws), lambda ws: render_points(G, ws, x, x)):
        with pytest.raises(ValueError, match=r"ws must be \[N,7,12\]"):
            call(torch.zeros(shape))


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.rand(3), torch.rand(2), r"one shape.*\[3\].*\[2\]"),
        (torch.rand(3), torch.arange(3), "int64"),
        (torch.rand(0), torch.rand(0), "not empty"),
        (torch.rand(2), torch.tensor([0, nan]), "not finite"),
        (torch.tensor([inf]), torch.rand(1), "not finite"),
    ],
)
def test_wrong_points_are_sentences(x, y, words):
    G = tiny()
    for exact in (True, False):
        with pytest.raises(UserError, match=words):
            render_points(G, styles(G), x, y, exact=exact)


def test_a_wrong_number_of_wanted_tiles_is_refused():
    G = tiny()
    with pytest.raises(ValueError, match="3 entries for 4 tiles"):
        next(render_tiles(G, styles(G), Tiling.of(G, Shot((8, 8), tile=4)), only=[True] * 3))


def test_wrong_arguments_are_refused_before_the_first_tile_is_asked_for():
    G = tiny()
    with pytest.raises(ValueError, match="tile=0"):
        rendering.tiles(G, styles(G), Shot(tile=0))


# --- What it leaves behind ----------------------------------------------------------------------------------------


@pytest.fixture
def unchanged():
    """No thread left over, nothing switched."""
    with threads(2):
        before = threading.active_count()
        yield
        assert threading.active_count() == before
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
        assert torch.is_grad_enabled()


@each_way
@pytest.mark.usefixtures("unchanged")
def test_a_image_abandoned_midway_leaves_nothing_behind(way):
    G = tiny()
    rendering.tiles(G, styles(G), Shot(**WAYS[way]))  # never begun
    for count, _ in enumerate(rendering.tiles(G, styles(G), Shot((50, 50), tile=5, **WAYS[way]))):
        assert torch.is_grad_enabled()
        assert torch.get_num_threads() == 2
        if count == 3:
            break


@pytest.mark.usefixtures("unchanged")
def test_an_error_in_a_thread_comes_out_and_leaves_nothing_behind():
    G = tiny()

    def broken(x, y):
        assert x[0, -1] < 0.5, "half way"
        return x, y

    with pytest.raises(AssertionError, match="half way"):
        render(G, styles(G), (20, 20), transform=broken, exact=True, tile=5)

    def full(colours):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        list(render_tiles(G, styles(G), Tiling.of(G, Shot()), finish=full))


def test_colours_need_no_gradients_whatever_the_caller_does():
    G = copy.deepcopy(tiny()).requires_grad_(True)
    ws = styles(G).requires_grad_(True)
    expected = render(tiny(), styles(G), (9, 9), transform=rotation(9))
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            got = render(G, ws, (9, 9), transform=rotation(9))
        assert not got.requires_grad
        assert torch.equal(got, expected)


def test_autocast_does_not_reach_the_engine():
    G = tiny()
    ws = styles(G)
    with torch.autocast("cpu", torch.bfloat16):
        got = render(G, ws, (9, 9)), render_points(G, ws, *torch.eye(2))
    assert torch.equal(got[0], render(G, ws, (9, 9)))
    assert torch.equal(got[1], render_points(G, ws, *torch.eye(2)))


@pytest.mark.parametrize(("kind", "way"), [("GridBlock", "plain"), ("FieldBlock", "between")])
def test_lines_of_one_block_at_a_time_are_kept(kind, way):
    G = tiny()
    alive, most = weakref.WeakSet(), []

    class Counted(getattr(engine, kind)):
        def __init__(self, *arguments):
            alive.add(self)
            most.append(len(alive))
            super().__init__(*arguments)

    with small(), mock.patch.object(engine, kind, Counted):
        render(G, styles(G), (30, 30), tile=8, **WAYS[way])
    assert len(most) == 16
    assert max(most) == 1


def peaks(*sizes):
    """The peak memory in MB after squares of each of these sides, their tiles thrown away."""
    G = tiny(depth=2, biline_channels=1, thickness=1)
    found = []
    for side in sizes:
        for _ in rendering.tiles(G, styles(G, 1), Shot((side, side))):
            pass
        # getrusage would count what the parent process held when it started this one.
        (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        found.append(int(peak) / 1024)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_image():
    """4000×4000 pixels of three float32 are 183 MB."""
    small, large = map(float, other_process("print(*test_rendering.peaks(500, 4000))").split())
    assert large - small <= 60
