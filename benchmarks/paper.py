"""Repeat the tables and figures of the paper's slides and supplement: python -m benchmarks.paper --help

Each row has what is published, what this project measures, and on what. Time and memory are those of networks of the
published sizes with random weights, in fresh processes that take turns. Scale consistency, equivariance and figures are
those of given networks; FIDs, those of given runs.

A row that fails says why. Measurements are written to --out one by one, and a call makes those that are missing there;
remove a failed one to try again.
"""

import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import torch
from PIL import Image
from torch import Tensor

import rendering
from benchmarks.machine import describe, device_name, interleaved, peak_mib
from benchmarks.rendering import styles
from dnnlib.console import UserError, count
from dnnlib.files import atomic_write, cache_dir, check_writable, sha256
from docs import figures
from metrics.evaluation import Evaluation
from metrics.generated import Generated
from metrics.needs import Settings
from metrics.plot import CONSISTENCY, FID, over_training, read
from metrics.registry import parse
from rendering import Shot
from rendering.styles import Styles
from torch_utils.command import command
from torch_utils.distributed import Processes
from torch_utils.errors import explain
from torch_utils.images import to_uint8
from training.config import read_recipe
from training.networks import AnyGeneratorConfig, CIPSConfig, Generator, GeneratorConfig, INRGANConfig, StyleGAN2Config
from training.networks.layers import compute_with
from training.snapshot import find_network, load_generator

# --- published: FID and consistency are in metrics/plot.py ---

# Slides, "Previous works (2)": (side, batch) -> GB, seconds. None: out of memory.
COST = {
    (256, 1): {"StyleGAN2": (1.5, 0.04), "CIPS": (3.3, 0.06), "CREPS": (2.3, 0.03)},
    (256, 4): {"StyleGAN2": (2.5, 0.05), "CIPS": (10.2, 0.23), "CREPS": (5.2, 0.06)},
    (512, 1): {"StyleGAN2": (1.7, 0.04), "CIPS": (10.4, 0.21), "CREPS": (4.5, 0.05)},
    (512, 4): {"StyleGAN2": (3.4, 0.06), "CIPS": None, "CREPS": (14.6, 0.16)},
}
# INR-GAN's README, on a V100 at 256²: images per second, batch, GB.
RATES = {
    "StyleGAN2": (95.8, 32, 3.65),
    "CIPS": (27.3, 16, 8.11),
    "INR-GAN": (266.5, 50, 23.5),
    "INR-GAN-bil": (209.2, 50, 23.6),
}
# Supplement, table 4: recipe -> configuration, FID, GB, seconds.
ABLATION = {
    "ablation-single-fusion": ("+ bi-line and d=8", 8.23, 1.6, 0.03),
    "ablation-no-decoders": ("+ no decoders and d=8", 6.91, 1.7, 0.03),
    "ablation-thin": ("+ multiple decoders and d=4", 6.46, 1.6, 0.03),
    "ffhq128": ("+ multiple decoders and d=8", 4.66, 1.7, 0.04),
}
ABLATION_SIDE = 128
# Supplement, tables 1 and 2: layer -> channels in and out, and the layer here.
LAYERS = {
    "SynthesisBlock(32, 128)": ("32 → 128", "refinement.0.layers.0"),
    "ToRGB(128, 3)": ("128 → 3", "refinement.0.head"),
    "SynthesisBlock(128, 64)": ("32 → 64, though named 128", "refinement.1.layers.0"),
    "ToRGB(64, 3)": ("64 → 3", "refinement.1.head"),
    "Linear(32, 64)": ("32 → 64", "decoder_last.0"),
    "Linear(64, 128)": ("64 → 128", "decoder_last.1"),
    "Linear(128, 64)": ("128 → 64", "decoder_last.2"),
    "Linear(64, 32)": ("64 → 32", "decoder_last.3"),
}
LARGEST = {3687: "in a single run (slides)", 6144: "two images (supplement 3.1)"}
NOTHING = "–"

# --- time and memory ---

ENGINE = "CREPS by rendering.render"


def ablation(recipe: str) -> Callable[[int], GeneratorConfig]:
    return lambda side: GeneratorConfig(**read_recipe(recipe)["G"] | {"img_resolution": side})


