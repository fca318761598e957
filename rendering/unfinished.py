"""Files that take long to write: finished parts are kept on disk, and the file appears whole or not at all.

The parts of the unfinished file `out/seed0003.tif` are in the directory `out/seed0003.tif.part`:

    job.json    everything that the file depends on; only an equal job may resume
    encoding/   the final file while it is written
    …           the finished parts (writers.py, video.py)

When the file is finished, its job.json becomes `out/.jobs/seed0003.tif.json`, so that resuming keeps the file.
"""

import contextlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from dnnlib.console import UserError
from dnnlib.files import atomic_write, follow

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Unfinished(ABC):
    """An unfinished file, and which of its parts are missing.

    Several processes may share it: one starts it, each writes its own parts inside `with`, and one finishes it after
    all have left.
    """

    def __init__(self, path: Path, job: dict):
        """Describe the file `path`, touching nothing. job: plain JSON values, everything that its bytes depend on.

        Raises UserError when `path` cannot be a file.
        """
        self.path = path = follow(path)
        self.job = job
        self.folder = path.with_name(path.name + ".part")
        self.record = path.parent / ".jobs" / f"{path.name}.json"

    def finished(self) -> bool:
        """Tell whether the file is complete. Raises UserError if it is of another job."""
        try:
            then = read_job(self.record)
        except (OSError, ValueError):  # never finished, or by an earlier version
            return False
        if not os.path.isfile(self.path):
            return False
        self.compare(then)
        if self.folder.exists():  # a kill may have left the empty directory
            with self.alone():
                self.discard()
        return True

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other commands from writing this file. Raises UserError if one does."""
        with contextlib.ExitStack() as stack:
            while not self.hold(stack):
                pass  # another command has just finished the file, and removed the directory
            yield

    def hold(self, stack: contextlib.ExitStack) -> bool:
        """Create the directory and lock it until `stack` ends. Return whether it is still there; raises UserError."""
        self.create()
        if fcntl is None:
            return True
        try:
            handle = os.open(self.folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"cannot write {self.path}: another command is writing it; wait for it, or choose another directory"
                ) from error
            except OSError:  # some network file systems have no locks
                pass
            return os.path.samefile(handle, self.folder)
        except FileNotFoundError:
            return False

    def start(self, resume: bool) -> None:
        """Create the directory or, with `resume`, keep the directory of an equal job.

        Raises UserError if it cannot be written, or if the directory to resume is broken or of another job.
        """
        self.create()
        with self.creating():
            if not resume:
                self.clear()
            self.record.unlink(missing_ok=True)
            # Hidden names are temporary files of a run that was killed before it wrote its job.
            fresh = all(entry.name.startswith(".") for entry in self.folder.iterdir())
        if fresh:
            with self.writing(), atomic_write(self.folder / "job.json") as temporary:
                temporary.write_text(json.dumps(self.job, indent=1))
        self.check()

    def create(self) -> None:
        """Create the directory if there is none. Raises UserError."""
        with self.creating(), contextlib.suppress(FileExistsError):
            self.folder.mkdir(parents=True)

    @contextlib.contextmanager
    def creating(self) -> Iterator[None]:
        """Turn a failure to make or empty the directory into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror} ({error.filename}); choose a directory that you may "
                "write to"
            ) from error

    def check(self) -> None:
        """Raise UserError unless it was started for an equal job, naming the first thing that differs."""
        try:
            then = read_job(self.folder / "job.json")
        except (OSError, ValueError) as error:
            raise self.broken(f"job.json cannot be read ({error})") from error
        self.compare(then)

    def compare(self, then: dict) -> None:
        now = json.loads(json.dumps(self.job))  # tuples become lists
        for key in now | then:
            if key not in now or key not in then or now[key] != then[key]:
                a, b = (json.dumps(values[key])[:100] if key in values else "not given" for values in (then, now))
                raise UserError(
                    f"cannot resume {self.path}: it was started with {key} = {a}, and now {key} is {b}; "
                    "use the original settings, or start over without resume"
                )

    @property
    @abstractmethod
    def missing(self) -> Sequence[int]:
        """Return the numbers of the parts still to be written."""

    @abstractmethod
    def encode(self, folder: Path) -> Path:
        """Write the final file into `folder` and return its path. Raises UserError when the disk is full."""

    def __enter__(self):
        self.check()
        return self

    def __exit__(self, *exception):  # noqa: B027 (only a subclass with open files has something to close)
        pass

    def finish(self) -> None:
        """Encode the file, give it its name and remove the directory.

        Raises UserError if it cannot be written; all parts and any earlier file of this name are then kept.
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
            shutil.rmtree(folder, ignore_errors=True)  # on a full disk, the next attempt needs this space
            raise

    def publish(self, encoded: Path) -> None:
        """Rename the complete file to its final name and remove the directory."""
        sync(encoded)
        os.replace(encoded, self.path)
        sync(self.path.parent)
        self.record.parent.mkdir(exist_ok=True)
        os.replace(self.folder / "job.json", self.record)
        self.discard()

    def clear(self) -> None:
        """Empty the directory. After a kill, the rest can be started over: marks go first, job.json last."""
        order = {"done": 0, "job.json": 2}
        for entry in sorted(self.folder.iterdir(), key=lambda entry: order.get(entry.name, 1)):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def discard(self) -> None:
        """Remove the directory, if any."""
        if self.folder.exists():
            self.clear()
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
            f"cannot write {self.path}: {reason}; finished parts are kept in {self.folder}, "
            "so free some space (or fix the cause) and resume"
        )

    def broken(self, reason: str) -> UserError:
        return UserError(f"cannot resume {self.path}: {self.folder} is broken, {reason}; start over without resume")


def read_job(path: Path) -> dict:
    """Read a job. Raises OSError and ValueError."""
    job = json.loads(path.read_text())
    if not isinstance(job, dict):
        raise ValueError("not a dictionary")
    return job


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return  # Windows does not open directories
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
