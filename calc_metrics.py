"""Measure a trained generator, or a folder of pictures."""

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

import click

from dnnlib.config import read_yaml
from dnnlib.console import UserError
from dnnlib.files import check_writable
from metrics.evaluation import Evaluation, default_batch
from metrics.pictures import Size
from metrics.plan import Settings
from metrics.registry import FAMILIES, KNOWN, parse
from metrics.runner import load_tools
from metrics.scale import FILTERS
from metrics.sources import Archive, Generated, Given, Photographs, open_labelled
from torch_utils.command import command
from torch_utils.distributed import processes
from training.data import ImageArchive
from training.snapshot import find_network, load_generator, read_trained


def table(records: Iterable[dict]) -> str:
    """Lines with aligned columns."""
    rows = [("metric", "value", "± standard error", "pictures", "seconds")]
    for record in records:
        for name, value in record["results"].items():
            error = record["standard_error"][name]
            rows.append(
                (
                    name,
                    f"{value:.4f}",
                    "" if error is None else f"{error:.4f}",
                    f"{record['num_fake']:,}",
                    f"{record['total_time']:.1f}",
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


# The command.


def parse_size(text: str, option: str) -> Size:
    """(height, width) from "512" or "1024x512". Raises UserError."""
    match = re.fullmatch(r"\s*([1-9]\d{0,4})(?:[xX]([1-9]\d{0,4}))?\s*", text)
    if not match:
        raise UserError(f"{option}={text}: write width x height in pixels, for example 1024x512, or a square's side")
    return int(match[2] or match[1]), int(match[1])


def trained_on(network: str) -> dict:
    """The settings `data` of the run in whose directory the network lies; {} when it lies elsewhere."""
    path = find_network(network).parent / "options.yaml"
    return read_yaml(path).get("data", {}) if path.is_file() else {}


@click.group(invoke_without_command=True, context_settings={"max_content_width": 110})
@click.option(
    "--network", metavar="NAME|FILE", help="A name in models/, a network-snapshot-*.safetensors, or a released .pkl."
)
@click.option("--images", metavar="ZIP|DIR", help="Pictures to measure, instead of a network's.")
@click.option(
    "--data", metavar="ZIP|DIR", help="Photographs to compare with.  [default: those the network was trained on]"
)
@click.option("--metrics", metavar="A,B", help="Which.  [default: scale_psnr of networks, fid50k_full of images]")
@click.option("--num", type=click.IntRange(min=1), help="How many pictures, instead of the numbers in the names.")
@click.option("--size", metavar="WxH", help="Size to measure at.  [default: that trained at]")
@click.option("--scale", type=click.FloatRange(0, 1000, min_open=True), help="Size as a multiple of that trained at.")
@click.option("--scales", metavar="R,S", help="Sizes that scale_* compares, each with the first.  [default: R,2R]")
@click.option(
    "--filter",
    type=click.Choice(list(FILTERS)),
    help="Brings pictures to another size.  [default: box for scale_*, lanczos for photographs]",
)
@click.option(
    "--mirror",
    type=bool,
    is_flag=False,
    flag_value="true",
    metavar="[BOOL]",
    help="Also take the photographs mirrored.  [default: as in training]",
)
@click.option("--trunc", type=float, default=1, show_default=True, help="Truncation ψ of the pictures.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of latents, labels, windows.")
@click.option("--batch", type=click.IntRange(min=1), help="Pictures at once.  [default: 32 on a GPU, else 8]")
@click.option("--weights", metavar="DIR", help="Where the weights of detectors lie, if not in the cache.")
@click.option("--outdir", metavar="DIR", help="Where results are added.  [default: beside the network's file]")
@click.pass_context
@command(memory="give a smaller --batch", interrupted="the statistics of photographs that were complete are kept.")
def main(context, network, images, outdir, **options):
    """Measure a trained generator, or a folder of pictures.

    \b
    python calc_metrics.py --network=runs/00000-auto-faces/network-snapshot-005000.safetensors
    python calc_metrics.py --network=net.safetensors --data=faces.zip --metrics=fid50k_full,is50k --num=5000
    python calc_metrics.py --network=net.safetensors --metrics=scale_psnr,scale_ssim --scales=256,512,1024
    python calc_metrics.py --images=pictures/ --data=photos/ --metrics=fid50k_full,pr50k3_full

    \b
    fid50k_full fid50k fd_dinov2_50k_full   Fréchet distance; _full: against all photographs
    fd_lite0_50k_full                       the same by a small network that comes with the installation
    lines1k_full                            line artefacts: spectral energy along the axes
    kid50k_full pr50k3_full is50k           kernel distance; precision and recall; Inception score
    pfid50k_full                            Fréchet distance of windows of large pictures
    ppl2_wend                               path length in W
    eqt50k_int eqt50k_frac eqr50k           equivariance in dB: translation, rotation
    scale_psnr scale_ssim scale_lpips       consistency of two sizes, of 1,000 pictures

    The number in a name is how many pictures are generated, and may be any other. Results are printed, and added as
    lines to metric-NAME.jsonl. With several GPUs, start the same command with torchrun. docs/metrics.md has the rest.
    """
    if context.invoked_subcommand:
        return
    with processes() as procs:
        calculate(procs, network, images, outdir, **options)


def calculate(
    procs, network, images, outdir, data, metrics, num, size, scale, scales, filter, mirror, trunc, seed, batch, weights
) -> None:
    if bool(network) == bool(images):
        raise UserError("give either --network, a generator, or --images, a folder or ZIP of pictures")
    if size and scale:
        raise UserError("--size and --scale both set the size; give one of them")
    if not math.isfinite(trunc):
        raise UserError(f"--trunc={trunc}: give a finite number, for example 0.7")
    chosen = parse(metrics or ("scale_psnr" if network else "fid50k_full"))
    chosen = tuple(dict.fromkeys(metric.of(num or metric.num) for metric in chosen))
    if not chosen:
        raise UserError(f"--metrics={metrics} measures nothing; known are {', '.join(KNOWN)}")
    compared = {metric.family for metric in chosen if FAMILIES[metric.family].reals}
    sizes = tuple(dict.fromkeys(parse_size(part, "--scales") for part in scales.split(","))) if scales else ()
    if len(sizes) == 1:
        raise UserError(f"--scales={scales}: give two sizes or more, for example --scales=256,512")
    settings = Settings(sizes, filter, seed, batch or default_batch(procs.device))

    reals = photos = None
    if network:
        G = load_generator(network, procs.device)
        trained = trained_on(network)
        path = data or trained.get("path")
        if path and not data and (compared or G.config.c_dim) and not os.path.exists(path):
            raise UserError(f"the network was trained on {path}, which is not there; say with --data where it is now")
        mirror = bool(trained.get("mirror")) if mirror is None else mirror
        archive = open_labelled(path, G, mirror) if path and (compared - {"pfid"} or G.config.c_dim) else None
        reals = archive and Archive(archive, mirror)
        shape = parse_size(size, "--size") if size else None
        if scale:
            shape = tuple(max(1, round(side * scale)) for side in G.config.img_shape)
        labelled = archive if archive and archive.label_dim else None
        fakes = Generated(G, shape, seed=seed, trunc=trunc, labelled=labelled)
        if path and "pfid" in compared:
            photos = Photographs(path, fakes.channels, max(fakes.size))
    else:
        drawn = [metric.name for metric in chosen if FAMILIES[metric.family].drawn]
        if drawn:
            raise UserError(f"{drawn[0]} takes a generator, not --images; give --network")
        given = [name for name, value in (("size", size), ("scale", scale), ("scales", scales)) if value]
        if given or trunc != 1:
            raise UserError(f"--{(given or ['trunc'])[0]} is for networks; --images are measured as they are")
        fakes = Given(ImageArchive(images, channels=3))
        chosen = tuple(metric.of(min(metric.num, fakes.files.num)) for metric in chosen)
        if data:
            reals = Archive(ImageArchive(data, mirror=bool(mirror), channels=3), bool(mirror))
    if photos and photos.left_out and procs.is_first:
        click.echo(f"{photos.left_out:,} photographs smaller than {max(fakes.size)} pixels are left out", err=True)
    # Of pictures and of networks in models/ the results are printed, and kept only where --outdir says.
    folder = Path(outdir) if outdir else Path(network).parent if network and Path(network).is_file() else None
    if folder and procs.is_first:
        check_writable(folder)

    tools = load_tools(chosen, procs, weights)
    records = Evaluation(chosen, reals, photos, tools, settings, procs)(fakes)
    if not procs.is_first:
        return
    seen = read_trained(find_network(network)) if network else {}
    source = {"network": Path(network).name} if network else {"images": images}
    source |= {"kimg": seen["kimg"]} if seen else {}
    records = [record | source | ({"data": str(data or path)} if compared else {}) for record in records]
    click.echo(table(records))
    if folder:
        add(records, folder, seen)


def add(records: list[dict], folder: Path, seen: dict[str, float]) -> None:
    """Adds lines to metric-<name>.jsonl and, of a snapshot of a run, points to TensorBoard in the run directory."""
    for record in records:
        with open(folder / f"metric-{record['metric']}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    if seen and (folder / "options.yaml").is_file():
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        from training.report import add_scalars

        with SummaryWriter(folder) as events:
            for record in records:
                add_scalars(events, record, seen["step"])


@main.command()
@click.argument("runs", metavar="RUN_DIR…", nargs=-1, required=True)
@click.option("--out", metavar="PNG", default="metrics.png", show_default=True, help="The picture, or a .pdf or .svg.")
@click.option("--published", metavar="NAME", help="Published FIDs as dashed lines, for example of FFHQ-512.")
@command()
def plot(runs, out, published):
    """Draw what was measured in several run directories: each metric over the training, and scale consistency over
    scales, with the paper's figures as dashed lines.
    """
    try:
        from metrics.plot import draw
    except ModuleNotFoundError as error:
        raise UserError("drawing takes matplotlib; run: pip install matplotlib") from error
    draw([Path(run) for run in runs], Path(out), published)
    click.echo(out)


if __name__ == "__main__":
    main()
