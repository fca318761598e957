"""Render pictures and films of a trained generator: any size, any window, any transform."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

import rendering
from dnnlib.console import UserError, progress
from dnnlib.files import sha256
from rendering.grid import FITS, Box
from rendering.video import Film
from rendering.writers import FORMATS, SUFFIXES, Canvas, check_format, guess_format
from torch_utils.distributed import Processes, processes
from torch_utils.pictures import to_uint8
from training.networks import Generator
from training.snapshot import find_network, load_generator, network_names, save_generator

MAX_SIDE = 10**7  # pixels; a square of it would take 300 TB
GRIDS = {suffix: format for format, suffix in SUFFIXES.items()}  # how a grid is written
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


# Who: latents, labels, styles.


def parse_seeds(text: str) -> list[int]:
    """[0, 1, 2, 7] from "0-2,7". Raises UserError."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})(?:-(\d{1,10}))?\s*", part)
        if not match:
            raise UserError(f"--seeds={text}: cannot read {part!r}; write numbers and ranges, for example 0-3,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= 2**32:
            raise UserError(f"--seeds={text}: {part!r} is no range of seeds from 0 to {2**32 - 1}")
        seeds += range(first, last + 1)
    return seeds


def latent(G: Generator, seed: int) -> Tensor:
    """[1,z_dim]: the latent that StyleGAN's tools give this seed."""
    return torch.from_numpy(np.random.RandomState(seed).randn(1, G.config.z_dim)).float()


def label(G: Generator, text: str | None) -> Tensor:
    """[1,c_dim]: class "2", or the blend "2:0.3+5:0.7" of classes; equal parts without numbers. Raises UserError."""
    c_dim = G.config.c_dim
    c = torch.zeros(1, c_dim)
    if text is None:  # a network without classes
        return c
    for part in text.split("+"):
        match = re.fullmatch(r"\s*(\d{1,9})(?::([0-9.]{1,12}))?\s*", part)
        weight = number(match[2] or "1") if match else None
        if weight is None:
            raise UserError(f"--class={text}: cannot read {part!r}; write a class, or a blend such as 2:0.3+5:0.7")
        if int(match[1]) >= c_dim:
            known = f"it has classes 0 to {c_dim - 1}" if c_dim else "the network has no classes; leave it out"
            raise UserError(f"--class={text}: {known}")
        c[0, int(match[1])] += weight
    if not c.sum() > 0:
        raise UserError(f"--class={text}: the parts of the blend are all 0; make one of them larger")
    return c / c.sum()


def number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class Styles(NamedTuple):
    """How seeds become styles: truncation, classes, mixing."""

    trunc: float
    cutoff: int | None
    classes: list[str]  # of the first seed, of the second, …; then again from the start
    mix: list[str]  # "SEED:LAYERS"

    def of(self, G: Generator, seeds: list[int], device: torch.device) -> Tensor:
        """[len(seeds),num_ws,w_dim]. Raises UserError."""
        count = G.config.num_ws
        if self.cutoff is not None and self.cutoff > count:
            raise UserError(f"--trunc-cutoff={self.cutoff}: the network has {count} styles; choose 0 to {count}")
        mixed = [self.parse_mix(text, count) for text in self.mix]

        def styles(seed: int, c: Tensor) -> Tensor:
            return G.mapping(latent(G, seed).to(device), c.to(device), self.trunc, self.cutoff)

        result = []
        with torch.no_grad():
            for i, seed in enumerate(seeds):
                c = label(G, self.class_of(G, i, seed))
                ws = styles(seed, c)
                for other, layers in mixed:
                    ws[:, layers] = styles(other, c)[:, layers]
                result.append(ws)
        return torch.cat(result)

    def class_of(self, G: Generator, i: int, seed: int) -> str | None:
        """Returns the class of the i-th seed: where none are given, seed mod c_dim, or None of an unconditional G."""
        if self.classes:
            return self.classes[i % len(self.classes)]
        return str(seed % G.config.c_dim) if G.config.c_dim else None

    @staticmethod
    def parse_mix(text: str, count: int) -> tuple[int, list[int]]:
        match = re.fullmatch(r"(\d{1,10}):([\d,\-]+)", text)
        if not match:
            raise UserError(f"--mix={text}: write a seed and the styles taken from it, for example 7:4-8")
        layers = parse_seeds(match[2])
        if max(layers) >= count:
            raise UserError(f"--mix={text}: the network has styles 0 to {count - 1}")
        return parse_seeds(match[1])[0], layers


# Where: the camera, which stands still in a picture and follows paths in a film.


def parse_path(option: str, text: str, count: int, example: str) -> list[tuple[float, ...]]:
    """Numbers "a,b,…" (`count` of them), or the path "a,b:c,d:…". Raises UserError."""
    path = []
    for stop in text.split(":"):
        values = [number(part) for part in stop.split(",")]
        if len(values) != count or None in values:
            raise UserError(f"--{option}={text}: cannot read {stop!r}; write for example --{option}={example}")
        path.append(tuple(values))
    return path


def along(path: list[tuple[float, ...]], t: float, between: Callable) -> tuple[float, ...]:
    """The point of `path` at t in [0,1], each leg taking the same time; between(a, b, t) on a leg."""
    leg = min(int(t * (len(path) - 1)), len(path) - 2)
    return path[0] if len(path) == 1 else between(path[leg], path[leg + 1], t * (len(path) - 1) - leg)


def linear(a: tuple[float, ...], b: tuple[float, ...], t: float) -> tuple[float, ...]:
    return tuple(x + (y - x) * t for x, y in zip(a, b, strict=True))


def geometric(a: tuple[float, ...], b: tuple[float, ...], t: float) -> tuple[float, ...]:
    return tuple(x * (y / x) ** t for x, y in zip(a, b, strict=True))


def approach(a: tuple[float, ...], b: tuple[float, ...], t: float) -> tuple[float, ...]:
    """From window to window at a constant rate of zoom, about the point that both have in the same place."""
    edges = []
    for low, high in ((0, 2), (1, 3)):
        before, after = a[high] - a[low], b[high] - b[low]
        now = before * (after / before) ** t
        done = t if math.isclose(before, after) else (before - now) / (before - after)
        middle = (a[low] + a[high]) / 2 * (1 - done) + (b[low] + b[high]) / 2 * done
        edges.append((middle - now / 2, middle + now / 2))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


class Camera(NamedTuple):
    """Paths of the window and of the transforms."""

    window: list[tuple[float, ...]]
    translate: list[tuple[float, ...]]
    rotate: list[tuple[float, ...]]
    zoom: list[tuple[float, ...]]

    @classmethod
    def parse(cls, window: str | None, translate: str | None, rotate: str | None, zoom: str | None) -> "Camera":
        """From the options of these names. Raises UserError."""
        camera = cls(
            parse_path("window", window or "0,0,1,1", 4, "0.25,0.25,0.5,0.5"),
            parse_path("translate", translate or "0,0", 2, "0.3,0"),
            parse_path("rotate", rotate or "0", 1, "30"),
            parse_path("zoom", zoom or "1", 1, "2"),
        )
        for x0, y0, x1, y1 in camera.window:
            if not (x0 < x1 and y0 < y1):
                raise UserError(f"--window={window}: give left,top,right,bottom with left < right and top < bottom")
        if min(factor for (factor,) in camera.zoom) <= 0:
            raise UserError(f"--zoom={zoom}: give a factor above 0, for example 2")
        return camera

    @property
    def moves(self) -> bool:
        return any(len(path) > 1 for path in self)

    @property
    def closes(self) -> bool:
        """Whether the last picture of the path looks like the first: full turns, and the rest in its old place."""
        turns = (self.rotate[-1][0] - self.rotate[0][0]) % 360 == 0
        return self.moves and turns and all(path[0] == path[-1] for path in (self.window, self.translate, self.zoom))

    def at(self, t: float) -> dict:
        """The arguments `window` and `transform` of rendering.plan at t in [0,1]."""
        window = along(self.window, t, approach)
        (x, y), (degrees,) = along(self.translate, t, linear), along(self.rotate, t, linear)
        (factor,) = along(self.zoom, t, geometric)
        move = rendering.translation(x, y) @ rendering.rotation(degrees) @ rendering.zoom(factor)
        return {"window": window, "transform": None if torch.equal(move, rendering.zoom(1)) else move}


def picture_size(G: Generator, scale: float | None, size: str | None, window: tuple[float, ...]) -> tuple[int, int]:
    """(height, width) from --size or --scale; by default as many pixels along the longer side as it was trained at.

    Raises UserError.
    """
    if scale and size:
        raise UserError("--scale and --size both set the size; give one of them")
    if scale is not None and not math.isfinite(scale):
        raise UserError(f"--scale={scale}: give a finite number, for example 2")
    if size:
        match = re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", size)
        if not match:
            raise UserError(f"--size={size}: write width x height in pixels, for example 1024x768")
        width, height = int(match[1]), int(match[2])
    else:
        wide, high = window[2] - window[0], window[3] - window[1]
        scale = scale or 1 / max(wide, high)
        height, width = (
            round(side * part * scale) for side, part in zip(G.config.img_shape, (high, wide), strict=True)
        )
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise UserError(
            f"a picture of {width}x{height} pixels cannot be written; it may have 1 to {MAX_SIDE:,} per side, "
            "so choose another --size or --scale"
        )
    return height, width


# What: pictures and films.


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
    missing = group.share(np.flatnonzero(~canvas.done) if group.is_first else None)
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
    group.wait()  # until all have closed the canvas
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
    missing = group.share(film.missing if group.is_first else None)
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
    group.wait()  # until all frames are there
    if group.is_first:
        film.finish()


@click.group(invoke_without_command=True, context_settings={"max_content_width": 110})
@click.option(
    "--network",
    metavar="NAME|FILE",
    help="A name in models/, a network-snapshot-*.safetensors, or a released .pkl.  "
    "[default: emoji-people, or else the first name in models/]",
)
@click.option("--seeds", metavar="0-3,7", help="One picture for each seed; the stations of a film.")
@click.option("--outdir", metavar="DIR", help="Where seed0000.png … are written.")
@click.option("--grid", metavar="FILE.png", help="All pictures in one file, row by row; or .webp, .tif, .dzi.")
@click.option("--columns", type=click.IntRange(min=1), help="Of --grid.  [default: nearly square]")
@click.option(
    "--trunc", type=float, default=1, show_default=True, help="Truncation ψ: 1 is the full variety, 0 the average."
)
@click.option("--trunc-cutoff", type=click.IntRange(min=0), help="Truncate so many styles only.  [default: all]")
@click.option(
    "--class",
    "classes",
    metavar="C[,C…]",
    help="Classes of the seeds, in turn: 2, or a blend such as 2:0.3+5:0.7.  [default: seed mod number of classes]",
)
@click.option("--mix", multiple=True, metavar="SEED:STYLES", help="Take these styles from another seed, e.g. 7:4-8.")
@click.option("--size", metavar="WxH", help="Size in pixels.  [default: that trained at]")
@click.option("--scale", type=click.FloatRange(min=0, min_open=True), help="Size as a multiple of that trained at.")
@click.option(
    "--fit",
    type=click.Choice(list(FITS)),
    default="crop",
    show_default=True,
    help="When shapes differ: show less, show more, or oblong pixels.",
)
@click.option("--window", metavar="X0,Y0,X1,Y1", help="Part of the picture to show, in fractions: 0,0,1,1 is all.")
@click.option("--translate", metavar="X,Y", help="Move the picture right and down, in its sides.")
@click.option("--rotate", metavar="DEGREES", help="Turn the picture counter-clockwise.")
@click.option("--zoom", metavar="FACTOR", help="Magnify the picture about its centre.")
@click.option("--exact", is_flag=True, help="Compute rotated pixels exactly, some hundred times slower.")
@click.option(
    "--supersample", type=click.IntRange(1, 64), default=1, show_default=True, help="K² samples averaged per pixel."
)
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="fp32", show_default=True, help="Of the matrix products."
)
@click.option("--tile", type=click.IntRange(1, 2**14), help="Side of a tile in pixels.  [default: by device]")
@click.option("--format", type=click.Choice(list(FORMATS)), help="Of pictures.  [default: png, tiff for large ones]")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted call has left.")
@click.option(
    "--video", metavar="FILE.mp4", help="A film through the seeds; A:B makes a path of --window, --zoom, …, e.g. 1:50."
)
@click.option("--w-frames", type=click.IntRange(min=1), default=60, show_default=True, help="Frames for each seed.")
@click.option("--fps", type=click.FloatRange(min=0, min_open=True), default=30, show_default=True)
@click.pass_context
def main(
    context, network, seeds, outdir, grid, columns, trunc, trunc_cutoff, classes, mix, video, w_frames, fps, **options
):
    """Render pictures and films of a trained generator.

    \b
    python generate.py --network=net.safetensors --seeds=0-7 --outdir=out
    python generate.py --network=emoji-people --seeds=0-63 --grid=out/grid.png
    python generate.py --network=net.safetensors --seeds=3 --size=3840x2160 --trunc=0.7 --outdir=out
    python generate.py --network=net.safetensors --seeds=3 --scale=64 --window=0.3,0.3,0.4,0.4 --outdir=out
    python generate.py --network=net.safetensors --seeds=3 --size=40000x40000 --format=dzi --outdir=out
    python generate.py --network=net.safetensors --seeds=0-3 --zoom=1:8 --video=out/walk.mp4

    With several GPUs or machines, start the same command with torchrun: the files are the same.
    """
    if context.invoked_subcommand:
        return
    names = network_names()
    if network is None and not names:
        raise UserError("--network is missing, and models/ holds none; give a network-snapshot-*.safetensors of a run")
    if not seeds:
        raise UserError("--seeds is missing; see generate.py --help")
    if sum(map(bool, (outdir, grid, video))) != 1:
        raise UserError("give one of --outdir, for pictures, --grid, for all in one, and --video, for a film")
    if columns and not grid:
        raise UserError("--columns belongs to --grid; give --grid=FILE.png as well")
    if grid and Path(grid).suffix not in GRIDS:
        raise UserError(f"--grid={grid}: choose a name that ends in {', '.join(GRIDS)}")
    if not math.isfinite(trunc):
        raise UserError(f"--trunc={trunc}: give a finite number, for example 0.7")
    camera = Camera.parse(*(options[name] for name in ("window", "translate", "rotate", "zoom")))
    numbers = parse_seeds(seeds)
    styles = Styles(trunc, trunc_cutoff, classes.split(",") if classes else [], list(mix))
    if video and not (camera.moves or len(numbers) > 1):
        raise UserError("the film would stand still; give several --seeds, or a path, for example --zoom=1:50")
    if video and not video.endswith(".mp4"):
        raise UserError(f"--video={video}: films are MP4 files; choose a name that ends in .mp4")
    if not video and camera.moves:
        raise UserError("a path A:B is for films; add --video, or give single values")
    geometry = {name: options[name] for name in ("fit", "supersample", "exact", "tile")}
    try:
        with processes() as group:
            say = click.echo if group.is_first else lambda line: None
            if network is None:
                network = names[0]
                say(f"--network={network}; models/ holds {', '.join(names)}")
            G = load_generator(network, group.device)
            if G.config.c_dim and not classes:
                say(f"{network} is conditional: seed i takes class i mod {G.config.c_dim}; choose with --class")
            size = picture_size(G, options["scale"], options["size"], camera.window[0])
            if options["dtype"] == "fp16" and group.device.type == "cpu":
                raise UserError("--dtype=fp16 is for GPUs; use bf16 or fp32 on a CPU")
            settings = {
                "network": sha256(find_network(network)),
                "size": size,
                **geometry,
                "dtype": options["dtype"],
                "device": group.device.type,
                "truncation": (styles.trunc, styles.cutoff),
                "mix": styles.mix,
            }
            ws = styles.of(G, numbers, group.device)
            drawn = [styles.class_of(G, i, seed) for i, seed in enumerate(numbers)]
            job = Job(G, DTYPES[options["dtype"]], {"size": size, **geometry}, settings, options["resume"])
            if video:
                job.settings.update(seeds=numbers, classes=drawn, camera=camera)
                write_film(job, group, ws, camera, w_frames * len(numbers), Path(video), fps)
            elif grid:
                write_grid(job, group, numbers, drawn, ws, camera, Path(grid), columns)
            else:
                work = {seed: (kind, w) for seed, kind, w in zip(numbers, drawn, ws, strict=True)}
                write_pictures(job, group, work, camera, Path(outdir), options["format"])
    except KeyboardInterrupt:
        click.echo("Interrupted; the same command with --resume goes on.", err=True)
        context.exit(130)


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("dest", type=click.Path(path_type=Path))
def convert(source, dest):
    """Turn a released .pkl (SOURCE) into a .safetensors file (DEST) that holds its averaged generator."""
    if dest.suffix != ".safetensors":
        raise UserError(f"{dest}: choose a name that ends in .safetensors")
    G = load_generator(source)
    save_generator(G, dest)
    height, width = G.config.img_shape
    click.echo(f"{dest}: a generator of {width}x{height}, {sum(p.numel() for p in G.parameters()):,} parameters")


if __name__ == "__main__":
    main()
