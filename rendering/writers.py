"""Pictures larger than memory: tiles go to an unfinished picture on disk, which becomes the file when all are there.

What is being made of `out/seed0003.tif` lies in the directory `out/seed0003.tif.part`:

    job.json     what the picture is made of; work goes on only with an equal job
    pixels.tif   an uncompressed TIFF: its header, then [H,W,C] uint8, row after row; viewers open it meanwhile
    done         one byte per tile: 1 when its pixels are on disk
    encoding/    the final file while it is written

Any order of tiles, any number of processes and any number of resumed runs give the same bytes. Memory does not grow
with the picture (except for WebP, whose encoder holds it whole), and the file has its name only when it is complete.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dnnlib.console import UserError, progress
from dnnlib.files import atomic_write

FLUSH_SECONDS = 5  # at most so much work is lost in a crash
PNG_PIXELS = 2**26  # 8192×8192; many viewers decode a PNG whole, 4 bytes per pixel, and give up beyond
WEBP_SIDE = 16383  # the format has 14 bits for each side
STRIP_ROWS = 16  # libvips reads so many rows of pixels.tif at once


# The directory beside the file, for pictures here and for films in video.py.


def start(path: Path, job: dict, resume: bool) -> Path:
    """Makes the directory `<path>.part` for `job`, or finds the one to continue. Returns it.

    path: the final file, untouched here. job: plain JSON values. With `resume` a directory of the same job is kept,
    without it any is removed. Raises UserError when it is of another job, broken, or cannot be written.
    """
    folder = part(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: a directory has this name; choose another one, or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            discard(folder)
        folder.mkdir(exist_ok=True)
        # Hidden names are temporary files of a run that was killed before it wrote its job.
        fresh = all(entry.name.startswith(".") for entry in folder.iterdir())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror} ({error.filename}); choose a directory that you may write to"
        ) from error
    if fresh:
        with writing(path), atomic_write(folder / "job.json") as temporary:
            temporary.write_text(json.dumps(job, indent=1))
    check(path, job)
    return folder


def part(path: Path) -> Path:
    """Where the unfinished state of the file `path` lies."""
    return path.with_name(path.name + ".part")


def check(path: Path, job: dict) -> None:
    """Raises UserError unless `<path>.part` was started for an equal job; it names the first thing that differs."""
    folder = part(path)
    try:
        then = json.loads((folder / "job.json").read_text())
        if not isinstance(then, dict):
            raise ValueError("no dictionary")
    except (OSError, ValueError) as error:
        raise broken(path, f"job.json cannot be read ({error})") from error
    now = json.loads(json.dumps(job))  # tuples become lists
    for key in now | then:
        if key not in now or key not in then or now[key] != then[key]:
            a, b = (json.dumps(values[key])[:100] if key in values else "not given" for values in (then, now))
            raise UserError(
                f"cannot resume {path}: it was started with {key} = {a}, and now {key} is {b}; "
                f"use the settings of then, or remove {folder} or leave --resume out to start anew"
            )


def broken(path: Path, reason: str) -> UserError:
    return UserError(
        f"cannot resume {path}: {part(path)} is broken, {reason}; remove it, or leave --resume out to start anew"
    )


def discard(folder: Path) -> None:
    """Removes a `.part` directory. Killed on the way, it leaves one that starts anew, not a broken one."""
    if folder.exists():
        (folder / "done").unlink(missing_ok=True)
        for entry in folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "job.json":
                entry.unlink()
        shutil.rmtree(folder)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write below `<path>.part`, such as a full disk, into a sentence."""
    try:
        yield
    except OSError as error:
        raise interrupted(path, error.strerror or str(error)) from error


def interrupted(path: Path, reason: str) -> UserError:
    return UserError(
        f"cannot write {path}: {reason}; what is finished is kept in {part(path)}, "
        "so make room (or fix what else is wrong) and continue with --resume"
    )


def publish(encoded: Path, path: Path) -> None:
    """Gives the complete file `encoded`, below `<path>.part`, its name, and removes `<path>.part`."""
    with writing(path):
        sync(encoded)
        os.replace(encoded, path)
        sync(path.parent)
        discard(part(path))


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# The formats.


def encode_png(image, target: Path) -> None:
    # 4096² photograph: 0.3 s and 8.2 MB; level 6 takes 1.3 s for 8.4 MB (filter paeth, 9.1 MB at level 3).
    image.pngsave(str(target), compression=3, filter="up", keep="none")