# System -> its published network for images of this side.
SYSTEMS: dict[str, Callable[[int], AnyGeneratorConfig]] = {
    "StyleGAN2": lambda side: StyleGAN2Config(img_resolution=side, channel_base=16384 if side < 512 else 32768),
    "CIPS": lambda side: CIPSConfig(img_resolution=side),
    "INR-GAN": lambda side: INRGANConfig(img_resolution=side, mapping_layers=2),
    "CREPS": lambda side: GeneratorConfig(img_resolution=side),
    ENGINE: lambda side: GeneratorConfig(img_resolution=min(side, 512)),
}
KINDS = {"stylegan2": "StyleGAN2", "cips": "CIPS", "inr_gan": "INR-GAN", "creps": "CREPS"}


class Process(NamedTuple):
    """A system (or a recipe of ABLATION) that renders a batch in a fresh process."""

    system: str
    side: int
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.side}×{self.side}, batch {self.batch}, {self.system}"


def measure(process: Process, device: str, seconds: float, keep: bool = False) -> dict:
    """Render for some seconds, at least once; return the seconds of each call and the peak memory in MiB.

    keep: render once, in plain PyTorch that keeps all activations for a gradient. Memory is resident, with Python and
    PyTorch (500 MiB); on a GPU, it is what PyTorch allocated.
    """
    on_gpu = device == "cuda"
    torch.manual_seed(0)
    config = (SYSTEMS.get(process.system) or ablation(process.system))(process.side)
    G = Generator(config).eval().to(device)
    with torch.set_grad_enabled(keep):
        ws, shot = styles(G, process.batch), Shot((process.side, process.side))
        if keep:
            compute_with(G, "reference", "none")

        def render() -> Tensor:
            if process.system == ENGINE:
                return rendering.render(G, ws, shot, dtype=torch.float16 if on_gpu else None)
            with torch.autocast("cuda", torch.float16, enabled=on_gpu):
                return G.synthesis(ws)

        def time_calls(rounds: int) -> list[float]:
            return interleaved({"": render}, rounds, torch.cuda.synchronize if on_gpu else lambda: None, warm=False)[""]

        times = time_calls(1)
        more = 0 if keep else min(int(seconds / times[0]), 20)
        if more:  # else a call is too long to need warming up
            times = time_calls(more)
    return {"seconds": times, "peak MiB": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_mib()}


