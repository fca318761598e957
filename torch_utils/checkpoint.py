"""Save, find and load training states: files of tensors and plain values."""

import contextlib
import pickletools
import re
import zipfile
from pathlib import Path

import torch

from dnnlib.console import UserError, brief
from dnnlib.files import atomic_write

FORMAT = "creps-training-state-1"
MODULES = ("torch", "torch._utils", "collections")  # that a file may name; builtins.bytearray could fill the memory
PATTERN = re.compile(r"training-state-(\d+)\.pt")
KEEP = 2  # states in a folder: the newest, and one more in case it is damaged


def save(state: dict, folder: Path, number: int) -> Path:
    """Write `state` to folder/training-state-<number>.pt atomically and remove all but the newest KEEP."""
    path = folder / f"training-state-{number:09d}.pt"
    with atomic_write(path) as temporary, open(temporary, "wb") as file:  # given the path, torch hides a full disk
        torch.save({"format": FORMAT, **state}, file)
    for old in found(folder)[KEEP:]:
        old.unlink(missing_ok=True)
    return path


def found(folder: Path) -> list[Path]:
    """List the training states in a folder, newest first."""
    numbered = [(int(match[1]), p) for p in folder.glob("training-state-*.pt") if (match := PATTERN.fullmatch(p.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def is_foreign(path: Path) -> bool:
    """Tell whether `path` is a file of torch.save that holds something other than a training state."""
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        (content,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(content) as file:
            return FORMAT.encode() not in file.read(1024)  # its first entry
    return False


def read(path: Path, what: str) -> object:
    """Read a file of torch.save to the CPU. Executes nothing. Raises UserError, "it is not `what`", when damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it claims more bytes than it has")
            if damaged := archive.testzip():  # torch does not verify the checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    _check_names(archive.read(name))
        return torch.load(path, map_location="cpu", weights_only=True)
    # For damaged files zipfile, torch and its unpickler raise a dozen kinds of exception.
    except Exception as error:
        raise UserError(f"{path} is not {what} ({brief(error)})") from error


def _check_names(pickled: bytes) -> None:
    """Raise ValueError if a pickle names what is not in MODULES."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("STACK_GLOBAL", "INST") or (
            opcode.name == "GLOBAL" and argument.split(" ")[0] not in MODULES
        ):
            raise ValueError(f"it names {argument or 'something'}, which no such file needs")


def load(path: Path) -> dict:
    """Load the state in `path` to the CPU. Executes nothing. Raises UserError when the file is missing or damaged."""
    state = read(path, "an intact training state")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(
            f"{path} is a torch file, but not a training state of this project; give one that train.py wrote"
        )
    return state
