"""Makes the figures of the documentation from any trained network: python -m docs.figures --help"""

from pathlib import Path

import click
import torch
from PIL import Image, ImageDraw

import rendering
from dnnlib.files import atomic_write
from generate import label, latent
from torch_utils.pictures import to_uint8
from training.snapshot import load_generator

GAP = 8


def beside(pictures: list[Image.Image], captions: list[str]) -> Image.Image:
    """One picture with the given ones in a row, each under its caption."""
    top = 20
    width = sum(p.width for p in pictures) + GAP * (len(pictures) + 1)
    sheet = Image.new("RGB", (width, max(p.height for p in pictures) + top + GAP), "white")
    draw, left = ImageDraw.Draw(sheet), GAP
    for picture, caption in zip(pictures, captions, strict=True):
        draw.text((left, 4), caption, fill="black")
        sheet.paste(picture, (left, top))
        left += picture.width + GAP
    return sheet


@click.command()
@click.option("--network", metavar="FILE", required=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--class", "number", type=click.IntRange(min=0))
@click.option("--trunc", type=float, default=1, show_default=True)
@click.option("--out", metavar="PNG", required=True)
def main(network, seed, number, trunc, out):
    """One seed at ×1, ×2 and ×4, beside a Lanczos enlargement of ×1."""
    G = load_generator(network)
    with torch.no_grad():
        ws = G.mapping(latent(G, seed), label(G, number), truncation_psi=trunc)
    height, width = G.config.img_shape
    sizes = [(k * height, k * width) for k in (1, 2, 4)]
    pictures = [
        Image.fromarray(to_uint8(rendering.render(G, ws, size)[0]).movedim(0, -1).squeeze(2).numpy()) for size in sizes
    ]
    lanczos = pictures[0].resize(pictures[-1].size, Image.Resampling.LANCZOS)
    with atomic_write(Path(out)) as temporary:
        captions = ["x1", "x2", "x4", "x1 enlarged (Lanczos)"]
        beside([*pictures, lanczos], captions).save(temporary)


if __name__ == "__main__":
    main()
