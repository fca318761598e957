"""Write archives for training, images and a `dataset.json` as in StyleGAN, and check archives."""

import contextlib
import dataclasses
import io
import json
import os
import random
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dnnlib.console import UserError, count, progress
from dnnlib.files import atomic_folder, atomic_write, is_pipe
from training.colours import count_channels
from training.config import gather, resolve
from training.data import ImageArchive
from training.labels import Labels, label_by_folder, parse_csv, parse_json
from training.native import NativeArchive
from training.sources import BadImage, ImageFiles, PillowSize, Source, size_text

TRANSFORMS = ("center-crop", "center-crop-wide", "random-crops", "native")
SQUARES = tuple(2**n for n in range(5, 15))  # sides of training images

Box = tuple[int, int, int, int]  # left, top, right, bottom


# --- transforms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transform:
    """How images are brought to one size: `resolution` is (width, height), `kind` None (stretch) or in TRANSFORMS.

    Of kind "native", images keep sizes of their own, and those whose shorter side is below `min_side` are left out.
    """

    resolution: PillowSize | None = None  # None: sizes stay
    kind: str | None = None
    crops: int | None = None  # per image
    seed: int = 0
    min_side: int | None = None

    def __post_init__(self):
        if self.min_side and self.kind != "native":
            raise UserError("min_side leaves images out of an archive of native sizes; add transform native to it")
        if self.kind == "native":
            return
        if self.kind and self.resolution is None:
            raise UserError(f"transform {self.kind} needs the size of its result; add a resolution, e.g. 256x256")
        if self.kind == "center-crop-wide" and self.resolution[0] < self.resolution[1]:
            size = size_text(self.resolution)
            raise UserError(f"center-crop-wide pads {size} at top and bottom, so its width must be the larger side")
        if (self.kind == "random-crops") != (self.crops is not None):
            raise UserError("transform random-crops and crops go together; give both, e.g. 100 crops, or neither")

    def __call__(self, image: Image.Image, name: str) -> Iterator[tuple[Image.Image, bool]]:
        """Yield the results for `image`, each with whether it was enlarged. Random crops depend on (seed, name)."""
        if self.kind == "native" or self.resolution is None:
            if min(image.size) >= (self.min_side or 0):
                yield image, False
            return
        width, height = self.resolution
        for box in self._boxes(image.size, name):
            crop = image.crop(box)
            result = crop.resize(self.resolution, Image.Resampling.LANCZOS)
            if self.kind == "center-crop-wide":
                square = Image.new(result.mode, (width, width), "black")
                square.paste(result, (0, (width - height) // 2))
                result = square
            yield result, crop.width < width or crop.height < height

    def _boxes(self, size: PillowSize, name: str) -> Iterator[Box]:
        if self.kind is None:
            yield 0, 0, *size
            return
        largest = min(size[0] / self.resolution[0], size[1] / self.resolution[1])
        if self.kind != "random-crops":
            yield place_box(size, self.resolution, largest, 0.5, 0.5)
            return
        rng = random.Random(f"{self.seed} {name}")
        for _ in range(self.crops):
            # Uniform between the resolution and the largest box that fits; of a smaller image, the largest box.
            scale = min(1 + (largest - 1) * rng.random(), largest)
            yield place_box(size, self.resolution, scale, rng.random(), rng.random())


def place_box(size: PillowSize, target: PillowSize, scale: float, across: float, down: float) -> Box:
    """Return a box of `scale` times the target's size in an image of `size`; `across` and `down` in 0..1 place it."""
    width = min(max(round(target[0] * scale), 1), size[0])
    height = min(max(round(target[1] * scale), 1), size[1])
    left, top = int(across * (size[0] - width)), int(down * (size[1] - height))
    return left, top, left + width, top + height


# --- labels -----------------------------------------------------------------------------------------------------------


def read_labels(choice: str | None, source: Source) -> Labels | None:
    """Return the labels of a choice: None (the source's own), "none", "folders" (a class each), or a file's path.

    Raises UserError.
    """
    if choice == "none":
        return None
    images = source.names()
    if choice is None:
        table = source.labels()
    elif choice == "folders":
        table = label_by_folder(images, source.path)
    else:
        if is_pipe(choice):
            raise UserError(f"{choice} is a pipe or device; give folders, none, or a file of labels")
        try:
            data = Path(choice).read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the labels {choice}: {error.strerror}; give folders, none, or a file"
            ) from error
        table = parse_json(data, choice) if choice.lower().endswith(".json") else parse_csv(data, choice)
        if table is None:
            raise UserError(f'{choice} holds no "labels"; give a file with labels, or none')
    return table and table.match(images)


# --- writing ----------------------------------------------------------------------------------------------------------


def convert(
    source: Source,
    dest: Path,
    transform: Transform,
    labels: Labels | None = None,
    channels: int = 3,
    max_images: int | None = None,
    skip_bad: bool = False,
    form: str = "png",
) -> str:
    """Write the archive `dest` atomically, a ZIP if it ends in .zip; return a summary. Raises UserError.

    The first line says what was written, further ones what was changed or left out.
    """
    check_dest(dest, source.path)
    if form == "jpg" and channels == 4:
        raise UserError("JPEG has no transparency; write PNGs, or 3 channels")
    names, native = source.names(), transform.kind == "native"
    entries, numbers, sizes, outcomes = [], [], [], Counter()
    total = min(len(names), max_images or len(names))
    with new_archive(dest) as write, progress(None, desc="images", total=total) as bar:
        for number, name in enumerate(names):
            if outcomes["used"] == total:
                break
            try:
                image = source.image(name, channels)
            except BadImage as error:
                if not skip_bad:
                    raise
                bar.write(f"Skipped: {error}", file=sys.stderr)
                outcomes["skipped"] += 1
                continue
            before = len(entries)
            for result, larger in transform(image, name):
                sizes.append(result.size)
                if not native and result.size != sizes[0]:
                    raise UserError(
                        f"{name} is {size_text(result.size)}, but {names[numbers[0]]} is {size_text(sizes[0])}; bring "
                        "all images to one resolution (transform center-crop keeps their proportions), or keep their "
                        "sizes (transform native)"
                    )
                data = source.unchanged(name, channels) if native else None
                outcomes["unchanged"] += data is not None
                target = f"{len(entries) // 1000:05d}/img{len(entries):08d}.{form if data is None else 'jpg'}"
                write(target, encode(result, form) if data is None else data)
                entries.append(target)
                numbers.append(number)
                outcomes["enlarged"] += larger
            is_used = len(entries) > before
            outcomes["used" if is_used else "small"] += 1
            bar.update(is_used)
        if not entries:
            least = f" and has {transform.min_side} pixels per side" if outcomes["small"] else ""
            raise UserError(f"{source.path} holds no image that can be read{least}; nothing was written")
        content = {"labels": None}
        if labels:
            labels = dataclasses.replace(labels, values=labels.values[numbers])
            pairs = zip(entries, labels.values.tolist(), strict=True)
            content = {"labels": list(pairs)} | ({"class_names": labels.names} if labels.names else {})
        content |= {"sizes": sizes} if native else {}
        write("dataset.json", json.dumps(content).encode())
    extent = " to ".join(dict.fromkeys(size_text(pick(sizes, key=sorted)) for pick in (min, max)))
    kind = labels.kind() if labels else "no labels"
    sentences = [f"Wrote {dest}: {count(len(entries), 'image')} of {extent}, {count(channels, 'channel')}, {kind}."]
    if n := outcomes["unchanged"]:
        sentences.append(f"Kept the files of {count(n, 'JPEG')}.")
    if n := outcomes["small"]:
        sentences.append(f"Left out {count(n, 'image')} with fewer than {transform.min_side} pixels per side.")
    if n := outcomes["skipped"]:
        sentences.append(f"Skipped {count(n, 'unreadable file')}.")
    if n := outcomes["enlarged"]:
        sentences.append(f"{count(n, 'image')} had to be enlarged: the source is smaller there.")
    notes = [f"labels: {labels.detail()}", *labels.notes, labels.lost] if labels else []
    return "\n".join([" ".join(sentences), *filter(None, notes), *source.notes(channels)])


def check_dest(dest: Path, source: Path) -> None:
    """Raise UserError when `dest` is or is in the source, is of another kind than its name says, or holds files."""
    target, origin = (Path(os.path.realpath(path)) for path in (dest, source))
    if target == origin:
        raise UserError(f"dest {dest} is the source itself; choose another place")
    if not is_zip_name(dest) and origin in target.parents:
        raise UserError(f"dest {dest} is in the source, so its images would be read as well; choose another place")
    if is_zip_name(dest) and dest.is_dir():
        raise UserError(f"dest {dest} is a folder; choose another name for the ZIP")
    if not is_zip_name(dest) and dest.exists() and not dest.is_dir():
        raise UserError(f"dest {dest} is a file; choose a folder, or a name that ends in .zip")
    if dest.is_dir() and any(dest.iterdir()):
        raise UserError(f"dest {dest} holds files already; choose an empty or a new folder")


@contextlib.contextmanager
def new_archive(dest: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Yield write(name, data); `dest` appears after the block. Raises UserError when it cannot be written."""
    try:
        if is_zip_name(dest):
            with atomic_write(dest) as temporary, zipfile.ZipFile(temporary, "w") as archive:

                def write(name: str, data: bytes) -> None:
                    entry = zipfile.ZipInfo(name)  # without a date, so that equal content gives equal bytes
                    entry.external_attr = 0o644 << 16
                    archive.writestr(entry, data)

                yield write
        else:
            with atomic_folder(dest) as temporary:

                def write(name: str, data: bytes) -> None:
                    (temporary / name).parent.mkdir(exist_ok=True)
                    (temporary / name).write_bytes(data)

                yield write
    except OSError as error:
        raise UserError(f"cannot write {dest}: {error.strerror}; free some space or choose another place") from error


def is_zip_name(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def encode(image: Image.Image, form: str) -> bytes:
    data = io.BytesIO()
    if form == "jpg":
        image.save(data, format="jpeg", quality=95, subsampling=0)
    else:  # uncompressed, as in StyleGAN: twice the bytes of compressed photographs, read in half the time
        image.save(data, format="png", compress_level=0, icc_profile=None)
    return data.getvalue()


# --- checking ---------------------------------------------------------------------------------------------------------


def examine(files: ImageFiles) -> tuple[list[str], list[str]]:
    """Return lines of text on (what an archive holds, what is wrong with it). Reads the images one at a time."""
    problems = []

    @contextlib.contextmanager
    def collect() -> Iterator[None]:
        """Add the UserError of a block to the problems."""
        try:
            yield
        except UserError as error:
            problems.append(str(error))

    listed, sizes, channels, example = None, Counter(), Counter(), {}
    with collect():
        listed = files.native_sizes
    for number, name in enumerate(progress(files.names(), desc="images")):
        with collect():
            image = files.image(name)
            sizes[image.size] += 1
            channels[count_channels(image)] += 1
            example.setdefault(image.size, name)
            if listed is not None and image.size != tuple(listed[number]):
                raise UserError(
                    f"{files.path / name} is {size_text(image.size)}, but is listed as {size_text(listed[number])}; "
                    "make the archive again"
                )
    if not sizes:
        return [], problems
    if listed is None and len(sizes) > 1:
        (common, times), (other, _), *_ = sizes.most_common()
        problems.append(
            f"{count(sizes.total() - times, 'image')} not of the most frequent size {size_text(common)}, e.g. "
            f"{example[other]} of {size_text(other)}; convert all to one resolution, or keep their sizes (transform "
            "native)"
        )
    notes, held = files.notes(channels.most_common(1)[0][0]), "unusable"
    if not problems:
        with collect():  # as train.py will
            if listed is None:
                archive = ImageArchive(files.path)
            else:
                side = 1 << min(map(min, sizes)).bit_length() - 1  # the largest power of two that all images hold
                archive = NativeArchive(files.path, (side, side))
            notes = archive.notes()
            resolve(gather("auto", {"data": {"path": str(files.path)}}), archive, str(files.path))
    with collect():
        labels = read_labels(None, files)
        held = f"{labels.kind()}: {labels.detail()}" if labels else "none"
        notes = [*labels.notes, *notes] if labels else notes
        problems += [f"{labels.lost}; restore them"] if labels and labels.lost else []
    report = [
        f"images    {len(files):,}",
        *(describe_equal(sizes) if listed is None else describe_native(sizes)),
        f"channels  {', '.join(f'{number} ({times:,})' for number, times in channels.most_common())}",
        f"labels    {held}",
        *notes,
    ]
    return report, problems


def describe_equal(sizes: Counter[PillowSize]) -> list[str]:
    more = f", and {count(len(sizes) - 5, 'size')} more" if len(sizes) > 5 else ""
    return [f"size      {', '.join(f'{size_text(size)} ({n:,})' for size, n in sizes.most_common(5))}{more}"]


def describe_native(sizes: Counter[PillowSize]) -> list[str]:
    """Return lines on sizes, by shorter sides, and on the square training images that the archive can serve."""
    ordered = sorted(sizes.elements(), key=sorted)
    least, median, largest = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    lines = [f"size      {size_text(least)} (smallest), {size_text(median)} (median), {size_text(largest)} (largest)"]
    for side in SQUARES:
        fitting = sum(min(size) >= side for size in ordered)
        if fitting == len(ordered):
            low, middle, high = (f"{min(size) / side:.1f}" for size in (least, median, largest))
            times = f"{low} times as large" if low == high else f"{low} to {high} times as large (median {middle})"
            lines.append(f"{f'{side}x{side}':<9} every image is {times}")
        elif fitting:
            some = f"{fitting:,} of {len(ordered):,} images"
            lines.append(f"{f'{side}x{side}':<9} in {some}; leave the others out with min-side {side}")
    return lines
