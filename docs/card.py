"""Puts the network of a run into models/, with a card beside it: python -m docs.card --help"""

import copy
import json
import math
import re
import shlex
import statistics
from pathlib import Path
from types import SimpleNamespace

import click
from matplotlib.figure import Figure

import generate
import rendering
from benchmarks.machine import describe
from dnnlib.config import build, read_yaml
from dnnlib.console import UserError
from dnnlib.files import atomic_write
from metrics.registry import parse
from rendering.styles import Styles
from torch_utils.command import command
from training import snapshot
from training.config import CONFIGS, RunConfig, gather, resolve
from training.networks import Generator
from training.report import duration
from training.runs import flat

LIMIT = 12_000_000  # bytes of a network in models/
LARGE = 4096  # numbers; smaller tensors, such as frequencies, are few bytes, and float16 there would change images most
HAND = "<!-- What follows is written by hand, and stays when the card is made again. -->"


def read_lines(path: Path) -> list[dict]:
    """Returns the JSON objects in a file, one a line. Raises UserError."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as lines of JSON ({error}); give the directory of a run") from error


def choose(run: Path, measured: list[dict], by: str) -> tuple[Path, str]:
    """Returns the snapshot with the smallest distance `by`, or the newest; and why. Raises UserError."""
    files = {path.name: path for path in snapshot.snapshots(run)}
    if not files:
        raise UserError(f"{run} holds no network-snapshot-*.safetensors; give the directory of a run")
    if by == "newest":
        return list(files.values())[-1], "the last one"
    (metric,) = parse(by)
    if not metric.family.reals or metric.name.startswith("pr"):
        raise UserError(f"{by} is no distance from the data; choose the snapshot by another metric with --by")
    values = {name: value for name, value in trained(measured, metric.name).items() if name in files}
    if not values:
        raise UserError(f"{run} holds no snapshot with {by}; choose by another metric with --by")
    return files[min(values, key=values.get)], f"that with the smallest {by} of {len(values)}"


def trained(measured: list[dict], metric: str) -> dict[str, float]:
    """Returns {snapshot: value} of a metric as measured in training, oldest first; calc_metrics.py names no step."""
    ours = [record for record in measured if "step" in record and record["metric"].split("@")[0] == metric]
    return {r["network"]: next(iter(r["results"].values())) for r in sorted(ours, key=lambda r: r["step"])}


def draw_curve(values: dict[str, float], metric: str, hours_per_kimg: float, path: Path) -> None:
    """Plots a metric over the hours of training."""
    figure = Figure(figsize=(6, 2.5), layout="constrained")
    axes = figure.add_subplot(xlabel="hours of training", ylabel=metric, ylim=(0, 1.1 * max(values.values())))
    axes.plot([thousands(name) * hours_per_kimg for name in values], list(values.values()), marker=".")
    axes.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def thousands(snapshot_name: str) -> int:
    """Returns how many thousand images a snapshot has seen."""
    return int(re.search(r"\d+", snapshot_name)[0])


def training_command(run: Path, config: RunConfig) -> str:
    """Returns a train.py command that comes to `config`: the recipe in the run's name, and all that differs from it."""
    names = [path.stem for path in CONFIGS.glob("*.yaml") if re.match(rf"\d+-{re.escape(path.stem)}-", run.name)]
    cfg = max(names, key=len, default="auto")
    data = {"path": Path(config.data.path).name, "cond": config.data.cond, "mirror": config.data.mirror}
    train = {"batch": config.train.batch, "kimg": config.train.kimg}
    shown = {"data": data, "train": train, "metrics": list(config.metrics)}
    images = SimpleNamespace(shape=(config.G.img_channels, *config.G.img_shape), label_dim=config.G.c_dim)
    before = flat(resolve(gather(cfg, shown), images, cfg).model_dump(mode="json"))
    after = flat(config.model_dump(mode="json"))
    words = ["python", "train.py", "--outdir=runs", f"--cfg={cfg}"]
    flags = {"data": data.pop("path")} | data | train | {"metrics": ",".join(config.metrics)}
    for name, value in flags.items():
        value = f"{value:g}" if isinstance(value, float) else value
        words += [f"--{name}"] if value is True else [f"--{name}={value}"] if value else []
    for key, value in after.items():
        if value != before[key] and key != "data.path":
            words += ["-o", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(words)


def compact(G: Generator) -> tuple[Generator, float]:
    """Returns G with large tensors in float16 if no pixel of seeds 0-15 changes by 1/255, or else G; and the change."""
    half = copy.deepcopy(G)
    for tensor in [*half.parameters(), *half.buffers()]:
        if tensor.numel() >= LARGE:
            tensor.data = tensor.data.half()
    pictures = []
    for network in (G, copy.deepcopy(half).float()):  # as load_generator reads them
        ws = Styles().map(network, list(range(16)))
        pictures.append(rendering.render(network, ws).clamp(-1, 1))
    change = float((pictures[0] - pictures[1]).abs().max()) / 2
    return half if change < 1 / 255 else G, change  # weights beyond float16 give nan, and stay as they are


def write_network(G: Generator, path: Path) -> str:
    """Writes G to `path` in as few bytes as its pictures allow. Returns a clause about it; raises UserError."""
    small, change = compact(G)
    kept = small is not G
    with atomic_write(path) as temporary:
        snapshot.save_generator(small, temporary)
        size = temporary.stat().st_size
        if size > LIMIT:
            raise UserError(f"{path} would take {size:,} bytes, and networks that come along {LIMIT:,} at most")
    precision = "float16, which changes" if kept else "float32, because float16 changes"
    return f"{size / 1e6:.1f} MB, in {precision} pixels by {change * 255:.2f}/255 at most (seeds 0-15)"


def table(rows: list[tuple]) -> str:
    """Returns Markdown; the first row is the head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ("---",) * len(rows[0]), *rows[1:]])


def distances(measured: list[dict], names: set[str]) -> str:
    """Returns the last value of each metric of the network that goes by one of `names`, as a table, or says so."""
    rows = {}
    for record in measured:
        if record.get("network") in names:
            for name, value in record["results"].items():
                error = (record.get("standard_error") or {}).get(name)
                rows[name] = (name, f"{value:.4g}", "" if error is None else f"{error:.2g}", f"{record['num_fake']:,}")
    head = ("metric", "value", "± standard error", "images")
    return table([head, *(rows[name] for name in sorted(rows))]) if rows else "Not measured."


@click.command()
@click.option("--run", "folder", metavar="RUN_DIR", required=True, type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", required=True, help="In models/.")
@click.option("--trunc", type=float, default=1, show_default=True, help="Truncation ψ of the grid.")
@click.option(
    "--by", metavar="METRIC", help="Distance that chooses the snapshot, or newest.  [default: the run's first metric]"
)
@click.option("--processor", metavar="TEXT", help="What the run took place on.  [default: this machine's]")
@click.option("--data", metavar="TEXT", help="What the images are and whose.  [required for a new card]")
@click.option("--licence", metavar="TEXT", help="Of the images.  [required for a new card]")
@click.option("--weaknesses", metavar="TEXT", help="What the network cannot do.  [required for a new card]")
@command()
def main(folder, name, trunc, by, processor, **words):
    """Puts the best network of a run into models/NAME.safetensors, 64 of its pictures into docs/images/NAME.png, its
    metrics over the hours of training beside them, and what is known about it into models/NAME.md.

    The words about data, licence and weaknesses stand at the end of the card. Made again, it keeps what is there.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"--name={name}: choose letters, digits and hyphens, for example emoji-people")
    if not math.isfinite(trunc):
        raise UserError(f"--trunc={trunc}: give a finite number, for example 0.7")
    network, card = snapshot.MODELS / f"{name}.safetensors", snapshot.MODELS / f"{name}.md"
    hand = written_by_hand(card, words)
    config = build(RunConfig, read_yaml(folder / "options.yaml"), str(folder / "options.yaml"))
    measured = [record for path in sorted(folder.glob("metric-*.jsonl")) for record in read_lines(path)]
    by = by or next(iter(config.metrics), "newest")
    best, why = choose(folder, measured, by)
    kimg = thousands(best.name)
    reports = [line for line in read_lines(folder / "stats.jsonl") if int(line["Progress/kimg"]) <= kimg]
    if not reports:
        raise UserError(f"{folder / 'stats.jsonl'} has no report of the time of {best.name}; give an unbroken run")
    train_command = training_command(folder, config)
    machine = describe()
    processor = processor or machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"

    G = snapshot.load_generator(best)
    stored = write_network(G, network)
    images = snapshot.MODELS.parent / "docs" / "images"
    image = images / f"{name}.png"
    drawing = [f"--network={name}", "--seeds=0-63", f"--trunc={trunc:g}"]
    generate.main([*drawing, f"--grid={image}"], standalone_mode=False)

    height, width = G.config.img_shape
    pace = statistics.median(line["Timing/sec_per_kimg"] for line in reports)  # a pause is in few reports
    seen = f"{reports[-1]['Progress/kimg']:,.0f} thousand images in {duration(pace * reports[-1]['Progress/kimg'])}"
    curves = []
    for metric in sorted({record["metric"].split("@")[0] for record in measured if "step" in record}):
        values = {n: v for n, v in trained(measured, metric).items() if thousands(n) <= kimg}
        if len(values) > 1:
            draw_curve(values, metric, pace / 3600, images / f"{name}-{metric}.png")
            curves.append(f"![{metric} over the hours of training](../docs/images/{name}-{metric}.png)")
    facts = [
        ("", ""),
        ("images", f"{width}x{height}, {G.config.img_channels} channels, {G.config.c_dim or 'no'} classes"),
        ("network", f"{sum(p.numel() for p in G.parameters()):,} parameters; {stored}"),
        ("seen in training", f"{seen} on {processor}"),
        ("snapshot", f"{best.stem}: {why}"),
    ]
    text = [
        f"# {name}",
        f"![64 images of the network](../docs/images/{name}.png)",
        table(facts),
        f"Trained and, for the picture above, drawn with\n\n```bash\n{train_command}\n"
        f"{shlex.join(['python', 'generate.py', *drawing, f'--grid=docs/images/{name}.png'])}\n```",
        distances(measured, {best.name, name}),
        *curves,
        HAND,
        hand,
    ]
    with atomic_write(card) as temporary:
        temporary.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    click.echo(f"{network} {image} {card}")


def written_by_hand(card: Path, words: dict[str, str | None]) -> str:
    """Returns the end of the card: of one that is there, what it holds, and else from `words`. Raises UserError."""
    given = [f"--{name}" for name, text in words.items() if text]
    if card.is_file():
        _, line, hand = card.read_text(encoding="utf-8").partition(HAND)
        if not line:
            raise UserError(f"{card} has no line {HAND}, below which text is kept; put one in, or remove the card")
        if given:
            raise UserError(f"{card} is there, and its text is kept; change it there, and leave {given[0]} out")
        return hand.strip()
    missing = [f"--{name}" for name, text in words.items() if not text]
    if missing:
        raise UserError(f"a new card needs {', '.join(missing)}; see python -m docs.card --help")
    return "\n\n".join(f"## {name.capitalize()}\n{text}" for name, text in words.items())


if __name__ == "__main__":
    main()
