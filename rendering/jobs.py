"""Pictures, sheets and films as files: processes share the tiles or frames, and interrupted work can be resumed."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

import rendering
from dnnlib.console import UserError, progress
from rendering.camera import Camera
from rendering.grid import Box
from rendering.video import Film
from rendering.writers import SUFFIXES, Canvas, check_format, guess_format
from torch_utils.distributed import Processes
from torch_utils.images import to_uint8
from training.networks import Generator

GRIDS = {suffix: format for format, suffix in SUFFIXES.items()}  # how a grid is written


class Job(NamedTuple):
    """What all pictures of one call have in common."""

    G: Generator
    dtype: torch.dtype
    geometry: dict  # arguments of rendering.plan: size, fit, supersample, exact, tile
    settings: dict  # plain values, which --resume compares
    resume: bool

    def plan(self, camera: Camera, t: float) -> rendering.Plan:
        try:
            return rendering.plan(self.G, **self.geometry, **camera.at(t))
        except ValueError as error:
            raise UserError(str(error)) from error

    def paint(self, ws: Tensor, plan: rendering.Plan, only=None):
        """Yields (box, uint8 [h,w,C]) of ws [num_ws,w_dim]."""
        for box, pixels in rendering.paint(self.G, ws[None], plan, dtype=self.dtype, only=only, finish=to_uint8):
            yield box, pixels[0].movedim(0, -1).cpu().numpy()


def write_pictures(
    job: Job, group: Processes, work: dict[int, tuple], camera: Camera, outdir: Path, format: str | None
) -> None:
    """The pictures of `work`, seed -> class and styles [num_ws,w_dim], as seed0000.png … in `outdir`."""
    height, width = size = job.geometry["size"]
    format = format or guess_format(size)
    check_format(format, size, job.G.config.img_channels)
    plan = job.plan(camera, 0)
    seeds = list(work)
    if len(seeds) >= group.world:  # a picture each, or else a part of each picture
        seeds, group = seeds[group.rank :: group.world], Processes(0, 1, group.device)
    total = len(seeds) * height * width // group.world
    with progress(None, desc=f"{width}x{height}", total=total, unit="px", scale=True) as bar:
        for seed in seeds:
            path = outdir / f"seed{seed:04d}{SUFFIXES[format]}"
            kind, ws = work[seed]
            settings = job.settings | {"seed": seed, "class": kind, "camera": camera, "tile": plan.tile}
            write_sheet(job, group, ws[None], 1, plan, path, format, settings, bar)


def write_grid(
    job: Job,
    group: Processes,
    seeds: list[int],
    classes: list[str | None],
    ws: Tensor,
    camera: Camera,
    path: Path,
    columns: int | None,
) -> None:
    """Writes the pictures of ws [N,num_ws,w_dim] into the file `path`, row by row.

    Without `columns`, nearly as many pixels high as wide. Cells that are left over in the last row stay black.
    """
    height, width = job.geometry["size"]
    columns = min(len(ws), columns or math.ceil(math.sqrt(len(ws) * height / width)))
    format = GRIDS[path.suffix]
    plan = job.plan(camera, 0)
    settings = job.settings | {
        "seeds": seeds,
        "classes": classes,
        "camera": camera,
        "tile": plan.tile,
        "columns": columns,
    }
    total = len(ws) * height * width // group.world
    with progress(None, desc=path.name, total=total, unit="px", scale=True) as bar:
        write_sheet(job, group, ws, columns, plan, path, format, settings, bar)


def write_sheet(
    job: Job,
    group: Processes,
    ws: Tensor,
    columns: int,
    plan: rendering.Plan,
    path: Path,
    format: str,
    settings: dict,
    bar,
) -> None:
    """Renders ws [N,num_ws,w_dim] into the file `path`, `columns` pictures a row; the processes share the tiles."""
    height, width = plan.view.size
    tiles = len(ws) * plan.tiles
    known = {
        "size": (-(-len(ws) // columns) * height, columns * width),
        "channels": job.G.config.img_channels,
        "tiles": tiles,
        "job": settings,
        "format": format,
    }
    if group.is_first:
        canvas = Canvas.create(path, resume=job.resume, **known)
    missing = group.broadcast(np.flatnonzero(~canvas.done) if group.is_first else None)
    if not group.is_first:
        canvas = Canvas(path, **known)
    mine = np.zeros((len(ws), plan.tiles), bool)
    mine.flat[np.array_split(missing, group.world)[group.rank]] = True
    bar.update((tiles - len(missing)) * plan.tile**2 // group.world)
    with canvas:
        for i in np.flatnonzero(mine.any(1)):
            top, left = i // columns * height, i % columns * width
            for box, pixels in job.paint(ws[i], plan, only=mine[i]):
                place = Box(top + box.y0, top + box.y1, left + box.x0, left + box.x1)
                canvas.write(i * plan.tiles + plan.number(box), *place.slices, pixels)
                bar.update(pixels.shape[0] * pixels.shape[1])
    group.barrier()  # until all have closed the canvas
    if group.is_first:
        canvas.finish()


def write_film(job: Job, group: Processes, ws: Tensor, camera: Camera, frames: int, path: Path, fps: float) -> None:
    """The film of ws [K,num_ws,w_dim] in a loop through K styles, with the camera on its way, into `path`."""
    loops = len(ws) > 1 or camera.closes
    times = [i / (frames if loops else max(frames - 1, 1)) for i in range(frames)]
    known = {
        "size": job.geometry["size"],
        "channels": job.G.config.img_channels,
        "frames": frames,
        "fps": fps,
        "job": job.settings | {"frames": frames},
    }
    if group.is_first:
        film = Film.create(path, resume=job.resume, **known)
    missing = group.broadcast(film.missing if group.is_first else None)
    if not group.is_first:
        film = Film(path, **known)
    keys = np.concatenate([ws.cpu().double().numpy(), ws[:1].cpu().double().numpy()])
    walk = CubicSpline(np.linspace(0, 1, len(keys)), keys, bc_type="periodic")
    for index in progress(missing[group.rank :: group.world], desc=path.name, unit="frame"):
        t = times[index]
        plan = job.plan(camera, t)
        frame = np.empty((*plan.view.size, job.G.config.img_channels), np.uint8)
        for box, pixels in job.paint(torch.from_numpy(walk(t)).to(ws), plan):
            frame[box.slices] = pixels
        film.write(index, frame)
    group.barrier()  # until all frames are there
    if group.is_first:
        film.finish()
