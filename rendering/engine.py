"""Render images of any size, a tile at a time.

Block by block (most images are one), the lines of CREPS are computed once, in pieces; then pixels, in tiles that stay
in the processor's cache. A tile of another kind of generator is a call of its synthesis. The cuts of blocks, pieces and
tiles depend on the image alone, and one thread computes each. So any number of threads and processes gives the same
bytes, in any order, after any interruption.
"""

import copy
import functools
import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dnnlib.console import UserError
from rendering import points
from rendering.grid import Box, Shot, View
from rendering.network import DirectGenerator, FoldedGenerator
from torch_utils.precision import full_precision
from training.networks import Generator
from training.networks.creps import CrepsSynthesis

# The side of a tile in samples (benchmarks/rendering.py compares sizes): on a CPU the widest features of a tile, 128
# channels, are 2 MB. Each point has its own lines, 14 KB with the paper's widths.
TILE = defaultdict(lambda: 1024, cpu=64)
POINTS_TILE = defaultdict(lambda: 256, cpu=32)
# Positions · thickness of a line, computed together; on a GPU, about 400 MB with the paper's widths.
PIECE = defaultdict(lambda: 65536, cpu=1024)
BLOCK = 16384  # samples along a block's side: 2 · 118 MB of lines with the paper's widths
POINTS_BLOCK = 1024
MOST = 1e9  # of a style: float32 holds the squares of what the affine layers make of it
# Types of the matrix products; sums of lines, features and colours are at least float32.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class NotFinite(UserError):
    """Styles or colours that are not finite."""


