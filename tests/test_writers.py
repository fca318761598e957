"""Laws of pictures larger than memory: rendering/writers.py."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dnnlib.console import UserError
from rendering import writers
from rendering.writers import SUFFIXES, Canvas, guess_format

pyvips = pytest.importorskip("pyvips")

JOB = {"network": "cafe", "seed": 3, "window": [0.0, 0.25, 1.0, 0.5], "tile": 16}
LOSSLESS = ["png", "tiff", "dzi"]


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [H,W,C]: waves and noise."""
    random = np.random.default_rng(seed)
    waves = 128 + 100 * np.sin(np.arange(height) / 9)[:, None, None] * np.cos(np.arange(width) / 7)[None, :, None]
    return (waves + random.integers(-20, 20, (height, width, channels))).astype(np.uint8)


def tiling(height: int, width: int, tile_height: int, tile_width: int) -> list[tuple[slice, slice]]:
    return [
        (slice(top, min(top + tile_height, height)), slice(left, min(left + tile_width, width)))
        for top in range(0, height, tile_height)
        for left in range(0, width, tile_width)
    ]


def create(path: Path, pixels: np.ndarray, tiles: int = 1, job: dict = JOB, resume: bool = False, format: str = "png"):
    height, width, channels = pixels.shape
    return Canvas.create(
        path, size=(height, width), channels=channels, tiles=tiles, job=job, format=format, resume=resume
    )


def fill(canvas: Canvas, pixels: np.ndarray, tiles: list[tuple[slice, slice]], order) -> None:
    for index in order:
        canvas.write(int(index), *tiles[index], pixels[tiles[index]])


def save(path: Path, pixels: np.ndarray, format: str) -> Path:
    """The picture as one tile, in `path` with the suffix of its format."""
    path = path.with_name(path.name + SUFFIXES[format])
    canvas = create(path, pixels, format=format)
    fill(canvas, pixels, [(slice(0, pixels.shape[0]), slice(0, pixels.shape[1]))], [0])
    canvas.finish()
    return path


def read(path: Path) -> np.ndarray:
    """[H,W,C] of a file that Pillow reads."""
    pixels = np.asarray(Image.open(path))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Canvas.


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    channels=st.sampled_from([1, 3, 4]),
    tile=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 2**16),
)
def test_tiles_of_any_shape_in_any_order_by_two_writers_over_two_runs_are_the_picture(
    tmp_path_factory, height, width, channels, tile, seed
):
    path = tmp_path_factory.mktemp("canvas") / "a.png"
    pixels = picture(height, width, channels, seed)
    tiles = tiling(height, width, *tile)
    order = np.random.default_rng(seed).permutation(len(tiles))
    half = len(tiles) // 2
    with create(path, pixels, len(tiles)) as canvas:
        fill(canvas, pixels, tiles, order[:half])
    with create(path, pixels, len(tiles), resume=True) as first:
        second = Canvas(
            path, size=(height, width), channels=channels, tiles=len(tiles), job=JOB, format="png"
        )  # as another process opens it
        todo = np.flatnonzero(~first.done)
        assert sorted(todo) == sorted(order[half:])
        fill(first, pixels, tiles, todo[::2])
        fill(second, pixels, tiles, todo[1::2])
        second.close()
        # The unfinished picture is a TIFF that other programs read.
        np.testing.assert_array_equal(tifffile.imread(first.folder / "pixels.tif").reshape(pixels.shape), pixels)
        first.finish()
    np.testing.assert_array_equal(read(path), pixels)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_threads_may_write(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "FLUSH_SECONDS", 0)  # a flush in each call
    pixels = picture(100, 90)
    tiles = tiling(100, 90, 11, 13)
    canvas = create(tmp_path / "a.png", pixels, len(tiles))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: canvas.write(i, *tiles[i], pixels[tiles[i]]), range(len(tiles))))
    canvas.finish()
    np.testing.assert_array_equal(read(tmp_path / "a.png"), pixels)


