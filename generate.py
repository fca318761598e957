"""Render pictures of a trained generator, at any size."""

import math
import re
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

import rendering
from dnnlib.console import UserError, progress
from dnnlib.files import atomic_write
from torch_utils.pictures import to_uint8
from training.networks import Generator
from training.snapshot import load_generator

MAX_PIXELS = 2**30  # an RGB picture is held whole, 3 GiB at this size
MAX_POSITIONS = 2**16  # so are its lines: 2 GiB in each layer of the paper's widths


def parse_seeds(text: str) -> list[int]:
    """[0, 1, 2, 7] from "0-2,7". Raises UserError."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})(?:-(\d{1,10}))?\s*", part)
        if not match:
            raise UserError(f"--seeds={text}: cannot read {part!r}; write numbers and ranges, for example 0-3,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= 2**32:
            raise UserError(f"--seeds={text}: {part!r} is no range of seeds from 0 to {2**32 - 1}")
        seeds += range(first, last + 1)
    return seeds


def picture_size(G: Generator, scale: float | None, size: str | None) -> tuple[int, int]:
    """(height, width) from --scale or --size, by default the size trained at. Raises UserError."""
    if scale and size:
        raise UserError("--scale and --size both set the size; give one of them")
    if scale is not None and not math.isfinite(scale):
        raise UserError(f"--scale={scale}: give a finite number, for example 2")
    height, width = G.config.img_shape
    if size:
        match = re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", size)
        if not match:
            raise UserError(f"--size={size}: write width x height in pixels, for example 1024x768")
        width, height = int(match[1]), int(match[2])
    elif scale:
        width, height = round(width * scale), round(height * scale)
    if not 1 <= width * height <= MAX_PIXELS or width + height > MAX_POSITIONS:
        raise UserError(
            f"a picture of {width}x{height} pixels cannot be rendered; it may have up to {MAX_PIXELS:,} pixels, and "
            f"width and height together up to {MAX_POSITIONS:,}"
        )
    return height, width


def latent(G: Generator, seed: int) -> torch.Tensor:
    """[1,z_dim]: the latent that StyleGAN's tools give this seed."""
    return torch.from_numpy(np.random.RandomState(seed).randn(1, G.config.z_dim)).float()


def label(G: Generator, number: int | None) -> torch.Tensor:
    """[1,c_dim]: one-hot for class `number`. Raises UserError when the network has no such class."""
    c_dim = G.config.c_dim
    if c_dim and number is None:
        raise UserError(f"the network is conditional; choose one of its {c_dim} classes with --class=0 to {c_dim - 1}")
    if number is not None and number >= c_dim:
        known = f"it has classes 0 to {c_dim - 1}" if c_dim else "the network has no classes; leave it out"
        raise UserError(f"--class={number}: {known}")
    c = torch.zeros(1, c_dim)
    if c_dim:
        c[0, number] = 1
    return c


@click.command(context_settings={"max_content_width": 110})
@click.option("--network", metavar="FILE", required=True, help="A network-snapshot-*.safetensors.")
@click.option("--seeds", metavar="0-3,7", required=True, help="One picture for each seed.")
@click.option(
    "--trunc", type=float, default=1, show_default=True, help="Truncation ψ: 1 is the full variety, 0 the average."
)
@click.option("--class", "number", type=click.IntRange(min=0), help="Class of a conditional network.")
@click.option("--scale", type=click.FloatRange(min=0, min_open=True), help="Times the size trained at.")
@click.option("--size", metavar="WxH", help="Size in pixels; the picture is stretched to it.")
@click.option("--outdir", metavar="DIR", required=True, help="Where seed0000.png … are written.")
def main(network, seeds, trunc, number, scale, size, outdir):
    """Render pictures of a trained generator, at any size.

    \b
    python generate.py --network=net.safetensors --seeds=0-7 --outdir=out
    python generate.py --network=net.safetensors --seeds=3 --trunc=0.7 --size=4096x2160 --outdir=out
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    G = load_generator(network, device)
    seeds = parse_seeds(seeds)
    if not math.isfinite(trunc):
        raise UserError(f"--trunc={trunc}: give a finite number, for example 0.7")
    height, width = picture_size(G, scale, size)
    c = label(G, number)
    for seed in progress(seeds, desc=f"{width}x{height}"):
        with torch.no_grad():
            ws = G.mapping(latent(G, seed).to(device), c.to(device), truncation_psi=trunc)
        picture = np.empty((height, width, G.config.img_channels), np.uint8)
        for rows, strip in rendering.strips(G, ws, (height, width)):
            picture[rows] = to_uint8(strip[0]).movedim(0, -1).cpu().numpy()
        with atomic_write(Path(outdir) / f"seed{seed:04d}.png") as temporary:
            Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture).save(temporary)


if __name__ == "__main__":
    main()
