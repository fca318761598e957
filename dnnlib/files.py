"""Files that appear whole or not at all, what they hold, and where those that others made are found."""

import contextlib
import hashlib
import http.client
import os
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dnnlib.console import UserError, progress

BLOCK = 2**20  # bytes read at once
TIMEOUT = 30  # seconds without a byte before a download is given up


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends well, it is flushed to disk and renamed to `path`.

    When the block raises, or the process dies, `path` keeps what it held before.
    Raises UserError when the directory cannot be made or written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=f".tmp{path.suffix}")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a directory that you may write to") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; give ours the permissions that open() would have given.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


class RemoteFile(NamedTuple):
    """A file that others made: its name, where it comes from, and how its SHA-256 begins."""

    name: str
    url: str
    digest: str | None  # hexadecimal, the whole or its beginning; None: unknown here, so it is never downloaded


def cache_dir() -> Path:
    """Where downloads and computed statistics are kept: $CREPS_CACHE, or else ~/.cache/creps."""
    return Path(os.environ.get("CREPS_CACHE") or Path.home() / ".cache" / "creps")


def locate(file: RemoteFile, folder: str | os.PathLike | None = None) -> Path:
    """The path of `file` in the cache directory, or else in `folder`, or else downloaded into the cache directory.

    What is found is not checked: whoever reads it looks at its SHA-256.
    Raises UserError, saying which file from where must lie in which place, when it can neither be found nor downloaded.
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
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{wanted} (downloading it failed: {error})") from error
    return places[0]


def download(file: RemoteFile, path: Path) -> None:
    """Downloads `file` to `path`, with a progress bar; `path` changes only when the SHA-256 is right.

    Raises UserError when it is not, or `path` cannot be written, and OSError or HTTPException when the server is out of
    reach or silent for 30 seconds.
    """
    with urllib.request.urlopen(file.url, timeout=TIMEOUT) as answer, atomic_write(path) as temporary:
        length = int(answer.headers.get("Content-Length") or 0) or None
        with open(temporary, "wb") as output, progress(None, desc=file.name, total=length, unit="B", scale=True) as bar:
            while block := answer.read(BLOCK):
                output.write(block)
                bar.update(len(block))
        found = sha256(temporary)
        if not found.startswith(file.digest):
            raise UserError(
                f"{file.url} gave a file whose SHA-256 is {found}, not one that begins with {file.digest}; the "
                f"download was cut short or another file lies there: try again, or put the right file at {path}"
            )


def check_writable(folder: Path) -> None:
    """Raises UserError unless files can be written into `folder`, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; give a folder of yours as --outdir") from error
