"""Render images and videos of a trained generator: any size, any window, any transform."""

import math
from functools import partial
from pathlib import Path

import click

from dnnlib.config import parse_size
from dnnlib.console import UserError, shorten
from dnnlib.files import sha256
from rendering.camera import Camera
from rendering.engine import DTYPES
from rendering.grid import FITS, Shot
from rendering.jobs import Job, write_film, write_grid, write_images
from rendering.saved import SavedStyles, write_styles
from rendering.styles import Seeds, Styles, parse_classes, parse_seeds
from rendering.writers import FORMATS
from torch_utils.command import Group, command, refuse_unused
from torch_utils.distributed import processes
from training.snapshot import find_network, load_generator, network_names, save_generator

MAX_SIDE = 10**7  # pixels; a square of it would take 300 TB
# Options that have no effect without one of others.
IMAGES = ("outdir", "grid", "video")
USES = {
    "format": ("outdir",),
    "columns": ("grid",),
    "w_frames": ("video",),
    "fps": ("video",),
    "trunc_cutoff": ("trunc",),
    **dict.fromkeys(("size", "scale", "fit", "window", "translate", "rotate", "zoom", "exact"), IMAGES),
    **dict.fromkeys(("supersample", "dtype", "tile", "resume"), IMAGES),
}


def image_size(
    trained: tuple[int, int], size: str | None, scale: float | None, window: tuple[float, ...]
) -> tuple[int, int]:
    """Return (height, width) from --size or --scale; by default, the window's longer side has the training size.

    Raises UserError.
    """
    if scale and size:
        raise UserError("--scale and --size both set the size; give one of them")
    if scale is not None and not math.isfinite(scale):
        raise UserError(f"--scale={scale}: give a finite number, for example 2")
    if size:
        height, width = parse_size(size)
    else:
        shares = window[3] - window[1], window[2] - window[0]
        scale = scale or 1 / max(shares)
        sides = (side * (share * scale) for side, share in zip(trained, shares, strict=True))
        height, width = (round(min(side, MAX_SIDE + 1)) for side in sides)
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise UserError(
            f"an image of {width}x{height} pixels cannot be written; it may have 1 to {MAX_SIDE:,} per side, "
            "so choose another --size or --scale"
        )
    return height, width


