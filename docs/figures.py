"""Make the figures of the documentation from any trained network: python -m docs.figures --help"""

from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

import rendering
from dnnlib.files import atomic_write
from rendering import Shot
from rendering.styles import Styles
from torch_utils.command import command
from torch_utils.images import to_uint8
from training.letters import Letters
from training.networks import Generator
from training.snapshot import load_generator

GAP = 8
CAPTION = 20
SIDES = (64, 256, 1024, 4096)  # pixels of the whole image, in the figure of sizes
PANEL = 256  # pixels of each part of that
DRAWINGS = 210  # of a letter, among which the one nearest to a generated image is chosen


def render(G: Generator, ws: Tensor, shot: Shot | None = None) -> Image.Image:
    image = to_uint8(rendering.render(G, ws, shot)[0]).movedim(0, -1)
    return Image.fromarray((image.squeeze(2) if image.shape[2] == 1 else image).numpy())


def sheet(rows: list[dict[str, Image.Image]]) -> Image.Image:
    """Arrange rows of images, each under its caption."""
    width = max(sum(p.width + GAP for p in row.values()) for row in rows) + GAP
    height = sum(max(p.height for p in row.values()) + CAPTION + GAP for row in rows)
    page = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(page), 0
    for row in rows:
        left = GAP
        for caption, image in row.items():
            draw.text((left, top + 4), caption, fill="black")
            page.paste(image, (left, top + CAPTION))
            left += image.width + GAP
        top += max(p.height for p in row.values()) + CAPTION + GAP
    return page


def scales(G: Generator, ws: Tensor) -> Image.Image:
    """Show ×1, ×2 and ×4 of the first style, next to a Lanczos enlargement of ×1."""
    ws = ws[:1]
    height, width = G.config.img_shape
    row = {f"x{k}": render(G, ws, Shot((k * height, k * width))) for k in (1, 2, 4)}
    return sheet([row | {"x1 enlarged (Lanczos)": row["x1"].resize(row["x4"].size, Image.Resampling.LANCZOS)}])


def views(G: Generator, ws: Tensor) -> Image.Image:
    """Show ×1, a window of ×8, transformed images and a panorama, all of the first style."""
    ws = ws[:1]
    side = 4 * max(G.config.img_shape)
    square = (side, side)
    top = {
        "x1": render(G, ws),
        "window 0.3,0.2,0.8,0.7 of x8": render(G, ws, Shot(square, window=(0.3, 0.2, 0.8, 0.7))),
        "x4, rotated by 30 degrees": render(G, ws, Shot(square, transform=rendering.rotation(30))),
        "x4, through a lens": render(G, ws, Shot(square, transform=rendering.lens(-0.8))),
    }
    wide = {"3:1, --fit=extend": render(G, ws, Shot((side, 3 * side), fit="extend"))}
    return sheet([top, wide])


def zoom(G: Generator, ws: Tensor) -> Image.Image:
    """Show the first style, and ever smaller parts of it, each magnified three times as much as the last."""
    row = {}
    for k in (1, 3, 9, 27):
        left, top = (at * (1 - 1 / k) for at in (0.5, 0.54))  # below the middle: often a mouth
        window = (left, top, left + 1 / k, top + 1 / k)
        row[f"x{k * 256 // max(G.config.img_shape)}"] = render(G, ws[:1], Shot((256, 256), window=window))
    return sheet([row])


def walks(G: Generator, ws: Tensor) -> Image.Image:
    """Show two rows of eight on straight lines in W, from style 1 to 2 and from 3 to 4, captioned by the fraction."""
    steps = torch.linspace(0, 1, 8)
    pairs = (ws[:2], ws[2:])
    return sheet([{f"{t:.2f}": render(G, torch.lerp(a, b, t)[None]) for t in steps} for a, b in pairs])