def encode_webp(image, target: Path) -> None:
    # For sharing: a photograph of 512² takes 80 kB (39 dB) and as PNG 455 kB. Lossless WebP would take 341 kB, ten
    # times PNG's time, and 25 bytes of memory per pixel.
    image.webpsave(str(target), Q=95, keep="none")


def encode_tiff(image, target: Path) -> None:
    # Always BigTIFF, so that one reader serves all sizes: a classic TIFF ends at 4 GiB.
    image.tiffsave(
        str(target),
        bigtiff=True,
        tile=True,
        tile_width=512,
        tile_height=512,
        pyramid=True,
        region_shrink="mean",
        compression="deflate",
        predictor="horizontal",
        level=3,
        keep="none",
    )


def encode_dzi(image, target: Path) -> None:
    # 254 and a border of 1 are what Deep Zoom tools make and viewers assume: files of 256×256, and smoothing across the
    # seams. The tiles lie in <stem>_files beside the descriptor.
    image.dzsave(
        str(target.with_suffix("")),
        tile_size=254,
        overlap=1,
        depth="onepixel",
        region_shrink="mean",
        suffix=".png[compression=3,filter=up]",
        keep="none",
    )
    # It holds the date, and would make equal pictures differ.
    (target.with_name(f"{target.stem}_files") / "vips-properties.xml").unlink(missing_ok=True)


FORMATS: dict[str, Callable] = {"png": encode_png, "webp": encode_webp, "tiff": encode_tiff, "dzi": encode_dzi}
SUFFIXES = {"png": ".png", "webp": ".webp", "tiff": ".tif", "dzi": ".dzi"}


def guess_format(size: tuple[int, int]) -> str:
    """The format for a picture of `size` = (height, width): PNG while common viewers open it, beyond that TIFF."""
    return "png" if size[0] * size[1] <= PNG_PIXELS else "tiff"


def check_format(format: str, size: tuple[int, int], channels: int) -> None:
    """Raises UserError when a picture of `size` = (height, width) cannot be a file of this format."""
    if format not in FORMATS:
        raise UserError(f"{format!r} is no format; choose {', '.join(FORMATS)}")
    if channels not in (1, 3, 4):
        raise UserError(f"a picture of {channels} channels cannot be written; grey has 1, RGB 3 and RGBA 4")
    if format == "webp" and max(size) > WEBP_SIDE:
        raise UserError(
            f"a WebP file ends at {WEBP_SIDE} pixels per side, the picture has {size[1]}x{size[0]}; "
            f"choose {' or '.join(name for name in FORMATS if name != 'webp')}"
        )
    vips()


def vips():
    """The module pyvips. Raises UserError when it, or the library behind it, is missing."""
    try:
        import pyvips
    except (ImportError, OSError) as error:
        raise UserError(
            f"writing pictures needs pyvips ({error}); install it with: pip install pyvips pyvips-binary"
        ) from error
    pyvips.cache_set_max(0)  # nothing is computed twice here; a cache would keep pixels and files
    return pyvips


def vips_reason(error) -> str:
    """What went wrong in libvips, in a few words if it was the system that refused."""
    refusal = re.search(r"system error: (.+)", str(error))
    return refusal[1] if refusal else " ".join(str(error).split())


