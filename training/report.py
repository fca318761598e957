"""Logs of a run: log.txt, stats.jsonl, metric-*.jsonl, TensorBoard events and PNGs."""

import json
import os
import threading
from pathlib import Path

import numpy as np
from PIL import Image

from dnnlib.files import append_line, atomic_write, to_json


class RunLog:
    """Writes the logs of a run directory, from `step` on.

    What an earlier process wrote after that step is cut off, so that no line is missing or duplicated: all beyond the
    `written` bytes of log.txt and stats.jsonl, and the metrics of later steps. Other files are left alone, and so are
    the lines that calc_metrics.py adds, which have no step.
    """

    GROWING = ("log.txt", "stats.jsonl")

    def __init__(self, folder: Path, written: dict[str, int], step: int):
        self.folder = folder
        for name in self.GROWING:
            path = folder / name
            path.touch()
            os.truncate(path, min(written.get(name, 0), path.stat().st_size))
        for path in folder.glob("metric-*.jsonl"):
            lines = path.read_bytes().splitlines(keepends=True)
            with atomic_write(path) as temporary:
                temporary.write_bytes(b"".join(x for x in lines if _belongs(x, step)))
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        # Its thread would print the traceback of a full disk, which its next call raises as well.
        threading.excepthook = lambda thread: (
            None if issubclass(thread.exc_type, OSError) else threading.__excepthook__(thread)
        )
        self.events = SummaryWriter(folder, purge_step=step + 1)

    def print(self, line: str) -> None:
        print(line, flush=True)
        append_line(self.folder / "log.txt", line)

    def stats(self, record: dict, step: int) -> None:
        """Add a report, {name: number or {"mean": number, …}}, to stats.jsonl and TensorBoard."""
        append_line(self.folder / "stats.jsonl", to_json(record))
        for name, value in record.items():
            self.events.add_scalar(name, value["mean"] if isinstance(value, dict) else value, step)
        self.events.flush()

    def metric(self, record: dict, step: int) -> None:
        """Add the record of a metric (metrics.evaluation) to metric-<name>.jsonl and TensorBoard, and print it.

        Not to log.txt: a resumed run would cut it off there, because the state was saved before.
        """
        for name, value in record["results"].items():
            print(f"{name} {value:.4f}", flush=True)
        append_line(self.folder / f"metric-{record['metric']}.jsonl", to_json(record))
        add_scalars(self.events, record, step)

    def image(self, name: str, grid: np.ndarray, step: int) -> None:
        """Write uint8 [H,W,C] to `name`.png and TensorBoard."""
        with atomic_write(self.folder / f"{name}.png") as temporary:
            Image.fromarray(grid.squeeze(2) if grid.shape[2] == 1 else grid).save(temporary)
        self.events.add_image(name.rstrip("0123456789"), grid, step, dataformats="HWC")
        self.events.flush()

    def written(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for name in self.GROWING if (path := self.folder / name).exists()}

    def close(self) -> None:
        self.events.close()


def add_scalars(events, record: dict, step: int) -> None:
    """Add the results in the record of a metric to a SummaryWriter."""
    for name, value in record["results"].items():
        events.add_scalar(f"Metrics/{name}", value, step)
    events.flush()


def _belongs(line: bytes, step: int) -> bool:
    """Check that a line is the whole record of a metric at `step` or before; a crash may have left half a line."""
    try:
        return json.loads(line).get("step", 0) <= step
    except (ValueError, AttributeError):
        return False


class SilentLog:
    """Takes the place of RunLog on the other ranks, and writes nothing."""

    def print(self, *_) -> None: ...

    stats = metric = image = close = print

    def written(self) -> dict[str, int]:
        return {}


def duration(seconds: float) -> str:
    """Format as 12s, 3m 05s, 1h 02m or 2d 03h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02}s"
    if s < 86400:
        return f"{s // 3600}h {s // 60 % 60:02}m"
    return f"{s // 86400}d {s // 3600 % 24:02}h"