def test_a_tile_is_marked_only_after_its_pixels_are_on_disk(tmp_path, monkeypatch):
    pixels = picture(8, 8)
    tiles = tiling(8, 8, 4, 8)
    canvas = create(tmp_path / "a.png", pixels, 2)
    events, fsync, pwrite = [], os.fsync, os.pwrite
    names = {canvas._pixels: "pixels", canvas._marks: "marks"}
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(f"sync {names[file]}"), fsync(file)))
    monkeypatch.setattr(
        os, "pwrite", lambda file, *rest: (events.append(f"write {names[file]}"), pwrite(file, *rest))[1]
    )
    fill(canvas, pixels, tiles, [0, 1])
    assert not canvas.done.any()
    canvas.close()
    assert canvas.done.all()
    assert events == ["write pixels"] * 2 + ["sync pixels"] + ["write marks"] * 2 + ["sync marks"]


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:100], offset))
    pixels = picture(20, 30)
    np.testing.assert_array_equal(read(save(tmp_path / "a", pixels, "png")), pixels)


def test_a_flush_is_due_every_few_seconds(tmp_path, monkeypatch):
    pixels, tiles = picture(8, 8), tiling(8, 8, 2, 8)
    with create(tmp_path / "a.png", pixels, 4) as canvas:
        fill(canvas, pixels, tiles, [0, 1])
        assert not canvas.done.any()
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + writers.FLUSH_SECONDS + 1)
        fill(canvas, pixels, tiles, [2])
        assert canvas.done.tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda c, p: c.write(0, slice(0, 4), slice(0, 9), p[:4]),
        lambda c, p: c.write(0, slice(0, 4), slice(0, 8), p),
        lambda c, p: c.write(0, slice(0, 4), slice(0, 8), p[:4].astype(float)),
        lambda c, p: c.write(2, slice(0, 4), slice(0, 8), p[:4]),
        lambda c, p: c.write(-1, slice(0, 4), slice(0, 8), p[:4]),
        lambda c, p: c.finish(),
    ],
)
def test_wrong_use_is_an_error(tmp_path, wrong):
    pixels = picture(8, 8)
    with create(tmp_path / "a.png", pixels, 2) as canvas, pytest.raises(ValueError, match="tile"):
        wrong(canvas, pixels)


