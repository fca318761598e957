"""Reads image files, and labels from `dataset.json`, out of a folder or a ZIP."""

import contextlib
import io
import json
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dnnlib.console import UserError

ENDINGS = ("png", "jpg", "jpeg", "jfif", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "tga", "jp2")
# Only these decoders are tried on the bytes: a file named .png may hold PostScript, which Pillow would execute.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "JPEG2000")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
ZIP_ERRORS = (OSError, ValueError, EOFError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile)
MAX_FILE_BYTES = 2**30  # Pillow refuses images above 179 million pixels, which are 0.5 GiB in RGB
MAX_CLASSES = 100_000  # a one-hot vector of this length is 0.4 MB per image; more is a mistake in the labels


class BadImage(UserError):
    """An image file that cannot be read. The message names the file and the reason."""


class Labels(NamedTuple):
    """The labels of a source; None for what it does not hold."""

    by_name: dict[str, object] | None = None  # file name -> class number or vector
    class_names: list[str] | None = None


class Source(Protocol):
    """Where images come from: ImageFiles, or drawn Letters."""

    path: Path

    def names(self) -> list[str]: ...

    def image(self, name: str, channels: int) -> Image.Image: ...

    def labels(self) -> Labels: ...


# --- colours ----------------------------------------------------------------------------------------------------------


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to 8-bit grey (1), RGB (3) or RGBA (4).

    16-bit grey is scaled from 0..65535 to 0..255. Without an alpha channel in the result, transparent parts are
    composited over white. RGB becomes grey by the luma of ITU-R 601. Colour profiles are ignored. Raises ValueError for
    32-bit pixels, which have no standard range.
    """
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no agreed range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit integer pixels have no agreed range: save it with 8 or 16 bits")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert(MODES[channels])


def count_channels(image: Image.Image) -> int:
    """Return 1 for grey, 4 with an alpha channel or a transparent colour, else 3."""
    if image.has_transparency_data:
        return 4
    return 1 if image.mode in ("1", "L", "F") or image.mode.startswith("I") else 3


# --- files ------------------------------------------------------------------------------------------------------------


class ImageFiles:
    """The image files of a folder (with its sub-folders) or a ZIP, as sorted names with forward slashes.

    Hidden files and the `__MACOSX` folder of Apple's ZIPs are left out. Objects can be pickled, and used after a fork.
    Raises UserError when `path` is not a folder or a readable ZIP, or holds no images.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._zip, self._zip_owner = None, None
        if not os.path.exists(self.path):
            raise UserError(f"{self.path} does not exist or is out of reach; give a folder or a ZIP of images")
        self.is_zip = not self.path.is_dir()
        names = sorted(filter(is_image, self._list_zip() if self.is_zip else self._list_folder()))
        if not names:
            raise UserError(f"{self.path} holds no images; known endings are {', '.join(ENDINGS)}")
        # Bytes in one array: a list of a million str costs 100 MB, copied page by page into every forked worker.
        self._names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self._names)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None, "_zip_owner": None}

    def name(self, index: int) -> str:
        return os.fsdecode(self._names[index])

    def names(self) -> list[str]:
        return [os.fsdecode(name) for name in self._names]

    def image(self, name: str, channels: int | None = None) -> Image.Image:
        """Decode an image (of an animation the first frame), turned upright by its EXIF orientation.

        With `channels`, convert it by to_channels. Raises BadImage when the file is empty, truncated, too large, or not
        an image.
        """
        with self._name_errors(name):
            image = self._open(name)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image if channels is None else to_channels(image, channels)

    def size(self, name: str) -> tuple[int, int]:
        """Read width and height from the file's header, before EXIF orientation. Raises BadImage."""
        with self._name_errors(name):
            return self._open(name).size

    def contents(self, names: Iterable[str]) -> Iterator[bytes]:
        """Yield the bytes of each file. Raises BadImage."""
        for name in names:
            with self._name_errors(name):
                data = self._read(name)
            yield data

    def labels(self) -> Labels:
        """Read `dataset.json`, if there is one. Raises UserError when it is damaged."""
        where = self.path / "dataset.json"
        try:
            data = self._read("dataset.json")
        except (FileNotFoundError, KeyError):
            return Labels()
        except ZIP_ERRORS as error:
            raise UserError(f"{where} cannot be read: {error}; make the dataset again") from error
        return parse_labels(data, where)

    @contextlib.contextmanager
    def _name_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        # For damaged files Pillow, zlib and zipfile raise a dozen kinds of exception.
        except Exception as error:
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "it is in no known image format" if unknown else str(error) or type(error).__name__
            raise BadImage(f"{self.path / name} cannot be read as an image: {reason}; repair or remove it") from error

    def _open(self, name: str) -> Image.Image:
        data = self._read(name)
        if not data:
            raise ValueError("the file is empty")
        return Image.open(io.BytesIO(data), formats=FORMATS)

    def _list_folder(self) -> Iterator[str]:
        def refuse(error: OSError):
            reason = f"cannot list {error.filename}: {error.strerror}; give yourself permission to read it"
            raise UserError(reason) from error

        seen = {os.path.realpath(self.path)}
        for folder, subfolders, files in os.walk(self.path, followlinks=True, onerror=refuse):
            # Each folder is visited once, so that links that form a ring end.
            real = {name: os.path.realpath(os.path.join(folder, name)) for name in subfolders}
            subfolders[:] = [name for name in sorted(subfolders) if real[name] not in seen]
            seen.update(real.values())
            inside = Path(folder).relative_to(self.path)
            yield from ((inside / name).as_posix() for name in files)

    def _list_zip(self) -> set[str]:
        again = "make or download it again"
        try:
            entries = self._open_zip().infolist()
        except ZIP_ERRORS as error:
            raise UserError(f"{self.path} is neither a folder nor a whole ZIP file ({error}); {again}") from error
        for entry in entries:
            if entry.flag_bits & 1:
                raise UserError(f"{self.path} is encrypted ({entry.filename}); pack it again without a password")
            if entry.filename.startswith("/") or ".." in PurePosixPath(entry.filename).parts:
                raise UserError(f"{self.path} holds {entry.filename}, a name that points outside of it; {again}")
        return {entry.filename for entry in entries}

    def _open_zip(self) -> zipfile.ZipFile:
        # A forked process shares the file position with its parent, so each process opens the file for itself.
        if self._zip_owner != os.getpid():
            self._zip, self._zip_owner = zipfile.ZipFile(self.path), os.getpid()
        return self._zip

    def _read(self, name: str) -> bytes:
        if self.is_zip:
            size = self._open_zip().getinfo(name).file_size
        else:
            status = (self.path / name).stat()
            size = status.st_size
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a regular file")  # opening a pipe would block
        if size > MAX_FILE_BYTES:
            raise ValueError(f"it claims {size / 2**30:,.1f} GiB, and the limit is {MAX_FILE_BYTES / 2**30:.0f} GiB")
        return self._open_zip().read(name) if self.is_zip else (self.path / name).read_bytes()