@click.group(cls=Group, invoke_without_command=True, context_settings={"max_content_width": 110})
@click.option(
    "--network",
    metavar="NAME|FILE|URL",
    help="A name in models/, a network-snapshot-*.safetensors, a released file, or https://…#sha256=….  "
    "[default: emoji-people, or else the first name in models/]",
)
@click.option("--seeds", metavar="0-3,7", help="One image for each seed; the stops of a video.")
@click.option(
    "--w", "--projected-w", "saved", metavar="FILE", help="Styles in a .npz, .npy or .safetensors, instead of --seeds."
)
@click.option("--save-w", metavar="FILE", help="Write the styles of the seeds to such a file.")
@click.option("--outdir", metavar="DIR", help="Where seed0000.png … are written.")
@click.option("--grid", metavar="FILE.png", help="All images in one file, row by row; or .webp, .tif, .dzi.")
@click.option("--columns", type=click.IntRange(min=1), help="Columns of --grid.  [default: nearly square]")
@click.option(
    "--trunc", type=float, default=1, show_default=True, help="Truncation ψ: 1 is the full variety, 0 the average."
)
@click.option("--trunc-cutoff", type=click.IntRange(min=0), help="Truncate only the first N styles.  [default: all]")
@click.option(
    "--class",
    "classes",
    metavar="C[,C…]",
    help="Classes of the seeds, in turn: a name or a number, a blend such as 2:0.3+cat:0.7, or a vector such as "
    "[1,0,-1.5].  [default: seed mod number of classes]",
)
@click.option("--mix", multiple=True, metavar="SEED:STYLES", help="Use these styles of another seed, e.g. 7:4-8.")
@click.option("--size", metavar="R|WxH", help="Size in pixels.  [default: the training size]")
@click.option("--scale", type=click.FloatRange(min=0, min_open=True), help="Size as a multiple of the training size.")
@click.option(
    "--fit",
    type=click.Choice(list(FITS)),
    default="crop",
    show_default=True,
    help="When shapes differ: show less, show more, or oblong pixels.",
)
@click.option("--window", metavar="X0,Y0,X1,Y1", help="Part of the image to show, in fractions: 0,0,1,1 is all.")
@click.option("--translate", metavar="X,Y", help="Move the image right and down, in units of its longer side.")
@click.option("--rotate", metavar="DEGREES", help="Rotate the image counter-clockwise.")
@click.option("--zoom", metavar="FACTOR", help="Magnify the image about its centre.")
@click.option("--exact", is_flag=True, help="Compute rotated pixels exactly, about a hundred times slower.")
@click.option(
    "--supersample", type=click.IntRange(1, 64), default=1, show_default=True, help="Average K² samples per pixel."
)
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="fp32", show_default=True, help="Type of the matrix products."
)
@click.option("--tile", type=click.IntRange(1, 2**14), help="Side of a tile in pixels.  [default: by device]")
@click.option("--format", type=click.Choice(list(FORMATS)), help="Image format.  [default: png, tiff for large ones]")
@click.option("--resume", is_flag=True, help="Continue an interrupted call.")
@click.option(
    "--video", metavar="FILE.mp4", help="A video through the seeds; A:B makes a path of --window, --zoom, …, e.g. 1:50."
)
@click.option("--w-frames", type=click.IntRange(min=1), default=60, show_default=True, help="Frames for each seed.")
@click.option("--fps", type=click.FloatRange(min=0, min_open=True), default=30, show_default=True)
@click.pass_context
@command(memory="give a smaller --tile", interrupted="the same command with --resume continues.")
def main(
    context, network, seeds, saved, save_w, outdir, grid, columns, video, w_frames, fps, format, resume, trunc,
    trunc_cutoff, classes, mix, size, scale, window, translate, rotate, zoom, dtype, **view,
):  # fmt: skip
    """Render images and videos of a trained generator.

    \b
    python generate.py --network=net.safetensors --seeds=0-7 --outdir=out
    python generate.py --network=emoji-people --seeds=0-63 --grid=out/grid.png
    python generate.py --network=net.safetensors --seeds=3 --size=3840x2160 --trunc=0.7 --outdir=out
    python generate.py --network=net.safetensors --seeds=3 --scale=64 --window=0.3,0.3,0.4,0.4 --outdir=out
    python generate.py --network=net.safetensors --seeds=3 --size=40000x40000 --format=dzi --outdir=out
    python generate.py --network=net.safetensors --seeds=0-3 --zoom=1:8 --video=out/walk.mp4

    With several GPUs or machines, start the same command with torchrun; it writes the same files.
    """
    if context.invoked_subcommand:
        return
    names = network_names()
    if network is None and not names:
        raise UserError("--network is missing, and models/ is empty; give a network-snapshot-*.safetensors of a run")
    if not (seeds or saved):
        raise UserError("--seeds is missing; see generate.py --help")
    of_seeds = {
        "--seeds": seeds,
        "--trunc": trunc != 1,
        "--trunc-cutoff": trunc_cutoff is not None,
        "--class": classes,
        "--mix": mix,
        "--save-w": save_w,
    }
    if saved and any(of_seeds.values()):
        raise UserError(f"{next(name for name, given in of_seeds.items() if given)} does not go with --w; leave it out")
    if sum(map(bool, (outdir, grid, video))) != 1 and not (save_w and not (outdir or grid or video)):
        raise UserError("give one of --outdir (separate images), --grid (all in one file) and --video")
    refuse_unused(context, USES)
    if not abs(trunc) < 1e38:
        raise UserError(f"--trunc={trunc}: give a finite number, for example 0.7")
    camera = Camera.parse(window, translate, rotate, zoom)
    numbers = parse_seeds(seeds) if seeds else []
    styles = Styles(trunc, trunc_cutoff, parse_classes(classes) if classes else [], mix)
    if not video and camera.moves:
        raise UserError("a path A:B is for videos; add --video, or give single values")
    with processes() as group:
        say = partial(click.echo, err=True) if group.is_first else lambda line: None
        if network is None:
            network = names[0]
            say(f"--network={network}; models/ holds {', '.join(names)}")
        file = group.broadcast(find_network(network) if group.is_first else None)
        G = load_generator(file, group.device)
        if G.config.c_dim and not (classes or saved):
            known = f": {shorten(G.class_names)}" if G.class_names else ""
            say(f"{network} is conditional: seed i gets class i mod {G.config.c_dim}; choose with --class{known}")
        if dtype == "fp16" and group.device.type == "cpu":
            raise UserError("--dtype=fp16 is for GPUs; use bf16 or fp32 on a CPU")
        shot = Shot(image_size(G.config.img_shape, size, scale, camera.window[0]), **view)
        images = SavedStyles(G, Path(saved)) if saved else Seeds(G, numbers, styles)
        if video and not (camera.moves or len(images) > 1):
            raise UserError("the video would not move; give several --seeds, or a path, for example --zoom=1:50")
        if save_w and group.is_first:
            write_styles(images, Path(save_w))
            click.echo(f"{save_w}\t{len(images)}x{G.config.num_ws}x{G.config.w_dim}")
        job = Job(G, sha256(file), images, camera, shot, dtype, resume, click.echo)
        if video:
            write_film(job, group, Path(video), w_frames, fps)
        elif grid:
            write_grid(job, group, Path(grid), columns)
        elif outdir:
            write_images(job, group, Path(outdir), format)


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("dest", type=click.Path(path_type=Path))
@command()
def convert(source, dest):
    """Turn a file that authors released (SOURCE) into a .safetensors file (DEST) that holds its averaged generator."""
    if dest.suffix != ".safetensors":
        raise UserError(f"{dest}: choose a name that ends in .safetensors")
    G = load_generator(source)
    save_generator(G, dest)
    height, width = G.config.img_shape
    click.echo(f"{dest}: a generator of {width}x{height} images, {sum(p.numel() for p in G.parameters()):,} parameters")


if __name__ == "__main__":
    main()
