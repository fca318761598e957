"""Read files by name out of a folder, a ZIP, a TAR, a CIFAR data set or an LMDB. Names have forward slashes.

A container can be pickled, and used after a fork. Nothing in a file is executed.
"""

import atexit
import io
import json
import os
import pickle
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from dnnlib.console import UserError
from dnnlib.files import is_pipe

READ_ERRORS = (
    OSError, ValueError, EOFError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile, tarfile.TarError,
)  # fmt: skip
MAX_FILE_BYTES = 2**31  # a 16-bit RGB image of 350 megapixels


class Container(ABC):
    """Files by name. The methods may raise any of READ_ERRORS, and KeyError."""

    def __init__(self, path: Path):
        self.path = path
        self._opened, self._owner = None, None

    all_images = False  # whether every file is an image, whatever its name

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None, "_owner": None}

    @property
    def opened(self):
        """Return what _open returns. A forked process shares file positions, so each process opens for itself."""
        if self._owner != os.getpid():
            self._opened, self._owner = self._open(), os.getpid()
        return self._opened

    def _open(self) -> object:
        """Open what a process keeps open between files: by default nothing."""
        return None

    @abstractmethod
    def names(self) -> list[str]:
        """List the files, in any order."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open a file for reading. Raises ValueError if it is implausibly large or not a regular file."""


class Folder(Container):
    """A folder with its sub-folders. Links are followed; each folder is visited once, so that rings of links end."""

    def names(self) -> list[str]:
        def refuse(error: OSError):
            reason = f"cannot list {error.filename}: {error.strerror}; give yourself permission to read it"
            raise UserError(reason) from error

        found, seen = [], {os.path.realpath(self.path)}
        for folder, subfolders, files in os.walk(self.path, followlinks=True, onerror=refuse):
            real = {name: os.path.realpath(os.path.join(folder, name)) for name in subfolders}
            subfolders[:] = [name for name in sorted(subfolders) if real[name] not in seen]
            seen.update(real.values())
            inside = Path(folder).relative_to(self.path)
            found += [(inside / name).as_posix() for name in files]
        return found

    def open(self, name: str) -> BinaryIO:
        status = (self.path / name).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")  # opening a pipe would block
        check_size(status.st_size)
        return open(self.path / name, "rb")


class Zip(Container):
    def _open(self) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
        archive = zipfile.ZipFile(self.path)
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        # Some programs write backslashes, or ./ before each name.
        return archive, {str(PurePosixPath(entry.filename.replace("\\", "/"))): entry for entry in entries}

    def names(self) -> list[str]:
        entries = self.opened[1]
        for name, entry in entries.items():
            if entry.flag_bits & 1:
                raise UserError(f"{self.path} is encrypted ({name}); pack it again without a password")
        return list(entries)

    def open(self, name: str) -> BinaryIO:
        archive, entries = self.opened
        check_size(entries[name].file_size)
        return archive.open(entries[name])


