"""Put the network of a run into models/, with a card: python -m docs.card --help"""

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

import rendering
from benchmarks.machine import describe
from dnnlib.config import build, fields, nested, read_yaml
from dnnlib.console import UserError
from dnnlib.files import atomic_write, sha256
from metrics.registry import parse
from rendering.camera import Camera
from rendering.engine import NotFinite
from rendering.jobs import Job, write_grid
from rendering.styles import Seeds, Styles
from torch_utils.command import command
from torch_utils.distributed import processes
from training import snapshot
from training.config import CONFIGS, RunConfig, gather, resolve
from training.networks import Generator
from training.report import duration
from training.runs import flat

LIMIT = 12_000_000  # bytes of a network in models/
LARGE = (
    4096  # elements; smaller tensors, such as frequencies, take few bytes, and float16 there would change images most
)
HAND = "<!-- What follows is written by hand, and stays when the card is made again. -->"


def read_lines(path: Path) -> list[dict]:
    """Read a file of JSON objects, one per line. Raises UserError."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as lines of JSON ({error}); give the directory of a run") from error


def choose(run: Path, measured: list[dict], by: str) -> tuple[Path, str]:
    """Choose the snapshot with the smallest distance `by`, or the newest. Return it and why. Raises UserError."""
    files = {path.name: path for path in snapshot.snapshots(run)}
    if not files:
        raise UserError(f"{run} holds no network-snapshot-*.safetensors; give the directory of a run")
    if by == "newest":
        return list(files.values())[-1], "the last one"
    (metric,) = parse(by)
    if not metric.family.reals or metric.name.startswith("pr"):
        raise UserError(f"{by} is not a distance from the data; choose the snapshot by another metric with --by")
    values = {record["network"]: value for record, value in in_training(measured, metric.name)}
    values = {name: value for name, value in values.items() if name in files}
    if not values:
        raise UserError(f"{run} holds no snapshot with {by}; choose by another metric with --by")
    return files[min(values, key=values.get)], f"the smallest {by} of {len(values)}"


def in_training(measured: list[dict], metric: str) -> list[tuple[dict, float]]:
    """Return the records of a metric that training wrote (they have a step), oldest first, each with its value.

    Those without a finite value are left out.
    """
    ours = [record for record in measured if "step" in record and record["metric"].split("@")[0] == metric]
    values = [(r, next(iter(r["results"].values()))) for r in sorted(ours, key=lambda r: r["step"])]
    return [(record, value) for record, value in values if value is not None]


def plot_curve(hours: list[float], values: list[float], metric: str, path: Path) -> None:
    """Plot a metric over the hours of training."""
    figure = Figure(figsize=(6, 2.5), layout="constrained")
    axes = figure.add_subplot(xlabel="hours of training", ylabel=metric, ylim=(0, 1.1 * max(values)))
    axes.plot(hours, values, marker=".")
    axes.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def training_command(run: Path, config: RunConfig) -> str:
    """Return a train.py command for `config`: the recipe in the run's name, and everything that differs from it."""
    names = [path.stem for path in CONFIGS.glob("*.yaml") if re.match(rf"\d+-{re.escape(path.stem)}-", run.name)]
    cfg = max(names, key=len, default="auto")
    shape = (config.G.img_channels, *config.G.img_shape)
    images = SimpleNamespace(shape=shape, label_dim=config.G.c_dim, summary=lambda: config.data.contents)

    def settings_with(given: list[str]) -> dict:
        """Return all settings, where only `given` are those of the run."""
        values = [nested(key, wanted[key]) for key in given]
        return flat(resolve(gather(cfg, *values), images, cfg).model_dump(mode="json"))

    wanted = flat(config.model_dump(mode="json"))
    wanted["data.path"] = Path(config.data.path).name
    recipe = settings_with(["data.path"])
    # Other defaults depend on these.
    given = [
        "data.path",
        *(key for key in ("data.resolution", "scales.max", "train.batch") if wanted[key] != recipe[key]),
    ]
    default = settings_with(given)
    flags = {"data.path": "data", "metrics": "metrics"}
    flags |= {dotted: extra["flag"] for dotted, _, extra in fields(RunConfig) if extra.get("flag")}
    written = {"data.resolution": lambda shape: "{1}x{0}".format(*shape), "metrics": ",".join}
    words = ["python", "train.py", "--outdir=runs", f"--cfg={cfg}"]
    for key, value in wanted.items():
        if key not in given and value == default[key]:
            continue
        write = written.get(key, str if isinstance(value, str) else json.dumps)
        if key not in flags:
            words += ["-o", f"{key}={write(value)}"]
        else:
            words += [f"--{flags[key]}" + ("" if value is True else f"={write(value)}")]
    return shlex.join(words)


