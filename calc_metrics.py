"""Measure a trained generator, or a folder of pictures."""

import functools
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

import rendering
from dnnlib.config import read_yaml
from dnnlib.console import UserError, progress
from metrics.cache import content_digest
from metrics.path_length import path_lengths
from metrics.pictures import Batch, Drawing, Fakes, Files, Size
from metrics.plan import Result, Settings
from metrics.registry import FAMILIES, KNOWN, Metric, parse
from metrics.runner import Stopped, estimate, load_tools, measure
from metrics.scale import FILTERS
from torch_utils.distributed import Processes, processes
from torch_utils.pictures import to_uint8
from torch_utils.randomness import generator
from training.data import ImageArchive, ImageFiles, cores, listed
from training.networks import Generator
from training.snapshot import find_network, load_generator

READERS = 3  # processes that read ahead
WORTH = 1000  # pictures from which on they are worth their start
EXACT = 64 * 64  # pixels up to which rotated pictures are computed exactly, at some hundred times the cost


# What is measured and what it is compared with, as metrics/pictures.py asks for it.


class Generated:
    """The pictures of a generator; number i depends on (seed, i) alone."""

    def __init__(
        self,
        G: Generator,
        size: Size | None = None,
        *,
        seed: int = 0,
        trunc: float = 1,
        labelled: ImageArchive | None = None,
    ):
        """`labelled`: whose labels a conditional generator gets, drawn at random; without it, classes take turns."""
        self.G, self.seed, self.trunc, self.labelled = G, seed, trunc, labelled
        self.native, self.channels = G.config.img_shape, G.config.img_channels
        self.size = size or self.native
        self.variant = () if trunc == 1 else (f"trunc{trunc:g}",)
        self.points = "exact" if math.prod(self.size) <= EXACT else "interpolated"
        self.weight = G.synthesis.lines.input.weight  # for its dtype and device

    def latents(self, numbers: Sequence[int], purpose: str) -> tuple[Tensor, Tensor]:
        """z [N,z_dim] and labels [N,c_dim]."""
        z, c = [], torch.zeros(len(numbers), self.G.config.c_dim)
        for i, number in enumerate(numbers):
            random = generator(self.seed, number, purpose)
            z.append(torch.randn(self.G.config.z_dim, generator=random))
            if self.labelled:
                c[i] = self.labelled.label(int(torch.randint(len(self.labelled), (), generator=random)))
            elif self.G.config.c_dim:
                c[i, number % self.G.config.c_dim] = 1
        return torch.stack(z).to(self.weight), c.to(self.weight)

    def styles(self, z: Tensor, c: Tensor) -> Tensor:
        return self.G.mapping(z, c, self.trunc)

    def paint(self, ws: Tensor, size: Size, **where) -> Tensor:
        """[N,C,H,W] about [-1,1]. Raises UserError for colours that are not finite."""
        colours = rendering.render(self.G, ws, size, **where)
        if not colours.isfinite().all():
            raise UserError("the network gives colours that are not finite; it is broken, measure an earlier snapshot")
        return colours

    def batches(self, lists: Sequence[Sequence[int]]) -> Iterator["Drawn"]:
        return (Drawn(self, numbers) for numbers in lists)


