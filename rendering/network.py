"""A generator with the styles of one image: folded into its weights, as functions `line` and `pixels`, or as it is.

Legend: C channels, D thickness, K fusions, R positions of a line, P pixels. Here channels come first and positions
last, [C,…,P]: a layer is weight @ x, and a fusion of two lines is a batched product without transposing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rendering.pixel_path import PixelPath
from torch_utils.ops.chain import Chain
from training.networks import Generator
from training.networks.pixels import FUSION_GAIN


class FoldedGenerator:
    """Render the image of w [num_ws,w_dim]: `line` for its rows and columns, then `pixels`.

    dtype: of the matrix products in the layers; sums of lines, features and colours are at least float32.
    imap: maps a function over the layers to fold them (see engine.workers).
    impl: as in PixelPath; by default, as in G.
    """

    def __init__(self, G: Generator, w: Tensor, dtype: torch.dtype, imap: Callable = map, impl: str | None = None):
        lines, pixels = G.synthesis.lines, G.synthesis.pixels
        impl = impl or pixels.impl
        self.dtype, self.device, self.thickness = dtype, w.device, lines.thickness
        self.input = lines.input
        (self.scale,) = imap(lines.input.scale, [w[0]])
        line_layers, pixel_layers = lines.folded(w, imap), pixels.folded(w[-1], imap)
        line_impl = "auto" if impl == "triton" else impl  # the kernel is for pixels
        self.lines = Chain([layer.to(dtype) for layer in line_layers], every=True, impl=line_impl, imap=imap)
        self.pixels = PixelPath([layer.to(dtype) for layer in pixel_layers], impl=impl, imap=imap)

    def line(self, axis: int, positions: Tensor) -> Tensor:
        """Compute float64 [R] -> [K,C,D,R]: lines of rows (axis 0) or columns (axis 1), summed up to each fusion.

        Rows include FUSION_GAIN, so a fusion is a plain dot product.
        """
        x = self.input.features(positions) * self.scale[axis]
        sums = self.lines(x.permute(2, 1, 0).flatten(1).to(self.dtype))
        if axis == 0:
            sums *= FUSION_GAIN
        return sums.unflatten(2, (-1, len(positions)))


class DirectGenerator:
    """Render the image of w [num_ws,w_dim] by the synthesis itself, whatever its kind.

    dtype: of the matrix products. Half types run under autocast; the others are that of G.
    """

    def __init__(self, G: Generator, w: Tensor, dtype: torch.dtype):
        self.synthesis, self.w, self.dtype, self.device = G.synthesis, w[None], dtype, w.device
        self.any_position = G.config.any_position

    def image(self, rows: Tensor | None = None, cols: Tensor | None = None) -> Tensor:
        """Compute [img_channels,H,W] at float64 rows [H] and cols [W], by default on the training grid."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype.itemsize < 4):
            return self.synthesis(self.w, rows, cols)[0]
