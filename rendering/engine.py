"""Pictures of any size, a tile at a time.

Block by block (most pictures are one), lines are computed once, in pieces; then pixels, in tiles that stay in the
processor's cache. Blocks, pieces and tiles lie where the picture says, whoever computes them, and each is computed by
one thread. So the same numbers come out of any number of threads and processes, in any order, after any interruption.
"""

import copy
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rendering import points
from rendering.grid import Box, View
from rendering.network import FoldedGenerator
from torch_utils.precision import full_precision
from training.networks import Generator

# The side of a tile in samples (benchmarks/rendering.py compares sizes): on a CPU the widest features of a tile, 128
# channels, are 2 MB. Points carry lines of their own, 14 KB each with the paper's widths.
TILE = {"cpu": 64, "cuda": 1024}
POINTS_TILE = {"cpu": 32, "cuda": 256}
# Positions · thickness of a line that are computed together; on a GPU, some 400 MB with the paper's widths.
PIECE = {"cpu": 1024, "cuda": 65536}
BLOCK = 16384  # samples along a block's side: 2 · 118 MB of lines with the paper's widths
POINTS_BLOCK = 1024
DTYPES = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)  # None: that of the generator


@dataclass(frozen=True)
class Plan:
    """A View cut into blocks and tiles, `block` and `tile` their sides in pixels, `piece` that of lines in pixels.

    Tiles are numbered row by row over the whole picture.
    """

    view: View
    exact: bool
    tile: int
    block: int
    piece: int

    @classmethod
    def of(cls, G: Generator, view: View, exact: bool, tile: int | None) -> "Plan":
        """`tile`: its side in pixels, None for the device's own. Raises ValueError."""
        device = G.synthesis.lines.input.weight.device.type
        samples = view.rows.samples
        if tile is None:
            tile = max(1, (POINTS_TILE if view.field else TILE)[device] // samples)
            # Four tiles at least on a CPU, so that two cores share the work of a small picture.
            while device == "cpu" and tile > 16 and view.size[0] * view.size[1] < 4 * tile * tile:
                tile //= 2
        elif tile < 1:
            raise ValueError(f"tile={tile} has no pixels; use 1 or more")
        block = (POINTS_BLOCK if view.field else BLOCK) // samples
        piece = max(1, PIECE[device] // (G.config.thickness * samples))
        return cls(view, exact, tile, max(1, block // tile) * tile, piece)

    @property
    def whole(self) -> Box:
        return Box(0, self.view.size[0], 0, self.view.size[1])

    @property
    def across(self) -> int:
        return -(-self.view.size[1] // self.tile)

    @property
    def tiles(self) -> int:
        """How many there are."""
        return -(-self.view.size[0] // self.tile) * self.across

    def number(self, box: Box) -> int:
        """Of the tile `box`, 0 … tiles − 1."""
        return box.y0 // self.tile * self.across + box.x0 // self.tile


@torch.no_grad()
def paint(
    G: Generator,
    ws: Tensor,
    plan: Plan,
    *,
    dtype: torch.dtype | None = None,
    only: Sequence[bool] | None = None,
    finish: Callable[[Tensor], Tensor] = torch.positive,
    impl: str | None = None,
) -> Iterator[tuple[Box, Tensor]]:
    """Yields (box, finish(colours [N,C,h,w] about [-1,1], float32 at least)) for every tile of the plan.

    ws [N,num_ws,w_dim]. `dtype` of the matrix products, by default that of G. `only`: for each tile, whether it is
    wanted. `finish` runs in the threads that paint. `impl` as in rendering.pixel_path, by default G's.
    Raises ValueError for a dtype that does not serve or other shapes.
    """
    if only is not None and len(only) != plan.tiles:
        raise ValueError(f"`only` says for {len(only)} tiles whether they are wanted, but the plan has {plan.tiles}")

    def tiles(block: Box) -> Iterator[tuple[Box, Tensor]]:  # a frame of its own: it frees the lines of the block
        wanted = [box for box in block.split(plan.tile) if only is None or only[plan.number(box)]]
        if not wanted:
            return
        region = (Points if plan.view.field else Lines)(made, plan, block, wanted, imap)

        def tile(box: Box) -> Tensor:
            samples = plan.view.rows.samples
            colours = torch.stack([region.colours(i, box) for i in range(len(made))])
            colours = colours.unflatten(2, [side * samples for side in box.shape])
            return finish(F.avg_pool2d(colours, samples) if samples > 1 else colours)

        yield from zip(wanted, imap(tile, wanted), strict=True)

    imap = workers(ws.device)
    made = painters(G, ws, dtype, imap, impl)
    for block in plan.whole.split(plan.block):
        yield from tiles(block)


def painters(
    G: Generator, ws: Tensor, dtype: torch.dtype | None, imap: Callable, impl: str | None = None
) -> list[FoldedGenerator]:
    """One for each of ws [N,num_ws,w_dim]. Raises ValueError."""
    expected = (G.config.num_ws, G.config.w_dim)
    if ws.ndim != 3 or ws.shape[1:] != expected or not len(ws):
        raise ValueError(f"ws must be [N,{expected[0]},{expected[1]}], as G.mapping makes it; got {list(ws.shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not one of {', '.join(map(str, DTYPES[1:]))}")
    if dtype == torch.float16 and ws.device.type == "cpu":
        raise ValueError("float16 is for GPUs; use float32 or bfloat16 on a CPU")
    own = G.synthesis.lines.input.weight.dtype
    dtype = dtype or own
    if torch.promote_types(dtype, own) != own:
        G = copy.deepcopy(G).to(dtype)  # styles and input in float64 too
    with full_precision(ws):
        return [FoldedGenerator(G, w, dtype, imap, impl) for w in ws.to(G.synthesis.lines.input.weight.dtype)]


class Lines:
    """The lines of a block, as far as the wanted tiles need them, and colours from them."""

    def __init__(self, made: list[FoldedGenerator], plan: Plan, block: Box, wanted: list[Box], imap: Callable):
        self.made, self.block, self.view = made, block, plan.view
        samples, piece = plan.view.rows.samples, plan.piece
        pieces = []  # axis of the picture, first and last pixel
        for axis, (begin, end) in enumerate((block[:2], block[2:])):
            needed = torch.zeros(end - begin, dtype=torch.bool)
            for part in {box[2 * axis : 2 * axis + 2] for box in wanted}:
                needed[part[0] - begin : part[1] - begin] = True
            starts = range(begin, end, piece)
            pieces += [(axis, i, min(i + piece, end)) for i in starts if needed[i - begin : i - begin + piece].any()]
        work = [(i, *part) for i in range(len(made)) for part in pieces]
        self.lines: list[list[Tensor | None]] = [[None, None] for _ in made]
        for (i, axis, start, stop), line in zip(work, imap(self.piece, work), strict=True):
            begin, end = block[2 * axis : 2 * axis + 2]
            if self.lines[i][axis] is None:
                self.lines[i][axis] = line.new_empty(*line.shape[:3], (end - begin) * samples)
            self.lines[i][axis][..., (start - begin) * samples : (stop - begin) * samples] = line

    def piece(self, work: tuple[int, int, int, int]) -> Tensor:
        i, axis, start, stop = work
        t = (self.view.rows, self.view.cols)[axis].positions(start, stop).to(self.made[i].device)
        return self.made[i].line(axis ^ self.view.turned, t)

    def colours(self, i: int, box: Box) -> Tensor:
        """[img_channels,P]: the samples of `box`, row by row."""
        samples, (y, x) = self.view.rows.samples, (self.block.y0, self.block.x0)
        rows = self.lines[i][0][..., (box.y0 - y) * samples : (box.y1 - y) * samples]
        cols = self.lines[i][1][..., (box.x0 - x) * samples : (box.x1 - x) * samples]
        return self.made[i].pixels(rows, cols)


@torch.no_grad()
def paint_points(
    G: Generator, ws: Tensor, x: Tensor, y: Tensor, *, exact: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """x, y float64 [P] -> [N,img_channels,P]. As `paint`, at points in any order."""
    imap = workers(ws.device)
    made = painters(G, ws, dtype, imap)
    samples = [(None, None)] * len(made)
    if not exact:
        samples = sample(made, [points.Spread.of(y), points.Spread.of(x)], imap)

    def part(places: tuple[Tensor, Tensor]) -> Tensor:
        return torch.stack([points.colours(made[i], *places, samples[i]) for i in range(len(made))])

    count = POINTS_TILE[ws.device.type] ** 2
    return torch.cat(list(imap(part, list(zip(x.split(count), y.split(count), strict=True)))), dim=2)


class Points:
    """Samples of the lines around a block, where a field leads, and colours between them; or exact colours."""

    def __init__(self, made: list[FoldedGenerator], plan: Plan, block: Box, wanted: list[Box], imap: Callable):
        self.made, self.view = made, plan.view
        self.samples = [(None, None) for _ in made]
        if not plan.exact:
            spreads = [points.Spread.of(t) for t in reversed(plan.view.points(block))]
            self.samples = sample(made, spreads, imap)

    def colours(self, i: int, box: Box) -> Tensor:
        """[img_channels,P]: the samples of `box`, row by row."""
        x, y = (t.flatten().to(self.made[i].device) for t in self.view.points(box))
        return points.colours(self.made[i], x, y, self.samples[i])


def sample(made: list[FoldedGenerator], spreads: Sequence[points.Spread], imap: Callable):
    """For each painter (rows, columns): points.Samples around `spreads`, or None where exact points come cheaper."""
    grids = [spread.grid() for spread in spreads]
    work = []
    for axis, grid in enumerate(grids):
        if grid is not None:
            first, step, count = grid
            piece = max(1, PIECE[made[0].device.type] // made[0].thickness)
            t = first + torch.arange(count, dtype=torch.float64) * step
            work += [(painter, axis, part) for painter in made for part in t.split(piece)]
    lines: dict = {}
    for (painter, axis, _), line in zip(work, imap(sample_piece, work), strict=True):
        lines.setdefault((painter, axis), []).append(line)
    return [
        tuple(
            None if grid is None else points.Samples(*grid[:2], torch.cat(lines.pop((painter, axis))))
            for axis, grid in enumerate(grids)
        )
        for painter in made
    ]


def sample_piece(work: tuple[FoldedGenerator, int, Tensor]) -> Tensor:
    painter, axis, t = work
    return points.position_major(painter.line(axis, t.to(painter.device)))


def workers(device: torch.device) -> Callable:
    """imap(f, items): f of each item, in order, by as many threads as torch would use on a CPU."""
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
        finally:  # left early, or by an error
            for task in running:
                task.cancel()
            wait(running)

    return imap


@functools.lru_cache
def threads(pid: int, count: int) -> ThreadPoolExecutor:
    """`count` threads of process `pid` that compute alone: matrices of a tile's size are too small to share.

    They are kept, for their libraries' buffers take longer to set up than a small picture takes.
    """
    before = torch.get_num_threads()
    started = threading.Barrier(count + 1)

    def alone():
        torch.set_num_threads(1)
        torch.get_num_threads()  # makes it last: a thread's first operation takes over the process's setting
        started.wait()

    pool = ThreadPoolExecutor(count)
    for _ in range(count):
        pool.submit(alone)
    started.wait()
    torch.set_num_threads(before)  # for this thread and those to come
    return pool