# Formats.


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (15, 600), (700, 530)])
def test_png_holds_the_picture(tmp_path, size, channels):
    pixels = picture(*size, channels)
    path = save(tmp_path / "a [b] é.c", pixels, "png")
    image = Image.open(path)
    assert image.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    assert round(image.info["dpi"][0]) == 300
    assert set(image.info) == {"dpi"}
    np.testing.assert_array_equal(read(path), pixels)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_webp_is_near_the_picture(tmp_path, channels):
    ramp = np.linspace(0, 255, 300)
    pixels = np.stack([np.add.outer(ramp[:200] * a, ramp * (1 - a)) for a in (0.2, 0.5, 0.8, 1)][:channels], -1)
    path = save(tmp_path / "a", pixels.astype(np.uint8), "webp")
    image = Image.open(path)
    assert image.size == (300, 200)
    found = np.asarray(image.convert("RGBA"))[..., :channels].astype(float)
    seen = slice(None) if channels < 4 else pixels[..., 3] > 0  # colours that cannot be seen are not kept
    assert ((found - pixels)[seen] ** 2).mean() < 255**2 / 10**4  # 40 dB


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (513, 40), (1030, 1541)])
def test_tiff_holds_the_picture_and_its_halves(tmp_path, size, channels):
    pixels = picture(*size, channels)
    path = save(tmp_path / "a", pixels, "tiff")
    with tifffile.TiffFile(path) as file:
        pages = list(file.pages)
        assert file.is_bigtiff
        assert all(page.is_tiled and page.tile == (512, 512) for page in pages)
        assert all(page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE for page in pages)
        assert all(page.extrasamples == ((2,) if channels == 4 else ()) for page in pages)
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


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (254, 255), (600, 777)])
def test_deep_zoom_holds_the_picture_at_every_level(tmp_path, size, channels):
    pixels = picture(*size, channels)
    path = save(tmp_path / "a.b", pixels, "dzi")
    folder = tmp_path / "a.b_files"
    descriptor = ET.parse(path).getroot()
    assert {k: descriptor.get(k) for k in ("Format", "Overlap", "TileSize")} == {
        "Format": "png",
        "Overlap": "1",
        "TileSize": "254",
    }
    assert {k: int(v) for k, v in descriptor[0].attrib.items()} == {"Height": size[0], "Width": size[1]}
    (height, width), depth = size, int(np.ceil(np.log2(max(size))))
    for level in range(depth, -1, -1):
        files = contents(folder / str(level))
        columns, rows = (-(-n // 254) for n in (width, height))
        assert set(files) == {f"{x}_{y}.png" for x in range(columns) for y in range(rows)}
        whole = np.zeros((height, width, channels), np.uint8)
        for x in range(columns):
            for y in range(rows):
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


@pytest.mark.parametrize("format", list(SUFFIXES))
def test_equal_pixels_give_equal_bytes(tmp_path, monkeypatch, format):
    pixels = picture(400, 600)
    tiles = tiling(400, 600, 64, 90)
    for name, order in (("one", range(len(tiles))), ("two", reversed(range(len(tiles))))):
        path = tmp_path / name / f"a{SUFFIXES[format]}"
        with create(path, pixels, len(tiles), format=format) as canvas:
            fill(canvas, pixels, tiles, order)
            canvas.finish()
    # Libvips takes its number of threads from the environment when it starts.
    command = f"""
from pathlib import Path
from rendering.writers import Canvas
import numpy as np
pixels = np.load({str(tmp_path / "pixels.npy")!r})
canvas = Canvas.create(Path({str(tmp_path / "three")!r}, "a{SUFFIXES[format]}"), size=(400, 600), channels=3, tiles=1,
                       job={{}}, format={format!r}, resume=False)
canvas.write(0, slice(0, 400), slice(0, 600), pixels)
canvas.finish()
"""
    np.save(tmp_path / "pixels.npy", pixels)
    if format == "tiff":  # one of them is enough: it takes seconds
        run(command, VIPS_CONCURRENCY="7")
        assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(
    ("size", "format"), [((1024, 1024), "png"), ((8192, 8192), "png"), ((8192, 8193), "tiff"), ((16384, 16384), "tiff")]
)
def test_large_pictures_are_tiffs(size, format):
    assert guess_format(size) == format


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    umask = os.umask(0o027)
    try:
        for format in SUFFIXES:
            save(tmp_path / "a", picture(9, 9), format)
    finally:
        os.umask(umask)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > len(SUFFIXES)
    assert {p.stat().st_mode & 0o777 for p in files} == {0o640}


# Resuming.


def run(script: str, **environment) -> None:
    subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1], env=os.environ | environment
    )


def kill_when_it_says_so(script: str) -> None:
    """Runs Python code until it prints "now", then kills it."""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "now\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


