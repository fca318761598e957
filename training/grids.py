"""Grids of images that a run writes."""

import math

import numpy as np
import torch
from torch import Tensor

from torch_utils.images import to_uint8
from torch_utils.randomness import make_rng
from training.data import ImageArchive
from training.native import NativeArchive
from training.networks import Generator
from training.scales import ScalesConfig, positions, sample_window


def grid_shape(height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of images that fill about 1920×1080 pixels: at least 3×4 and at most 8×12."""
    return min(max(1080 // height, 3), 8), min(max(1920 // width, 4), 12)


def tile(images: Tensor, rows: int) -> np.ndarray:
    """uint8 [rows·columns,C,H,W] -> [rows·H,columns·W,C]."""
    n, channels, height, width = images.shape
    grid = images.view(rows, n // rows, channels, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * height, -1, channels).cpu().numpy()


def choose_reals(images: ImageArchive, seed: int) -> list[int]:
    """List the numbers of the images in the grid of reals."""
    rows, columns = grid_shape(*images.shape[1:])
    chosen = torch.randperm(len(images), generator=make_rng(seed, 0, "grid of reals")).tolist()
    return (chosen * math.ceil(rows * columns / len(chosen)))[: rows * columns]


def choose_windows(images: NativeArchive, seed: int, scales: ScalesConfig) -> Tensor:
    """Return a window for each image in the grid of reals, sampled as in training: float64 [n,3]."""
    scales = scales.model_copy(update={"windows": 1.0})
    windows = [sample_window(scales, images.largest(i), seed, n) for n, i in enumerate(choose_reals(images, seed))]
    return torch.tensor(windows, dtype=torch.float64)


def real_grid(images: ImageArchive, seed: int, scales: ScalesConfig | None = None) -> np.ndarray:
    """Tile images of the archive chosen by `seed`, or, with `scales`, windows of them."""
    chosen = choose_reals(images, seed)
    if scales:
        windows = choose_windows(images, seed, scales).tolist()
        shown = [images.window(i, *window) for i, window in zip(chosen, windows, strict=True)]
    else:
        shown = [images[i][0] for i in chosen]
    return tile(torch.stack(shown), grid_shape(*images.shape[1:])[0])


@torch.no_grad()
def generated_grid(
    G: Generator, images: ImageArchive, seed: int, micro: int, scales: ScalesConfig | None = None
) -> np.ndarray:
    """Tile images of G, `micro` at a time: the same latents at every snapshot; with labels, each row is one class.

    With `scales`, each image is rendered at the window that real_grid shows in its place.
    """
    rows, columns = grid_shape(*G.config.img_shape)
    rng = make_rng(seed, 0, "grid of fakes")
    z = torch.randn(rows * columns, G.config.z_dim, generator=rng)
    chosen = torch.randint(len(images), [rows * columns], generator=rng)
    c = torch.stack([images.label(i) for i in chosen.tolist()])
    c = c[torch.arange(rows).repeat_interleave(columns) * columns]
    like = G.mapping.w_avg
    axes = positions(choose_windows(images, seed, scales).to(like.device), G.config.img_shape) if scales else ()
    parts = zip(*(x.split(micro) for x in (z.to(like), c.to(like), *axes)), strict=True)
    return tile(torch.cat([to_uint8(G(z, c, 1, None, *axes)) for z, c, *axes in parts]), rows)
