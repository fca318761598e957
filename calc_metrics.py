"""Measure a trained generator, or a folder of images."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click

from dnnlib.config import build, parse_size, read_yaml
from dnnlib.console import UserError
from dnnlib.files import append_line, check_writable, to_json
from metrics.evaluation import Evaluation
from metrics.generated import Generated
from metrics.images import Size
from metrics.needs import Settings
from metrics.reals import EqualFiles, Given, LargeFiles
from metrics.registry import KNOWN, Metric, parse
from metrics.resize import FILTERS
from torch_utils.command import Group, command
from torch_utils.distributed import Processes, processes
from training.config import DataConfig
from training.data import ImageArchive
from training.labels import check_class_names
from training.networks import Generator
from training.snapshot import find_network, load_generator, read_trained
from training.sources import ImageFiles


@dataclass(frozen=True)
class Options:
    """The options of the command."""

    network: str | None
    images: str | None
    data: str | None
    metrics: str | None
    num: int | None
    size: str | None
    scale: float | None
    scales: str | None
    filter: str | None
    mirror: bool | None
    trunc: float
    supersample: int
    seed: int
    batch: int | None
    weights: str | None
    outdir: str | None


@dataclass(frozen=True)
class Subject:
    """The images to measure and those to compare with.

    source  what the records state about their origin
    seen    `step` and `kimg` of a run's snapshot, else {}
    folder  where the records are added, if anywhere
    """

    images: Generated | Given
    reals: EqualFiles | None
    large: LargeFiles | None
    source: dict
    seen: dict
    folder: Path | None


def measure(options: Options, procs: Processes) -> None:
    """Measure, print the results and add them to files."""
    if bool(options.network) == bool(options.images):
        raise UserError("give either --network, a generator, or --images, a folder or ZIP of images")
    metrics = parse(options.metrics or ("scale_psnr" if options.network else "fid50k_full"))
    metrics = tuple(dict.fromkeys(metric.of(options.num or metric.num) for metric in metrics))
    if not metrics:
        raise UserError(f"--metrics={options.metrics} measures nothing; known are {', '.join(KNOWN)}")
    settings = Settings(parse_scales(options.scales), options.filter, options.seed, options.batch)
    subject = (from_network if options.network else from_files)(options, metrics, procs)
    for metric in metrics:
        if (metric.family.reals and not subject.reals) or (metric.family.windows and not subject.large):
            raise UserError(f"{metric.name} compares with real images; give them with --data")
    over_scales = [metric.family.pattern.startswith("scale_") for metric in metrics]
    if settings.scales and not any(over_scales):
        raise UserError("--scales belongs to the metrics scale_*; add one, or leave --scales out")
    if (options.size or options.scale) and all(over_scales):
        raise UserError("--size and --scale set the size of other metrics; give those of scale_* with --scales")
    if options.images:
        metrics = tuple(metric.of(min(metric.num, subject.images.files.num)) for metric in metrics)
    if procs.is_first:
        if subject.large and subject.large.left_out:
            side = max(subject.images.size)
            click.echo(f"{subject.large.left_out:,} images smaller than {side} pixels are left out", err=True)
        if subject.reals and any(m.family.reals for m in metrics) and subject.reals.size != subject.images.size:
            theirs, ours = (f"{width}x{height}" for height, width in (subject.reals.size, subject.images.size))
            click.echo(f"the real images are {theirs}; they are cropped and resized to {ours}", err=True)
        if subject.folder:
            check_writable(subject.folder)
    evaluation = Evaluation(metrics, settings, procs, subject.reals, subject.large, options.weights)
    records = [record | subject.source for record in evaluation(subject.images)]
    if procs.is_first:
        click.echo(format_table(records))
        for record in records:
            if "caution" in record:
                click.echo(f"{record['metric']}: {record['caution']}", err=True)
        if subject.folder:
            write_records(records, subject.folder, subject.seen)


def from_network(options: Options, metrics: tuple[Metric, ...], procs: Processes) -> Subject:
    """Open a generator and, if the metrics need them, its training images or --data."""
    if options.size and options.scale:
        raise UserError("--size and --scale both set the size; give one of them")
    for name, value, example in (("trunc", options.trunc, 0.7), ("scale", options.scale or 1, 2)):
        if not abs(value) < 1e38:
            raise UserError(f"--{name}={value}: give a finite number, for example {example}")
    file = procs.broadcast(find_network(options.network) if procs.is_first else None)
    G = load_generator(file, procs.device)
    trained = trained_on(file)
    path = options.data or (trained.path if trained else None)
    compares = any(metric.family.reals for metric in metrics)
    windows = any(metric.family.windows for metric in metrics)
    if path and path != options.data and (compares or windows or G.config.c_dim) and not os.path.exists(path):
        raise UserError(
            f"the network was trained on {path}, which does not exist; give its present location with --data"
        )
    mirror = bool(trained and trained.mirror) if options.mirror is None else options.mirror
    archive = open_labelled(path, G, mirror) if path and (compares or G.config.c_dim) else None
    size = parse_size(options.size) if options.size else None
    if options.scale:
        size = tuple(max(1, round(side * options.scale)) for side in G.config.img_shape)
    labelled = archive if archive and archive.label_dim else None
    settings = {"seed": options.seed, "trunc": options.trunc, "supersample": options.supersample}
    images = Generated(G, size, **settings, labelled=labelled)
    seen = read_trained(file)
    name = file if options.network.startswith("http") else Path(options.network)
    source = {"network": name.name} | ({"kimg": seen["kimg"]} if seen else {})
    # The results of networks in models/ are kept only in --outdir.
    beside = file.parent if Path(options.network).is_file() else None
    return Subject(
        images,
        EqualFiles(archive, mirror) if archive else None,
        LargeFiles(ImageFiles(path), images.channels, max(images.size)) if path and windows else None,
        source | ({"data": str(path)} if compares or windows else {}),
        seen,
        Path(options.outdir) if options.outdir else beside,
    )


def from_files(options: Options, metrics: tuple[Metric, ...], procs: Processes) -> Subject:
    """Open --images and --data."""
    for metric in metrics:
        if metric.family.renders:
            raise UserError(f"{metric.name} needs a generator, not --images; give --network")
    given = [name for name in ("size", "scale", "scales") if getattr(options, name)]
    given += [name for name in ("trunc", "supersample") if getattr(options, name) != 1]
    if given:
        raise UserError(f"--{given[0]} is for networks; --images are measured as they are")
    mirror, reals = bool(options.mirror), None
    if options.data:
        reals = EqualFiles(ImageArchive(options.data, mirror=mirror, channels=3), mirror)
    return Subject(
        Given(EqualFiles(ImageArchive(options.images, channels=3)), procs.device),
        reals,
        None,
        {"images": options.images} | ({"data": options.data} if any(metric.family.reals for metric in metrics) else {}),
        {},
        Path(options.outdir) if options.outdir else None,
    )


def trained_on(network: Path) -> DataConfig | None:
    """Return the settings `data` of the run whose directory contains the network, None if it is elsewhere."""
    path = network.parent / "options.yaml"
    return build(DataConfig, read_yaml(path).get("data") or {}, f"data in {path}") if path.is_file() else None


def open_labelled(path: str, G: Generator, mirror: bool) -> ImageArchive:
    """Open images, with labels if they have them and G uses them. Raises UserError if these do not fit."""
    settings = {"mirror": mirror, "channels": G.config.img_channels}
    images = ImageArchive(path, **settings)
    if not (G.config.c_dim and images.has_labels):
        return images
    images = ImageArchive(path, use_labels=True, **settings)
    if images.label_dim != G.config.c_dim:
        raise UserError(
            f"the labels of {path} have {images.label_dim} numbers, and the network needs {G.config.c_dim}; "
            "give the archive that it was trained on"
        )
    check_class_names(G.class_names, images.class_names, path)
    return images


def parse_scales(text: str | None) -> tuple[Size, ...]:
    sizes = tuple(dict.fromkeys(parse_size(part) for part in text.split(","))) if text else ()
    if len(sizes) == 1:
        raise UserError(f"--scales={text}: give two sizes or more, for example --scales=256,512")
    return sizes


def format_table(records: Iterable[dict]) -> str:
    """Format the results as lines with aligned columns."""
    rows = [("metric", "value", "± standard error", "images", "seconds")]
    for record in records:
        for name, value in record["results"].items():
            error = record["standard_error"][name]
            error = "" if math.isnan(error) else f"{error:.4f}"
            rows.append((name, f"{value:.4f}", error, f"{record['num_fake']:,}", f"{record['total_time']:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def write_records(records: list[dict], folder: Path, seen: dict[str, float]) -> None:
    """Add lines to metric-<name>.jsonl and, for a snapshot of a run, points to TensorBoard in the run directory."""
    for record in records:
        append_line(folder / f"metric-{record['metric']}.jsonl", to_json(record))
    if seen and (folder / "options.yaml").is_file():
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        from training.report import add_scalars

        with SummaryWriter(folder) as events:
            for record in records:
                add_scalars(events, record, seen["step"])


# --- the command -----------------------------------------------------------------------------------------------------


@click.group(cls=Group, invoke_without_command=True, context_settings={"max_content_width": 110})
@click.option(
    "--network",
    metavar="NAME|FILE|URL",
    help="A name in models/, a network-snapshot-*.safetensors, a released file, or https://…#sha256=….",
)
@click.option("--images", metavar="ZIP|DIR", help="Images to measure, instead of a network's.")
@click.option("--data", metavar="ZIP|DIR", help="Real images to compare with.  [default: the training images]")
@click.option(
    "--metrics", metavar="A,B", help="Metrics to compute.  [default: scale_psnr of networks, fid50k_full of images]"
)
@click.option("--num", type=click.IntRange(min=1), help="Number of images, instead of the numbers in the names.")
@click.option("--size", metavar="R|WxH", help="Size to measure at.  [default: the training size]")
@click.option("--scale", type=click.FloatRange(0, 1000, min_open=True), help="Size as a multiple of the training size.")
@click.option("--scales", metavar="R,S", help="Sizes that scale_* compares, each with the first.  [default: R,2R]")
@click.option(
    "--filter",
    type=click.Choice(list(FILTERS)),
    help="Filter that resizes images.  [default: box for scale_*, lanczos for real images]",
)
@click.option(
    "--mirror",
    type=bool,
    is_flag=False,
    flag_value="true",
    metavar="[BOOL]",
    help="Also use the real images mirrored.  [default: as in training]",
)
@click.option("--trunc", type=float, default=1, show_default=True, help="Truncation ψ of the generated images.")
@click.option(
    "--supersample", type=click.IntRange(1, 64), default=1, show_default=True, help="Average K² samples per pixel."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of latents, labels, windows."
)
@click.option("--batch", type=click.IntRange(min=1), help="Images per batch.  [default: 32 on a GPU, else 8]")
@click.option("--weights", metavar="DIR", help="Where the weights of detectors are, if not in the cache.")
@click.option("--outdir", metavar="DIR", help="Where results are added.  [default: next to the network's file]")
@click.pass_context
@command(memory="give a smaller --batch", interrupted="complete statistics of real images are kept.")
def main(context, **options):
    """Measure a trained generator, or a folder of images.

    \b
    python calc_metrics.py --network=runs/00000-auto-faces/network-snapshot-005000.safetensors
    python calc_metrics.py --network=net.safetensors --data=faces.zip --metrics=fid50k_full,is50k --num=5000
    python calc_metrics.py --network=net.safetensors --metrics=scale_psnr,scale_ssim --scales=256,512,1024
    python calc_metrics.py --images=generated/ --data=real/ --metrics=fid50k_full,pr50k3_full

    \b
    fid50k_full fid50k fd_dinov2_50k_full   Fréchet distance; _full: against all real images
    fd_lite0_50k_full                       the same with a small network that needs no download
    lines1k_full                            line artefacts: spectral energy along the axes
    kid50k_full pr50k3_full is50k           kernel distance; precision and recall; Inception score
    pfid50k_full                            Fréchet distance of windows of large images
    fid_scales50k_full kid_scales50k_full
    fd_lite0_scales_50k_full                distances of windows at each of the scales 1, 2, 4, …
    ppl2_wend                               path length in W
    eqt50k_int eqt50k_frac eqr50k           equivariance in dB: translation, rotation
    scale_psnr scale_ssim scale_lpips       consistency of two sizes, of 1,000 images

    The number in a name is the number of generated images; any number is allowed. Results are printed, and added as
    lines to metric-NAME.jsonl. With several GPUs, start the same command with torchrun. docs/metrics.md has the rest.
    """
    if context.invoked_subcommand is None:
        with processes() as procs:
            measure(Options(**options), procs)


@main.command()
@click.argument("runs", metavar="RUN_DIR…", nargs=-1, required=True)
@click.option("--out", metavar="PNG", default="metrics.png", show_default=True, help="The image, or a .pdf or .svg.")
@click.option("--published", metavar="NAME", help="Published FIDs as dashed lines, for example FFHQ-512.")
@command()
def plot(runs, out, published):
    """Plot what was measured in several run directories: each metric over the training, and scale consistency over
    scales, with the paper's values as dashed lines.
    """
    try:
        from metrics.plot import plot_runs
    except ModuleNotFoundError as error:
        raise UserError("plots need matplotlib; run: pip install matplotlib") from error
    plot_runs([Path(run) for run in runs], Path(out), published)
    click.echo(out)


if __name__ == "__main__":
    main()