def limit_memory() -> None:
    """Let allocations fail before the memory is full, where the system would end any process."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = int(0.9 * available) if hard == resource.RLIM_INFINITY else min(int(0.9 * available), hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def fresh(process: Process, device: str, seconds: float, keep: bool = False) -> dict:
    """Measure in a new process. Raises UserError where it fails."""
    call = [sys.executable, "-m", "benchmarks.paper", f"--device={device}", f"--seconds={seconds}"]
    call += ["--once", *map(str, process), str(keep)]
    ran = subprocess.run(call, capture_output=True, text=True)
    if ran.returncode < 0:
        raise UserError(f"ended by signal {-ran.returncode}, usually for lack of memory")
    if ran.returncode:
        raise UserError(ran.stderr.strip().splitlines()[-1].removeprefix("Error: "))
    return json.loads(ran.stdout.splitlines()[-1])


# --- networks ---


def evaluate(G: Generator, name: str, settings: Settings = Settings()) -> dict:
    """Measure one metric."""
    (record,) = Evaluation(parse(name), settings, Processes(0, 1, G.mapping.w_avg.device))(Generated(G))
    ((key, value),) = record["results"].items()
    return {"value": value, "standard error": record["standard_error"][key], "images": record["num_fake"]}


def measure_network(G: Generator, num: int) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Yield the name of each measurement and what makes it."""
    from metrics.perceptual import BACKBONES  # imports torchvision, which would be in the memory of every process

    # As published, 256² and 512²; of smaller networks, the training size and twice that.
    factor = max(1, max(G.config.img_shape) // 256)
    small = tuple(side // factor for side in G.config.img_shape)
    settings = Settings(scales=(small, tuple(2 * side for side in small)))
    sizes = " against ".join(f"{width}×{height}" for height, width in settings.scales)
    for family in CONSISTENCY:
        if family != "scale_lpips" or (cache_dir() / BACKBONES["alex"].name).is_file():
            yield family, lambda family=family: {"sizes": sizes} | evaluate(G, f"{family}_{num}", settings)
    for name in ("eqt{}_frac", "eqr{}"):
        yield name.format(""), lambda name=name: evaluate(G, name.format(num))


def draw_scales(G: Generator, ws: Tensor) -> tuple[Image.Image, dict]:
    return figures.scales(G, ws), {}


def draw_lanczos(G: Generator, ws: Tensor) -> tuple[Image.Image, dict]:
    """Compare the middle of an image, enlarged by Lanczos, with the same part rendered at that size.

    Returns the mean difference of neighbouring pixels of the latter, over that of the former.
    """
    height, width = G.config.img_shape
    times = max(4, 512 // max(height, width))
    whole, size = figures.render(G, ws), (times * width, times * height)
    middle = tuple(round(side * share) for share in (0.25, 0.75) for side in size)
    enlarged = whole.resize(size, Image.Resampling.LANCZOS).crop(middle)
    rendered = figures.render(G, ws, Shot(size[::-1])).crop(middle)
    row = {f"{width}x{height}": whole, f"x{times} by Lanczos": enlarged, f"x{times}, rendered": rendered}
    slopes = [to_tensor(image).diff(dim=1).abs().mean().item() for image in (rendered, enlarged)]
    return figures.sheet([row]), {"slope": slopes[0] / slopes[1]}


def draw_transforms(G: Generator, ws: Tensor) -> tuple[Image.Image, dict]:
    side = max(256, *G.config.img_shape)
    transforms = {
        "as it is": None,
        "translated": rendering.translation(0.25, 0.1),
        "rotated by 30 degrees": rendering.rotation(30),
        "through a lens": rendering.lens(-0.8),
    }
    row = {name: figures.render(G, ws, Shot((side, side), transform=t)) for name, t in transforms.items()}
    return figures.sheet([row]), {}


def draw_bilines() -> tuple[Image.Image, dict]:
    """Fit a photograph with thick lines: the sum of D products of a column and a row that is nearest to it.

    That is its truncated singular value decomposition. Returns the PSNR in dB for each D.
    """
    import skimage

    with Image.open(Path(skimage.__file__).parent / "data" / "camera.png") as file:
        photograph = file.convert("L").resize((256, 256), Image.Resampling.LANCZOS)
    pixels = to_tensor(photograph)[..., 0].double() / 127.5 - 1
    u, s, v = torch.linalg.svd(pixels)
    row, found = {"photograph": photograph}, {}
    for d in (1, 4, 8, 32):
        fit = u[:, :d] * s[:d] @ v[:d]
        found[f"D = {d}"] = (10 * torch.log10(4 / (fit - pixels).square().mean())).item()
        row[f"D = {d}"] = Image.fromarray(to_uint8(fit).numpy())
    return figures.sheet([row]), found


def to_tensor(image: Image.Image) -> Tensor:
    """Return float32 [H,W,C]."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, -1).float()


FIGURES = {"scales": draw_scales, "lanczos": draw_lanczos, "transforms": draw_transforms}


def draw(path: Path, make: Callable[[], tuple[Image.Image, dict]]) -> dict:
    sheet, found = make()
    with atomic_write(path) as temporary:
        sheet.save(temporary, optimize=True)
    return {"image": path.name, **found}


# --- results ---


class Results:
    """What has been measured so far, in a file.

    processes: str(Process) -> "turn 1", "turn 2", …, "activations kept" -> as `measure` returns, or "failed".
    networks: name -> kind, and a measurement for each name of measure_network and FIGURES.
    runs: row of a table -> run, kimg, its distances.
    """

    def __init__(self, path: Path, device: str):
        """Raises UserError for a file of another machine."""
        self.path = path
        machine = describe() | {"device": device, "memory GiB": round(total_memory(device) / 2**30)}
        self.found = {"machine": machine, "processes": {}, "networks": {}, "runs": {}}
        if path.is_file():
            self.found = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key in machine if machine[key] != self.found.get("machine", {}).get(key)]
            if differing:
                raise UserError(
                    f"{path} was measured with another {', '.join(differing)}; give another --out, or remove it"
                )

    def add(self, group: dict, name: str, task: Callable[[], dict], label: str = "") -> None:
        """Make a measurement of a group unless it is there. A failure is kept too."""
        if name in group:
            return
        try:
            group[name] = task()
        except Exception as error:
            group[name] = {"failed": str(explain(error)).partition(";")[0]}
        click.echo(f"{label}{name}: {json.dumps(group[name])}")
        self.save()

    def save(self) -> None:
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(self.found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def turns(self, process: Process) -> list[dict]:
        found = self.found["processes"].get(str(process), {})
        return [turn for name, turn in found.items() if name.startswith("turn")]

    def seconds(self, process: Process) -> float | None:
        every = [seconds for turn in self.turns(process) for seconds in turn.get("seconds", ())]
        return statistics.median(every) if every else None

    def peak(self, process: Process) -> float | None:
        return max((turn["peak MiB"] for turn in self.turns(process) if "peak MiB" in turn), default=None)


def total_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# --- tables ---


class Row(NamedTuple):
    name: str
    published: str
    measured: str = NOTHING
    on: str = NOTHING


class Table(NamedTuple):
    title: str
    note: str
    rows: Iterable[Row]


def gb(mib: float) -> str:
    return f"{mib * 2**20 / 1e9:.3g} GB"


def failed(row: dict) -> str:
    return f"failed: {row['failed']}"


def cost(results: Results, process: Process) -> tuple[str, str]:
    """Return what was measured, and on what."""
    turns, seconds = results.turns(process), results.seconds(process)
    if not turns:
        return NOTHING, NOTHING
    measured = f"{gb(results.peak(process))}, {seconds:.3g} s" if seconds else failed(turns[0])
    if kept := results.found["processes"][str(process)].get("activations kept"):
        measured += f"; {gb(kept['peak MiB']) if 'peak MiB' in kept else failed(kept)} with activations kept"
    calls = sum(len(turn.get("seconds", ())) for turn in turns)
    return measured, f"random weights; {count(calls, 'call')} in {count(len(turns), 'process', 'processes')}"


def cost_table(results: Results, cells: Iterable[tuple[int, int]]) -> Table:
    def rows() -> Iterator[Row]:
        for side, batch in sorted({*COST, *cells}):
            for system in SYSTEMS:
                process, text = Process(system, side, batch), NOTHING
                if system in COST.get((side, batch), {}):
                    value = COST[side, batch][system]
                    text = f"{value[0]} GB, {value[1]} s" if value else "out of memory"
                yield Row(str(process), text, *cost(results, process))

    note = """Slides, "Previous works (2)", which name no device. Published memory grows with pixels as that of kept
        activations does, so memory is measured without a gradient and with the activations that one needs (in plain
        PyTorch)."""
    return Table("Memory and time", note, rows())


def rate_table(results: Results) -> Table:
    def rows() -> Iterator[Row]:
        for system, (rate, batch, memory) in RATES.items():
            process, published = Process(system, 256, 4), f"{rate} images/s (batch {batch}), {memory} GB"
            seconds = results.seconds(process)
            measured = f"{4 / seconds:.3g} images/s (batch 4), {gb(results.peak(process))}" if seconds else NOTHING
            yield Row(system, published, measured, cost(results, process)[1])

    return Table("Images per second at 256×256", "INR-GAN's README, on a V100. Measured as above.", rows())


def distances(run: dict | None) -> tuple[str, str]:
    if run is None:
        return NOTHING, NOTHING
    return ", ".join(
        f"`{name}` {value:.4g}" for name, value in run["results"].items()
    ), f"{run['run']}, {run['kimg']:g} kimg"


def fid_table(results: Results) -> Table:
    runs = results.found["runs"]
    rows = {data: [f"{who} {value:g}" for who, value in values.items()] for data, values in FID.items()}
    rows["MetFaces-1024"] += ["CIPS out of memory"]
    rows |= {row: [NOTHING] for row in runs if row not in (*rows, *ABLATION)}
    note = """FFHQ-512, FFHQ-1024, Church, MetFaces and Scenery: slides and the supplement's table 3, which takes
        AnyresGAN's values from its paper and computes ScaleParty's; CREPS's FFHQ-1024 is its FFHQ-512 network, rendered
        larger. AFHQ-Dog: supplement 2.1. FFHQ-256, Bedroom and INR-GAN: INR-GAN's README. Landscapes: CIPS's README."""
    return Table("FID", note, (Row(row, ", ".join(texts), *distances(runs.get(row))) for row, texts in rows.items()))


def consistency_table(results: Results) -> Table:
    def rows() -> Iterator[Row]:
        for who in dict.fromkeys([*CONSISTENCY["scale_psnr"], *KINDS.values()]):
            texts = [f"{values[who]:.2f}" for values in CONSISTENCY.values() if who in values]
            published = ", ".join(texts) or NOTHING
            found = {name: n for name, n in results.found["networks"].items() if KINDS[n["kind"]] == who}
            for name, network in found.items():
                measured = [network[family] for family in CONSISTENCY if family in network]
                yield Row(f"{who}, {name}", published, *values_of(measured))
            if texts and not found:
                yield Row(who, published)

    return Table("Scale consistency: PSNR (dB), SSIM, LPIPS", "Slides. Here by area averaging.", rows())


def values_of(measured: list[dict]) -> tuple[str, str]:
    """Return the values with their standard errors, and on what they were measured."""
    if not measured:
        return NOTHING, NOTHING
    if "failed" in measured[0]:
        return failed(measured[0]), NOTHING
    texts = [f"{one['value']:.4g} ± {one['standard error']:.2g}" for one in measured if "value" in one]
    sizes = [measured[0]["sizes"]] if "sizes" in measured[0] else []
    return ", ".join(texts), ", ".join([*sizes, f"{measured[0]['images']:,} images"])


def layer_table() -> Table:
    with torch.device("meta"):
        pixels = Generator(GeneratorConfig()).synthesis.pixels

    def rows() -> Iterator[Row]:
        for layer, (published, name) in LAYERS.items():
            outputs, inputs = pixels.get_submodule(name).weight.shape
            yield Row(layer, published, f"{inputs} → {outputs}", "`GeneratorConfig()`")

    return Table("Refinement blocks and decoder: channels", "Supplement, tables 1 and 2.", rows())


def ablation_table(results: Results) -> Table:
    def rows() -> Iterator[Row]:
        for recipe, (title, fid, memory, seconds) in ABLATION.items():
            cells = zip(
                distances(results.found["runs"].get(recipe)), cost(results, Process(recipe, ABLATION_SIDE)), strict=True
            )
            measured, on = ("; ".join(part for part in cell if part != NOTHING) or NOTHING for cell in cells)
            yield Row(f"{title} (`{recipe}`)", f"FID {fid}, {memory} GB, {seconds} s", measured, on)

    return Table("Ablation", "Supplement, table 4. Time and memory are those of one image of 128×128.", rows())


def largest_table(results: Results, sizes: list[int], large: list[int]) -> Table:
    def rows() -> Iterator[Row]:
        for side in sorted({*LARGEST, *large}):
            yield Row(f"{side}×{side}, {ENGINE}", LARGEST.get(side, NOTHING), *cost(results, Process(ENGINE, side)))
        memory = 1024 * results.found["machine"]["memory GiB"]
        for system, published in (("CREPS", "3687×3687 in a single run, memory unknown (slides)"), (ENGINE, NOTHING)):
            peaks = {side: results.peak(Process(system, side)) for side in sorted({*sizes, *large})}
            peaks = [(side, mib) for side, mib in peaks.items() if mib]
            estimate = on = NOTHING
            if len(peaks) > 1:
                (small, base), (most, top) = peaks[0], peaks[-1]
                pixels = (memory - base) * (most**2 - small**2) / max(top - base, 1) + small**2
                estimate, on = f"{int(pixels**0.5):,} pixels a side (estimate)", f"peaks at {small}² and {most}²"
            yield Row(f"largest square in {gb(memory)}, {system}", published, estimate, on)
        yield Row("largest by `generate.py`", "any size, by patches (slides)", "any size: docs/rendering.md")

    return Table("Largest picture", f"{ENGINE} holds the image in float32; CREPS, its features too.", rows())


def figure_table(results: Results) -> Table:
    def rows() -> Iterator[Row]:
        for name, network in (results.found["networks"] or {NOTHING: {}}).items():
            moved = values_of([network[key] for key in ("eqt_frac", "eqr") if key in network])
            for what, (title, published, text) in texts.items():
                measured, found = NOTHING, network.get(what)
                if found:
                    measured = failed(found) if "failed" in found else text.format(equivariance=moved[0], **found)
                yield Row(title, published, measured, f"{name}, {moved[1]}" if what == "transforms" else name)
        fitted = {d: psnr for d, psnr in results.found.get("bi-line", {}).items() if d.startswith("D")}
        psnrs = ", ".join(f"{d}: {psnr:.3g} dB" for d, psnr in fitted.items())
        yield Row(
            "image fitted with thick lines (slides)", "figure", psnrs or NOTHING, "scikit-image's camera, 256×256"
        )

    texts = {
        "scales": ("one latent at any scale (slides)", "figure", "figure"),
        "lanczos": (
            "crop, beside Lanczos's (supplement, figure 1)",
            "512² to 2048²: more details",
            "{slope:.3g} times the slope",
        ),
        "transforms": (
            "translation, rotation, distortion (slides, supplement 3.3)",
            "figures, video",
            "EQ-T, EQ-R: {equivariance} dB",
        ),
    }
    note = """Samples (supplement, figures 2 to 5) are in the cards in models/. Slope: mean difference of neighbouring
        pixels. Fit: the nearest sum of D products of a column and a row (truncated singular value decomposition)."""
    return Table("Figures", note, rows())


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 140)


def page(results: Results, cells: list[tuple[int, int]], large: list[int]) -> str:
    """Return Markdown."""
    machine = results.found["machine"]
    on_gpu = machine["device"] == "cuda"
    where = (
        f"{machine['gpu']} in float16"
        if on_gpu
        else f"{count(machine['threads'], 'thread')} of an {machine['cpu']} in float32"
    )
    memory = "what PyTorch allocated" if on_gpu else "with about 0.5 GB of Python and PyTorch"
    note = f"""Written by `python -m benchmarks.paper` on {where}, torch {machine["torch"]}. Time is the median of the
        calls of the synthesis, memory the peak of a process, {memory}. {NOTHING}: not published, or not measured.
        A network's file is named by the first digits of its SHA-256; models/ may hold a newer one."""
    sizes = [side for side, _ in cells]
    tables = [
        cost_table(results, cells), rate_table(results), fid_table(results), consistency_table(results), layer_table(),
        ablation_table(results), largest_table(results, sizes, large), figure_table(results),
    ]  # fmt: skip
    lines = ["# The paper's tables and figures", *wrapped(note), ""]
    for table in tables:
        lines += [f"## {table.title}", *wrapped(table.note), ""]
        lines += ["| | published | measured | on |", "| --- | --- | --- | --- |"]
        lines += [*(f"| {' | '.join(row)} |" for row in table.rows), ""]
    drawn = [results.found.get("bi-line"), *itertools.chain(*(n.values() for n in results.found["networks"].values()))]
    lines += [
        f"![{one['image']}](images/{one['image']})\n" for one in drawn if isinstance(one, dict) and "image" in one
    ]
    return "\n".join(lines).rstrip() + "\n"


# --- the command ---


def numbers(context: click.Context, option: click.Parameter, text: str) -> list[int]:
    """Read numbers with commas between them."""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise click.BadParameter(f"{text!r}: give numbers with commas between them, for example 256,512")
    return [int(part) for part in text.split(",")]


def measure_processes(results: Results, processes: list[Process], turns: int, device: str, seconds: float) -> None:
    """Measure each process in turn, several times; then with activations kept."""
    for name in [*(f"turn {turn}" for turn in range(1, turns + 1)), "activations kept"]:
        for process in processes:
            group, keep = results.found["processes"].setdefault(str(process), {}), name == "activations kept"
            hopeless = name != "turn 1" and "failed" in group["turn 1"]
            if not hopeless and not (keep and process.system == ENGINE):
                results.add(group, name, lambda p=process, k=keep: fresh(p, device, seconds, k), f"{process}, ")


@click.command()
@click.option("--sizes", default="256,512", show_default=True, callback=numbers, help="Sides for memory and time.")
@click.option("--batches", default="1,4", show_default=True, callback=numbers)
@click.option("--large", default="3687,6144", show_default=True, callback=numbers, help="Sides for the engine alone.")
@click.option("--turns", type=click.IntRange(1), default=2, show_default=True, help="Processes of each system.")
@click.option("--seconds", default=5.0, show_default=True, help="Of calls in each process; one call at least.")
@click.option("--network", "networks", multiple=True, default=["emoji-people"], show_default=True, metavar="NAME|FILE")
@click.option("--num", type=click.IntRange(2), default=100, show_default=True, help="Images of a network to measure.")
@click.option(
    "--run",
    "runs",
    type=(str, click.Path(exists=True, file_okay=False, path_type=Path)),
    multiple=True,
    metavar="ROW DIR",
    help="A row of the FID table (FFHQ-512, or a new name) or a recipe of the ablation, and a run that was measured.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda if there is one]")
@click.option("--out", type=click.Path(path_type=Path), help="[default: benchmarks/results/paper-DEVICE.json]")
@click.option("--page", "markdown", type=click.Path(path_type=Path), default="docs/paper.md", show_default=True)
@click.option("--once", type=(str, int, int, bool), hidden=True)
@torch.no_grad()
@command(interrupted="what is finished is kept, and the same call continues.")
def main(sizes, batches, large, turns, seconds, networks, num, runs, device, out, markdown, once):
    """Measure what --out lacks; write the page, with figures in images/ beside it, and print it."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device to measure; use --device=cpu")
    if once:
        *process, keep = once
        if device == "cpu":
            limit_memory()
        click.echo(json.dumps(measure(Process(*process), device, seconds, keep)))
        return
    results = Results(out or Path(f"benchmarks/results/paper-{device_name(device)}.json"), device)
    images = markdown.parent / "images"
    for folder in (results.path.parent, images):
        check_writable(folder)
    for row, folder in runs:
        ends = {name: points[-1] for name, points in over_training(read(folder)).items()}
        found = {name: (kimg, value) for name, (kimg, value, _) in ends.items() if name.startswith(("fid", "fd_"))}
        if not found:
            raise UserError(
                f"{folder} holds no Fréchet distance; measure it with calc_metrics.py --metrics=fid50k_full"
            )
        values = {name: value for name, (_, value) in found.items()}
        results.found["runs"][row] = {"run": folder.resolve().name, "kimg": max(found.values())[0], "results": values}
    generators = {f"{Path(name).stem} ({sha256(find_network(name))[:8]})": load_generator(name) for name in networks}

    cells = list(itertools.product(sizes, batches))
    processes = [Process(system, *cell) for cell in cells for system in SYSTEMS]
    processes += [Process(recipe, ABLATION_SIDE) for recipe in ABLATION]
    measure_processes(results, processes, turns, device, seconds)
    measure_processes(results, [Process(ENGINE, side) for side in large], 1, device, seconds)
    results.add(results.found, "bi-line", lambda: draw(images / "paper-bi-line.png", draw_bilines))
    for name, G in generators.items():
        group, ws = results.found["networks"].setdefault(name, {"kind": G.config.kind}), Styles(0.8).map(G, [2])
        for what, make in FIGURES.items():
            path = images / f"paper-{name.split()[0]}-{what}.png"
            results.add(group, what, lambda p=path, m=make, G=G, ws=ws: draw(p, lambda: m(G, ws)), f"{name}, ")
        for what, task in measure_network(G.to(device), num):
            results.add(group, what, task, f"{name}, ")
    results.save()
    text = page(results, cells, large)
    with atomic_write(markdown) as temporary:
        temporary.write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
