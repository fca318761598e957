"""Measure a trained generator."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from torch import Tensor

import rendering
from dnnlib.config import nearest
from dnnlib.console import UserError, progress
from metrics import METRICS
from torch_utils.pictures import to_uint8
from torch_utils.randomness import generator
from training.networks import Generator
from training.snapshot import load_generator


def known_metrics(text: str) -> tuple[str, ...]:
    """("a", "b") from "a,b"; () from "none". Raises UserError for an unknown name."""
    names = () if text == "none" else tuple(text.split(","))
    for name in names:
        if name not in METRICS:
            raise UserError(f"there is no metric {name!r}; {nearest(name, METRICS)}")
    return names


@torch.no_grad()
def scale_pairs(G: Generator, num: int, batch: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """`num` random pictures (uint8 [N,C,H,W]), each with itself at twice the size (uint8 [N,C,2H,2W]).

    The latents depend on `seed` alone. Labels, if any, take turns.
    """
    parameter = next(G.parameters())
    height, width = G.config.img_shape
    latents = torch.randn(num, G.config.z_dim, generator=generator(seed, 0, "metrics")).to(parameter)
    labels = torch.zeros(num, G.config.c_dim).to(parameter)
    if G.config.c_dim:
        labels[torch.arange(num), torch.arange(num) % G.config.c_dim] = 1
    for z, c in zip(latents.split(batch), labels.split(batch), strict=True):
        ws = G.mapping(z, c)
        yield tuple(to_uint8(rendering.render(G, ws, (k * height, k * width))) for k in (1, 2))


def evaluate(G: Generator, name: str, num: int, batch: int = 8) -> dict:
    """One line for metric-<name>.jsonl."""
    began = time.time()
    batches = -(-num // batch)
    result = METRICS[name](progress(scale_pairs(G, num, batch), desc=name, total=batches, unit="batch"))
    return {
        "results": {name: result.mean, f"{name}_standard_error": result.standard_error},
        "metric": name,
        "num": result.num,
        "size": list(G.config.img_shape),
        "total_time": time.time() - began,
        "timestamp": time.time(),
    }


@click.command(context_settings={"max_content_width": 110})
@click.option("--network", metavar="FILE", required=True, help="A network-snapshot-*.safetensors.")
@click.option(
    "--metrics", metavar="A,B", default="scale_psnr", show_default=True, help="Which: " + ", ".join(METRICS) + "."
)
@click.option("--num", type=click.IntRange(min=2), default=1000, show_default=True, help="How many pictures.")
def main(network, metrics, num):
    """Measure a trained generator.

    \b
    scale_psnr   dB between each picture and itself at twice the size, averaged over 2x2 pixels

    Each result is printed, and added as a line to metric-NAME.jsonl beside the network.
    """
    names = known_metrics(metrics)
    G = load_generator(network, "cuda" if torch.cuda.is_available() else "cpu")
    for name in names:
        path = Path(network).parent / f"metric-{name}.jsonl"
        try:
            file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (before the measuring, which takes minutes)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; copy the network to a folder of yours") from error
        with file:
            line = {**evaluate(G, name, num), "network": Path(network).name}
            file.write(json.dumps(line) + "\n")
        mean, error = line["results"].values()
        click.echo(f"{name} {mean:.3f} ± {error:.3f} ({num} pictures, {line['total_time']:.0f} s)")


if __name__ == "__main__":
    main()
