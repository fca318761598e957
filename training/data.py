"""Reads training images: a folder or ZIP of images, and an endless stream of batches that can begin at any image.

A dataset is a folder or a ZIP of equal-size images (the StyleGAN format, which dataset_tool.py writes). Labels, if any,
stand in `dataset.json` beside them as {"labels": [["00000/img00000000.png", 3], ...]}: class numbers, or vectors of one
length.

The order of the images is a function of (seed, position): a run that resumes after n images needs only n.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from dnnlib.console import UserError
from torch_utils.reading import read_ahead

EXTENSIONS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".tga",
    ".jp2",
)
# Only these decoders are tried on the bytes: a file that calls itself .png may hold PostScript, which Pillow would run.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "JPEG2000")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
ZIP_ERRORS = (OSError, ValueError, EOFError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile)
MAX_FILE_BYTES = 2**30  # Pillow refuses images above 179 million pixels, which are 0.5 GiB in RGB
MAX_CLASSES = 100_000  # a one-hot vector this long is 0.4 MB per image; more is a mistake in the labels


class BadImage(UserError):
    """One file that is no readable image. The message names it and the reason."""


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image as 8-bit grey (1), RGB (3) or RGBA (4).

    16-bit grey is scaled from 0..65535 to 0..255. Without an alpha channel in the result, transparent parts are laid
    over white. RGB becomes grey by the luma of ITU-R 601. Colour profiles are ignored. Raises ValueError for pixels
    without an agreed range (32-bit).
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


def channels_of(image: Image.Image) -> int:
    """1 for grey, 4 with an alpha channel or a transparent colour, else 3."""
    if image.has_transparency_data:
        return 4
    return 1 if image.mode in ("1", "L", "F") or image.mode.startswith("I") else 3


class ImageFiles:
    """The image files in a folder (with its sub-folders) or a ZIP, as sorted names with forward slashes.

    Hidden files and the `__MACOSX` folder of Apple's ZIPs are left out.
    An object can be pickled, and used after a fork.
    Raises UserError when `path` is no folder or readable ZIP, or holds no images.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._zip, self._zip_owner = None, None
        if not os.path.exists(self.path):
            raise UserError(f"{self.path} does not exist or is out of reach; give a folder or a ZIP of images")
        self.is_zip = not self.path.is_dir()
        found = self._zip_names() if self.is_zip else self._folder_names()
        names = sorted(name for name in found if is_image(name))
        if not names:
            raise UserError(f"{self.path} holds no images; known endings are {' '.join(EXTENSIONS)}")
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
        """The decoded first frame, turned upright as its EXIF data asks; with `channels`, converted by to_channels.

        Raises BadImage when the file is empty, truncated, too large, or no image.
        """
        with self._named_errors(name):
            image = self._open(name)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image if channels is None else to_channels(image, channels)

    def size(self, name: str) -> tuple[int, int]:
        """Width and height as the file's head tells them, before it is turned upright. The errors are `image`'s."""
        with self._named_errors(name):
            return self._open(name).size

    def contents(self, names: Iterable[str]) -> Iterator[bytes]:
        """The bytes of each file. The errors are `image`'s."""
        for name in names:
            with self._named_errors(name):
                data = self._read(name)
            yield data

    @contextlib.contextmanager
    def _named_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        # Broken bytes make Pillow, zlib and zipfile raise a dozen kinds of exception; all mean the same to the user.
        except Exception as error:
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "it is in no known image format" if unknown else str(error) or type(error).__name__
            raise BadImage(f"{self.path / name} cannot be read as an image: {reason}; repair or remove it") from error

    def _open(self, name: str) -> Image.Image:
        data = self._read(name)
        if not data:
            raise ValueError("the file is empty")
        return Image.open(io.BytesIO(data), formats=FORMATS)

    def dataset_json(self) -> tuple[dict[str, object] | None, list[str] | None]:
        """The labels by file name and the names of the classes, from `dataset.json`; None for what it does not hold."""
        where = self.path / "dataset.json"
        try:
            data = self._read("dataset.json")
        except (FileNotFoundError, KeyError):
            return None, None
        except ZIP_ERRORS as error:
            raise UserError(f"{where} cannot be read: {error}; make the dataset again") from error
        return parse_dataset_json(data, where)

    def _folder_names(self) -> Iterator[str]:
        def refuse(error: OSError):
            raise UserError(
                f"cannot list {error.filename}: {error.strerror}; give yourself the right to read it"
            ) from error

        seen = {os.path.realpath(self.path)}
        for folder, subfolders, files in os.walk(self.path, followlinks=True, onerror=refuse):
            # A link to a folder is followed once, so links that form a ring end.
            real = {name: os.path.realpath(os.path.join(folder, name)) for name in subfolders}
            subfolders[:] = [name for name in sorted(subfolders) if real[name] not in seen]
            seen.update(real.values())
            inside = Path(folder).relative_to(self.path)
            yield from ((inside / name).as_posix() for name in files)

    def _zip_names(self) -> set[str]:
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
                raise ValueError("it is not a regular file")  # opening a pipe would wait for ever
        if size > MAX_FILE_BYTES:
            raise ValueError(f"it claims {size / 2**30:,.1f} GiB, and the limit is {MAX_FILE_BYTES / 2**30:.0f} GiB")
        return self._open_zip().read(name) if self.is_zip else (self.path / name).read_bytes()


