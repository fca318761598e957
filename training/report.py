"""What a run writes for people: log.txt, stats.jsonl, TensorBoard events, and grids of pictures."""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dnnlib.files import atomic_write


class RunLog:
    """The logs of a run directory, which go on at `step`.

    What an earlier process wrote after that is cut off, so that no line is missing or doubled: all beyond the
    `written` bytes of log.txt and stats.jsonl, and the measurements of later steps. Other files are left alone, and so
    are the lines that calc_metrics.py adds, which name no step.
    """

    GROWING = ("log.txt", "stats.jsonl")

    def __init__(self, folder: Path, written: dict[str, int], step: int):
        self.folder = folder
        for name in self.GROWING:
            path = folder / name
            path.touch()
            os.truncate(path, min(written.get(name, 0), path.stat().st_size))
        for path in folder.glob("metric-*.jsonl"):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            with atomic_write(path) as temporary:
                temporary.write_text("".join(x for x in lines if _belongs(x, step)), encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.events = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def print(self, line: str) -> None:
        print(line, flush=True)
        self._append("log.txt", line)

    def stats(self, record: dict, step: int) -> None:
        """One report: {name: number or {"mean": number, …}} as a line of stats.jsonl and as TensorBoard scalars."""
        self._append("stats.jsonl", json.dumps(record))
        for name, value in record.items():
            self.events.add_scalar(name, value["mean"] if isinstance(value, dict) else value, step)
        self.events.flush()

    def metric(self, record: dict, step: int) -> None:
        """One measurement, as metrics.evaluation gives it, as a line of metric-<name>.jsonl and in TensorBoard.

        It is printed, but not in log.txt: it comes after the state was saved, from which a run goes on, and what comes
        after that is cut off there.
        """
        for name, value in record["results"].items():
            print(f"{name} {value:.4f}", flush=True)
        self._append(f"metric-{record['metric']}.jsonl", json.dumps(record))
        add_scalars(self.events, record, step)

    def picture(self, name: str, grid: np.ndarray, step: int) -> None:
        """uint8 [H,W,C] to `name`.png and to TensorBoard."""
        with atomic_write(self.folder / f"{name}.png") as temporary:
            Image.fromarray(grid.squeeze(2) if grid.shape[2] == 1 else grid).save(temporary)
        self.events.add_image(name.rstrip("0123456789"), grid, step, dataformats="HWC")
        self.events.flush()

    def written(self) -> dict[str, int]:
        return {name: (self.folder / name).stat().st_size for name in self.GROWING}

    def close(self) -> None:
        self.events.close()

    def _append(self, name: str, line: str) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def add_scalars(events, record: dict, step: int) -> None:
    """Adds the results of one measurement to a SummaryWriter."""
    for name, value in record["results"].items():
        events.add_scalar(f"Metrics/{name}", value, step)
    events.flush()


def _belongs(line: str, step: int) -> bool:
    """Whether a measurement is whole and of no later step; a crash may have left half a line."""
    try:
        return json.loads(line).get("step", 0) <= step
    except (ValueError, AttributeError):
        return False


class SilentLog:
    """The twin that the other processes hold."""

    def print(self, line: str) -> None: ...

    def stats(self, record: dict, step: int) -> None: ...

    def metric(self, record: dict, step: int) -> None: ...

    def picture(self, name: str, grid: np.ndarray, step: int) -> None: ...

    def written(self) -> dict[str, int]:
        return {}

    def close(self) -> None: ...


def grid_shape(height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of pictures that fill about 1920×1080 pixels: 3×4 at the least and 8×12 at the most."""
    return min(max(1080 // height, 3), 8), min(max(1920 // width, 4), 12)


def tile(images: Tensor, rows: int) -> np.ndarray:
    """uint8 [rows·columns,C,H,W] -> [rows·H,columns·W,C]."""
    n, channels, height, width = images.shape
    grid = images.view(rows, n // rows, channels, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * height, -1, channels).cpu().numpy()


def duration(seconds: float) -> str:
    """As people write it: 12s, 3m 05s, 1h 02m, 2d 03h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02}s"
    if s < 86400:
        return f"{s // 3600}h {s // 60 % 60:02}m"
    return f"{s // 86400}d {s // 3600 % 24:02}h"