def is_image(name: str) -> bool:
    """Tell whether a name ends like an image and is neither hidden nor a shadow file of Apple's ZIPs."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix[1:].lower() in ENDINGS and not hidden


# --- labels -----------------------------------------------------------------------------------------------------------


def parse_labels(data: bytes, where: object) -> Labels:
    """Parse the bytes of a `dataset.json`; `where` names it in errors.

    "labels" may be a list of [name, label], a mapping, or null. Raises UserError for anything else.
    """
    try:
        content = json.loads(data)
        labels, class_names = content.get("labels"), content.get("class_names")
        if labels is not None:
            labels = {name.replace("\\", "/"): label for name, label in dict(labels).items()}
        if class_names is not None:
            class_names = [str(name) for name in class_names]
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f'{where} is not of the form {{"labels": [["00000/img00000000.png", 3], ...]}} ({error}); '
            "fix it, or remove it to work without labels"
        ) from error
    return Labels(labels, class_names)


def label_array(labels: dict[str, object], names: list[str], where: object) -> np.ndarray:
    """Return the labels of `names`, in their order: int64 [n] class numbers, or float64 [n,L] vectors.

    Raises UserError when a name has no label, or the labels are neither class numbers nor vectors of one length.
    """
    missing = [name for name in names if name not in labels]
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise UserError(f"{where} has no label for {missing[0]}{more}; label every image, or work without labels")
    try:
        array = np.array([labels[name] for name in names], dtype=np.float64)
    except (TypeError, ValueError):
        array = np.array(np.nan)  # text, or vectors of several lengths
    if array.ndim not in (1, 2) or array.size == 0 or not np.isfinite(array).all():
        raise UserError(
            f"{where}: labels must be class numbers, or finite vectors of one length, the same for all images"
        )
    if array.ndim == 2:
        return array
    wrong = (array != np.floor(array)) | (array < 0) | (array >= MAX_CLASSES)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise UserError(
            f"{where} labels {names[first]} as {array[first]:g}; classes are whole numbers from 0 to {MAX_CLASSES - 1}"
        )
    return array.astype(np.int64)
