"""Turns a folder or ZIP of pictures, or drawn letters, into a training dataset: equal-size PNGs and a dataset.json."""

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import string
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from PIL import Image

from dnnlib.config import build
from dnnlib.console import UserError, progress
from dnnlib.files import atomic_write
from torch_utils.command import command
from training.data import BadImage, ImageFiles, channels_of, label_array, parse_dataset_json, to_channels
from training.networks import DiscriminatorConfig

if TYPE_CHECKING:
    from training.letters import Letters  # needs matplotlib, so it is imported when it is asked for

MAX_SIDE = 16384  # 16384² RGB pixels are 0.8 GB while one picture is made
DRAWINGS = 176  # per character, eight or nine in each of matplotlib's 21 text fonts; from A to Z that makes 4,576
TRANSFORMS = ("center-crop", "center-crop-wide", "random-crops")

Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]  # left, top, right, bottom


def centred_box(size: Size, target: Size) -> Box:
    """The largest box of the target's aspect ratio in the middle of an image."""
    return placed_box(size, target, min(size[0] / target[0], size[1] / target[1]), 0.5, 0.5)


def random_box(size: Size, target: Size, rng: random.Random) -> Box:
    """A box of the target's aspect ratio, uniform in scale (from the target to the largest that fits) and in place.

    An image smaller than the target gives the largest box that fits.
    """
    largest = min(size[0] / target[0], size[1] / target[1])
    scale = min(1 + (largest - 1) * rng.random(), largest)
    return placed_box(size, target, scale, rng.random(), rng.random())


def placed_box(size: Size, target: Size, scale: float, across: float, down: float) -> Box:
    """A box of `scale` times the target's size; `across` and `down` in 0..1 say how far along the free way it lies."""
    width = min(max(round(target[0] * scale), 1), size[0])
    height = min(max(round(target[1] * scale), 1), size[1])
    left, top = int(across * (size[0] - width)), int(down * (size[1] - height))
    return left, top, left + width, top + height