def is_image(name: str) -> bool:
    """Whether the name ends as an image does and is neither hidden nor one of the shadow files of Apple's ZIPs."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in EXTENSIONS and not hidden


def parse_dataset_json(data: bytes, where: object) -> tuple[dict[str, object] | None, list[str] | None]:
    """Labels by file name and class names from the bytes of a `dataset.json`; `where` names it in errors.

    "labels" may be a list of [name, label], a mapping, or null. Raises UserError for anything else.
    """
    try:
        content = json.loads(data)
        labels = content.get("labels")
        if labels is not None:
            labels = {name.replace("\\", "/"): label for name, label in dict(labels).items()}
        class_names = content.get("class_names")
        if class_names is not None:
            class_names = [str(name) for name in class_names]
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f'{where} is not of the form {{"labels": [["00000/img00000000.png", 3], ...]}} ({error}); '
            "fix it, or remove it to do without labels"
        ) from error
    return labels, class_names


def label_array(labels: dict[str, object], names: list[str], where: object) -> np.ndarray:
    """The labels of `names`, in their order: int64 [n] class numbers, or float64 [n, L] vectors.

    Raises UserError when a name has no label, or the labels are neither class numbers nor vectors of one length.
    """
    missing = [name for name in names if name not in labels]
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise UserError(f"{where} has no label for {missing[0]}{more}; label every image, or do without labels")
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


class ImageArchive:
    """The images of a folder or ZIP as tensors. All have one size, which may be rectangular; formats may mix.

    shape       (channels, height, width)
    label_dim   length of a label: classes for class numbers, L for vectors, 0 when labels are not used
    has_labels  whether the archive holds labels, used or not
    name        of the folder, or of the ZIP without its ending

    use_labels  read them; class numbers become one-hot vectors of length (largest number of the archive) + 1
    mirror      each image counts twice: index i and, flipped left to right, i + len/2
    channels    1, 3 or 4: images are converted to it by to_channels (grey is repeated into RGB, and so on); by default
                as many as the first image has
    max_images  use this many, chosen by `seed`, before mirroring
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        use_labels: bool = False,
        mirror: bool = False,
        channels: int | None = None,
        max_images: int | None = None,
        seed: int = 0,
    ):
        if channels not in (None, *MODES):
            raise UserError(f"channels={channels}, but images have 1 (grey), 3 (RGB) or 4 (RGBA) channels")
        if max_images is not None and max_images < 1:
            raise UserError(f"max_images={max_images} leaves no images; use 1 or more, or leave it out for all")
        self._files = ImageFiles(path)
        self._mirror = mirror
        self._kept = np.sort(epoch_order(len(self._files), seed, 0)[:max_images])
        first = self._files.image(self._files.name(self._kept[0]), channels)
        self.shape = (channels or channels_of(first), first.height, first.width)
        self.name = self._files.path.resolve().stem if self._files.is_zip else self._files.path.resolve().name
        labels, _ = self._files.dataset_json()
        self.has_labels = labels is not None
        self.label_dim = 0
        if use_labels:
            where = self._files.path / "dataset.json"
            if labels is None:
                raise UserError(
                    f"{path} holds no labels; make it with dataset_tool.py --labels, or train without labels"
                )
            self._labels = label_array(labels, self._files.names(), where)
            self.label_dim = self._labels.shape[1] if self._labels.ndim == 2 else int(self._labels.max()) + 1

    def __len__(self) -> int:
        return len(self._kept) * (2 if self._mirror else 1)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image number `index`: uint8 [C,H,W] in 0..255, and its label: float32 [label_dim].

        Raises IndexError outside 0..len-1, and UserError, naming the file, when it is unreadable or of another size.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        mirrored, item = divmod(index, len(self._kept))
        number = int(self._kept[item])
        name = self._files.name(number)
        channels, height, width = self.shape
        image = self._files.image(name, channels)
        if image.size != (width, height):
            raise UserError(
                f"{self._files.path / name} is {image.width}x{image.height}, but the first image is {width}x{height}; "
                "make all images one size with dataset_tool.py --resolution"
            )
        pixels = np.asarray(image).reshape(height, width, channels)
        pixels = pixels[:, ::-1] if mirrored else pixels
        return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C")), self.label(index)

    def label(self, index: int) -> torch.Tensor:
        """The label of image number `index`, float32 [label_dim], without reading the image."""
        number = self._kept[index % len(self._kept)]
        label = torch.zeros(self.label_dim)
        if self.label_dim:
            value = self._labels[number]
            if self._labels.ndim == 2:
                label = torch.from_numpy(value.astype(np.float32))
            else:
                label[int(value)] = 1
        return label

    def contents(self) -> Iterator[bytes]:
        """The bytes of the files in use, in their order, each once."""
        return self._files.contents(self._files.name(number) for number in self._kept)


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..count-1 that depends on (seed, epoch) alone; int64 [count], read-only.

    It sorts raw Philox output, whose bits NumPy keeps across versions; it does not promise that for its own shuffle.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} must be a whole number from 0 to 2^63 - 1")
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    order = np.argsort(keys, kind="stable")
    order.setflags(write=False)
    return order


