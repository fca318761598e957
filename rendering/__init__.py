"""Pictures of any size from a trained generator."""

from collections.abc import Iterator

import torch
from torch import Tensor

from training.networks import Generator, positions

STRIP_PIXELS = 2**16  # at a time: about 100 MB of features with the paper's widths


@torch.no_grad()
def strips(G: Generator, ws: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows of the picture, [N,C,rows,W]) from top to bottom: all of a picture of `size` = (height, width).

    The unit square is mapped onto the whole picture, whatever its proportions. The strips equal G.synthesis, in less
    memory. Colours about [-1,1]. ws [N,num_ws,w_dim]. Raises ValueError for an empty size.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {width}x{height} has no pixels")
    rows, cols = (positions(n, G.config.coords, ws.dtype).to(ws.device) for n in size)
    lines = G.synthesis.lines(ws, rows, cols)
    step = max(1, STRIP_PIXELS // (width * len(ws)))
    for top in range(0, height, step):
        part = slice(top, min(top + step, height))
        yield part, G.synthesis.pixels(lines.window(part, slice(None)), ws[:, -1])


def render(G: Generator, ws: Tensor, size: tuple[int, int]) -> Tensor:
    """[N,num_ws,w_dim] -> [N,C,H,W] with `size` = (H, W), colours about [-1,1]. As `strips`, put together."""
    image = ws.new_empty(len(ws), G.config.img_channels, *size)
    for rows, part in strips(G, ws, size):
        image[:, :, rows] = part
    return image
