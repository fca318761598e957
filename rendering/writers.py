"""Image files larger than memory: tiles go to an uncompressed TIFF on disk, which is encoded when all are there.

Besides the entries listed in unfinished.py, the directory `out/seed0003.tif.part` holds

    pixels.tif   [H,W,C] uint8, row after row; viewers can open it in the meantime
    done         one byte per tile: 1 when its pixels are on disk

Any order of tiles and any number of processes and resumed runs give the same bytes. Memory does not grow with the
image, except for WebP, whose encoder holds it whole.
"""

import contextlib
import errno
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile

from dnnlib.console import UserError, progress
from dnnlib.vips import import_vips
from rendering.grid import Box
from rendering.unfinished import Unfinished

FLUSH_SECONDS = 5  # of work that a crash loses at most
PNG_PIXELS = 2**26  # 8192×8192; many viewers decode a whole PNG, 4 bytes per pixel, and fail beyond this
STRIP_ROWS = 16  # rows of pixels.tif that libvips reads at once


def encode_png(image, target: Path) -> None:
    # A photograph of 4096²: 0.3 s and 8.2 MB; level 6 takes 1.3 s for 8.4 MB (filter paeth, 9.1 MB at level 3).
    image.pngsave(str(target), compression=3, filter="up", keep="none")


def encode_webp(image, target: Path) -> None:
    # For sharing: a photograph of 512² takes 80 kB (39 dB) and as PNG 455 kB. Lossless WebP would take 341 kB, ten
    # times PNG's time, and 25 bytes of memory per pixel.
    image.webpsave(str(target), Q=95, keep="none")


def encode_tiff(image, target: Path) -> None:
    # Always BigTIFF, so that one reader handles all sizes: a classic TIFF is limited to 4 GiB.
    tiles = {"tile": True, "tile_width": 512, "tile_height": 512, "pyramid": True, "region_shrink": "mean"}
    packed = {"compression": "deflate", "predictor": "horizontal", "level": 3}
    image.tiffsave(str(target), bigtiff=True, keep="none", **tiles, **packed)


def encode_dzi(image, target: Path) -> None:
    # Deep Zoom tools write, and viewers assume, 254 and a border of 1: files of 256×256, and smoothing across the
    # seams. The tiles are in <stem>_files next to the descriptor.
    tiles = {"tile_size": 254, "overlap": 1, "depth": "onepixel", "suffix": ".png[compression=3,filter=up]"}
    image.dzsave(str(target.with_suffix("")), region_shrink="mean", keep="none", **tiles)
    # It contains the date, which would make equal images differ.
    (target.with_name(f"{target.stem}_files") / "vips-properties.xml").unlink(missing_ok=True)


class Format(NamedTuple):
    suffix: str
    encode: Callable  # (pyvips.Image, Path) -> None
    max_side: float = math.inf  # pixels


FORMATS = {
    "png": Format(".png", encode_png),
    "webp": Format(".webp", encode_webp, 16383),
    "tiff": Format(".tif", encode_tiff),
    "dzi": Format(".dzi", encode_dzi),
}


def choose_format(size: tuple[int, int]) -> str:
    """Return the format for an image of (height, width): PNG if common viewers can open it, else TIFF."""
    return "png" if size[0] * size[1] <= PNG_PIXELS else "tiff"


