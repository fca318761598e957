"""Training states as files that appear whole, hold only tensors and plain values, and are found again."""

import pickle
import re
import zipfile
from pathlib import Path

import torch

from dnnlib.console import UserError
from dnnlib.files import atomic_write

PATTERN = re.compile(r"training-state-(\d+)\.pt")


def save(state: dict, folder: Path, number: int, keep: int = 2) -> Path:
    """Writes `state` to folder/training-state-<number>.pt and removes all but the newest `keep`."""
    path = folder / f"training-state-{number:09d}.pt"
    with atomic_write(path) as temporary:
        torch.save(state, temporary)
    for old in found(folder)[keep:]:
        old.unlink()
    return path


def found(folder: Path) -> list[Path]:
    """The training states in a folder, newest first."""
    numbered = [(int(match[1]), p) for p in folder.glob("training-state-*.pt") if (match := PATTERN.fullmatch(p.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def load(path: Path) -> dict:
    """The state in `path`, on the CPU. Executes nothing. Raises UserError when the file is missing or broken."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not an intact training state ({first_line})") from error