def compact(G: Generator) -> tuple[Generator, float]:
    """Return G in float16, or G if a pixel of seeds 0-15 would change by 1/255 or more; and the change."""
    half = copy.deepcopy(G)
    for tensor in [*half.parameters(), *half.buffers()]:
        if tensor.numel() >= LARGE:
            tensor.data = tensor.data.half()
    rendered = []
    for network in (G, copy.deepcopy(half).float()):  # as load_generator reads them
        ws = Styles().map(network, list(range(16)))
        try:
            rendered.append(rendering.render(network, ws).clamp(-1, 1))
        except NotFinite:  # weights beyond float16
            return G, math.inf
    change = float((rendered[0] - rendered[1]).abs().max()) / 2
    return half if change < 1 / 255 else G, change


def write_network(G: Generator, path: Path) -> str:
    """Write G to `path`, in float16 if its images allow. Return a clause about it. Raises UserError."""
    small, change = compact(G)
    kept = small is not G
    with atomic_write(path) as temporary:
        snapshot.save_generator(small, temporary)
        size = temporary.stat().st_size
        if size > LIMIT:
            raise UserError(f"{path} would take {size:,} bytes, and networks in models/ may take {LIMIT:,} at most")
    precision = "float16, which changes" if kept else "float32, because float16 changes"
    return f"{size / 1e6:.1f} MB, in {precision} pixels by {change * 255:.2f}/255 at most (seeds 0-15)"


