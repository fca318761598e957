"""Render a generator's images as functions of position: any size, any window, any transform.

image = rendering.render(G, ws, Shot(size=(2160, 4096)))
for box, colours in rendering.tiles(G, ws, Shot(size=(65536, 65536))): ...
colours = rendering.render_points(G, ws, x, y)
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rendering.engine import Tiling, check_finite, render_points, render_tiles
from rendering.grid import Box, Shot
from rendering.transforms import lens, perspective, rotation, shear, translation, zoom
from training.networks import Generator

__all__ = [
    "Box", "Shot", "lens", "perspective", "render", "render_each", "render_points", "rotation", "shear", "tiles",
    "translation", "zoom",
]  # fmt: skip


def tiles(
    G: Generator, ws: Tensor, shot: Shot | None = None, *, dtype: torch.dtype | None = None
) -> Iterator[tuple[Box, Tensor]]:
    """Yield (box, colours [N,C,h,w] about [-1,1]) until the image is complete; memory does not grow with its size.

    ws: [N,num_ws,w_dim], N images at once. shot: by default, the whole image at its training size. dtype: of the
    matrix products, by default the dtype of G; torch.bfloat16, float16 (GPUs) or float64. Raises UserError.
    """
    return render_tiles(G, ws, Tiling.of(G, shot or Shot()), dtype=dtype)


def render(G: Generator, ws: Tensor, shot: Shot | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return [N,C,H,W], colours about [-1,1], on the device of ws. Arguments and errors as in `tiles`."""
    tiling = Tiling.of(G, shot or Shot())
    image = None
    for box, colours in render_tiles(G, ws, tiling, dtype=dtype):
        if image is None:
            image = colours.new_empty(*colours.shape[:2], *tiling.view.size)
        image[(..., *box.slices)] = colours
    return image


TOGETHER = 512 * 512  # pixels that render_each computes at once, at least one image


@torch.no_grad()
def render_each(G: Generator, ws: Tensor, shots: Sequence[Shot]) -> Tensor:
    """Render image i of ws [N,num_ws,w_dim] by shots[i]; the shots differ in `window` alone. Returns [N,C,H,W].

    Equal to `render` of each, to rounding, and faster for small images: the synthesis gets several at once, whole. G is
    of a kind with positions, and the shots have no transform. Errors as in `tiles`.
    """
    views = [Tiling.of(G, shot).view for shot in shots]
    axes = [
        torch.stack([axis.positions(0, axis.count, ws.device) for axis in same])
        for same in zip(*((view.rows, view.cols) for view in views), strict=True)
    ]
    samples = views[0].rows.samples
    images = max(1, TOGETHER // (math.prod(views[0].size) * samples**2))
    parts = zip(*(x.split(images) for x in (ws, *axes)), strict=True)
    colours = torch.cat([F.avg_pool2d(G.synthesis(*part), samples) for part in parts])
    check_finite(colours)
    return colours
