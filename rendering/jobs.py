"""Render into files: processes share the tiles or frames, and interrupted work can be resumed.

Each finished file is reported as a line `path<TAB>width x height<TAB>seconds`, or `kept` if it was finished before.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from dnnlib.console import UserError, progress
from rendering.camera import Camera
from rendering.engine import DTYPES, NotFinite, Tiling, render_tiles
from rendering.grid import Box, Shot
from rendering.saved import SavedStyles
from rendering.styles import Seeds
from rendering.video import Film
from rendering.writers import FORMATS, Canvas, choose_format
from torch_utils.distributed import Processes
from torch_utils.images import to_uint8
from training.networks import Generator


@dataclass(frozen=True)
class Job:
    """What to render: `images`, seen by `camera`, with the size and options of `shot`.

    network: a digest of G's file. dtype: a key of DTYPES. resume: continue files of equal `settings`. say: reports a
    finished file.
    """

    G: Generator
    network: str
    images: Seeds | SavedStyles
    camera: Camera
    shot: Shot
    dtype: str = "fp32"
    resume: bool = False
    say: Callable[[str], None] = lambda line: None

    def settings(self, **more: object) -> dict:
        """Return everything that the bytes depend on, as JSON values. more: those of the images, and of the file."""
        shot = self.shot
        return {
            "network": self.network,
            "size": shot.size,
            "fit": shot.fit,
            "supersample": shot.supersample,
            "exact": shot.exact,
            "tile": shot.tile,
            "dtype": self.dtype,
            "device": self.G.mapping.w_avg.device.type,
            "camera": self.camera,
            **more,
        }

    def tiling(self, t: float = 0) -> Tiling:
        """Return the positions of the pixels at t in [0,1] of the camera's path. Raises UserError."""
        return Tiling.of(self.G, self.camera.aim(self.shot, t))

    def render(self, ws: Tensor, tiling: Tiling, only: np.ndarray | None = None) -> Iterator[tuple[Box, np.ndarray]]:
        """Yield (box, uint8 [h,w,C]) of ws [num_ws,w_dim]."""
        tiles = render_tiles(self.G, ws[None], tiling, dtype=DTYPES[self.dtype], only=only, finish=to_uint8)
        for box, pixels in tiles:
            yield box, pixels[0].movedim(0, -1).cpu().numpy()


@contextlib.contextmanager
def shared(output: Canvas | Film, job: Job, group: Processes) -> Iterator[np.ndarray]:
    """Start or resume `output`, yield this process's share of the missing parts, and finish when all are written.

    With `job.resume`, a file that is finished is kept, and nothing is missing.
    """
    began, line = time.monotonic(), f"{output.path}\t{output.size[1]}x{output.size[0]}\t"
    if group.broadcast(job.resume and output.finished() if group.is_first else None):
        yield np.empty(0, int)
        if group.is_first:
            job.say(f"{line}kept")
        return
    with output.alone() if group.is_first else contextlib.nullcontext():
        if group.is_first:
            output.start(job.resume)
        missing = group.broadcast(output.missing if group.is_first else None)
        try:
            with output:
                yield np.array_split(missing, group.world)[group.rank]
        except NotFinite:
            if group.is_first:
                output.discard()  # resuming would fail again
            raise
        group.barrier()
        if group.is_first:
            output.finish()
            job.say(f"{line}{time.monotonic() - began:.1f} s")


def write_images(job: Job, group: Processes, outdir: Path, format: str | None = None) -> None:
    """Write seed0000.png … into `outdir`. format: a key of FORMATS, by default `choose_format`. Raises UserError."""
    height, width = job.shot.size
    suffix = FORMATS[format or choose_format(job.shot.size)].suffix
    numbers = {}  # of each file; a seed given twice is one
    for i in range(len(job.images)):
        first = numbers.setdefault(job.images.name(i), i)
        if job.images.settings(i) != job.images.settings(first):
            raise UserError(
                f"two images would be {job.images.name(i)}{suffix}: the seed is given twice, with two classes; give "
                "them in two calls with two directories, or as a grid"
            )
    numbers = list(numbers.values())
    if len(numbers) >= group.world:  # whole images for each process, else a part of each image
        numbers, group = numbers[group.rank :: group.world], Processes(0, 1, group.device)
    total = len(numbers) * height * width // group.world
    with progress(None, desc=f"{width}x{height}", total=total, unit="px", scale=True) as bar:
        for i in numbers:
            path = outdir / f"{job.images.name(i)}{suffix}"
            write_sheet(job, group, [i], 1, path, bar, job.images.settings(i))


def write_grid(job: Job, group: Processes, path: Path, columns: int | None = None) -> None:
    """Write all images into one file, row by row. Raises UserError.

    Without `columns`, the grid is nearly as high as wide. Empty cells in the last row are black.
    """
    height, width = job.shot.size
    count = len(job.images)
    columns = min(count, columns or math.ceil(math.sqrt(count * height / width)))
    total = count * height * width // group.world
    with progress(None, desc=path.name, total=total, unit="px", scale=True) as bar:
        write_sheet(job, group, range(count), columns, path, bar, job.images.settings() | {"columns": columns})


def write_sheet(
    job: Job, group: Processes, images: Sequence[int], columns: int, path: Path, bar, details: dict
) -> None:
    """Render images, by their numbers, into the file `path`, `columns` per row. details: more settings."""
    height, width = job.shot.size
    tiling = job.tiling()
    tiles = len(images) * tiling.tiles
    canvas = Canvas(
        path,
        job.settings(tile=tiling.tile, **details),
        size=(-(-len(images) // columns) * height, columns * width),
        channels=job.G.config.img_channels,
        tiles=tiles,
    )
    with shared(canvas, job, group) as numbers:
        bar.total -= round((1 / group.world - len(numbers) / tiles) * len(images) * height * width)  # finished earlier
        mine = np.zeros((len(images), tiling.tiles), bool)
        mine.flat[numbers] = True
        for cell in np.flatnonzero(mine.any(1)):
            corner = cell // columns * height, cell % columns * width
            for box, pixels in job.render(job.images.ws(images[cell]), tiling, only=mine[cell]):
                canvas.write(cell * tiling.tiles + tiling.number(box), box.shifted(*corner), pixels)
                bar.update(pixels.shape[0] * pixels.shape[1])


def write_film(job: Job, group: Processes, path: Path, frames: int, fps: float) -> None:
    """Write a video with `frames` frames per image: a loop through their styles, while the camera follows its path.

    Raises UserError.
    """
    ws = torch.stack([job.images.ws(i) for i in range(len(job.images))])
    frames *= len(ws)
    loops = len(ws) > 1 or job.camera.closes
    keys = torch.cat([ws, ws[:1]]).cpu().double().numpy()
    walk = CubicSpline(np.linspace(0, 1, len(keys)), keys, bc_type="periodic")
    channels = job.G.config.img_channels
    settings = job.settings(**job.images.settings(), frames=frames, fps=fps)
    film = Film(path, settings, size=job.shot.size, channels=channels, frames=frames, fps=fps)
    with shared(film, job, group) as numbers:
        for index in progress(numbers, desc=path.name, unit="frame"):
            t = index / (frames if loops else max(frames - 1, 1))
            tiling = job.tiling(t)
            frame = np.empty((*job.shot.size, channels), np.uint8)
            for box, pixels in job.render(torch.from_numpy(walk(t)).to(ws), tiling):
                frame[box.slices] = pixels
            film.write(index, frame)