def table(rows: list[tuple]) -> str:
    """Format as Markdown; the first row is the header."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ("---",) * len(rows[0]), *rows[1:]])


def distances(measured: list[dict], names: set[str]) -> str:
    """Return a table of the last value of each metric of the network under one of `names`."""
    rows = {}
    for record in measured:
        if record.get("network") in names:
            for name, value in record["results"].items():
                error = (record.get("standard_error") or {}).get(name)
                value = "not finite" if value is None else f"{value:.4g}"
                rows[name] = (name, value, "" if error is None else f"{error:.2g}", f"{record['num_fake']:,}")
    head = ("metric", "value", "± standard error", "images")
    return table([head, *(rows[name] for name in sorted(rows))]) if rows else "Not measured."


@click.command()
@click.option("--run", "folder", metavar="RUN_DIR", required=True, type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", required=True, help="In models/.")
@click.option("--trunc", type=float, default=1, show_default=True, help="Truncation ψ of the grid.")
@click.option(
    "--scale", type=float, default=1, show_default=True, help="Size of the grid's images over the training size."
)
@click.option(
    "--by", metavar="METRIC", help="Distance that selects the snapshot, or newest.  [default: the run's first metric]"
)
@click.option("--processor", metavar="TEXT", help="Where the run was trained.  [default: this machine]")
@click.option("--data", metavar="TEXT", help="What the images are, and whose.  [required for a new card]")
@click.option("--licence", metavar="TEXT", help="Licence of the images.  [required for a new card]")
@click.option("--weaknesses", metavar="TEXT", help="What the network cannot do.  [required for a new card]")
@command()
def main(folder, name, trunc, scale, by, processor, **words):
    """Put the best network of a run into models/NAME.safetensors, 64 of its images into docs/images/NAME.png, plots of
    its metrics over the hours of training next to them, and a card into models/NAME.md.

    The texts about data, licence and weaknesses end the card. If the card exists, its texts are kept.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"--name={name}: choose letters, digits and hyphens, for example emoji-people")
    if not 0 < scale <= 64:
        raise UserError(f"--scale={scale}: give a number up to 64, for example 2")
    if not math.isfinite(trunc):
        raise UserError(f"--trunc={trunc}: give a finite number, for example 0.7")
    network, card = snapshot.MODELS / f"{name}.safetensors", snapshot.MODELS / f"{name}.md"
    hand = written_by_hand(card, words)
    config = build(RunConfig, read_yaml(folder / "options.yaml"), str(folder / "options.yaml"))
    measured = [record for path in sorted(folder.glob("metric-*.jsonl")) for record in read_lines(path)]
    by = by or next(iter(config.metrics), "newest")
    best, why = choose(folder, measured, by)
    kimg = snapshot.read_trained(best)["kimg"]
    reports = [line for line in read_lines(folder / "stats.jsonl") if line["Progress/kimg"] <= kimg]
    if not reports:
        raise UserError(f"{folder / 'stats.jsonl'} has no report up to {best.name}; give a complete run")
    train_command = training_command(folder, config)
    machine = describe()
    processor = processor or machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"

    G = snapshot.load_generator(best)
    stored = write_network(G, network)
    images = snapshot.MODELS.parent / "docs" / "images"
    image = images / f"{name}.png"
    rendering_options = [f"--network={name}", "--seeds=0-63", f"--trunc={trunc:g}"]
    rendering_options += [] if scale == 1 else [f"--scale={scale:g}"]
    with processes() as group:
        loaded = snapshot.load_generator(network, group.device)
        shot = rendering.Shot(tuple(round(scale * side) for side in loaded.config.img_shape))
        job = Job(loaded, sha256(network), Seeds(loaded, list(range(64)), Styles(trunc)), Camera.parse(), shot)
        write_grid(job, group, image)

    height, width = G.config.img_shape
    pace = statistics.median(line["Timing/sec_per_kimg"] for line in reports)  # a pause affects few reports
    seen = f"{reports[-1]['Progress/kimg']:,.0f} thousand images in {duration(pace * reports[-1]['Progress/kimg'])}"
    curves = []
    for metric in sorted({record["metric"].split("@")[0] for record in measured if "step" in record}):
        points = [(r["kimg"] * pace / 3600, v) for r, v in in_training(measured, metric) if r["kimg"] <= kimg]
        if len(points) > 1:
            plot_curve(*zip(*points, strict=True), metric, images / f"{name}-{metric}.png")
            curves.append(f"![{metric} over the hours of training](../docs/images/{name}-{metric}.png)")
    windows = f", windows of up to {config.scales.max:g} times that" if config.scales.max > 1 else ""
    facts = [
        ("", ""),
        ("images", f"{width}x{height}{windows}, {G.config.img_channels} channels, {G.config.c_dim or 'no'} classes"),
        ("network", f"{sum(p.numel() for p in G.parameters()):,} parameters; {stored}"),
        ("seen in this run", f"{seen} on {processor}"),
        ("snapshot", f"{best.stem}: {why}"),
    ]
    text = [
        f"# {name}",
        f"![64 images of the network](../docs/images/{name}.png)",
        table(facts),
        f"This run, and the image above:\n\n```bash\n{train_command}\n"
        f"{shlex.join(['python', 'generate.py', *rendering_options, f'--grid=docs/images/{name}.png'])}\n```",
        distances(measured, {best.name, name}),
        *curves,
        HAND,
        hand,
    ]
    with atomic_write(card) as temporary:
        temporary.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    click.echo(f"{network} {image} {card}")


def written_by_hand(card: Path, words: dict[str, str | None]) -> str:
    """Return the end of the card: of the existing card, or else `words`. Raises UserError."""
    given = [f"--{name}" for name, text in words.items() if text]
    if card.is_file():
        _, line, hand = card.read_text(encoding="utf-8").partition(HAND)
        if not line:
            raise UserError(f"{card} has no line {HAND}, below which text is kept; add it, or remove the card")
        if given:
            raise UserError(f"{card} exists, and its text is kept; edit it there, and leave {given[0]} out")
        return hand.strip()
    missing = [f"--{name}" for name, text in words.items() if not text]
    if missing:
        raise UserError(f"a new card needs {', '.join(missing)}; see python -m docs.card --help")
    return "\n\n".join(f"## {name.capitalize()}\n{text}" for name, text in words.items())


if __name__ == "__main__":
    main()
