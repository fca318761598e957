"""Any size, any window, any transform: a generator's pictures as functions of position.

picture = rendering.render(G, ws, (2160, 4096))
for box, part in rendering.tiles(G, ws, (65536, 65536)): ...
colours = rendering.render_points(G, ws, x, y)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rendering.engine import Plan, paint, paint_points
from rendering.grid import Box, Field, lens, perspective, rotation, shear, translation, view, zoom
from training.networks import Generator

__all__ = [
    "Box", "Plan", "lens", "paint", "perspective", "plan", "render", "render_points", "rotation", "shear", "tiles",
    "translation", "zoom",
]  # fmt: skip


def plan(
    G: Generator,
    size: tuple[int, int] | None = None,
    *,
    window: tuple[float, float, float, float] | None = None,
    fit: str = "crop",
    transform: Tensor | Field | None = None,
    supersample: int = 1,
    exact: bool = False,
    tile: int | None = None,
) -> Plan:
    """What is painted where; `paint(G, ws, plan)` does it, as `tiles` and `render` do.

    size: (height, width) in pixels, by default that trained at.
    window: (x0, y0, x1, y1) in fractions of the picture trained at, by default all of it, (0, 0, 1, 1).
    fit: what happens when the window has another shape than the size. "crop" shows the largest part of it with that
        shape, "extend" all of it and more around, "stretch" makes pixels oblong.
    transform: a matrix [3,3] that moves the picture about its centre (`rotation`, `zoom`, … and their products with @),
        or a function x, y -> x, y, float64 [h,w] each: where the colour of each place comes from (`lens`, …). Both in
        units of the longer side, in which the centre is (½, ½).
    supersample: K takes K² samples of each pixel and averages them.
    exact: concerns transforms that are no matter of rows and columns. False interpolates between dense samples of the
        lines, at an error that docs/rendering.md gives; True computes every pixel's own lines, which takes some
        hundred times as long.
    tile: its side in pixels, by default what suits the device.
    Raises ValueError, with a sentence, for arguments out of range.
    """
    places = view(
        G.config.coords,
        size or G.config.img_shape,
        trained=G.config.img_shape,
        window=window,
        fit=fit,
        transform=transform,
        supersample=supersample,
    )
    return Plan.of(G, places, exact, tile)


def tiles(
    G: Generator, ws: Tensor, size: tuple[int, int] | None = None, *, dtype: torch.dtype | None = None, **where
) -> Iterator[tuple[Box, Tensor]]:
    """Yields (box, colours [N,C,h,w] about [-1,1]) until the picture is complete; memory does not grow with it.

    ws [N,num_ws,w_dim]: N pictures at once. `size` and `where`: the arguments of `plan` (window, transform, …).
    dtype: of the matrix products, by default that of G; torch.bfloat16, float16 (GPUs) or float64.
    Raises ValueError, with a sentence, for arguments out of range.
    """
    return paint(G, ws, plan(G, size, **where), dtype=dtype)


def render(
    G: Generator, ws: Tensor, size: tuple[int, int] | None = None, *, dtype: torch.dtype | None = None, **where
) -> Tensor:
    """[N,C,H,W] with colours about [-1,1], on the device of ws. The arguments and errors are those of `tiles`."""
    arranged = plan(G, size, **where)
    image = None
    for box, colours in paint(G, ws, arranged, dtype=dtype):
        if image is None:
            image = colours.new_empty(*colours.shape[:2], *arranged.view.size)
        rows, cols = box.slices
        image[:, :, rows, cols] = colours
    return image


def render_points(
    G: Generator, ws: Tensor, x: Tensor, y: Tensor, *, exact: bool = True, dtype: torch.dtype | None = None
) -> Tensor:
    """[N,num_ws,w_dim], x and y float [...] -> [N,C,...]: colours about [-1,1] of single points.

    x runs to the right and y down, in fractions of the picture trained at: [0,1] is that picture, and numbers beyond
    continue it. Points that share a position on a line share its cost. `exact` and `dtype` as in `tiles`. Memory,
    besides x, y and the result, is bounded. Raises ValueError for other shapes.
    """
    if x.shape != y.shape or not (x.is_floating_point() and y.is_floating_point()) or not x.numel():
        raise ValueError(
            f"x and y must be float tensors of one shape, not empty; got {x.dtype} {list(x.shape)} and {y.dtype} "
            f"{list(y.shape)}"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("x and y lead to positions that are not finite; keep all of them finite")
    places = [t.double().flatten().to(ws.device) for t in (x, y)]
    return paint_points(G, ws, *places, exact=exact, dtype=dtype).view(len(ws), -1, *x.shape)