@dataclass(frozen=True)
class Recipe:
    """How pictures are made from one image. `resolution` is (width, height), `transform` None or one of TRANSFORMS."""

    resolution: Size | None = None
    transform: str | None = None
    crops: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.transform and self.resolution is None:
            raise UserError(
                f"--transform {self.transform} needs the size of its result; add --resolution, e.g. 256x256"
            )
        if self.transform == "center-crop-wide" and self.resolution[0] < self.resolution[1]:
            width, height = self.resolution
            raise UserError(
                f"center-crop-wide pads {width}x{height} at top and bottom, so its width must be the larger side"
            )
        if (self.transform == "random-crops") != (self.crops is not None):
            raise UserError("--transform random-crops and --crops go together; give both, e.g. --crops 100, or neither")

    def pictures(self, image: Image.Image, name: str) -> Iterator[tuple[Image.Image, bool]]:
        """The pictures made of `image`, each with whether it was enlarged. Random boxes depend on (seed, name)."""
        if self.resolution is None:
            yield image, False
            return
        for box in self._boxes(image.size, name):
            crop = image.crop(box)
            picture = crop.resize(self.resolution, Image.Resampling.LANCZOS)
            if self.transform == "center-crop-wide":
                width, height = self.resolution
                square = Image.new(picture.mode, (width, width), "black")
                square.paste(picture, (0, (width - height) // 2))
                picture = square
            yield picture, crop.width < self.resolution[0] or crop.height < self.resolution[1]

    def _boxes(self, size: Size, name: str) -> list[Box]:
        if self.transform is None:
            return [(0, 0, *size)]
        if self.transform == "random-crops":
            rng = random.Random(f"{self.seed} {name}")
            return [random_box(size, self.resolution, rng) for _ in range(self.crops)]
        return [centred_box(size, self.resolution)]


# Labels: a table of file name -> label, and the names of the classes where they have names.
Labels = tuple[dict[str, object] | None, list[str] | None]


def read_labels(choice: str | None, files: "ImageFiles | Letters") -> Labels:
    """The labels that --labels chooses: the source's own, none, one class per folder, or those of a file."""
    if choice is None:
        return files.dataset_json()
    if choice == "none":
        return None, None
    if choice == "folders":
        return folder_labels(files)
    try:
        data = Path(choice).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read --labels {choice}: {error.strerror}; give folders, none, or a file") from error
    if Path(choice).suffix.lower() != ".json":
        return csv_labels(data, choice)
    labels, class_names = parse_dataset_json(data, choice)
    if labels is None:
        raise UserError(f'{choice} holds no "labels"; give a file with labels, or --labels none')
    return labels, class_names


def folder_labels(files: "ImageFiles | Letters") -> Labels:
    """One class for each top-level folder, numbered in sorted order."""
    names = files.names()
    loose = next((name for name in names if "/" not in name), None)
    if loose:
        raise UserError(
            f"--labels folders: {loose} lies in no folder of {files.path}; put each image into its class's folder"
        )
    folders = sorted({name.split("/")[0] for name in names})
    if len(folders) == 1:
        raise UserError(
            f"--labels folders: all images of {files.path} lie in {folders[0]}; give the folder above the classes"
        )
    number = {folder: index for index, folder in enumerate(folders)}
    return {name: number[name.split("/")[0]] for name in names}, folders


def csv_labels(data: bytes, where: str) -> Labels:
    """Rows of `filename,label`, under that header or none. Labels are class numbers, or names, numbered when sorted."""
    labels = {}
    try:
        for number, row in enumerate(csv.reader(io.StringIO(data.decode("utf-8-sig"))), start=1):
            if not row or (number == 1 and [cell.strip().lower() for cell in row] == ["filename", "label"]):
                continue
            if len(row) != 2:
                raise UserError(f"{where}, line {number}: {len(row)} columns instead of filename,label; fix that line")
            name, label = row[0].strip().replace("\\", "/"), row[1].strip()
            if labels.setdefault(name, label) != label:
                raise UserError(
                    f"{where}, line {number}: {name} is both {labels[name]} and {label}; keep one of the two"
                )
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where} is no CSV text ({error}); give rows of filename,label, or a .json file") from error
    with contextlib.suppress(ValueError):
        return {name: int(label) for name, label in labels.items()}, None
    class_names = sorted(set(labels.values()))
    number = {label: index for index, label in enumerate(class_names)}
    return {name: number[label] for name, label in labels.items()}, class_names


@contextlib.contextmanager
def new_archive(dest: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Yields write(name, data). `dest` appears whole when the block ends well, or not at all; a ZIP if it ends in .zip.

    Equal content gives equal bytes: the ZIP carries no dates. Raises UserError when `dest` cannot be written.
    """
    try:
        if is_zip_name(dest):
            with atomic_write(dest) as temporary, zipfile.ZipFile(temporary, "w") as archive:

                def write(name: str, data: bytes) -> None:
                    entry = zipfile.ZipInfo(name)
                    entry.external_attr = 0o644 << 16
                    archive.writestr(entry, data, compress_type=zipfile.ZIP_STORED)

                yield write
        else:
            dest.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=dest.parent, prefix=f".{dest.name}-", suffix=".tmp"))
            try:

                def write(name: str, data: bytes) -> None:
                    (temporary / name).parent.mkdir(exist_ok=True)
                    (temporary / name).write_bytes(data)

                yield write
                umask = os.umask(0)
                os.umask(umask)
                temporary.chmod(0o777 & ~umask)  # mkdtemp makes private folders
                os.replace(temporary, dest)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {dest}: {error.strerror}; free some space or choose another place") from error


def is_zip_name(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def check_dest(dest: Path, source: Path) -> None:
    """Raises UserError when writing `dest` would end in a mess."""
    if dest.resolve() == source.resolve():
        raise UserError(f"--dest {dest} is the source itself; choose another place")
    if is_zip_name(dest) and dest.is_dir():
        raise UserError(f"--dest {dest} is a folder; choose another name for the ZIP")
    if not is_zip_name(dest) and dest.is_file():
        raise UserError(f"--dest {dest} is a file; choose a folder, or a name that ends in .zip")
    if dest.is_dir() and any(dest.iterdir()):
        raise UserError(f"--dest {dest} holds files already; choose an empty or a new folder")


def convert(
    files: "ImageFiles | Letters",
    dest: Path,
    recipe: Recipe,
    labels: Labels = (None, None),
    channels: int = 3,
    max_images: int | None = None,
    skip_bad: bool = False,
) -> str:
    """Writes the dataset and returns its summary in a line. Raises UserError; `dest` then keeps what it held before."""
    check_dest(dest, files.path)
    table, class_names = labels
    names = files.names()
    values = None if table is None else label_array(table, names, "--labels").tolist()
    written, used, skipped, enlarged, first = [], 0, 0, 0, None
    total = min(len(names), max_images or len(names))
    with new_archive(dest) as write, progress(None, desc="images", total=total) as bar:
        for number, name in enumerate(names):
            if used == total:
                break
            try:
                image = files.image(name, channels)
            except BadImage as error:
                if not skip_bad:
                    raise UserError(f"{error}, or leave such files out with --skip-bad") from error
                bar.write(f"Skipped: {error}", file=sys.stderr)
                skipped += 1
                continue
            for picture, larger in recipe.pictures(image, name):
                first = first or (name, picture.size)
                if picture.size != first[1]:
                    raise UserError(
                        f"{name} is {size_text(picture.size)}, but {first[0]} is {size_text(first[1])}; bring all "
                        "images to one size with --resolution, and --transform center-crop to keep their proportions"
                    )
                target = f"{len(written) // 1000:05d}/img{len(written):08d}.png"
                write(target, png_bytes(picture))
                written.append([target, values[number]] if values else target)
                enlarged += larger
            used += 1
            bar.update()
        if not written:
            raise UserError(f"{files.path} holds no image that can be read; nothing was written")
        content = {"labels": written if values else None} | ({"class_names": class_names} if class_names else {})
        write("dataset.json", json.dumps(content).encode())
    text = f"Wrote {dest}: {count(len(written), 'image')} of {size_text(first[1])}, {count(channels, 'channel')}, "
    text += f"{label_text([label for _, label in written] if values else None)}."
    if skipped:
        text += f" Skipped {count(skipped, 'unreadable file')}."
    if enlarged:
        text += f" {count(enlarged, 'image')} had to be enlarged: the source is smaller there."
    return text


def png_bytes(image: Image.Image) -> bytes:
    data = io.BytesIO()
    # Uncompressed, as StyleGAN writes them: twice the bytes of compressed photographs, and read in half the time.
    image.save(data, format="png", compress_level=0)
    return data.getvalue()


def size_text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def label_text(values: list | None) -> str:
    if values is None:
        return "no labels"
    if isinstance(values[0], list):
        return f"labels of {count(len(values[0]), 'number')}"
    return count(len(set(values)), "class", "classes")


def count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def examine(files: ImageFiles) -> tuple[list[str], list[str]]:
    """(what a dataset holds, what is wrong with it) as lines of text. Reads the images one at a time."""
    sizes, channels, example, problems = Counter(), Counter(), {}, []
    for name in progress(files.names(), desc="images"):
        try:
            image = files.image(name)
            holds = channels_of(image)
            to_channels(image, holds)
        except BadImage as error:
            problems.append(str(error))
        except ValueError as error:
            problems.append(f"{files.path / name}: {error}")
        else:
            sizes[image.size] += 1
            channels[holds] += 1
            example.setdefault(image.size, name)
    if not sizes:
        return [], problems
    (common, times), *others = sizes.most_common()
    if others:
        other = others[0][0]
        problems.append(
            f"{count(sizes.total() - times, 'image')} not of the most frequent size {size_text(common)}, "
            f"e.g. {example[other]} of {size_text(other)}; bring all to one size with --resolution"
        )
    label_lines, label_problems = examine_labels(files)
    report = [
        f"images    {len(files):,}",
        f"size      {', '.join(f'{size_text(size)} ({number:,})' for size, number in sizes.most_common(5))}"
        + (f", and {count(len(sizes) - 5, 'size')} more" if len(sizes) > 5 else ""),
        f"channels  {', '.join(f'{number} ({times:,})' for number, times in channels.most_common())}",
        *label_lines,
    ]
    if not others:
        try:  # as train.py will
            build(DiscriminatorConfig, {"img_shape": common[::-1]}, str(files.path))
        except UserError as error:
            problems.append(str(error))
    return report, problems + label_problems


def examine_labels(files: ImageFiles) -> tuple[list[str], list[str]]:
    """The part of examine() that reads dataset.json."""
    where = files.path / "dataset.json"
    try:
        labels, class_names = files.dataset_json()
        if labels is None:
            return ["labels    none"], []
        names = files.names()
        values = label_array(labels, [name for name in names if name in labels], where)
    except UserError as error:
        return ["labels    unusable"], [str(error)]
    problems = []
    if unlabelled := [name for name in names if name not in labels]:
        problems.append(
            f"{count(len(unlabelled), 'image')} without a label in {where}, e.g. {unlabelled[0]}; label each"
        )
    if lost := sorted(set(labels) - set(names)):
        problems.append(
            f"{where} labels {count(len(lost), 'file')} that are not there, e.g. {lost[0]}; bring them back"
        )
    if values.ndim == 2:
        return [f"labels    vectors of {count(values.shape[1], 'number')}"], problems
    times = np.bincount(values)
    if class_names is None:
        class_names = [str(number) for number in range(len(times))]
    if len(class_names) < len(times):
        problems.append(f"{where} names {count(len(class_names), 'class', 'classes')} and uses {len(times)}; name each")
    per_class = ", ".join(f"{name} {number:,}" for name, number in zip(class_names, times, strict=False))
    return [f"labels    {count(len(times), 'class', 'classes')}: {per_class}"], problems


def resolution(context: click.Context, option: click.Parameter, text: str | None) -> Size | None:
    """Reads WxH."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match or not all(1 <= int(side) <= MAX_SIDE for side in match.groups()):
        raise click.BadParameter(f"{text!r} is no WIDTHxHEIGHT with sides from 1 to {MAX_SIDE}; write e.g. 256x256")
    return int(match[1]), int(match[2])


@click.group(invoke_without_command=True, context_settings={"max_content_width": 100})
@click.option("--source", metavar="DIR|ZIP|letters", help="Where the images come from.")
@click.option(
    "--dest", type=click.Path(path_type=Path), metavar="ZIP|DIR", help="What to write; a ZIP if it ends in .zip."
)
@click.option("--resolution", callback=resolution, metavar="WxH", help="Size of the result; without it, sizes stay.")
@click.option("--transform", type=click.Choice(TRANSFORMS), help="How to reach --resolution; stretched by default.")
@click.option("--crops", type=click.IntRange(min=1), metavar="N", help="random-crops: crops per image.")
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
@click.option("--skip-bad", is_flag=True, help="Leave out unreadable images instead of stopping at the first.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which random crops or letters.")
@click.pass_context
@command()
def main(
    context,
    source,
    dest,
    resolution,
    transform,
    crops,
    characters,
    drawings,
    labels,
    channels,
    max_images,
    skip_bad,
    seed,
):
    """Make a training dataset of equal-size PNGs, in the format of StyleGAN, from a folder or ZIP of images.

    \b
    python dataset_tool.py --source photos --dest photos256.zip --resolution 256x256 --transform center-crop
    python dataset_tool.py check photos256.zip

    Folders are read with all their sub-folders. "letters" needs no download: it stands for --characters drawn in the
    fonts that come with matplotlib, each in two colours and with its class as label; the same --seed at another
    --resolution gives the same drawings.

    \b
    center-crop       the largest centred crop of the shape of WxH, resized to WxH
    center-crop-wide  the same, then black bars at top and bottom make it W x W
    random-crops      --crops crops per image of the shape of WxH, of random size (from WxH up) and place
    (none)            resized to WxH without regard to proportions

    Resizing is Lanczos. Photographs are turned upright by their EXIF data, 16-bit grey is scaled to 8 bits, transparent
    parts are laid over white (unless --channels 4), and animations give their first frame.

    \b
    --labels folders  one class per top-level folder, numbered in sorted order
    --labels FILE     a .json like dataset.json, or a CSV with rows of filename,label; names relative to --source

    The result appears whole at the end; until then --dest keeps what it held.
    """
    if context.invoked_subcommand:
        if source or dest:
            raise click.UsageError(
                f"{context.invoked_subcommand} takes no --source and --dest, only the PATH to look at."
            )
        return
    for name, value in (("--source", source), ("--dest", dest)):
        if not value:
            raise click.UsageError(f"Missing option '{name}'.")
    if source != "letters" and (characters is not None or drawings is not None):
        raise UserError(
            "--characters and --drawings only say what --source letters draws; leave them out, or use that source"
        )
    recipe = Recipe(resolution, transform, crops, seed)
    # Panoramas above 89 million pixels are fine and would each print a warning; Pillow still refuses twice that.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    drawn = source == "letters"
    files = letters(resolution, transform, characters, drawings, seed) if drawn else ImageFiles(source)
    click.echo(convert(files, dest, recipe, read_labels(labels, files), int(channels), max_images, skip_bad))


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@command()
def check(path):
    """Tell what a dataset holds and what is wrong with it.

    PATH is a ZIP or a folder. The exit code is 0 if it is fit for training, and 2 if not.
    """
    report, problems = examine(ImageFiles(path))
    click.echo("\n".join([str(path), *(f"  {line}" for line in report)]))
    if problems:
        more = [f"... and {len(problems) - 10:,} more"] if len(problems) > 10 else []
        raise UserError("\n  ".join([f"{path} is not fit for training:", *problems[:10], *more]))


def letters(
    resolution: Size | None, transform: str | None, characters: str | None, drawings: int | None, seed: int
) -> "Letters":
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


if __name__ == "__main__":
    main(prog_name="dataset_tool.py")