def sizes(G: Generator, ws: Tensor) -> Image.Image:
    """Show the first style at SIDES, from 1024 on its sharpest edge alone, above a Lanczos enlargement of ×1."""
    whole, small = render(G, ws[:1], Shot((PANEL, PANEL))), render(G, ws[:1])
    rows = [{}, {}]
    for side, window in find_edges(whole):
        pixels = min(side, PANEL)
        rows[0][f"{side}x{side}"] = magnify(render(G, ws[:1], Shot((pixels, pixels), window=window)))
        box = tuple(at * small.width for at in window)
        rows[1][f"x1 enlarged to {side}"] = magnify(small.resize((pixels, pixels), Image.Resampling.LANCZOS, box))
    return sheet(rows)


def outlines(image: Image.Image, character: str) -> Image.Image:
    """Show the outline nearest to a generated image of this character, at SIDES, on its sharpest edge from 1024 on."""
    drawings = Letters(character, (PANEL, PANEL), DRAWINGS)
    near = min(drawings.names(), key=lambda name: distance(drawings.image(name, 3), image))
    row = {}
    for side, (left, top, right, bottom) in find_edges(drawings.image(near, 3)):
        drawn = Letters(character, (side, side), DRAWINGS).image(near, 3)
        row[f"outline at {side}x{side}"] = magnify(drawn.crop([round(at * side) for at in (left, top, right, bottom)]))
    return sheet([row])


def find_edges(image: Image.Image) -> list[tuple[int, tuple[float, float, float, float]]]:
    """Return each of SIDES with a window in fractions, at most PANEL pixels wide, around the sharpest edge."""
    strength = np.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(2)), float)
    slope = np.hypot(*np.gradient(strength))
    row, column = np.unravel_index(slope.argmax(), slope.shape)
    windows = []
    for side in SIDES:
        span = min(1, PANEL / side)
        left, top = (min(max(at / PANEL - span / 2, 0), 1 - span) for at in (column, row))
        windows.append((side, (left, top, left + span, top + span)))
    return windows


def magnify(image: Image.Image) -> Image.Image:
    return image.resize((PANEL, PANEL), Image.Resampling.NEAREST)


def distance(image: Image.Image, other: Image.Image) -> float:
    """Compute the root mean square difference of two images' shapes, whatever their colours and contrast."""
    first, second = (standardize(each) for each in (image, other))
    return min(float(np.square(first - sign * second).mean()) for sign in (1, -1)) ** 0.5


def standardize(image: Image.Image) -> np.ndarray:
    values = np.asarray(image.convert("L"), float)
    return (values - values.mean()) / values.std()


FIGURES = {"scales": scales, "views": views, "zoom": zoom, "walks": walks, "sizes": sizes}


@click.command()
@click.option("--network", "networks", metavar="NAME|FILE", multiple=True, required=True, help="May be repeated.")
@click.option("--figure", type=click.Choice(list(FIGURES)), default="scales", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--class", "kind", metavar="C", help="[default: seed mod number of classes]")
@click.option("--trunc", type=float, default=1, show_default=True)
@click.option(
    "--outline", metavar="CHARACTER", help="Add the outline of a font that is nearest to the first network's."
)
@click.option("--out", metavar="PNG", required=True)
@command()
def main(networks, figure, seed, kind, trunc, outline, out):
    """Draw one seed of a network at several scales or in several views, or walks between it and the next three.

    Several networks, for example before and after training on windows, are drawn one below the other.
    """
    styles = Styles(trunc, classes=[kind] if kind else [])
    seeds = list(range(seed, seed + 4))
    generators = [load_generator(network) for network in networks]
    pages = [FIGURES[figure](G, styles.map(G, seeds)) for G in generators]
    if outline:
        image = render(generators[0], styles.map(generators[0], seeds[:1]), Shot((PANEL, PANEL)))
        pages.append(outlines(image, outline))
    whole = Image.new("RGB", (max(page.width for page in pages), sum(page.height for page in pages)), "white")
    top = 0
    for page in pages:
        whole.paste(page, (0, top))
        top += page.height
    with atomic_write(Path(out)) as temporary:
        whole.save(temporary, optimize=True)


if __name__ == "__main__":
    main()
