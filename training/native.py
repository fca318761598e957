"""Read windows of images that keep their own sizes: (image, zoom, place) -> uint8 [C,R_h,R_w], R the training size."""

import os

import torch
from PIL import Image

from dnnlib.console import UserError
from training.data import ImageArchive
from training.sources import size_text

MARGIN = 2  # a JPEG is decoded at no less than this multiple of a window's resolution


class NativeArchive(ImageArchive):
    """The images of a folder or ZIP, of any sizes and shapes, seen through windows of the training size.

    The frame of an image is its largest centred box of the training images' proportions. At zoom 1 a window is the
    frame; at zoom z it is 1/z of the frame's height and width, as many pixels from as much less of the image.

    side  height and width of the training images; every image must hold a box of that many pixels

    Sizes are those that dataset_tool.py has listed in `dataset.json`, or else those of all headers, read at once.
    The other attributes, arguments and methods are those of ImageArchive; images[i] is the frame of image i.
    """

    def __init__(self, path: str | os.PathLike, side: tuple[int, int], **options: object):
        self._window_side = side
        super().__init__(path, **options)

    def _side(self, channels: int) -> tuple[int, int]:
        height, width = self._window_side
        self._sizes = self._files.sizes()
        small = (self._sizes < (width, height)).any(axis=1)
        if small.any():
            number = small.argmax()
            raise UserError(
                f"{self._files.path / self._files.filename(number)} is {size_text(self._sizes[number])}, smaller than "
                f"the training images, {width}x{height} ({small.sum():,} of {len(small):,} images are); leave small "
                f"images out with dataset_tool.py (transform native, min-side {max(height, width)})"
            )
        return height, width

    def largest(self, index: int) -> float:
        """Return the frame's height over the training image's, at least 1: the zoom at its own pixels."""
        width, height = self._sizes[self._locate(index)[0]].tolist()
        return min(height / self.shape[1], width / self.shape[2])

    def window(self, index: int, zoom: float, y: float, x: float, shape: tuple[int, int] | None = None) -> torch.Tensor:
        """Return R_h × R_w pixels of the frame resampled to zoom·R_h × zoom·R_w pixels: uint8 [C,R_h,R_w].

        `shape` is (R_h, R_w), by default that of the training images. Pixel (i, j) shows the place
        (y + (i + ½)/(zoom·R_h), x + (j + ½)/(zoom·R_w)) of the frame, in fractions of its height and width, or of the
        mirrored frame for a mirrored image; zoom >= 1, and y and x are in 0..1 - 1/zoom. The filter is Lanczos' of
        three lobes, widened when it reduces, over premultiplied colours; it reads pixels beyond the window, so windows
        are parts of one resampled image, to rounding.

        Raises IndexError outside 0..len-1, ValueError for a window beyond the frame, and UserError, naming the file,
        when it is unreadable or of another size than listed.
        """
        if not (zoom >= 1 and min(y, x) >= 0 and max(y, x) <= 1 - 1 / zoom + 1e-9):
            raise ValueError(f"a window at {y=}, {x=} with {zoom=} is not within the frame")
        number, mirrored = self._locate(index)
        shape = shape or self.shape[1:]
        larger = shape[0] / self.shape[1]
        size = tuple(self._sizes[number].tolist())
        largest = self.largest(index)
        height, width = (
            min(largest * n, most) for n, most in zip(self.shape[1:], size[::-1], strict=True)
        )  # the frame
        reduce = next(n for n in (8, 4, 2, 1) if n == 1 or largest >= MARGIN * n * zoom * larger)
        name = self._files.filename(number)
        image = self._files.image(name, self.shape[0], reduce)
        if image.size == size:
            reduce = 1  # not a JPEG, or not upright
        elif image.size != tuple(-(-length // reduce) for length in size):
            raise UserError(
                f"{self._files.path / name} is {size_text(image.size)}, but is listed or says in its header that it is "
                f"{size_text(size)}; make the archive again with dataset_tool.py"
            )
        x = 1 - 1 / zoom - x if mirrored else x
        left = max((size[0] - width) // 2 + x * width, 0)
        top = max((size[1] - height) // 2 + y * height, 0)
        right, bottom = min(left + width / zoom, size[0]), min(top + height / zoom, size[1])
        box = tuple(edge / reduce for edge in (left, top, right, bottom))
        return self._pixels(image.resize(shape[::-1], Image.Resampling.LANCZOS, box=box), mirrored)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the frame of image number `index` at the training size, uint8 [C,R_h,R_w], and its label."""
        return self.window(index, 1, 0, 0), self.label(index)

    def facts(self) -> dict:
        """Return what affects the pixels, besides the files, the channels and mirroring."""
        return {**super().facts(), "frame": self.shape[1:]}
