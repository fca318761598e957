"""Read image files, and labels from `dataset.json`, out of a folder, a ZIP or another container."""

import contextlib
import functools
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from dnnlib.console import UserError, count, progress
from dnnlib.vips import import_vips
from training.colours import (
    ENDINGS,
    HINTS,
    MODES,
    count_channels,
    decode,
    deep_values,
    depth_of,
    is_deep,
    is_upright_jpeg,
    known_depth,
    looks_like_image,
    open_image,
    profile_of,
    to_channels,
    to_srgb,
    upright_size,
)
from training.containers import READ_ERRORS, open_container
from training.drawings import draw
from training.labels import Table, common_folder, load_json, parse_json

WRITTEN = re.compile(r"\d{5}/img\d{8}\.(png|jpg)")  # the names in archives of StyleGAN and of dataset_tool.py
SAMPLE = 64  # files that decide how many bits the values in 16-bit files have
PillowSize = tuple[int, int]  # width, height, as of Pillow's images; other sizes are (height, width), as of tensors


class BadImage(UserError):
    """An image file that cannot be read. The message names the file and the reason."""


class Source(Protocol):
    """Where images come from: ImageFiles, or drawn Letters."""

    path: Path

    def names(self) -> list[str]: ...

    def image(self, name: str, channels: int) -> Image.Image: ...

    def unchanged(self, name: str, channels: int) -> bytes | None: ...

    def labels(self) -> Table | None: ...

    def notes(self, channels: int) -> list[str]: ...


# --- files ------------------------------------------------------------------------------------------------------------


