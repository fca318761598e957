"""Grids of images that a run writes."""

import math

import numpy as np
import torch
from torch import Tensor

from torch_utils.images import to_uint8
from torch_utils.randomness import make_rng
from training.data import ImageArchive
from training.networks import Generator


def grid_shape(height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of images that fill about 1920×1080 pixels: at least 3×4 and at most 8×12."""
    return min(max(1080 // height, 3), 8), min(max(1920 // width, 4), 12)


def tile(images: Tensor, rows: int) -> np.ndarray:
    """uint8 [rows·columns,C,H,W] -> [rows·H,columns·W,C]."""
    n, channels, height, width = images.shape
    grid = images.view(rows, n // rows, channels, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * height, -1, channels).cpu().numpy()


def real_grid(images: ImageArchive, seed: int) -> np.ndarray:
    """Tile images of the archive chosen by `seed`."""
    rows, columns = grid_shape(*images.shape[1:])
    chosen = torch.randperm(len(images), generator=make_rng(seed, 0, "grid of reals")).tolist()
    chosen = (chosen * math.ceil(rows * columns / len(chosen)))[: rows * columns]
    return tile(torch.stack([images[i][0] for i in chosen]), rows)


@torch.no_grad()
def generated_grid(G: Generator, images: ImageArchive, seed: int, micro: int) -> np.ndarray:
    """Tile images of G, `micro` at a time: the same latents at every snapshot; with labels, each row is one class."""
    rows, columns = grid_shape(*G.config.img_shape)
    rng = make_rng(seed, 0, "grid of fakes")
    z = torch.randn(rows * columns, G.config.z_dim, generator=rng)
    chosen = torch.randint(len(images), [rows * columns], generator=rng)
    c = torch.stack([images.label(i) for i in chosen.tolist()])
    c = c[torch.arange(rows).repeat_interleave(columns) * columns]
    z, c = (x.to(G.mapping.w_avg).split(micro) for x in (z, c))
    return tile(torch.cat([to_uint8(G(z, c)) for z, c in zip(z, c, strict=True)]), rows)