KILLED = """
import time
import numpy as np
from rendering import writers
pixels = np.load({pixels!r})
writers.FLUSH_SECONDS = 0
canvas = writers.Canvas.create({path!r}, size=(40, 30), channels=3, tiles=10, job={job!r}, format="png", resume=True)
for i in range({tiles}):
    canvas.write(i, slice(4 * i, 4 * i + 4), slice(0, 30), pixels[4 * i : 4 * i + 4])
def encode(image, target):
    target.write_bytes(b"half")
    print("now", flush=True)
    time.sleep(60)
if {tiles} == 10:
    writers.FORMATS["png"] = encode
    canvas.finish()
print("now", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("tiles", [4, 10])
def test_a_killed_run_is_continued_and_gives_the_same_bytes(tmp_path, tiles):
    pixels, path = picture(40, 30), tmp_path / "a.png"
    expected = save(tmp_path / "whole", pixels, "png").read_bytes()
    np.save(tmp_path / "pixels.npy", pixels)
    path.write_bytes(b"former")
    kill_when_it_says_so(KILLED.format(pixels=str(tmp_path / "pixels.npy"), path=str(path), job=JOB, tiles=tiles))
    assert path.read_bytes() == b"former"
    canvas = create(path, pixels, 10, resume=True)
    assert canvas.done.tolist() == [True] * tiles + [False] * (10 - tiles)
    fill(canvas, pixels, tiling(40, 30, 4, 30), range(tiles, 10))
    canvas.finish()
    assert path.read_bytes() == expected
    assert not canvas.folder.exists()


def started(path: Path) -> Path:
    """An unfinished picture whose first tile of two is done. Returns its directory."""
    pixels = picture(8, 8)
    with create(path, pixels, 2) as canvas:
        fill(canvas, pixels, tiling(8, 8, 4, 8), [0])
    return canvas.folder


def test_without_resume_it_starts_anew(tmp_path):
    started(tmp_path / "a.png")
    with create(tmp_path / "a.png", picture(8, 8), 2) as canvas:
        assert not canvas.done.any()


def test_resume_with_nothing_to_resume_starts(tmp_path):
    with create(tmp_path / "deep" / "a.png", picture(8, 8), 2, resume=True) as canvas:
        assert not canvas.done.any()


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (JOB | {"seed": 4}, ["seed = 3", "seed is 4"]),
        (JOB | {"window": (0.0, 0.0, 1.0, 1.0)}, ["window = [0.0, 0.25, 1.0, 0.5]", "window is [0.0, 0.0, 1.0, 1.0]"]),
        (JOB | {"dtype": "half"}, ["dtype = not given", 'dtype is "half"']),
        ({k: v for k, v in JOB.items() if k != "tile"}, ["tile = 16", "tile is not given"]),
    ],
)
def test_another_job_is_refused(tmp_path, job, words):
    before = contents(started(tmp_path / "a.png"))
    with pytest.raises(UserError) as caught:
        create(tmp_path / "a.png", picture(8, 8), 2, job=job, resume=True)
    for word in [*words, "a.png.part", "--resume"]:
        assert word in str(caught.value)
    assert contents(tmp_path / "a.png.part") == before


def test_a_job_with_tuples_is_equal_to_itself(tmp_path):
    for resume in (False, True):
        create(tmp_path / "a.png", picture(8, 8), 2, job={"size": (8, 8)}, resume=resume).close()


@pytest.mark.parametrize(
    ("breaking", "words"),
    [
        (lambda folder: (folder / "job.json").write_text("{"), "job.json"),
        (lambda folder: (folder / "job.json").write_text("[]"), "job.json"),
        (lambda folder: (folder / "job.json").unlink(), "job.json"),
        (lambda folder: (folder / "pixels.tif").unlink(), "pixels.tif has 0 bytes"),
        (lambda folder: os.truncate(folder / "pixels.tif", 99), "pixels.tif has 99 bytes"),
        (lambda folder: os.truncate(folder / "done", 1), "done has 1 bytes and not 2"),
    ],
)
def test_a_broken_part_is_a_sentence(tmp_path, breaking, words):
    breaking(started(tmp_path / "a.png"))
    with pytest.raises(UserError, match=r"a\.png\.part is broken.*remove it, or leave --resume out") as caught:
        create(tmp_path / "a.png", picture(8, 8), 2, resume=True)
    assert words in str(caught.value)
    create(tmp_path / "a.png", picture(8, 8), 2).close()


def test_a_run_killed_before_its_first_tile_does_not_stand_in_the_way(tmp_path):
    for names in [[], [".job-x.tmp.json"], ["job.json"], ["job.json", "pixels.tif"]]:
        folder = started(tmp_path / "a.png")
        for entry in folder.iterdir():
            if entry.name not in names:
                entry.unlink()
        if names and names[0].startswith("."):
            (folder / names[0]).write_text("")
        with create(tmp_path / "a.png", picture(8, 8), 2, resume=True) as canvas:
            assert not canvas.done.any()


@pytest.mark.parametrize("removals", range(4))
def test_a_removal_killed_on_the_way_leaves_what_can_be_resumed(tmp_path, monkeypatch, removals):
    folder = started(tmp_path / "a.png")
    remaining, unlink = [removals], Path.unlink

    def dying_unlink(*arguments, **options):
        remaining[0] -= 1
        if remaining[0] < 0:
            raise KeyboardInterrupt
        unlink(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying_unlink)
        patch.setattr(writers.shutil, "rmtree", lambda *_: dying_unlink(folder / "nothing"))
        with pytest.raises((KeyboardInterrupt, FileNotFoundError)):
            writers.discard(folder)
    create(tmp_path / "a.png", picture(8, 8), 2, resume=True).close()


# Failures.


def failing(number: int):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_disk_too_full_for_the_pixels_is_a_sentence_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"former")
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with pytest.raises(UserError, match=r"No space left.* need [\d,]+ bytes and .* has [\d,]+ free"):
        create(tmp_path / "a.png", picture(8, 8))
    assert contents(tmp_path) == {"a.png": b"former"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("refusal", [failing(errno.EOPNOTSUPP), None])
def test_a_file_system_that_cannot_reserve_will_do(tmp_path, monkeypatch, refusal):
    if refusal:
        monkeypatch.setattr(os, "posix_fallocate", refusal)
    else:
        monkeypatch.delattr(os, "posix_fallocate")
    pixels = picture(30, 20)
    np.testing.assert_array_equal(read(save(tmp_path / "a", pixels, "png")), pixels)


def fill_and_flush(canvas: Canvas, *arguments) -> None:
    fill(canvas, *arguments)
    canvas.flush()


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_fills_up_keeps_the_finished_tiles(tmp_path, monkeypatch, call):
    pixels, tiles = picture(8, 8), tiling(8, 8, 4, 8)
    (tmp_path / "a.png").write_bytes(b"former")
    started(tmp_path / "a.png")
    canvas = create(tmp_path / "a.png", pixels, 2, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(errno.ENOSPC))
        with pytest.raises(UserError, match=r"No space left on device; .* kept in .*a\.png\.part.*--resume"):
            fill_and_flush(canvas, pixels, tiles, [1])
    canvas.close()
    canvas = create(tmp_path / "a.png", pixels, 2, resume=True)
    assert canvas.done.tolist() == [True, False]
    assert (tmp_path / "a.png").read_bytes() == b"former"
    fill(canvas, pixels, tiles, [1])
    canvas.finish()
    np.testing.assert_array_equal(read(tmp_path / "a.png"), pixels)


# Files may not grow beyond 20 kB: as a full disk, but for one process.
FULL = """
import resource
import numpy as np
import pytest
from dnnlib.console import UserError
from rendering.writers import SUFFIXES, Canvas
pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
for format, suffix in SUFFIXES.items():
    made = dict(size=(200, 200), channels=3, tiles=1, job={{}}, format=format, resume=False)
    canvas = Canvas.create(f"{folder}/a{{suffix}}", **made)
    canvas.write(0, slice(0, 200), slice(0, 200), pixels)
    canvas.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
    with pytest.raises(UserError, match="File too large; .* kept in .*--resume"):
        canvas.finish()
    with pytest.raises(UserError, match="File too large; its pixels need"):
        Canvas.create(f"{folder}/b{{suffix}}", **made)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_a_disk_that_fills_up_while_encoding_keeps_all_tiles_and_the_former_file(tmp_path):
    for suffix in SUFFIXES.values():
        (tmp_path / f"a{suffix}").write_bytes(b"former")
    (tmp_path / "a_files").mkdir()
    (tmp_path / "a_files" / "former").write_bytes(b"tile")
    run(FULL.format(folder=tmp_path))
    assert contents(tmp_path / "a_files") == {"former": b"tile"}
    for format, suffix in SUFFIXES.items():
        path = tmp_path / f"a{suffix}"
        assert path.read_bytes() == b"former"
        assert not (tmp_path / f"b{suffix}.part").exists()
        folder = path.with_name(path.name + ".part")
        assert {p.name for p in folder.iterdir()} == {"job.json", "pixels.tif", "done"}
        canvas = Canvas.create(path, size=(200, 200), channels=3, tiles=1, job={}, format=format, resume=True)
        assert canvas.done.all()
        canvas.finish()
    assert (tmp_path / "a_files" / "0" / "0_0.png").exists()
    assert not (tmp_path / "a_files" / "former").exists()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("format", list(SUFFIXES))