class ImageFiles:
    """The image files of a folder (with its sub-folders), a ZIP or another container, by sorted names.

    A file is an image if its name ends like one or, without any ending, if it begins like one. Hidden files, the
    `__MACOSX` folder of Apple's ZIPs and unfinished images are left out. Objects can be pickled, and used after a fork.

    name     of the folder, or of the file without its ending
    written  whether the names are those of an archive for training, whose images are read as they are
    bits     how many bits the values in 16-bit files have that do not say so; by default a sample decides
    cover    width and height that drawings, SVG files, are drawn to cover; without it, they are left out
    drawings whether there are any

    Raises UserError when `path` is not a folder or a readable container, or holds no images.
    """

    def __init__(self, path: str | os.PathLike, bits: int | None = None, cover: PillowSize | None = None):
        self.path = Path(path)
        self._files, names = open_container(self.path)
        resolved = self.path.resolve()
        self.name = resolved.name if resolved.is_dir() else re.sub(r"(\.tar)?\.\w+$", "", resolved.name)
        self._cover = cover
        endings = (*ENDINGS, "svg") if cover else ENDINGS
        found, labels, self._left_out = [], [], Counter()
        for name in names:
            if is_hidden(name):
                continue
            ending = PurePosixPath(name).suffix[1:].lower()
            if self._files.all_images or ending in endings or (not ending and self._begins_like_image(name)):
                found.append(name)
            elif PurePosixPath(name).name == "dataset.json":
                labels.append(name)
            else:
                self._left_out[ending] += 1
        if not found:
            others = f" ({self._left_out_text()})" if self._left_out else ""
            raise UserError(f"{self.path} holds no images{others}; known endings are {', '.join(endings)}")
        # Bytes in one array: a list of a million str costs 100 MB, copied page by page into every forked worker.
        self._names = np.array([os.fsencode(name) for name in sorted(found)])
        above = common_folder(found)
        self._labels = min(
            (n for n in labels if above.startswith(n.removesuffix("dataset.json"))), key=len, default=None
        )
        self._unread = sorted(labels) if self._labels is None else []
        self.drawings = any(map(is_drawing, found))
        if self.drawings:
            import_vips()  # so that its absence is told at once, and not of each file
        self.written = all(WRITTEN.fullmatch(name) for name in found)
        self._bits = bits  # None: not decided yet
        self._header_sizes = None  # until _read_headers
        # Of the headers if they were all read, else of the images read so far.
        self._channels, self._profiles = Counter(), Counter()

    def __len__(self) -> int:
        return len(self._names)

    def filename(self, index: int) -> str:
        return os.fsdecode(self._names[index])

    def names(self) -> list[str]:
        return [os.fsdecode(name) for name in self._names]

    def _sample(self) -> list[str]:
        return self.names()[:: -(-len(self) // SAMPLE)]

    def bits(self) -> int:
        """Return the fewest bits that hold the values of a sample, of the 16-bit files that do not say how many."""
        if self._bits is None:
            largest = 0
            for name in [] if self.written else self._sample():
                with contextlib.suppress(Exception):  # reading it properly will name what is wrong
                    data = self._read(name)
                    image = open_image(io.BytesIO(data))
                    if is_deep(image) and not known_depth(image):
                        largest = max(largest, int(deep_values(image, data).max()))
            self._bits = depth_of(largest) if largest else 16
        return self._bits

    def image(self, name: str, channels: int | None = None, reduce: int = 1) -> Image.Image:
        """Decode an image by colours.decode, in sRGB, with `channels`, by default the fewest that hold it.

        Raises BadImage when the file is empty, truncated, too large, or not an image.
        """
        with self._name_errors(name):
            data = self._read(name)
            image = draw(data, self._cover) if is_drawing(name) else decode(data, self.bits, reduce)
            if self._header_sizes is None:
                self._note(image)
            image = image if self.written else to_srgb(image)
            return to_channels(image, channels or count_channels(image))

    def unchanged(self, name: str, channels: int) -> bytes | None:
        """Return the bytes of a JPEG whose pixels image(name, channels) returns as they are in the file, else None."""
        if is_drawing(name):
            return None
        with self._name_errors(name):
            data = self._read(name)
            image = open_image(io.BytesIO(data))
            in_srgb = self.written or profile_of(image)[1] is None
            return data if is_upright_jpeg(image) and image.mode == MODES[channels] and in_srgb else None

    def common_channels(self) -> int:
        """Return the fewest channels that hold all images, by their headers.

        1 if all are grey; 4 if all have an alpha channel, which is not opaque throughout a sample; else 3.
        """
        if self.written:
            return count_channels(self.image(self.filename(0)))
        self._read_headers()  # counts channels
        if set(self._channels) == {4}:
            alphas = (self.image(name, 4).getchannel("A").getextrema()[0] for name in self._sample())
            return 4 if any(least < 255 for least in alphas) else 3
        return 1 if set(self._channels) == {1} else 3

    def sizes(self) -> np.ndarray:
        """Return the width and height of every image, upright: int32 [n,2], of dataset.json or else of the headers.

        Raises BadImage for a header that cannot be read.
        """
        sizes = self._read_headers() if self.native_sizes is None else self.native_sizes
        for number in np.flatnonzero(sizes[:, 0] == 0)[:1]:
            self._header(self.filename(number))  # raises, with the reason
        return sizes

    @functools.cached_property
    def native_sizes(self) -> np.ndarray | None:
        """Return the sizes in `dataset.json`, which dataset_tool writes for images of different sizes, or None.

        Raises UserError when they are not those of the images that are there.
        """
        data = self._read_json()
        if data is None or b'"sizes"' not in data:
            return None
        try:
            sizes = np.array(load_json(data)["sizes"])
            if sizes.shape != (len(self), 2) or sizes.dtype.kind != "i" or not 0 < sizes.min() <= sizes.max() < 2**31:
                raise ValueError(f"they are not a width and a height for each of {count(len(self), 'image')}")
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise UserError(
                f'"sizes" in {self.path / self._labels} cannot be used ({error}); make the dataset again'
            ) from error
        return sizes.astype(np.int32)

    def _read_headers(self) -> np.ndarray:
        """Read all headers, once. Return width and height as sizes() does, but 0 where a header cannot be read."""
        if self._header_sizes is None:
            sizes = np.zeros((len(self), 2), np.int32)
            for number, name in enumerate(progress(self.names(), desc="headers")):
                with contextlib.suppress(BadImage):
                    sizes[number] = upright_size(self._header(name))
            self._header_sizes = sizes
        return self._header_sizes

    def _header(self, name: str) -> Image.Image:
        with self._name_errors(name), self._files.open(name) as file:
            image = open_image(file)
            self._note(image)
            if is_deep(image) and not known_depth(image):
                self.bits()  # decided now, so that notes name it
            return image

    def _note(self, image: Image.Image) -> None:
        self._channels[count_channels(image)] += 1
        profile, _ = (None, None) if self.written else profile_of(image)
        self._profiles.update([profile] if profile else [])

    def notes(self, channels: int) -> list[str]:
        """Return lines on what reading left out or changed so far, when images are read with `channels`."""
        total = self._channels.total()
        kinds = {1: "grey", 3: "in colour", 4: "with an alpha channel" + ("" if channels == 4 else ", put on white")}
        others = [f"{n:,} {kinds[kind]}" for kind, n in sorted(self._channels.items()) if kind != channels]
        lines = [f"channels: {MODES[channels]} ({', '.join(others)}, of {total:,}; converted)"] if others else []
        if self._bits is not None:
            lines.append(f"16-bit files: read as {self._bits} bits, 0 to {(1 << self._bits) - 1}, scaled to 0 to 255")
        if self._unread:
            lines.append(f"labels: {self._unread[0]} is not above all images, so it was not read")
        if self._profiles:
            lines.append(f"colours: converted to sRGB from {tally(self._profiles)}")
        return [*lines, self._left_out_text()] if self._left_out else lines

    def facts(self) -> dict:
        """Return what affects the pixels, besides the files and the channels."""
        return {} if self.written else {"colours": "srgb", "bits": self.bits()}

    def _left_out_text(self) -> str:
        endings = Counter({f".{e}" if e else "without an ending": n for e, n in self._left_out.items()})
        hints = sorted({f".{ending}: {HINTS[ending]}" for ending in self._left_out if ending in HINTS})
        return "; ".join([f"left out: {tally(endings)}", *hints])

    def contents(self, names: Iterable[str]) -> Iterator[bytes]:
        """Yield the bytes of each file. Raises BadImage."""
        for name in names:
            with self._name_errors(name):
                data = self._read(name)
            yield data

    def labels(self) -> Table | None:
        """Read `dataset.json`, if there is one above all images. Raises UserError when it is damaged."""
        data = self._read_json()
        return None if data is None else parse_json(data, self.path / self._labels)

    def _read_json(self) -> bytes | None:
        if self._labels is None:
            return None
        try:
            return self._read(self._labels)
        except READ_ERRORS as error:
            raise UserError(f"{self.path / self._labels} cannot be read: {error}; make the dataset again") from error

    @contextlib.contextmanager
    def _name_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        # For damaged files Pillow, zlib and zipfile raise a dozen kinds of exception.
        except Exception as error:
            reason = str(error) or type(error).__name__
            if isinstance(error, UnidentifiedImageError):
                reason = "it is in no known image format"
            elif isinstance(error, Image.DecompressionBombError):
                reason = f"it claims more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:,.0f} million pixels"
            raise BadImage(f"{self.path / name} cannot be read as an image: {reason}; repair or remove it") from error

    def _read(self, name: str) -> bytes:
        with self._files.open(name) as file:
            return file.read()

    def _begins_like_image(self, name: str) -> bool:
        try:
            with self._files.open(name) as file:
                return looks_like_image(file.read(16))
        except READ_ERRORS:
            return False


def is_drawing(name: str) -> bool:
    return name.lower().endswith(".svg")


def is_hidden(name: str) -> bool:
    parts = PurePosixPath(name).parts
    # x.png.part holds the pixels of an image that generate.py has not finished (rendering/unfinished.py).
    return any(part.startswith(".") or part == "__MACOSX" or part.endswith(".part") for part in parts)


def tally(counts: Counter) -> str:
    """Format as `12 .txt, 3 .heic`, the most frequent first."""
    return ", ".join(f"{number:,} {what}" for what, number in sorted(counts.items(), key=lambda item: (-item[1], item)))


def size_text(size: PillowSize) -> str:
    return f"{size[0]}x{size[1]}"
