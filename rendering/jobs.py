"""Render into files: processes share the tiles or frames, and interrupted work can be resumed."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from dnnlib.console import progress
from rendering.camera import Camera
from rendering.engine import DTYPES, NotFinite, Tiling, render_tiles
from rendering.grid import Box, Shot
from rendering.styles import Styles
from rendering.unfinished import Unfinished
from rendering.video import Film
from rendering.writers import FORMATS, Canvas, choose_format
from torch_utils.distributed import Processes
from torch_utils.images import to_uint8
from training.networks import Generator


@dataclass(frozen=True)
class Job:
    """What to render: the images of `seeds`, seen by `camera`, with the size and options of `shot`.

    network: a digest of G's file. `resume` compares it, like all other fields. dtype: a key of DTYPES.
    """

    G: Generator
    network: str
    seeds: list[int]
    styles: Styles
    camera: Camera
    shot: Shot
    dtype: str = "fp32"
    resume: bool = False

    def settings(self, **more: object) -> dict:
        """Return everything that the bytes depend on, as JSON values."""
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
            "truncation": (self.styles.trunc, self.styles.cutoff),
            "mix": self.styles.mix,
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
def shared(output: Unfinished, group: Processes, resume: bool) -> Iterator[np.ndarray]:
    """Start or resume `output`, yield this process's share of the missing parts, and finish when all are written."""
    if group.is_first:
        output.start(resume)
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


def write_images(job: Job, group: Processes, outdir: Path, format: str | None = None) -> None:
    """Write seed0000.png … into `outdir`. format: a key of FORMATS, by default `choose_format`. Raises UserError."""
    height, width = job.shot.size
    suffix = FORMATS[format or choose_format(job.shot.size)].suffix
    classes, ws = job.styles.choose_classes(job.G, job.seeds), job.styles.map(job.G, job.seeds)
    numbers = list({seed: i for i, seed in enumerate(job.seeds)}.values())  # a seed given twice is one file
    if len(numbers) >= group.world:  # whole images for each process, else a part of each image
        numbers, group = numbers[group.rank :: group.world], Processes(0, 1, group.device)
    total = len(numbers) * height * width // group.world
    with progress(None, desc=f"{width}x{height}", total=total, unit="px", scale=True) as bar:
        for i in numbers:
            path = outdir / f"seed{job.seeds[i]:04d}{suffix}"
            write_sheet(job, group, ws[i : i + 1], 1, path, bar, {"seed": job.seeds[i], "class": classes[i]})


def write_grid(job: Job, group: Processes, path: Path, columns: int | None = None) -> None:
    """Write the images of all seeds into one file, row by row. Raises UserError.

    Without `columns`, the grid is nearly as high as wide. Empty cells in the last row are black.
    """
    height, width = job.shot.size
    count = len(job.seeds)
    columns = min(count, columns or math.ceil(math.sqrt(count * height / width)))
    ws = job.styles.map(job.G, job.seeds)
    details = {"seeds": job.seeds, "classes": job.styles.choose_classes(job.G, job.seeds), "columns": columns}
    total = count * height * width // group.world
    with progress(None, desc=path.name, total=total, unit="px", scale=True) as bar:
        write_sheet(job, group, ws, columns, path, bar, details)


def write_sheet(job: Job, group: Processes, ws: Tensor, columns: int, path: Path, bar, details: dict) -> None:
    """Render ws [N,num_ws,w_dim] into the file `path`, `columns` images per row. details: more settings."""
    height, width = job.shot.size
    tiling = job.tiling()
    tiles = len(ws) * tiling.tiles
    canvas = Canvas(
        path,
        job.settings(tile=tiling.tile, **details),
        size=(-(-len(ws) // columns) * height, columns * width),
        channels=job.G.config.img_channels,
        tiles=tiles,
    )
    with shared(canvas, group, job.resume) as numbers:
        bar.update(max(0, tiles // group.world - len(numbers)) * tiling.tile**2)  # finished earlier
        mine = np.zeros((len(ws), tiling.tiles), bool)
        mine.flat[numbers] = True
        for i in np.flatnonzero(mine.any(1)):
            corner = i // columns * height, i % columns * width
            for box, pixels in job.render(ws[i], tiling, only=mine[i]):
                canvas.write(i * tiling.tiles + tiling.number(box), box.shifted(*corner), pixels)
                bar.update(pixels.shape[0] * pixels.shape[1])


def write_film(job: Job, group: Processes, path: Path, frames: int, fps: float) -> None:
    """Write a video with `frames` frames per seed: a loop through the styles, while the camera follows its path.

    Raises UserError.
    """
    ws = job.styles.map(job.G, job.seeds)
    frames *= len(ws)
    loops = len(ws) > 1 or job.camera.closes
    keys = torch.cat([ws, ws[:1]]).cpu().double().numpy()
    walk = CubicSpline(np.linspace(0, 1, len(keys)), keys, bc_type="periodic")
    classes = job.styles.choose_classes(job.G, job.seeds)
    channels = job.G.config.img_channels
    settings = job.settings(seeds=job.seeds, classes=classes, frames=frames)
    film = Film(path, settings, size=job.shot.size, channels=channels, frames=frames, fps=fps)
    with shared(film, group, job.resume) as numbers:
        for index in progress(numbers, desc=path.name, unit="frame"):
            t = index / (frames if loops else max(frames - 1, 1))
            tiling = job.tiling(t)
            frame = np.empty((*job.shot.size, channels), np.uint8)
            for box, pixels in job.render(torch.from_numpy(walk(t)).to(ws), tiling):
                frame[box.slices] = pixels
            film.write(index, frame)