def index_at(position: int, count: int, seed: int) -> int:
    """Which of `count` images stands at `position` of the endless stream; every `count` positions show each image once.

    O(count) when `position` enters an epoch, O(1) while it stays there.
    """
    epoch, place = divmod(position, count)
    return int(epoch_order(count, seed, epoch)[place])


def batches(
    images: ImageArchive,
    *,
    batch: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    workers: int = 2,
    pin_memory: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The endless stream of this process: (uint8 [batch/world,C,H,W], float32 [batch/world,label_dim]).

    Batch s of all processes together holds the positions start + s·batch ... + batch - 1 of the order that `seed`
    gives; process `rank` of `world` reads every world-th of them, from the rank-th on. `start` is the number of images
    already seen. `workers` processes read ahead (0: this one reads); the stream does not depend on their number.
    Raises UserError for impossible numbers at once, and when its turn comes for an image that cannot be read.
    """
    if batch < 1 or world < 1 or batch % world:
        raise UserError(f"batch={batch} does not divide over {world} processes; try {max(batch // world, 1) * world}")
    if not 0 <= rank < world or start < 0 or workers < 0:
        raise UserError(f"{rank=} must be below {world=}, and {start=} and {workers=} not negative")
    lists = _IndexLists(len(images), batch, start, rank, world, seed)
    return read_ahead(functools.partial(_batch, images), lists, workers, pin_memory)


def _batch(images: ImageArchive, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*(images[index] for index in indices), strict=True)
    return torch.stack(images), torch.stack(labels)


class _IndexLists:
    """The indices of each batch of one process, without end."""

    def __init__(self, count: int, batch: int, start: int, rank: int, world: int, seed: int):
        self.count, self.batch, self.start, self.rank, self.world, self.seed = count, batch, start, rank, world, seed

    def __iter__(self) -> Iterator[list[int]]:
        for first in itertools.count(self.start, self.batch):
            positions = range(first + self.rank, first + self.batch, self.world)
            yield [index_at(position, self.count, self.seed) for position in positions]
