"""Training states as files that appear whole, hold only tensors and plain values, and are found again."""

import re
import zipfile
from pathlib import Path

import torch

from dnnlib.console import UserError
from dnnlib.files import atomic_write

FORMAT = "creps-training-state-1"
PATTERN = re.compile(r"training-state-(\d+)\.pt")


def save(state: dict, folder: Path, number: int, keep: int = 2) -> Path:
    """Writes `state` to folder/training-state-<number>.pt and removes all but the newest `keep`."""
    path = folder / f"training-state-{number:09d}.pt"
    with atomic_write(path) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)
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
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not look at the checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    # Broken bytes make zipfile, torch and its unpickler raise a dozen kinds of exception; all mean the same.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not an intact training state ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is a torch file, but no training state of this project")
    return state