@dataclass(frozen=True)
class Tiling:
    """A View, split into blocks and tiles (sides in pixels).

    Tiles are numbered row by row over the whole image.
    """

    view: View
    exact: bool
    tile: int
    block: int

    @classmethod
    def of(cls, G: Generator, shot: Shot) -> "Tiling":
        """Resolve `shot` for a generator and its device. Raises UserError, also for what its kind cannot render."""
        view = View.of(G.config, shot)
        if not G.config.any_position and view != View.of(G.config, Shot()):
            height, width = G.config.img_shape
            raise UserError(
                f"a generator of kind {G.config.kind} renders its whole image at {width}x{height} only; leave out "
                "other sizes, windows, transforms and supersampling"
            )
        if view.field:
            check_lines(G)
        device = G.mapping.w_avg.device.type
        tile = shot.tile
        if tile is None:
            tile = max(1, (POINTS_TILE if view.field else TILE)[device] // shot.supersample)
            # At least four tiles on a CPU, so that two cores share the work of a small image.
            while device == "cpu" and tile > 16 and view.size[0] * view.size[1] < 4 * tile * tile:
                tile //= 2
        block = (POINTS_BLOCK if view.field else BLOCK) // shot.supersample
        return cls(view, shot.exact, tile, max(1, block // tile) * tile)

    @property
    def whole(self) -> Box:
        return Box(0, self.view.size[0], 0, self.view.size[1])

    @property
    def columns(self) -> int:
        return -(-self.view.size[1] // self.tile)

    @property
    def tiles(self) -> int:
        return -(-self.view.size[0] // self.tile) * self.columns

    def number(self, box: Box) -> int:
        """Return the number of the tile `box`, 0 … tiles − 1."""
        return box.y0 // self.tile * self.columns + box.x0 // self.tile


@torch.no_grad()
def render_tiles(
    G: Generator,
    ws: Tensor,
    tiling: Tiling,
    *,
    dtype: torch.dtype | None = None,
    only: Sequence[bool] | None = None,
    finish: Callable[[Tensor], Tensor] = torch.positive,
    impl: str | None = None,
) -> Iterator[tuple[Box, Tensor]]:
    """Yield (box, finish(colours [N,C,h,w] about [-1,1], float32 or float64)) for every tile.

    ws: [N,num_ws,w_dim]. dtype: of the matrix products, by default the dtype of G. only: for each tile, whether
    to render it. finish: runs in the threads that render. impl: of rendering.pixel_path, by default as in G.
    Raises UserError for other shapes or dtypes, and NotFinite.
    """
    if only is not None and len(only) != tiling.tiles:
        raise ValueError(f"`only` has {len(only)} entries for {tiling.tiles} tiles")

    def render_block(block: Box) -> Iterator[tuple[Box, Tensor]]:  # returns, and so frees, the lines of the block
        wanted = [box for box in block.split(tiling.tile) if only is None or only[tiling.number(box)]]
        if not wanted:
            return
        computed = kind(networks, tiling, block, wanted, imap)

        def render_tile(box: Box) -> Tensor:
            samples = tiling.view.rows.samples
            colours = torch.stack([computed.colours(i, box) for i in range(len(networks))])
            check_finite(colours)  # before conversion to bytes, which hides it
            colours = colours.unflatten(2, [side * samples for side in box.shape])
            return finish(F.avg_pool2d(colours, samples) if samples > 1 else colours)

        yield from zip(wanted, imap(render_tile, wanted), strict=True)

    imap = workers(ws.device)
    networks = fold(G, ws, dtype, imap, impl)
    kind = DirectBlock if not has_lines(G) else FieldBlock if tiling.view.field else GridBlock
    for block in tiling.whole.split(tiling.block):
        yield from render_block(block)


def check_finite(colours: Tensor) -> None:
    """Raise NotFinite for colours that are not finite."""
    if not colours.isfinite().all():
        raise NotFinite(
            "the network returns colours that are not finite; it is broken, too large for this dtype, or the window is "
            "too far away: use an earlier snapshot, dtype fp32 or a nearer window"
        )


def has_lines(G: Generator) -> bool:
    return isinstance(G.synthesis, CrepsSynthesis)


def check_lines(G: Generator) -> None:
    """Raise UserError if G has no lines, which arbitrary points need."""
    if not has_lines(G):
        raise UserError(
            f"a generator of kind {G.config.kind} renders rows × columns only; leave out rotations and other "
            "transforms that mix them"
        )


def fold(
    G: Generator, ws: Tensor, dtype: torch.dtype | None, imap: Callable, impl: str | None = None
) -> list[FoldedGenerator] | list[DirectGenerator]:
    """Return G for each of ws [N,num_ws,w_dim]. Raises UserError for other shapes or dtypes, and NotFinite."""
    expected = (G.config.num_ws, G.config.w_dim)
    if ws.ndim != 3 or ws.shape[1:] != expected or not len(ws):
        raise UserError(f"ws must be [N,{expected[0]},{expected[1]}], as G.mapping returns it; got {list(ws.shape)}")
    if not ws.abs().amax() <= MOST:  # nan too
        raise NotFinite(
            f"styles must be finite numbers up to {MOST:g}, and these are not; give a truncation between 0 and 1, or "
            "another file of styles"
        )
    own = G.mapping.w_avg.dtype
    dtype = dtype or own
    if dtype not in DTYPES.values():
        raise UserError(f"dtype={dtype} is not one of {', '.join(map(str, DTYPES.values()))}")
    if dtype == torch.float16 and ws.device.type == "cpu":
        raise UserError("float16 is for GPUs; use float32 or bfloat16 on a CPU")
    if torch.promote_types(dtype, own) != own:
        G = copy.deepcopy(G).to(dtype)  # styles and input in float64 too
    ws = ws.to(G.mapping.w_avg.dtype)
    if not has_lines(G):
        return [DirectGenerator(G, w, dtype) for w in ws]
    with full_precision(ws):
        return [FoldedGenerator(G, w, dtype, imap, impl) for w in ws]


class GridBlock:
    """The lines of a block whose pixels share rows and columns, as far as the wanted tiles need them."""

    def __init__(self, networks: list[FoldedGenerator], tiling: Tiling, block: Box, wanted: list[Box], imap: Callable):
        self.networks, self.block, self.view = networks, block, tiling.view
        self.samples = tiling.view.rows.samples
        piece = max(1, PIECE[networks[0].device.type] // (networks[0].thickness * self.samples))  # in pixels
        work = []  # network, axis of the image, first and last pixel
        for axis, (begin, end) in enumerate((block[:2], block[2:])):
            needed = {box[2 * axis : 2 * axis + 2] for box in wanted}
            for start in range(begin, end, piece):
                stop = min(start + piece, end)
                if any(low < stop and start < high for low, high in needed):
                    work += [(i, axis, start, stop) for i in range(len(networks))]
        self.lines: list[list[Tensor | None]] = [[None, None] for _ in networks]
        for (i, axis, start, stop), line in zip(work, imap(self.compute_piece, work), strict=True):
            if self.lines[i][axis] is None:
                self.lines[i][axis] = line.new_empty(*line.shape[:3], block.shape[axis] * self.samples)
            self.part(i, axis, start, stop).copy_(line)

    def compute_piece(self, work: tuple[int, int, int, int]) -> Tensor:
        i, axis, start, stop = work
        t = (self.view.rows, self.view.cols)[axis].positions(start, stop, self.networks[i].device)
        return self.networks[i].line(axis ^ self.view.transposed, t)

    def part(self, i: int, axis: int, start: int, stop: int) -> Tensor:
        """Return the lines of pixels start … stop − 1 along `axis`."""
        begin = self.block[2 * axis]
        return self.lines[i][axis][..., (start - begin) * self.samples : (stop - begin) * self.samples]

    def colours(self, i: int, box: Box) -> Tensor:
        """Return [img_channels,P]: the samples of `box`, row by row."""
        return self.networks[i].pixels(self.part(i, 0, box.y0, box.y1), self.part(i, 1, box.x0, box.x1))


class DirectBlock:
    """A block of a generator without lines: tile by tile, or the whole image where its kind has no positions."""

    def __init__(self, networks: list[DirectGenerator], tiling: Tiling, block: Box, wanted: list[Box], imap: Callable):
        self.networks, self.view = networks, tiling.view
        self.images = None
        if not networks[0].any_position:
            self.images = list(imap(DirectGenerator.image, networks))

    def colours(self, i: int, box: Box) -> Tensor:
        """Return [img_channels,P]: the samples of `box`, row by row."""
        network, view = self.networks[i], self.view
        if self.images:
            return self.images[i][(..., *box.slices)].flatten(1)
        rows, cols = view.rows.positions(*box[:2], network.device), view.cols.positions(*box[2:], network.device)
        return (network.image(cols, rows).mT if view.transposed else network.image(rows, cols)).flatten(1)


class FieldBlock:
    """A block in which every pixel has its own row and column, with samples of the lines around it unless exact."""

    def __init__(self, networks: list[FoldedGenerator], tiling: Tiling, block: Box, wanted: list[Box], imap: Callable):
        self.networks, self.block, self.density = networks, block, tiling.view.rows.samples
        self.points = tiling.view.points(block, networks[0].device)
        self.samples = [(None, None) for _ in networks]
        if not tiling.exact:
            self.samples = sample_lines(networks, *self.points, imap)

    def colours(self, i: int, box: Box) -> Tensor:
        """Return [img_channels,P]: the samples of `box`, row by row."""
        y0, y1, x0, x1 = (n * self.density for n in box.shifted(-self.block.y0, -self.block.x0))
        x, y = (t[y0:y1, x0:x1].flatten() for t in self.points)
        return points.colours(self.networks[i], x, y, self.samples[i])


@torch.no_grad()
def render_points(
    G: Generator, ws: Tensor, x: Tensor, y: Tensor, *, exact: bool = True, dtype: torch.dtype | None = None
) -> Tensor:
    """Render single points: ws [N,num_ws,w_dim], x and y float [...] -> colours about [-1,1], [N,C,...].

    x, y: to the right and down, in fractions of the training image, which the network continues beyond [0,1].
    `exact` and `dtype` as in Shot and `render`. Points that share a position on a line share its cost. Memory is
    bounded, apart from x, y and the result. Raises UserError for other shapes, positions that are not finite, and
    generators without lines.
    """
    check_lines(G)
    if x.shape != y.shape or not (x.is_floating_point() and y.is_floating_point()) or not x.numel():
        raise UserError(
            f"x and y must be float tensors of one shape, not empty; got {x.dtype} {list(x.shape)} and {y.dtype} "
            f"{list(y.shape)}"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise UserError("x and y lead to positions that are not finite; keep all of them finite")
    shape = x.shape
    x, y = (t.double().flatten().to(ws.device) for t in (x, y))
    imap = workers(ws.device)
    networks = fold(G, ws, dtype, imap)
    samples = [(None, None) for _ in networks] if exact else sample_lines(networks, x, y, imap)

    def render_part(part: tuple[Tensor, Tensor]) -> Tensor:
        return torch.stack([points.colours(network, *part, samples[i]) for i, network in enumerate(networks)])

    count = POINTS_TILE[ws.device.type] ** 2
    colours = torch.cat(list(imap(render_part, list(zip(x.split(count), y.split(count), strict=True)))), dim=2)
    return colours.view(len(ws), -1, *shape)


def sample_lines(networks: list[FoldedGenerator], x: Tensor, y: Tensor, imap: Callable) -> list[tuple]:
    """Return points.Samples of (rows, columns) around x, y for each network, or None if exact points cost less."""
    grids = [points.Spread.of(t).grid() for t in (y, x)]
    piece = max(1, PIECE[networks[0].device.type] // networks[0].thickness)
    work = []
    for axis, grid in enumerate(grids):
        if grid is not None:
            first, step, count = grid
            t = first + torch.arange(count, dtype=torch.float64) * step
            work += [(i, axis, part) for i in range(len(networks)) for part in t.split(piece)]

    def compute_piece(work: tuple[int, int, Tensor]) -> Tensor:
        i, axis, t = work
        return points.position_major(networks[i].line(axis, t.to(networks[i].device)))

    pieces: dict[tuple[int, int], list[Tensor]] = {}
    for (i, axis, _), line in zip(work, imap(compute_piece, work), strict=True):
        pieces.setdefault((i, axis), []).append(line)
    return [
        tuple(
            None if grid is None else points.Samples(*grid[:2], torch.cat(pieces.pop((i, axis))))
            for axis, grid in enumerate(grids)
        )
        for i in range(len(networks))
    ]


def workers(device: torch.device) -> Callable:
    """Return imap(f, items), which yields f(item) in order, computed by as many threads as torch would use on a CPU."""
    if device.type != "cpu":
        return map
    count = torch.get_num_threads()
    pool = threads(os.getpid(), count)

    def imap(f, items):
        running: deque = deque()
        try:
            for item in items:
                running.append(pool.submit(torch.no_grad()(f), item))
                if len(running) > 2 * count:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:  # also when left early or by an error
            for task in running:
                task.cancel()
            wait(running)

    return imap


@functools.lru_cache
def threads(pid: int, count: int) -> ThreadPoolExecutor:
    """Start `count` threads in process `pid`, each single-threaded: a tile's matrices are too small to share.

    The threads are kept: setting up the buffers of their libraries takes longer than rendering a small image.
    """
    before = torch.get_num_threads()
    started = threading.Barrier(count + 1)

    def alone():
        torch.set_num_threads(1)
        torch.get_num_threads()  # makes it persist: a thread's first operation adopts the process's setting
        started.wait()

    pool = ThreadPoolExecutor(count)
    for _ in range(count):
        pool.submit(alone)
    started.wait()
    torch.set_num_threads(before)  # for this thread and later ones
    return pool