class Drawn(Drawing):
    """Pictures of a generator, rendered as they are asked for."""

    def __init__(self, fakes: Generated, numbers: Sequence[int]):
        super().__init__(numbers, fakes.size)
        self.fakes = fakes
        self.z, self.c = fakes.latents(numbers, "latents")
        self.ws = fakes.styles(self.z, self.c)

    def colours(self, size: Size) -> Tensor:
        return self.once(("colours", size), lambda: self.fakes.paint(self.ws, size))

    def pictures(self, size: Size | None = None) -> Tensor:
        size = size or self.size
        return self.once(("pictures", size), lambda: to_uint8(self.colours(size)))

    def moved(self, index: int, matrix: Tensor | None) -> Tensor:
        if matrix is None:
            return self.colours(self.size)[index : index + 1]
        ends = self.fakes.G.config.coords == "endpoints"
        sides = matrix.clone()
        sides[:2, 2] /= max(self.size) - ends  # the pixels of a longer side span the square trained at
        exact = self.fakes.points == "exact"
        return self.fakes.paint(self.ws[index : index + 1], self.size, transform=sides, exact=exact)

    def windows(self, boxes: list[tuple[float, float, float, float]]) -> Tensor:
        painted = [
            self.fakes.paint(w, self.fakes.native, window=box) for w, box in zip(self.ws.split(1), boxes, strict=True)
        ]
        return to_uint8(torch.cat(painted))

    def path_lengths(self, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        towards, _ = self.fakes.latents(self.numbers.tolist(), "latents of path ends")
        paint = functools.partial(self.fakes.paint, size=self.size)
        return path_lengths(self.fakes.styles, paint, distance, self.z, towards, self.c)


class Archive:
    """Images of one size, as photographs to compare with."""

    def __init__(self, images: ImageArchive, mirror: bool):
        self.images, self.num, self.size = images, len(images), images.shape[1:]
        self.facts = {"mirror": mirror, "channels": images.shape[0]}

    @functools.cached_property
    def _digest(self) -> str:
        files = self.num // (1 + self.facts["mirror"])
        return content_digest(progress(self.images.contents(), desc=f"digest of {self.images.name}", total=files))

    def digest(self) -> str:
        return self._digest

    def batches(self, lists: Sequence[list[int]]) -> Iterator[list[Tensor]]:
        return listed(self.read, lists, readers(lists))

    def read(self, indices: list[int]) -> list[Tensor]:
        return [self.images[index][0] for index in indices]


class Given:
    """Images of one size, as the pictures measured, in random order."""

    def __init__(self, images: ImageArchive):
        self.files = Archive(images, mirror=False)
        self.channels, *size = images.shape
        self.size = self.native = tuple(size)
        self.variant = ()
        self.order = np.random.RandomState(0).permutation(self.files.num)

    def batches(self, lists: Sequence[Sequence[int]]) -> Iterator[Batch]:
        read = self.files.batches([self.order[list(numbers)].tolist() for numbers in lists])
        for numbers, pictures in zip(lists, read, strict=True):
            yield Batch(numbers, self.size, torch.stack(pictures))


class Photographs:
    """Those of at least `side` pixels per side in a folder or ZIP; each has its own size. Raises UserError."""

    size = None

    def __init__(self, path: str, channels: int, side: int):
        self.files = ImageFiles(path)
        names = self.files.names()
        self.names = [name for name in progress(names, desc=f"sizes of {path}") if min(self.files.size(name)) >= side]
        if not self.names:
            raise UserError(f"no image of {path} has {side} pixels per side; give larger ones, or a smaller --size")
        self.left_out = len(names) - len(self.names)
        self.num, self.channels, self.facts = len(self.names), channels, {"channels": channels}

    @functools.cached_property
    def _digest(self) -> str:
        return content_digest(progress(self.files.contents(self.names), desc="digest of photographs", total=self.num))

    def digest(self) -> str:
        return self._digest

    def batches(self, lists: Sequence[list[int]]) -> Iterator[list[Tensor]]:
        return listed(self.read, lists, readers(lists))

    def read(self, indices: list[int]) -> list[Tensor]:
        images = (self.files.image(self.names[index], self.channels) for index in indices)
        return [torch.from_numpy(np.array(image)).view(image.height, image.width, -1).movedim(2, 0) for image in images]


def readers(lists: Sequence[Sequence[int]]) -> int:
    return min(READERS, cores()) if sum(map(len, lists)) >= WORTH else 0


# The measuring, here and in train.py.


def default_batch(device: torch.device) -> int:
    return 32 if device.type == "cuda" else 8


@dataclass(frozen=True)
class Evaluation:
    """Metrics and all that they need besides the pictures measured."""

    metrics: tuple[Metric, ...]
    reals: Files | None
    photos: Files | None
    tools: dict  # of metrics.runner.load_tools
    settings: Settings
    procs: Processes

    @torch.no_grad()
    def __call__(self, fakes: Fakes, stop: Callable[[], bool] = lambda: False) -> list[dict]:
        """The lines for metric-<name>.jsonl, in every process; none when `stop` became true in some process."""
        try:
            results = measure(*self._arguments(fakes), stop=stop)
        except Stopped:
            return []
        return [self.record(result) for result in results]

    @torch.no_grad()
    def estimate(self, fakes: Fakes) -> tuple[float, float]:
        """Seconds for the pictures, and for photographs unless they are known. Raises the UserErrors of measuring."""
        return estimate(*self._arguments(fakes))

    def _arguments(self, fakes: Fakes) -> tuple:
        return self.metrics, fakes, self.reals, self.photos, self.tools, self.settings, self.procs

    def record(self, result: Result) -> dict:
        figures = {result.named(ending): measured for ending, measured in result.measures.items()}
        return {
            "results": {name: measured.mean for name, measured in figures.items()},
            "metric": result.named(),
            "standard_error": {
                name: None if math.isnan(measured.standard_error) else measured.standard_error
                for name, measured in figures.items()
            },
            **result.facts,
            "total_time": result.seconds,
            "num_gpus": self.procs.world,
            "timestamp": time.time(),
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    project = (Path(__file__).parent / "pyproject.toml").read_text(encoding="utf-8")
    own = re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1]
    return {"creps": own} | {name: version(name) for name in ("torch", "torchvision", "torch-fidelity")}


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


def open_labelled(path: str, G: Generator, mirror: bool) -> ImageArchive:
    """The archive, with labels if it has them and the generator wants them. Raises UserError when they do not fit."""
    settings = {"mirror": mirror, "channels": G.config.img_channels}
    images = ImageArchive(path, **settings)
    if not (G.config.c_dim and images.has_labels):
        return images
    images = ImageArchive(path, use_labels=True, **settings)
    if images.label_dim != G.config.c_dim:
        raise UserError(
            f"the labels of {path} have {images.label_dim} numbers, and the network takes {G.config.c_dim}; "
            "give the archive that it was trained on"
        )
    return images


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
    try:
        with processes() as procs:
            calculate(procs, network, images, outdir, **options)
    except UserError:
        # One that every process finds is said once: the launcher ends the others while they hold back.
        time.sleep(5 * min(int(os.environ.get("RANK", 0)), 1))
        raise
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU's memory is full; give a smaller --batch") from error
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            click.echo("Interrupted; the statistics of photographs that were complete are kept.", err=True)
        context.exit(130)


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
    source = {"network": Path(network).name} if network else {"images": images}
    records = [record | source | ({"data": str(data or path)} if compared else {}) for record in records]
    click.echo(table(records))
    if folder:
        add(records, folder, network)


def check_writable(folder: Path) -> None:
    """Before the measuring, which takes minutes. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; give a folder of yours as --outdir") from error


def add(records: list[dict], folder: Path, network: str | None) -> None:
    """Adds lines to metric-<name>.jsonl and, of a snapshot of a run, points to TensorBoard in the run directory."""
    for record in records:
        with open(folder / f"metric-{record['metric']}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    number = re.fullmatch(r"network-snapshot-(\d+)\.safetensors", Path(network or "").name)
    options = folder / "options.yaml"
    if number and options.is_file():
        from training.report import SummaryWriter, add_scalars  # TensorBoard takes a second to import

        step = round(int(number[1]) * 1000 / read_yaml(options)["train"]["batch"])
        with SummaryWriter(folder) as events:
            for record in records:
                add_scalars(events, record, step)


@main.command()
@click.argument("runs", metavar="RUN_DIR…", nargs=-1, required=True)
@click.option("--out", metavar="PNG", default="metrics.png", show_default=True, help="The picture, or a .pdf or .svg.")
@click.option("--published", metavar="NAME", help="Published FIDs as dashed lines, for example of FFHQ-512.")
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