class Canvas:
    """The pixels of an unfinished picture, and which of its tiles are done.

    One process creates it; others open it after that. Each writes tiles that no other writes, then closes it; after
    the last has closed, one finishes it.
    """

    @classmethod
    def create(
        cls, path: Path, *, size: tuple[int, int], channels: int, tiles: int, job: dict, format: str, resume: bool
    ) -> "Canvas":
        """A canvas for the file `path` in `format`, size = (height, width), to be filled by `tiles` tiles.

        job: plain JSON values, everything that the pixels depend on, the places of the tiles too.
        resume: go on with `<path>.part` if there is one; otherwise it is removed.
        Raises UserError when the format cannot hold the picture, the disk cannot, or the part is of another job or
        broken.
        """
        path = Path(path)
        check_format(format, size, channels)
        folder = start(path, job, resume)
        allocate(path, size, channels, tiles)
        shutil.rmtree(folder / "encoding", ignore_errors=True)
        return cls(path, size=size, channels=channels, tiles=tiles, job=job, format=format)

    def __init__(self, path: Path, *, size: tuple[int, int], channels: int, tiles: int, job: dict, format: str):
        """Opens the canvas that another process created, with the same arguments. Raises UserError as `create`."""
        self.path, self.size, self.channels, self.format = Path(path), size, channels, format
        self.folder = part(self.path)
        check(self.path, job)
        self._tiles = tiles
        self._start = len(tiff_header(size, channels))
        for name, length in (("pixels.tif", self._start + size[0] * size[1] * channels), ("done", tiles)):
            found = file_size(self.folder / name)
            if found != length:
                raise broken(self.path, f"{name} has {found} bytes and not {length}")
        self._pixels = os.open(self.folder / "pixels.tif", os.O_RDWR)
        self._marks = os.open(self.folder / "done", os.O_RDWR)
        self._lock = threading.Lock()
        self._unmarked: list[int] = []
        self._flushed = time.monotonic()

    @property
    def done(self) -> np.ndarray:
        """[tiles] bool: which tiles are on disk, whoever wrote them. Tiles written since the last flush are not."""
        return np.fromfile(self.folder / "done", np.uint8) == 1

    def write(self, index: int, rows: slice, cols: slice, pixels: np.ndarray) -> None:
        """Puts tile `index` at its place. pixels uint8 [h,w,C] for h rows and w columns; any thread may call.

        Raises UserError when the disk is full.
        """
        (height, width), channels = self.size, self.channels
        shape = (rows.stop - rows.start, cols.stop - cols.start, channels)
        if not 0 <= index < self._tiles:
            raise ValueError(f"there is no tile {index}, the picture has {self._tiles}")
        if not (0 <= rows.start < rows.stop <= height and 0 <= cols.start < cols.stop <= width):
            raise ValueError(f"tile {index} at rows {rows}, columns {cols} is not inside {height} x {width}")
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f"tile {index} needs uint8 {shape}, got {pixels.dtype} {pixels.shape}")
        pixels = np.ascontiguousarray(pixels)
        # Whole rows of the picture lie one after the other, and are written at once.
        pieces = [pixels] if shape[1] == width else pixels
        with writing(self.path):
            for row, piece in enumerate(pieces, rows.start):
                write_all(self._pixels, piece.reshape(-1), self._start + (row * width + cols.start) * channels)
        with self._lock:
            self._unmarked.append(index)
            due = time.monotonic() - self._flushed > FLUSH_SECONDS
        if due:
            self.flush()

    def flush(self) -> None:
        """Waits until all pixels written so far are on disk, and only then marks their tiles as done."""
        with self._lock:
            tiles, self._unmarked = self._unmarked, []
            self._flushed = time.monotonic()
        if not tiles:
            return
        with writing(self.path):
            os.fsync(self._pixels)
            for index in tiles:
                write_all(self._marks, b"\1", index)
            os.fsync(self._marks)

    def finish(self) -> None:
        """Encodes the picture, gives it its name and removes the unfinished state. Closes the canvas.

        Raises UserError when it cannot be written: all tiles are kept then, and the former file of this name too.
        """
        self.close()
        missing = np.flatnonzero(~self.done)
        if len(missing):
            raise ValueError(f"{self.path}: {len(missing)} tiles are not written, the first is {missing[0]}")
        folder = self.folder / "encoding"
        encoded = folder / f"picture{SUFFIXES[self.format]}"
        with writing(self.path):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir()
        try:
            self._encode(encoded)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)  # on a full disk this is the room that the next try needs
            if isinstance(error, vips().Error):
                raise interrupted(self.path, vips_reason(error)) from error
            raise
        if self.format == "dzi":
            with writing(self.path):
                self._publish_tiles(folder)
        publish(encoded, self.path)

    def _encode(self, target: Path) -> None:
        pyvips = vips()
        # libvips reads a TIFF a strip at a time; files without a header it maps whole, 0.8 GB of memory at 16384².
        image = pyvips.Image.tiffload(str(self.folder / "pixels.tif"), access="sequential", fail_on="truncated")
        # 300 dots per inch, as printers ask for; libvips would say 25.4.
        image = image.copy(xres=300 / 25.4, yres=300 / 25.4)
        image.set_progress(True)
        stopped = threading.Event()

        def tick(_, done):
            bar.update(max(0, done.percent - bar.n))
            if stopped.is_set():
                image.set_kill(True)  # the encoder ends within a few rows; before its first row it would not heed this

        with progress(None, desc=f"encoding {self.path.name}", total=100, unit="%") as bar:
            image.signal_connect("eval", tick)
            # In a thread, because Ctrl-C reaches Python only outside of libvips.
            with ThreadPoolExecutor(1) as thread:
                try:
                    thread.submit(FORMATS[self.format], image, target).result()
                except BaseException:
                    stopped.set()  # and leaving the block waits for the encoder
                    raise

    def _publish_tiles(self, folder: Path) -> None:
        """Swaps the tiles of a Deep Zoom picture; those of the former one go with the unfinished state."""
        new, former = folder / "picture_files", self.path.with_name(self.path.stem + "_files")
        os.sync()  # thousands of small files
        if former.exists():
            os.replace(former, folder / "former_files")
        os.replace(new, former)

    def close(self) -> None:
        """Flushes and lets the files go. The unfinished picture stays, to be finished or resumed."""
        if self._pixels is None:
            return
        try:
            self.flush()
        finally:
            os.close(self._pixels)
            os.close(self._marks)
            self._pixels = self._marks = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def tiff_header(size: tuple[int, int], channels: int) -> bytes:
    """What stands before the pixels [H,W,C] uint8 in an uncompressed BigTIFF of size = (height, width)."""
    height, width = size
    strips = -(-height // STRIP_ROWS)
    row = width * channels
    short, long, long8 = 3, 4, 16
    entries = 9 + (channels == 4)
    tables = 16 + 8 + 20 * entries + 8  # the file's header, then the directory: its length, its entries, no next one
    start = tables + 16 * strips
    offsets = [start + i * STRIP_ROWS * row for i in range(strips)]
    lengths = [min(STRIP_ROWS, height - i * STRIP_ROWS) * row for i in range(strips)]
    tags = [
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, channels, sum(8 << 16 * i for i in range(channels))),  # bits of each channel
        (259, short, 1, 1),  # not compressed
        (262, short, 1, 1 if channels == 1 else 2),  # grey or RGB
        (273, long8, strips, offsets[0] if strips == 1 else tables),  # a table of one entry stands in its place
        (277, short, 1, channels),
        (278, long, 1, STRIP_ROWS),
        (279, long8, strips, lengths[0] if strips == 1 else tables + 8 * strips),
    ]
    if channels == 4:
        tags.append((338, short, 1, 2))  # alpha that the colours are not multiplied by
    directory = b"".join(struct.pack("<HHQQ", *tag) for tag in tags)
    return struct.pack(f"<2sHHHQQ{20 * entries}sQ", b"II", 43, 8, 0, 16, entries, directory, 0) + struct.pack(
        f"<{2 * strips}Q", *offsets, *lengths
    )