class Canvas(Unfinished):
    """An image file to be filled by tiles."""

    def __init__(self, path: Path, job: dict, *, size: tuple[int, int], channels: int, tiles: int):
        """Describe the file `path` of size = (height, width), touching nothing. Its suffix selects the format.

        job: plain JSON values, everything that the pixels depend on, including the positions of the tiles.
        Raises UserError if the format cannot hold the image.
        """
        super().__init__(path, job)
        self.size, self.channels, self.tiles = size, channels, tiles
        self.pixels, self.marks = self.folder / "pixels.tif", self.folder / "done"
        by_suffix = {known.suffix: known for known in FORMATS.values()}
        if path.suffix not in by_suffix:
            raise UserError(f"{path}: choose a name that ends in {', '.join(by_suffix)}")
        self.format = by_suffix[path.suffix]
        if channels not in (1, 3, 4):
            raise UserError(f"an image of {channels} channels cannot be written; grey has 1, RGB 3 and RGBA 4")
        if max(size) > self.format.max_side:
            larger = " or ".join(name for name, known in FORMATS.items() if known.max_side >= max(size))
            raise UserError(
                f"a {path.suffix} file has at most {self.format.max_side} pixels per side, and the image has "
                f"{size[1]}x{size[0]}; choose {larger}"
            )
        import_vips()

    @property
    def missing(self) -> np.ndarray:
        """Return the numbers of the tiles that no process has flushed to disk."""
        return np.flatnonzero(np.fromfile(self.marks, np.uint8) != 1)

    def start(self, resume: bool) -> None:
        super().start(resume)
        if self.marks.exists() and (self.marks.stat().st_size == self.tiles or any(self.marks.read_bytes())):
            return  # resumed; __enter__ checks whether it is complete
        try:
            create_tiff(self.pixels, self.size, self.channels)
            self.marks.write_bytes(bytes(self.tiles))
        except OSError as error:
            self.discard()
            needed, free = self.size[0] * self.size[1] * self.channels, shutil.disk_usage(self.path.parent).free
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; its pixels need {needed:,} bytes and "
                f"{self.path.parent} has {free:,} free; free some space, or choose another directory"
            ) from error

    def __enter__(self):
        super().__enter__()
        count = self.size[0] * self.size[1] * self.channels
        try:
            with tifffile.TiffFile(self.pixels) as file:
                self._first = file.pages[0].dataoffsets[0]
            for path, length in ((self.pixels, self._first + count), (self.marks, self.tiles)):
                if path.stat().st_size != length:
                    raise self.broken(f"{path.name} has {path.stat().st_size} bytes instead of {length}")
        except (OSError, IndexError, tifffile.TiffFileError) as error:
            raise self.broken(f"it cannot be read ({error})") from error
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0)  # Windows would translate line ends
        self._file, self._marks = (os.open(path, flags) for path in (self.pixels, self.marks))
        self._unmarked: list[int] = []
        self._flushed = time.monotonic()
        return self

    def write(self, index: int, box: Box, pixels: np.ndarray) -> None:
        """Put uint8 [h,w,C] into tile `index` at `box`. Raises UserError when the disk is full."""
        inside = 0 <= box.y0 < box.y1 <= self.size[0] and 0 <= box.x0 < box.x1 <= self.size[1]
        if not (inside and 0 <= index < self.tiles):
            raise ValueError(f"tile {index} of {self.tiles} at {box} is not inside {self.size}")
        if pixels.shape != (*box.shape, self.channels) or pixels.dtype != np.uint8:
            raise ValueError(f"tile {index} at {box} needs uint8 [h,w,C], got {pixels.dtype} {pixels.shape}")
        # Not tifffile.memmap: its pages would count as memory, a full disk would kill the process by SIGBUS, and on a
        # shared file system one machine's pages would overwrite what another writes next to its tile.
        pixels, width = np.ascontiguousarray(pixels), self.size[1]
        pieces = [pixels] if box.shape[1] == width else pixels  # whole rows are contiguous in the file
        with self.writing():
            for row, piece in enumerate(pieces, box.y0):
                write_all(self._file, piece.reshape(-1), self._first + (row * width + box.x0) * self.channels)
        self._unmarked.append(index)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Wait until all pixels written so far are on disk, and only then mark their tiles."""
        tiles, self._unmarked = self._unmarked, []
        with self.writing():
            os.fsync(self._file)
            for index in tiles:
                write_all(self._marks, b"\1", index)
            os.fsync(self._marks)
        self._flushed = time.monotonic()

    def __exit__(self, *exception):
        try:
            self.flush()
        finally:
            os.close(self._file)
            os.close(self._marks)

    def encode(self, folder: Path) -> Path:
        target, vips = folder / f"image{self.format.suffix}", import_vips()
        # libvips reads a TIFF strip by strip, but maps files without a header whole: 0.8 GB of memory at 16384².
        image = vips.Image.tiffload(str(self.pixels), access="sequential", fail_on="truncated")
        # 300 dots per inch, as printers expect; libvips would write 25.4.
        image = image.copy(xres=300 / 25.4, yres=300 / 25.4)
        image.set_progress(True)
        stopped = threading.Event()

        def tick(_, done):
            bar.update(max(0, done.percent - bar.n))
            if stopped.is_set():
                image.set_kill(True)  # stops the encoder within a few rows; ignored before its first row

        with progress(None, desc=f"encoding {self.path.name}", total=100, unit="%") as bar:
            image.signal_connect("eval", tick)
            # In a thread, because Ctrl-C reaches Python only outside of libvips.
            with ThreadPoolExecutor(1) as thread:
                try:
                    thread.submit(self.format.encode, image, target).result()
                except vips.Error as error:
                    refusal = re.search(r"system error: (.+)", str(error))
                    reason = refusal[1] if refusal else " ".join(str(error).split())
                    raise self.interrupted(reason) from error
                except BaseException:
                    stopped.set()  # leaving the block waits for the encoder
                    raise
        return target

    def publish(self, encoded: Path) -> None:
        if self.format.suffix == ".dzi":  # swap the tiles; the old ones are removed with the directory
            tiles = self.path.with_name(f"{self.path.stem}_files")
            with contextlib.suppress(AttributeError):  # Windows has no sync
                os.sync()  # thousands of small files
            if tiles.exists():
                os.replace(tiles, encoded.with_name("former_files"))
            os.replace(encoded.with_name(f"{encoded.stem}_files"), tiles)
        super().publish(encoded)


def create_tiff(path: Path, size: tuple[int, int], channels: int) -> None:
    """Write the header of an uncompressed BigTIFF and reserve its disk space, so that a full disk fails now."""
    tifffile.imwrite(
        path,
        shape=size if channels == 1 else (*size, channels),
        dtype=np.uint8,
        bigtiff=True,
        photometric="minisblack" if channels == 1 else "rgb",
        planarconfig=None if channels == 1 else "contig",
        extrasamples=["unassalpha"] if channels == 4 else None,
        rowsperstrip=STRIP_ROWS,
        metadata=None,
    )
    with open(path, "rb+") as file, contextlib.suppress(AttributeError):  # macOS has no posix_fallocate
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some network file systems
                raise


def write_all(handle: int, data, offset: int) -> None:
    """Write bytes at `offset` of a file; one system call writes 2 GiB at most, and less on a full disk."""
    view = memoryview(data)
    while len(view):
        if hasattr(os, "pwrite"):
            written = os.pwrite(handle, view, offset)
        else:  # Windows
            os.lseek(handle, offset, os.SEEK_SET)
            written = os.write(handle, view)
        view, offset = view[written:], offset + written
