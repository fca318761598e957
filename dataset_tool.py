"""Make a training archive from a folder or ZIP of images or from rendered letters; check an archive."""

import string
from pathlib import Path

import click

from dnnlib.config import parse_size
from dnnlib.console import UserError
from torch_utils.command import Group, command, is_given
from training.archives import TRANSFORMS, Transform, convert, examine, read_labels
from training.sources import BadImage, ImageFiles, PillowSize, Source

MAX_SIDE = 16384  # 16384² RGB pixels are 0.8 GB while one image is made
PACKED = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".mdb", ".lmdb", ".h5", ".npz")
DRAWINGS = 176  # per character, eight or nine in each of matplotlib's 21 text fonts; from A to Z that makes 4,576


def parse_resolution(text: str) -> PillowSize:
    """Return (width, height). Raises UserError."""
    height, width = parse_size(text)
    if max(height, width) > MAX_SIDE:
        raise UserError(f"--resolution={text}: a side may have {MAX_SIDE} pixels at most")
    return width, height


def open_source(
    name: str,
    resolution: PillowSize | None,
    transform: str | None,
    characters: str | None,
    drawings: int | None,
    seed: int,
    bits: int | None,
) -> Source:
    """Open a folder, a ZIP, or "letters"."""
    if name != "letters":
        if characters is not None or drawings is not None:
            raise UserError(
                "--characters and --drawings only say what --source letters draws; leave them out, or use that source"
            )
        files = ImageFiles(name, bits, resolution)
        if transform == "native" and resolution and not files.drawings:
            raise UserError("--transform native keeps the sizes of images; leave out --resolution")
        return files
    if resolution is None or transform:
        raise UserError(
            "letters are drawn at the size of the result; give --resolution, e.g. 64x64, and no --transform"
        )
    try:
        from training.letters import Letters
    except ModuleNotFoundError as error:
        raise UserError("letters needs matplotlib, which is not installed; run: pip install matplotlib") from error
    characters = string.ascii_uppercase if characters is None else characters
    return Letters(characters, resolution, drawings or DRAWINGS, seed)


@click.group(cls=Group, invoke_without_command=True, context_settings={"max_content_width": 100})
@click.option("--source", metavar="DIR|ZIP|TAR|letters", help="Where the images come from.")
@click.option(
    "--dest", type=click.Path(path_type=Path), metavar="ZIP|DIR", help="What to write; a ZIP if it ends in .zip."
)
@click.option("--resolution", metavar="R|WxH", help="Size of the result; without it, sizes stay.")
@click.option("--transform", type=click.Choice(TRANSFORMS), help="How to reach --resolution; stretched by default.")
@click.option("--crops", type=click.IntRange(min=1), metavar="N", help="random-crops: crops per image.")
@click.option(
    "--min-side", type=click.IntRange(min=1), metavar="N", help="native: leave out images with a shorter side below N."
)
@click.option("--characters", metavar="TEXT", help="letters: what to draw, a class each; A to Z by default.")
@click.option(
    "--drawings",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"letters: drawings per character; {DRAWINGS} by default.",
)
@click.option("--labels", metavar="folders|none|FILE", help="Labels; the source's own dataset.json by default.")
@click.option(
    "--channels", type=click.Choice(["1", "3", "4"]), default="3", show_default=True, help="Grey, RGB or RGBA."
)
@click.option(
    "--max-images", type=click.IntRange(min=1), metavar="N", help="Use only the first N images, sorted by name."
)
@click.option(
    "--bits", type=click.IntRange(8, 16), metavar="N", help="Bits of the values in 16-bit files; by default, found out."
)
@click.option(
    "--format",
    type=click.Choice(["png", "jpg"]),
    default="png",
    show_default=True,
    help="Of the result; jpg: quality 95.",
)
@click.option("--skip-bad", is_flag=True, help="Leave out unreadable images instead of stopping at the first.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which random crops or letters.")
@click.pass_context
@command()
def main(
    context, source, dest, resolution, transform, crops, min_side, characters, drawings, labels, channels, max_images,
    bits, format, skip_bad, seed,
):  # fmt: skip
    """Make a training dataset, in the format of StyleGAN, from a folder, ZIP or TAR of images.

    \b
    python dataset_tool.py --source photos --dest photos256.zip --resolution 256x256 --transform center-crop
    python dataset_tool.py check photos256.zip

    Folders are read with all their sub-folders. "letters" needs no download: --characters are drawn in the
    fonts that come with matplotlib, each in two colours and with its class as label; the same --seed at another
    --resolution gives the same drawings.

    \b
    center-crop       the largest centred crop of the shape of WxH, resized to WxH
    center-crop-wide  the same, then black bars at top and bottom make it W x W
    random-crops      --crops crops per image of the shape of WxH, of random size (from WxH up) and place
    native            sizes and shapes stay, for training at several scales; JPEGs stay the same files if nothing
                      has to be converted
    (none)            resized to WxH without regard to proportions

    Resizing is Lanczos. Photographs are turned upright by their EXIF data, colours are converted from their profile
    to sRGB, 16-bit files are scaled to 8 bits, transparent parts are composited over white (unless --channels 4), and
    animations give their first frame. SVG files are drawn at the size that covers --resolution; add it to native for
    them.

    \b
    --labels folders  one class per folder, named after it and numbered 0, 1, … in natural order (2 before 10)
    --labels FILE     a CSV with a column of file names and one of labels, or a .json like dataset.json

    --dest is written atomically, at the end.
    """
    if context.invoked_subcommand:
        return
    for name, value in (("--source", source), ("--dest", dest)):
        if not value:
            raise click.UsageError(f"Missing option '{name}'.")
    if dest.suffix.lower() in PACKED:
        raise UserError(f"--dest={dest}: only ZIPs and folders are written; choose a name that ends in .zip")
    if is_given(context, "seed") and source != "letters" and transform != "random-crops":
        raise UserError("--seed chooses random crops or letters; leave it out, or add --transform random-crops")
    resolution = parse_resolution(resolution) if resolution else None
    recipe = Transform(resolution, transform, crops, seed, min_side)
    images = open_source(source, resolution, transform, characters, drawings, seed, bits)
    try:
        line = convert(images, dest, recipe, read_labels(labels, images), int(channels), max_images, skip_bad, format)
    except BadImage as error:
        raise UserError(f"{error}, or leave such files out with --skip-bad") from error
    click.echo(line)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@command()
def check(path):
    """Report what an archive holds and what is wrong with it.

    PATH is a ZIP or a folder. The exit code is 0 if it is fit for training, and 2 if not.
    """
    report, problems = examine(ImageFiles(path))
    click.echo("\n".join([str(path), *(f"  {line}" for line in report)]))
    if problems:
        more = [f"... and {len(problems) - 10:,} more"] if len(problems) > 10 else []
        raise UserError("\n  ".join([f"{path} is not fit for training:", *problems[:10], *more]))


if __name__ == "__main__":
    main(prog_name="dataset_tool.py")