def allocate(path: Path, size: tuple[int, int], channels: int, tiles: int) -> None:
    """Reserves the disk for the pixels, so that a full disk shows before the work. Keeps what is there already."""
    pixels, marks = part(path) / "pixels.tif", part(path) / "done"
    header = tiff_header(size, channels)
    length = len(header) + size[0] * size[1] * channels
    if marks.exists() and (file_size(marks) == tiles or any(marks.read_bytes())):
        return  # resumed; if tiles are lost, the canvas says that it is broken
    try:
        with open(pixels, "wb") as file:
            reserve(file.fileno(), length)
            file.write(header)
        marks.write_bytes(bytes(tiles))
    except OSError as error:
        discard(part(path))
        free = shutil.disk_usage(path.parent).free
        raise UserError(
            f"cannot write {path}: {error.strerror}; its pixels need {length:,} bytes and {path.parent} has "
            f"{free:,} free; make room, or choose another directory"
        ) from error


def reserve(handle: int, length: int) -> None:
    """Makes a file `length` bytes long, with blocks of the disk behind it where the system can."""
    try:
        return os.posix_fallocate(handle, 0, length)
    except AttributeError:  # macOS
        pass
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some network file systems
            raise
    return os.ftruncate(handle, length)


def write_all(handle: int, data, offset: int) -> None:
    """Writes bytes at `offset` of a file; one call of the system writes 2 GiB at most, and less on a full disk."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def file_size(path: Path) -> int:
    """In bytes; 0 for a missing file."""
    return path.stat().st_size if path.exists() else 0