class Tar(Container):
    """A TAR. A compressed one is unpacked into a temporary file first, because its files cannot be read one by one."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._places = {}  # name -> (offset, bytes)
        self._plain = path
        with tarfile.open(path, "r:*") as archive:
            if not isinstance(archive.fileobj, io.BufferedReader):
                self._plain = unpacked(archive.fileobj, path)
        with tarfile.open(self._plain, "r:") as archive:
            for entry in archive:
                name, first = (str(PurePosixPath(text)) for text in (entry.name, entry.linkname))
                if entry.isreg() and not entry.issparse():
                    self._places[name] = entry.offset_data, entry.size
                elif entry.islnk() and first in self._places:  # the same file under a further name
                    self._places[name] = self._places[first]

    def _open(self) -> BinaryIO:
        return open(self._plain, "rb")

    def names(self) -> list[str]:
        return list(self._places)

    def open(self, name: str) -> BinaryIO:
        offset, size = self._places[name]
        check_size(size)
        self.opened.seek(offset)
        data = self.opened.read(size)
        if len(data) < size:
            raise ValueError(f"{self.path.name} ends within it")
        return io.BytesIO(data)


def unpacked(packed: BinaryIO, path: Path) -> Path:
    """Write what `packed` decompresses to a temporary file, which is removed when the process exits."""
    handle, name = tempfile.mkstemp(suffix=".tar")
    atexit.register(lambda: Path(name).unlink(missing_ok=True))
    with open(handle, "wb") as plain:
        packed.seek(0)
        try:
            shutil.copyfileobj(packed, plain, 2**20)
        except OSError as error:
            if not error.errno:
                raise  # damaged: gzip.BadGzipFile
            raise UserError(
                f"cannot unpack {path} to {tempfile.gettempdir()}: {error.strerror}; unpack it into a folder yourself, "
                "or point TMPDIR to a place with more space"
            ) from error
    return Path(name)


def check_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ValueError(f"it claims {size / 2**30:,.1f} GiB, and the limit is {MAX_FILE_BYTES / 2**30:.0f} GiB")


# --- CIFAR ------------------------------------------------------------------------------------------------------------

# The training images of the "python version": file -> (key of the labels, file and key of the classes' names).
CIFAR = {
    **{f"data_batch_{i}": (b"labels", "batches.meta", b"label_names") for i in range(1, 6)},
    "train": (b"fine_labels", "meta", b"fine_label_names"),
}


def cifar_batches(names: Collection[str]) -> list[str]:
    """Return which of these files are training images of CIFAR, next to the names of their classes."""
    known = {name: CIFAR[PurePosixPath(name).name][1] for name in names if PurePosixPath(name).name in CIFAR}
    return sorted(name for name, names_in in known.items() if beside(name, names_in) in names)


def beside(name: str, other: str) -> str:
    return str(PurePosixPath(name).with_name(other))


class Cifar(Container):
    """The training images of CIFAR-10 or CIFAR-100 ("python version") in another container, as PPM files.

    Classes and their names are in a dataset.json, as in archives of dataset_tool.py.
    """

    def __init__(self, files: Container, batches: list[str]):
        super().__init__(files.path)
        self._files, self._batches = files, batches

    def _open(self) -> dict[str, np.ndarray | bytes]:
        images, labels, words = [], [], []
        for batch in self._batches:
            key, names_in, names_key = CIFAR[PurePosixPath(batch).name]
            try:
                content = self._load(batch)
                images += list(content[b"data"].values.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                labels += map(int, content[key])
                words = [word.decode() for word in self._load(beside(batch, names_in))[names_key]]
            except Exception as error:  # a damaged pickle raises a dozen kinds
                raise ValueError(f"{batch} is not a file of CIFAR ({error})") from error
        names = [f"{i // 1000:05d}/cifar{i:05d}.ppm" for i in range(len(images))]
        text = json.dumps({"labels": list(zip(names, labels, strict=True)), "class_names": words})
        return dict(zip(names, images, strict=True)) | {"dataset.json": text.encode()}

    def _load(self, name: str) -> dict:
        with self._files.open(name) as file:
            return _Arrays(file, encoding="bytes").load()

    def names(self) -> list[str]:
        return list(self.opened)

    def open(self, name: str) -> BinaryIO:
        content = self.opened[name]
        return io.BytesIO(content if isinstance(content, bytes) else b"P6 32 32 255\n" + content.tobytes())


class _Arrays(pickle.Unpickler):
    """Unpickles plain values and arrays of bytes, and refuses everything else."""

    def find_class(self, module: str, name: str) -> object:
        inert = {"_reconstruct": _Array, "ndarray": None, "dtype": _Type}
        if module.split(".")[0] != "numpy" or name not in inert:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return inert[name]


class _Array:
    def __init__(self, *_): ...

    def __setstate__(self, state: tuple):
        _version, shape, _type, is_fortran, data = state
        self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")


class _Type:
    def __init__(self, *_): ...

    def __setstate__(self, state: tuple): ...


# --- LMDB -------------------------------------------------------------------------------------------------------------


class Lmdb(Container):
    """A folder with a data.mdb, as LSUN has: every value is an image file."""

    all_images = True

    def _open(self):
        try:
            import lmdb
        except ModuleNotFoundError as error:
            raise UserError(f"reading {self.path} needs lmdb, which is not installed; run: pip install lmdb") from error
        try:
            return lmdb.open(os.fsencode(self.path), readonly=True, lock=False, readahead=False).begin(buffers=False)
        except lmdb.Error as error:
            raise ValueError(str(error)) from error

    def names(self) -> list[str]:
        return [os.fsdecode(key) for key in self.opened.cursor().iternext(values=False)]

    def open(self, name: str) -> BinaryIO:
        data = self.opened.get(os.fsencode(name))
        if data is None:
            raise KeyError(name)
        return io.BytesIO(data)


# --- choice -----------------------------------------------------------------------------------------------------------


def open_container(path: Path) -> tuple[Container, list[str]]:
    """Return the container of a path, and its files' names. Raises UserError when it is none that is known."""
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist or is out of reach; give a folder or a ZIP of images")
    if is_pipe(path):
        raise UserError(f"{path} is a pipe or device; give a folder or a ZIP of images")
    try:
        if path.is_dir():
            container = Lmdb(path) if (path / "data.mdb").is_file() else Folder(path)
        else:
            is_tar = not zipfile.is_zipfile(path) and tarfile.is_tarfile(path)
            container = Tar(path) if is_tar else Zip(path)
        names = container.names()
        batches = cifar_batches(names)
        if batches:
            container = Cifar(container, batches)
            names = container.names()
    except UserError:
        raise
    except READ_ERRORS as error:
        raise UserError(
            f"{path} is neither a folder nor a whole ZIP or TAR ({error}); make or download it again"
        ) from error
    for name in names:
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise UserError(f"{path} holds {name}, a name that points outside of it; make or download it again")
    return container, names
