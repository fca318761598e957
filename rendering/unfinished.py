"""Files that take long to make: finished parts are kept on disk, and the file appears whole or not at all.

What belongs to the unfinished file `out/seed0003.tif` is in the directory `out/seed0003.tif.part`:

    job.json    everything that the file depends on; only an equal job may resume
    encoding/   the final file while it is written
    …           the finished parts (writers.py, video.py)
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from dnnlib.console import UserError
from dnnlib.files import atomic_write


class Unfinished:
    """A file in the making, and which of its parts are missing.

    Several processes may hold it: one starts it, each writes parts that no other writes, inside `with`; after all have
    left it, one finishes it.
    """

    def __init__(self, path: Path, job: dict):
        """Describe the file `path`, touching nothing. job: plain JSON values, everything that its bytes depend on."""
        self.path, self.job = path, job
        self.folder = path.with_name(path.name + ".part")

    def start(self, resume: bool) -> None:
        """Make the directory, or keep that of an equal job if `resume`.

        Raises UserError when it cannot be written, or the one to resume is of another job or broken.
        """
        if self.path.is_dir():
            raise UserError(f"cannot write {self.path}: a directory has this name; choose another one, or remove it")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not resume:
                self.discard()
            self.folder.mkdir(exist_ok=True)
            # Hidden names are temporary files of a run that was killed before it wrote its job.
            fresh = all(entry.name.startswith(".") for entry in self.folder.iterdir())
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror} ({error.filename}); choose a directory that you may "
                "write to"
            ) from error
        if fresh:
            with self.writing(), atomic_write(self.folder / "job.json") as temporary:
                temporary.write_text(json.dumps(self.job, indent=1))
        self.check()

    def check(self) -> None:
        """Raise UserError unless it was started for an equal job, naming the first thing that differs."""
        try:
            then = json.loads((self.folder / "job.json").read_text())
            if not isinstance(then, dict):
                raise ValueError("not a dictionary")
        except (OSError, ValueError) as error:
            raise self.broken(f"job.json cannot be read ({error})") from error
        now = json.loads(json.dumps(self.job))  # tuples become lists
        for key in now | then:
            if key not in now or key not in then or now[key] != then[key]:
                a, b = (json.dumps(values[key])[:100] if key in values else "not given" for values in (then, now))
                raise UserError(
                    f"cannot resume {self.path}: it was started with {key} = {a}, and now {key} is {b}; "
                    "use the settings of then, or start anew without resume"
                )

    @property
    def missing(self) -> Sequence[int]:
        """Return the numbers of the parts still to be written."""
        raise NotImplementedError

    def encode(self, folder: Path) -> Path:
        """Write the final file into `folder`. Returns its path. Raises UserError when the disk is full."""
        raise NotImplementedError

    def __enter__(self):
        self.check()
        return self

    def __exit__(self, *exception):
        pass

    def finish(self) -> None:
        """Encode the file, give it its name and remove the directory.

        Raises UserError when it cannot be written: all parts are kept then, and the former file of this name too.
        """
        if len(self.missing):
            raise ValueError(f"{self.path}: {len(self.missing)} parts are missing, the first is {self.missing[0]}")
        folder = self.folder / "encoding"
        try:
            with self.writing():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                self.publish(self.encode(folder))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # on a full disk, the room that the next attempt needs
            raise

    def publish(self, encoded: Path) -> None:
        """Rename the complete file to its final name and remove the directory."""
        sync(encoded)
        os.replace(encoded, self.path)
        sync(self.path.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the directory, if any. What a kill leaves of it can be started anew: marks go first, job.json last."""
        order = {"done": 0, "job.json": 2}
        if self.folder.exists():
            for entry in sorted(self.folder.iterdir(), key=lambda entry: order.get(entry.name, 1)):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self.folder.rmdir()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn a failure to write, such as a full disk, into a UserError."""
        try:
            yield
        except OSError as error:
            raise self.interrupted(error.strerror or str(error)) from error

    def interrupted(self, reason: str) -> UserError:
        return UserError(
            f"cannot write {self.path}: {reason}; what is finished is kept in {self.folder}, "
            "so make room (or fix what else is wrong) and resume"
        )

    def broken(self, reason: str) -> UserError:
        return UserError(f"cannot resume {self.path}: {self.folder} is broken, {reason}; start anew without resume")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