def test_ctrl_c_while_encoding_keeps_all_tiles_and_the_former_file(tmp_path, monkeypatch, format):
    encode, path, stopped = writers.FORMATS[format], tmp_path / f"a{SUFFIXES[format]}", []
    path.write_bytes(b"former")

    def press_and_encode(image, target):
        time.sleep(0.1)  # until the main thread waits
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.1)
        try:
            encode(image, target)
        except pyvips.Error as error:
            stopped.append(error)

    monkeypatch.setitem(writers.FORMATS, format, press_and_encode)
    pixels = picture(1200, 1200)
    canvas = create(path, pixels, format=format)
    fill(canvas, pixels, [(slice(0, 1200), slice(0, 1200))], [0])
    with pytest.raises(KeyboardInterrupt):
        canvas.finish()
    assert stopped
    assert path.read_bytes() == b"former"
    assert {p.name for p in tmp_path.iterdir()} == {path.name, canvas.folder.name}
    assert {p.name for p in canvas.folder.iterdir()} == {"job.json", "pixels.tif", "done"}
    monkeypatch.undo()
    create(path, pixels, resume=True, format=format).finish()
    assert path.read_bytes() != b"former"


@pytest.mark.parametrize(
    ("format", "shape", "words"),
    [
        ("webp", (10, 16384, 3), "16383 pixels per side, the picture has 16384x10; choose png or tiff or dzi"),
        ("gif", (10, 10, 3), "choose png, webp, tiff, dzi"),
        ("png", (10, 10, 2), "2 channels"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_the_work(tmp_path, format, shape, words):
    with pytest.raises(UserError, match=words):
        create(tmp_path / "a", np.zeros(shape, np.uint8), format=format)
    assert not list(tmp_path.iterdir())


def test_without_pyvips_a_sentence_comes_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(UserError, match="pip install pyvips"):
        create(tmp_path / "a.png", picture(8, 8))
    assert not list(tmp_path.iterdir())


def test_names_that_cannot_be_written_are_sentences(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dir").mkdir()
    (tmp_path / "b.part").write_text("mine")
    for name, words in [
        ("file/a.png", "directory that you may"),
        ("dir", "a directory has this name"),
        ("b", "b.part"),
    ]:
        with pytest.raises(UserError, match="cannot write") as caught:
            create(tmp_path / name, picture(8, 8))
        assert words in str(caught.value)
    assert (tmp_path / "b.part").read_text() == "mine"


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_a_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        create(tmp_path / "a.png", picture(8, 8))


def test_the_job_is_kept_as_it_was_given(tmp_path):
    assert json.loads((started(tmp_path / "a.png") / "job.json").read_text()) == JOB
