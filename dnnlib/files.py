"""Write files atomically, compute checksums, and find or download files by other authors."""

import contextlib
import hashlib
import http.client
import json
import math
import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dnnlib.console import UserError, progress

BLOCK = 2**20  # bytes read at once
TIMEOUT = 30  # seconds without a byte until a download fails


def is_pipe(path: str | os.PathLike) -> bool:
    """Tell whether `path` is a pipe or a device, which may give no byte or never end."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def follow(path: Path) -> Path:
    """Return the file that is written for `path`: that which it links to, if it is a link.

    Raises UserError when it is a directory, a pipe or a device.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if os.path.isdir(path) or is_pipe(path):
        what = "a directory" if os.path.isdir(path) else "a pipe or device"
        raise UserError(f"cannot write {path}: {what} has this name; choose another one, or remove it")
    return path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path of the same ending; after the block, flush it to disk and rename it to `path`.

    `path` keeps its former content when the block raises or the process dies. If it is a link, it stays one.
    Raises UserError when the directory cannot be made or written, or `path` cannot be a file.
    """
    ending, path = Path(path).suffix, follow(Path(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=f".tmp{ending}")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a directory that you may write to") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        _publish(temporary, path, 0o666)
    except OSError as error:
        if error.errno:  # a full disk names no file, and the temporary name would mean nothing to the user
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; rename it to `path`, which may be an empty folder, after the block."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:40]}-", suffix=".tmp"))
    try:
        yield temporary
        _publish(temporary, path, 0o777)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, path: Path, mode: int) -> None:
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(mode & ~umask)  # tempfile makes private files and folders
    os.replace(temporary, path)


def append_line(path: str | os.PathLike, line: str) -> None:
    """Add a line to a text file: all of it, or, on a full disk, nothing of it."""
    data = f"{line}\n".encode()
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            file.truncate(end)
            error.filename = str(path)
            raise


def to_json(value: object) -> str:
    """Return `value` as a line of JSON; numbers that are not finite become null, because JSON has none."""

    def finite(value: object) -> object:
        if isinstance(value, dict):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), allow_nan=False)


def sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


class RemoteFile(NamedTuple):
    """A file by other authors."""

    name: str
    url: str
    digest: str | None  # the SHA-256 in hexadecimal, or its beginning; None: unknown, so the file is never downloaded


def cache_dir() -> Path:
    """Return the directory of downloads, statistics and libraries: $CREPS_CACHE, or else ~/.cache/creps.

    Raises UserError when there is no home directory, as of a container's user without a name.
    """
    try:
        return Path(os.environ.get("CREPS_CACHE") or Path.home() / ".cache" / "creps")
    except RuntimeError as error:
        raise UserError("there is no home directory; set CREPS_CACHE to a folder for what is kept") from error


def locate(file: RemoteFile, folder: str | os.PathLike | None = None) -> Path:
    """Find `file` in the cache directory or in `folder`, or else download it into the cache directory; return its path.

    A file that is found is not checked: its reader compares the SHA-256.
    Raises UserError, naming the file, its source and its place, when it can be neither found nor downloaded.
    """
    places = [cache_dir() / file.name, *([Path(folder) / file.name] if folder is not None else [])]
    for place in places:
        if os.path.isfile(place):
            return place
    wanted = f"{file.name} is needed and was not found; take it from {file.url} and put it at " + " or ".join(
        map(str, places)
    )
    if file.digest is None:
        raise UserError(f"{wanted} (it is not downloaded, because its SHA-256 is not known here)")
    try:
        download(file, places[0])
    except UserError as error:
        raise UserError(f"{wanted} ({error})") from error
    return places[0]


def fetch(url: str) -> Path:
    """Return the file of "https://…#sha256=…" in the cache directory, downloaded unless it is there intact.

    Raises UserError.
    """
    address, _, digest = url.partition("#sha256=")
    digest = digest.lower()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise UserError(
            f"{url} needs its SHA-256, so that nobody can replace it: write {address}#sha256=DIGEST, with the 64 "
            "digits that its author states, or that `sha256sum FILE` prints of a file you trust"
        )
    name = Path(re.split(r"[?#]", address)[0]).name
    path = cache_dir() / "downloads" / digest / name
    if not (path.is_file() and sha256(path) == digest):
        download(RemoteFile(name, address, digest), path)
    return path


def download(file: RemoteFile, path: Path) -> None:
    """Download `file` to `path`, with a progress bar; `path` changes only when the SHA-256 is right.

    Raises UserError when the SHA-256 is wrong, `path` cannot be written, or the server is out of reach or silent for
    TIMEOUT seconds.
    """
    try:
        with urllib.request.urlopen(file.url, timeout=TIMEOUT) as answer, atomic_write(path) as temporary:
            length = int(answer.headers.get("Content-Length") or 0) or None
            bar = progress(None, desc=file.name, total=length, unit="B", scale=True)
            with open(temporary, "wb") as output, bar:
                while block := answer.read(BLOCK):
                    output.write(block)
                    bar.update(len(block))
            found = sha256(temporary)
            if not found.startswith(file.digest):
                raise UserError(
                    f"{file.url} gave a file whose SHA-256 is {found}, not one that begins with {file.digest}; the "
                    f"download was cut short or the file was replaced: try again, or put the right file at {path}"
                )
    except UserError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:  # the last: an address that is none
        raise UserError(f"downloading {file.url} failed: {error}") from error


def check_writable(folder: Path) -> None:
    """Make `folder` if it is missing. Raises UserError unless files can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}: {error.strerror}; choose a folder that you may write to"
        ) from error
