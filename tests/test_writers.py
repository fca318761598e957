"""Laws of images larger than memory: rendering/writers.py and rendering/unfinished.py."""

import errno
import fcntl
import itertools
import os
import signal
import sys
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import folder_contents
from helpers import files_up_to
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dnnlib.console import UserError
from rendering import writers
from rendering.grid import Box
from rendering.writers import FORMATS, Canvas, choose_format

JOB = {"network": "cafe", "seed": 3, "window": [0.0, 0.25, 1.0, 0.5], "tile": 16}
SUFFIXES = [known.suffix for known in FORMATS.values()]
each_suffix = pytest.mark.parametrize("suffix", SUFFIXES)
each_count = pytest.mark.parametrize("channels", [1, 3, 4])


def image(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [H,W,C]: waves and noise."""
    rng = np.random.default_rng(seed)
    waves = 128 + 100 * np.sin(np.arange(height) / 9)[:, None, None] * np.cos(np.arange(width) / 7)[None, :, None]
    return (waves + rng.integers(-20, 20, (height, width, channels))).astype(np.uint8)


def tiling(pixels: np.ndarray, height: int, width: int) -> list[Box]:
    bottom, right = pixels.shape[:2]
    return [
        Box(y, min(y + height, bottom), x, min(x + width, right))
        for y in range(0, bottom, height)
        for x in range(0, right, width)
    ]


def canvas(path: Path, pixels: np.ndarray, tiles: int = 1, job: dict = JOB) -> Canvas:
    return Canvas(path, job, size=pixels.shape[:2], channels=pixels.shape[2], tiles=tiles)


def fill(canvas: Canvas, pixels: np.ndarray, boxes: list[Box], order) -> None:
    for index in order:
        canvas.write(int(index), boxes[index], pixels[boxes[index].slices])


def save(path: Path, pixels: np.ndarray, boxes: list[Box] | None = None, order=None, resume: bool = False) -> Path:
    """Write `pixels` to `path`, by default as one tile."""
    boxes = boxes or tiling(pixels, *pixels.shape[:2])
    made = canvas(path, pixels, len(boxes))
    made.start(resume)
    with made:
        fill(made, pixels, boxes, range(len(boxes)) if order is None else order)
    made.finish()
    return path


def read(path: Path) -> np.ndarray:
    """[H,W,C] of a file that Pillow reads."""
    pixels = np.asarray(Image.open(path))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def start_half(path: Path) -> Path:
    """Leave an image of 8×8 whose first tile of two is done. Returns its directory."""
    pixels = image(8, 8)
    made = canvas(path, pixels, 2)
    made.start(False)
    with made:
        fill(made, pixels, tiling(pixels, 4, 8), [0])
    return made.folder


def resume(path: Path, job: dict = JOB, again: bool = True) -> Canvas:
    """Start what `start_half` left, again or anew."""
    made = canvas(path, image(8, 8), 2, job)
    made.start(again)
    with made:
        return made


# Tiles.


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 3, 4])),
    tile=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 2**16),
)
def test_tiles_of_any_shape_in_any_order_by_two_writers_over_two_runs_are_the_image(
    tmp_path_factory, shape, tile, seed
):
    path = tmp_path_factory.mktemp("canvas") / "a.png"
    pixels = image(*shape, seed)
    boxes = tiling(pixels, *tile)
    order = np.random.default_rng(seed).permutation(len(boxes))
    half = len(boxes) // 2
    first, second = canvas(path, pixels, len(boxes)), canvas(path, pixels, len(boxes))
    first.start(resume=False)
    with first:
        fill(first, pixels, boxes, order[:half])
    first.start(resume=True)
    missing = first.missing
    assert sorted(missing) == sorted(order[half:])
    with first, second:
        fill(first, pixels, boxes, missing[::2])
        fill(second, pixels, boxes, missing[1::2])
    # The unfinished image is a TIFF that other programs read.
    np.testing.assert_array_equal(tifffile.imread(first.pixels).reshape(pixels.shape), pixels)
    first.finish()
    np.testing.assert_array_equal(read(path), pixels)
    assert [p.name for p in path.parent.glob("[!.]*")] == ["a.png"]


def test_a_tile_is_marked_only_after_its_pixels_are_on_disk(tmp_path, monkeypatch):
    pixels = image(8, 8)
    made = canvas(tmp_path / "a.png", pixels, 2)
    made.start(False)
    events, fsync, pwrite = [], os.fsync, os.pwrite

    def name(handle):
        return Path(os.readlink(f"/proc/self/fd/{handle}")).stem

    with made, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (events.append(f"sync {name(file)}"), fsync(file)))
        patch.setattr(os, "pwrite", lambda file, *rest: (events.append(f"write {name(file)}"), pwrite(file, *rest))[1])
        fill(made, pixels, tiling(pixels, 4, 8), [0, 1])
        assert len(made.missing) == 2
        made.flush()
    assert events == ["write pixels"] * 2 + ["sync pixels"] + ["write done"] * 2 + ["sync done"]
    assert len(made.missing) == 0


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:100], offset))
    pixels = image(20, 30)
    np.testing.assert_array_equal(read(save(tmp_path / "a.png", pixels)), pixels)


def test_tiles_are_flushed_every_few_seconds(tmp_path, monkeypatch):
    pixels = image(8, 8)
    boxes, made = tiling(pixels, 2, 8), canvas(tmp_path / "a.png", pixels, 4)
    made.start(False)
    with made:
        fill(made, pixels, boxes, [0, 1])
        assert len(made.missing) == 4
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + writers.FLUSH_SECONDS + 1)
        fill(made, pixels, boxes, [2])
        assert made.missing.tolist() == [3]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda c, p: c.write(0, Box(0, 4, 0, 9), p[:4]),
        lambda c, p: c.write(0, Box(0, 4, 0, 8), p),
        lambda c, p: c.write(0, Box(0, 4, 0, 8), p[:4].astype(float)),
        lambda c, p: c.write(2, Box(0, 4, 0, 8), p[:4]),
        lambda c, p: c.write(-1, Box(0, 4, 0, 8), p[:4]),
        lambda c, p: c.finish(),
    ],
)
def test_wrong_use_is_an_error(tmp_path, wrong):
    made = canvas(tmp_path / "a.png", image(8, 8), 2)
    made.start(False)
    with made, pytest.raises(ValueError, match=r"tile|parts"):
        wrong(made, image(8, 8))


# Formats.


@pytest.mark.parametrize(("size", "channels"), [((1, 1), 1), ((15, 600), 3), ((700, 530), 4)])
def test_png_holds_the_image(tmp_path, size, channels):
    pixels = image(*size, channels)
    path = save(tmp_path / "a [b] é.c.png", pixels)
    found = Image.open(path)
    assert found.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    assert round(found.info["dpi"][0]) == 300
    assert set(found.info) == {"dpi"}
    np.testing.assert_array_equal(read(path), pixels)


@each_count
def test_webp_is_near_the_image(tmp_path, channels):
    ramp = np.linspace(0, 255, 300)
    pixels = np.stack([np.add.outer(ramp[:200] * a, ramp * (1 - a)) for a in (0.2, 0.5, 0.8, 1)][:channels], -1)
    found = Image.open(save(tmp_path / "a.webp", pixels.astype(np.uint8)))
    assert found.size == (300, 200)
    found = np.asarray(found.convert("RGBA"))[..., :channels].astype(float)
    seen = slice(None) if channels < 4 else pixels[..., 3] > 0  # colours that cannot be seen are not kept
    assert ((found - pixels)[seen] ** 2).mean() < 255**2 / 10**4  # 40 dB


@pytest.mark.parametrize(("size", "channels"), [((1, 1), 4), ((513, 40), 1), ((1030, 1541), 3), ((1030, 1541), 4)])
def test_tiff_holds_the_image_and_its_halves(tmp_path, size, channels):
    pixels = image(*size, channels)
    path = save(tmp_path / "a.tif", pixels)
    with tifffile.TiffFile(path) as file:
        pages = list(file.pages)
        assert file.is_bigtiff
        for page in pages:
            assert page.is_tiled
            assert page.tile == (512, 512)
            assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
            assert page.extrasamples == ((2,) if channels == 4 else ())
        assert all(page.is_reduced for page in pages[1:])
        assert "DateTime" not in pages[0].tags
        levels = [page.asarray().reshape(page.imagelength, page.imagewidth, channels) for page in pages]
    np.testing.assert_array_equal(levels[0], pixels)
    np.testing.assert_array_equal(read(path), pixels)  # what Pillow reads is the first page
    for above, level in itertools.pairwise(levels):
        height, width = (n // 2 for n in above.shape[:2])
        assert level.shape[:2] == (height, width)
        if channels < 4:
            boxes = above[: 2 * height, : 2 * width].reshape(height, 2, width, 2, channels).astype(float)
            assert np.abs(level - boxes.mean((1, 3))).max() <= 1
    assert max(levels[-1].shape[:2]) <= 512 or min(levels[-1].shape[:2]) == 1
    assert max(pages[-2].shape[:2]) > 512 if len(pages) > 1 else max(size) <= 513


@pytest.mark.parametrize(("size", "channels"), [((1, 1), 4), ((254, 255), 1), ((600, 777), 3)])
def test_deep_zoom_holds_the_image_at_every_level(tmp_path, size, channels):
    pixels = image(*size, channels)
    descriptor = ET.parse(save(tmp_path / "a.b.dzi", pixels)).getroot()
    folder = tmp_path / "a.b_files"
    assert [descriptor.get(k) for k in ("Format", "Overlap", "TileSize")] == ["png", "1", "254"]
    assert {k: int(v) for k, v in descriptor[0].attrib.items()} == {"Height": size[0], "Width": size[1]}
    (height, width), depth = size, int(np.ceil(np.log2(max(size))))
    for level in range(depth, -1, -1):
        columns, rows = (-(-n // 254) for n in (width, height))
        assert set(folder_contents(folder / str(level))) == {
            f"{x}_{y}.png" for x in range(columns) for y in range(rows)
        }
        whole = np.zeros((height, width, channels), np.uint8)
        for x, y in itertools.product(range(columns), range(rows)):
            top, left = max(254 * y - 1, 0), max(254 * x - 1, 0)
            bottom, right = min(254 * y + 255, height), min(254 * x + 255, width)
            tile = read(folder / str(level) / f"{x}_{y}.png")
            assert tile.shape == (bottom - top, right - left, channels)
            whole[top:bottom, left:right] = tile
        if level == depth:
            np.testing.assert_array_equal(whole, pixels)
        height, width = -(-height // 2), -(-width // 2)
    assert whole.shape == (1, 1, channels)
    assert {p.name for p in folder.iterdir()} == {str(level) for level in range(depth + 1)}


@each_suffix
def test_equal_pixels_give_equal_bytes(tmp_path, start, suffix):
    pixels = image(400, 600)
    boxes = tiling(pixels, 64, 90)
    for name, order in (("one", range(len(boxes))), ("two", reversed(range(len(boxes))))):
        (tmp_path / name).mkdir()
        save(tmp_path / name / f"a{suffix}", pixels, boxes, order)
    assert folder_contents(tmp_path / "one") == folder_contents(tmp_path / "two")
    if suffix == ".tif":  # libvips reads its number of threads when it starts; one format is enough: it takes seconds
        script = f"import test_writers as t; t.save(t.Path({str(tmp_path / 'three' / 'a.tif')!r}), t.image(400, 600))"
        process = start("-c", script, VIPS_CONCURRENCY="7")
        assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)
        assert folder_contents(tmp_path / "three") == folder_contents(tmp_path / "one")


def test_large_images_are_tiffs():
    assert [choose_format((8192, width)) for width in (8192, 8193)] == ["png", "tiff"]


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    umask = os.umask(0o027)
    try:
        for suffix in SUFFIXES:
            save(tmp_path / f"a{suffix}", image(9, 9))
    finally:
        os.umask(umask)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > len(SUFFIXES)
    assert {p.stat().st_mode & 0o777 for p in files} == {0o640}


# Resuming.

KILLED = """
import time
from pathlib import Path
import test_writers as t
made = t.canvas(Path({path!r}), t.image(40, 30), 10)
made.start(resume=False)
t.writers.FLUSH_SECONDS = 0
with made:
    t.fill(made, t.image(40, 30), t.tiling(t.image(40, 30), 4, 30), range({tiles}))
    if {tiles} < 10:
        print("now", flush=True)
        time.sleep(60)
def encode(image, target):
    target.write_bytes(b"half")
    print("now", flush=True)
    time.sleep(60)
made.format = made.format._replace(encode=encode)
made.finish()
"""


@pytest.mark.parametrize("tiles", [4, 10])
def test_a_killed_run_is_resumed_to_the_same_bytes(tmp_path, start, tiles):
    pixels, path = image(40, 30), tmp_path / "a.png"
    expected = save(tmp_path / "whole.png", pixels).read_bytes()
    path.write_bytes(b"former")
    process = start("-c", KILLED.format(path=str(path), tiles=tiles))
    assert process.stdout.readline() == "now\n"
    process.kill()
    process.communicate(timeout=60)
    assert path.read_bytes() == b"former"
    made = canvas(path, pixels, 10)
    made.start(resume=True)
    assert made.missing.tolist() == list(range(tiles, 10))
    save(path, pixels, tiling(pixels, 4, 30), range(tiles, 10), resume=True)
    assert path.read_bytes() == expected
    assert not made.folder.exists()


def test_what_an_earlier_version_left_is_resumed(tmp_path):
    """It wrote its TIFF headers by hand: pixels began elsewhere, after the same rows."""
    pixels, folder = image(8, 8), start_half(tmp_path / "a.png")
    first_half = np.where(np.arange(8)[:, None, None] < 4, pixels, 0)
    tifffile.imwrite(folder / "pixels.tif", first_half, bigtiff=True, metadata=None, software="long ago" * 9)
    save(tmp_path / "a.png", pixels, tiling(pixels, 4, 8), [1], resume=True)
    np.testing.assert_array_equal(read(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize("name", ["a.png", "deep/b.png"])
def test_it_starts_anew_without_resume_or_without_anything_to_resume(tmp_path, name):
    start_half(tmp_path / "a.png")
    assert len(resume(tmp_path / name, again=name != "a.png").missing) == 2


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (JOB | {"seed": 4}, "seed = 3, and now seed is 4"),
        (JOB | {"window": (0.0, 0.0, 1.0, 1.0)}, r"window = \[0.0, 0.25, 1.0, 0.5\], and now window is \[0.0, 0.0"),
        (JOB | {"dtype": "half"}, 'dtype = not given, and now dtype is "half"'),
        ({k: v for k, v in JOB.items() if k != "tile"}, "tile = 16, and now tile is not given"),
    ],
)
def test_only_an_equal_job_resumes(tmp_path, job, words):
    before = folder_contents(start_half(tmp_path / "a.png"))
    with pytest.raises(UserError, match=words):
        resume(tmp_path / "a.png", job)
    assert folder_contents(tmp_path / "a.png.part") == before
    assert resume(tmp_path / "a.png", JOB | {"window": tuple(JOB["window"])}).missing.tolist() == [1]


@pytest.mark.parametrize(
    ("breaking", "words"),
    [
        (lambda folder: (folder / "job.json").write_text("{"), "job.json"),
        (lambda folder: (folder / "job.json").write_text("[]"), "job.json"),
        (lambda folder: (folder / "job.json").unlink(), "job.json"),
        (lambda folder: (folder / "pixels.tif").unlink(), "pixels.tif"),
        (lambda folder: os.truncate(folder / "pixels.tif", 99), "cannot be read"),
        (lambda folder: os.truncate(folder / "pixels.tif", 400), "pixels.tif has 400 bytes"),
        (lambda folder: os.truncate(folder / "done", 1), "done has 1 bytes instead of 2"),
    ],
)
def test_a_broken_part_is_a_sentence(tmp_path, breaking, words):
    breaking(start_half(tmp_path / "a.png"))
    with pytest.raises(UserError, match=r"a\.png\.part is broken.*start over without resume") as caught:
        resume(tmp_path / "a.png")
    assert words in str(caught.value)
    resume(tmp_path / "a.png", again=False)


@pytest.mark.parametrize("names", [[], [".job-x.tmp.json"], ["job.json"], ["job.json", "pixels.tif"]])
def test_a_run_killed_before_its_first_tile_does_not_stand_in_the_way(tmp_path, names):
    folder = start_half(tmp_path / "a.png")
    for entry in folder.iterdir():
        if entry.name not in names:
            entry.unlink()
    if names and names[0].startswith("."):
        (folder / names[0]).write_text("")
    assert len(resume(tmp_path / "a.png").missing) == 2


@pytest.mark.parametrize("removals", range(3))
def test_a_removal_killed_on_the_way_leaves_what_can_be_resumed(tmp_path, monkeypatch, removals):
    start_half(tmp_path / "a.png")
    remaining, unlink = [removals], Path.unlink

    def dying_unlink(*arguments, **options):
        remaining[0] -= 1
        if remaining[0] < 0:
            raise KeyboardInterrupt
        unlink(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying_unlink)
        with pytest.raises(KeyboardInterrupt):
            canvas(tmp_path / "a.png", image(8, 8), 2).discard()
    resume(tmp_path / "a.png")


def test_a_file_has_one_writer_at_a_time(tmp_path):
    pixels = image(8, 8)
    one, other = canvas(tmp_path / "a.png", pixels), canvas(tmp_path / "a.png", pixels)
    with one.alone():
        one.start(False)
        with pytest.raises(UserError, match="another command"), other.alone():
            pass
    with other.alone():
        other.start(False)


def test_what_one_writes_again_another_that_resumes_leaves_alone(tmp_path):
    path = save(tmp_path / "a.png", image(8, 8))
    one, other = canvas(path, image(8, 8)), canvas(path, image(8, 8))
    with one.alone():
        with pytest.raises(UserError, match="another command"):
            other.finished()
        assert one.folder.exists()
    assert other.finished()
    assert not one.folder.exists()


def test_a_directory_that_another_removes_before_it_is_locked_is_made_and_locked_again(tmp_path, monkeypatch):
    one, other = (canvas(tmp_path / "a.png", image(8, 8)) for _ in range(2))
    flock = fcntl.flock

    def overtaken(handle: int, how: int) -> None:
        monkeypatch.undo()
        one.folder.rmdir()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", overtaken)
    with one.alone():
        one.start(False)
        with pytest.raises(UserError, match="another command"), other.alone():
            pass


# Failures.


def failing(number: int):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_disk_too_full_for_the_pixels_is_a_sentence_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"former")
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with pytest.raises(UserError, match=r"No space left.* need 192 bytes and .* has [\d,]+ free"):
        canvas(tmp_path / "a.png", image(8, 8)).start(False)
    assert folder_contents(tmp_path) == {"a.png": b"former"}


@pytest.mark.parametrize("refusal", [failing(errno.EOPNOTSUPP), None])
def test_a_file_system_that_cannot_reserve_will_do(tmp_path, monkeypatch, refusal):
    if refusal:
        monkeypatch.setattr(os, "posix_fallocate", refusal)
    else:
        monkeypatch.delattr(os, "posix_fallocate")
    pixels = image(30, 20)
    np.testing.assert_array_equal(read(save(tmp_path / "a.png", pixels)), pixels)


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_fills_up_keeps_the_finished_tiles(tmp_path, monkeypatch, call):
    pixels = image(8, 8)
    (tmp_path / "a.png").write_bytes(b"former")
    start_half(tmp_path / "a.png")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(errno.ENOSPC))
        with pytest.raises(UserError, match=r"No space left on device; .* kept in .*a\.png\.part.* resume"):
            save(tmp_path / "a.png", pixels, tiling(pixels, 4, 8), [1], resume=True)
    made = resume(tmp_path / "a.png")
    assert made.missing.tolist() == [1]
    assert (tmp_path / "a.png").read_bytes() == b"former"
    save(tmp_path / "a.png", pixels, tiling(pixels, 4, 8), [1], resume=True)
    np.testing.assert_array_equal(read(tmp_path / "a.png"), pixels)


def test_a_disk_that_fills_up_while_encoding_keeps_all_tiles_and_the_former_file(tmp_path):
    for suffix in SUFFIXES:
        (tmp_path / f"a{suffix}").write_bytes(b"former")
    (tmp_path / "a_files").mkdir()
    (tmp_path / "a_files" / "former").write_bytes(b"tile")
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for suffix in SUFFIXES:
        a, b = (canvas(tmp_path / f"{name}{suffix}", pixels) for name in "ab")
        a.start(False)
        with a:
            fill(a, pixels, tiling(pixels, 200, 200), [0])
        with files_up_to(20_000):
            with pytest.raises(UserError, match=r"File too large; .* kept in .* resume"):
                a.finish()
            with pytest.raises(UserError, match="File too large; its pixels need"):
                b.start(False)
    assert folder_contents(tmp_path / "a_files") == {"former": b"tile"}
    for suffix in SUFFIXES:
        path = tmp_path / f"a{suffix}"
        assert path.read_bytes() == b"former"
        assert not (tmp_path / f"b{suffix}.part").exists()
        made = canvas(path, np.zeros((200, 200, 3), np.uint8))
        assert {p.name for p in made.folder.iterdir()} == {"job.json", "pixels.tif", "done"}
        made.start(resume=True)
        assert not len(made.missing)
        made.finish()
    assert (tmp_path / "a_files" / "0" / "0_0.png").exists()
    assert not (tmp_path / "a_files" / "former").exists()
    assert not list(tmp_path.glob("*.part"))


@each_suffix
def test_ctrl_c_while_encoding_keeps_all_tiles_and_the_former_file(tmp_path, suffix):
    path, pixels, stopped = tmp_path / f"a{suffix}", image(1200, 1200), []
    path.write_bytes(b"former")
    made = canvas(path, pixels)
    encode = made.format.encode

    def press_and_encode(image, target):
        time.sleep(0.1)  # until the main thread waits
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.1)
        try:
            encode(image, target)
        except writers.import_vips().Error as error:
            stopped.append(error)

    made.format = made.format._replace(encode=press_and_encode)
    made.start(False)
    with made:
        fill(made, pixels, tiling(pixels, 1200, 1200), [0])
    with pytest.raises(KeyboardInterrupt):
        made.finish()
    assert stopped
    assert path.read_bytes() == b"former"
    assert {p.name for p in tmp_path.iterdir()} == {path.name, made.folder.name}
    assert {p.name for p in made.folder.iterdir()} == {"job.json", "pixels.tif", "done"}
    canvas(path, pixels).finish()
    assert path.read_bytes() != b"former"


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("a.webp", (10, 16384, 3), "16383 pixels per side, and the image has 16384x10; choose png or tiff or dzi"),
        ("a.gif", (10, 10, 3), "ends in .png, .webp, .tif, .dzi"),
        ("a.png", (10, 10, 2), "2 channels"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_the_work(tmp_path, name, shape, words):
    with pytest.raises(UserError, match=words):
        canvas(tmp_path / name, np.zeros(shape, np.uint8))


def test_without_pyvips_a_sentence_comes_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(UserError, match="pip install pyvips"):
        canvas(tmp_path / "a.png", image(8, 8))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file/a.png", "directory that you may"),
        ("dir.png", "a directory has this name"),
        ("pipe.png", "a pipe or device has this name"),
        ("null.png", "/dev/null: a pipe or device has this name"),
        ("b.png", r"b\.png\.part"),
    ],
)
def test_names_that_cannot_be_written_are_sentences(tmp_path, name, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "dir.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "null.png").symlink_to(os.devnull)
    (tmp_path / "b.png.part").write_text("mine")
    with pytest.raises(UserError, match=rf"cannot write.*{words}"):
        canvas(tmp_path / name, image(8, 8)).start(False)
    assert (tmp_path / "b.png.part").read_text() == "mine"
