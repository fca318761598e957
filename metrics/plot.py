"""Plot the measurements of several runs, from their metric-*.jsonl."""

import json
import math
import re
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from dnnlib.config import nearest
from dnnlib.console import UserError
from dnnlib.files import atomic_write

# Published, by the paper (https://arxiv.org/abs/2303.14157) unless another source is named. Consistency: 256² against
# 512² downsampled to 256². FID of INR-GAN, and on FFHQ-256 and Bedroom-256: INR-GAN's README; on Landscapes-256: CIPS's
# README; of AnyresGAN: its own paper.
CONSISTENCY = {
    "scale_psnr": {"AnyresGAN": 24.19, "ScaleParty": 24.50, "CIPS": 33.33, "CREPS": 34.65},
    "scale_ssim": {"AnyresGAN": 0.73, "ScaleParty": 0.70, "CIPS": 0.93, "CREPS": 0.96},
    "scale_lpips": {"AnyresGAN": 0.07, "ScaleParty": 0.08, "CIPS": 0.05, "CREPS": 0.01},
}
FID = {
    "FFHQ-256": {"StyleGAN2": 3.83, "CIPS": 4.38, "INR-GAN": 9.57, "INR-GAN-bil": 4.95, "AnyresGAN": 3.34},
    "FFHQ-512": {"StyleGAN2": 3.41, "CIPS": 6.18, "CREPS": 4.43, "AnyresGAN": 3.71, "ScaleParty": 6.23},
    "FFHQ-1024": {"StyleGAN2": 2.84, "CIPS": 10.07, "CREPS": 4.09, "AnyresGAN": 4.06, "ScaleParty": 10.91},
    "LSUN-Church-256": {
        "StyleGAN2": 3.86,
        "CIPS": 2.92,
        "CREPS": 5.50,
        "INR-GAN": 4.45,
        "INR-GAN-bil": 4.04,
        "AnyresGAN": 3.84,
    },
    "LSUN-Bedroom-256": {"StyleGAN2": 2.65, "INR-GAN": 5.71, "INR-GAN-bil": 3.43},
    "MetFaces-1024": {"StyleGAN2": 18.22, "CREPS": 20.52},
    "Scenery-256": {"StyleGAN2": 6.40, "CIPS": 8.49, "CREPS": 7.21},
    "Landscapes-256": {"CIPS": 3.61},
    "AFHQ-Dog": {"StyleGAN2-ADA": 7.4, "CREPS": 9.7},
}
Point = tuple[float, float, float]  # x, value, standard error


def read(run: Path) -> list[dict]:
    """Read the measurements in a run directory, if there are any, each with its `kimg`. Raises UserError."""
    if not run.is_dir():
        raise UserError(f"{run} does not exist, or is no directory; give the directories of runs")
    records = []
    for path in sorted(run.glob("metric-*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                for name, value in record["results"].items():
                    record["results"][name] = math.nan if value is None else value
                snapshot = re.search(r"(\d+)\.\w+$", record.get("network", record.get("snapshot_pkl")) or "")
                record.setdefault("kimg", float(snapshot[1]) if snapshot else 0.0)
                records.append(record)
            except (ValueError, LookupError, AttributeError, TypeError) as error:
                raise UserError(f"line {number} of {path} is not a measurement ({error}); remove it") from error
    return records


def over_training(records: list[dict]) -> dict[str, list[Point]]:
    """Return {name of a result: its last value at each kimg}; for metrics of `over_scales`, only the default scales."""
    curves = {}
    for record in records:
        if "scales" in record and "@" in record["metric"]:
            continue
        for name, value in record["results"].items():
            error = (record.get("standard_error") or {}).get(name)
            curves.setdefault(name, {})[record["kimg"]] = (value, error or 0.0)
    return {name: [(x, *curve[x]) for x in sorted(curve)] for name, curve in curves.items()}


def over_scales(records: list[dict]) -> dict[str, list[Point]]:
    """Return {scale_psnr, …: the value of the newest network at each ratio of the sides}."""
    curves = {}
    for record in sorted(records, key=lambda record: record["kimg"]):
        if "scales" in record:
            ((name, value),) = record["results"].items()
            first, other = (math.prod(size) for size in record["scales"])
            family = next(key for key in CONSISTENCY if name.startswith(key))
            error = record["standard_error"][name] or 0.0
            curves.setdefault(family, {})[math.sqrt(other / first)] = (value, error)
    return {name: [(x, *curve[x]) for x in sorted(curve)] for name, curve in curves.items()}


def panel(axes: Axes, title: str, unit: str, curves: dict[str, list[Point]], published: dict[str, float]) -> None:
    if unit != "kimg":  # sizes
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    for run, points in curves.items():
        x, y, error = zip(*points, strict=True)  # matplotlib leaves out what is not finite
        axes.errorbar(x, y, error, marker="o", markersize=3, capsize=2, label=run)
    for i, (who, value) in enumerate(published.items()):
        axes.axhline(value, linestyle="--", linewidth=1, color=str(0.2 + 0.1 * i), label=f"{who} (published)")
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(unit)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def plot_runs(runs: list[Path], out: Path, published: str | None = None) -> None:
    """Plot a panel for each result over the training, and one for each kind of scale consistency, into `out`.

    Runs without measurements are left out, and named. published: a key of FID, whose values are dashed lines. Raises
    UserError.
    """
    if out.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"--out={out}: choose a name that ends in .png, .pdf or .svg")
    if published is not None and published not in FID:
        raise UserError(f"--published={published}: {nearest(published, FID)}")
    measured = {run: records for run in runs if (records := read(run))}
    for run in runs:
        if run not in measured:
            print(f"{run} holds no metric-*.jsonl; it is left out", file=sys.stderr)
    if not measured:
        raise UserError("nothing to plot; give the directories of runs that were measured")
    records = {run.resolve().name: found for run, found in measured.items()}
    training = {run: over_training(found) for run, found in records.items()}
    scales = {run: over_scales(found) for run, found in records.items()}
    panels = []
    several = {family for curves in scales.values() for family, points in curves.items() if len(points) > 1}
    for name in dict.fromkeys(name for curves in training.values() for name in curves):
        if name in several and all(len(curves.get(name, ())) < 2 for curves in training.values()):
            continue  # one snapshot at several scales: its curve is over these
        lines = FID[published] if published and name.startswith("fid") else {}
        panels.append((name, "kimg", {run: c[name] for run, c in training.items() if name in c}, lines))
    for name in dict.fromkeys(name for curves in scales.values() for name in curves):
        title = f"{name}: consistency over scales"
        curves = {run: c[name] for run, c in scales.items() if name in c}
        lines = {f"{who}, 256² to 512²": value for who, value in CONSISTENCY[name].items()}
        panels.append((title, "side, relative to the first of the scales", curves, lines))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    for i, arguments in enumerate(panels):
        panel(figure.add_subplot(rows, columns, i + 1), *arguments)
    with atomic_write(out) as temporary:
        figure.savefig(temporary, dpi=120)
