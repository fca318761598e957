"""Laws of films: rendering/video.py."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dnnlib.console import UserError
from rendering import video
from rendering.video import Film

av = pytest.importorskip("av")

JOB = {"network": "cafe", "seeds": [0, 1]}
BT709 = np.array([0.2126, 0.7152, 0.0722])


def smooth(index: int, size: tuple[int, int] = (96, 128), channels: int = 3) -> np.ndarray:
    """uint8 [H,W,C]: colours that wander with the frame."""
    y, x = np.mgrid[: size[0], : size[1]]
    waves = [x / 30 + index / 5, y / 25 - index / 7, (x + y) / 40 + index / 9]
    return np.stack([127 + 110 * np.sin(wave) for wave in waves][:channels], -1).astype(np.uint8)


def create(path: Path, frames: int = 3, size=(96, 128), channels: int = 3, fps=24, job=JOB, resume=False) -> Film:
    return Film.create(path, size=size, channels=channels, frames=frames, fps=fps, job=job, resume=resume)


def save(path: Path, frames: int = 3, fps: float = 24, channels: int = 3, size=(96, 128)) -> Path:
    film = create(path, frames, size, channels, fps)
    for index in range(frames):
        film.write(index, smooth(index, size, channels))
    film.finish()
    return path


def decode(path: Path) -> list[np.ndarray]:
    """[H,W,3] of each frame in numbers 0 to 255, from what the file says about its colours: BT.709, limited range."""
    frames = []
    with av.open(str(path)) as file:
        for frame in file.decode(video=0):
            height, width = frame.height, frame.width
            planes = frame.to_ndarray().astype(float)
            y = (planes[:height] - 16) / 219
            chroma = planes[height:].reshape(2, height // 2, width // 2)
            b, r = ((c.repeat(2, 0).repeat(2, 1) - 128) / 224 for c in chroma)
            red, blue = y + 2 * (1 - BT709[0]) * r, y + 2 * (1 - BT709[2]) * b
            green = (y - BT709[0] * red - BT709[2] * blue) / BT709[1]
            frames.append(255 * np.stack([red, green, blue], -1))
    return frames


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a - b.astype(float)) ** 2))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("fps", [1, 24, 29.97, 60])
def test_a_film_shows_every_frame_at_its_time(tmp_path, fps):
    save(tmp_path / "a.mp4", frames=5, fps=fps)
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert float(file.streams.video[0].average_rate) == pytest.approx(fps)
        times = [float(frame.time) for frame in file.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(5) / fps, atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_the_colours_are_those_of_the_frames_and_the_file_says_which_they_are(tmp_path):
    save(tmp_path / "a.mp4", frames=8)
    for index, frame in enumerate(decode(tmp_path / "a.mp4")):
        assert psnr(frame, smooth(index)) >= 35
        assert np.abs((frame - smooth(index)).mean((0, 1))).max() < 1
    with av.open(str(tmp_path / "a.mp4")) as file:
        context = file.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        # BT.709 is number 1 in the tables of H.264, and limited is number 1 of FFmpeg's ranges.
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)


def test_flat_colours_come_back(tmp_path):
    colours = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 200, 90)]
    film = create(tmp_path / "a.mp4", len(colours), (32, 32))
    for index, colour in enumerate(colours):
        film.write(index, np.full((32, 32, 3), colour, np.uint8))
    film.finish()
    for colour, frame in zip(colours, decode(tmp_path / "a.mp4"), strict=True):
        assert np.abs(frame.mean((0, 1)) - colour).max() <= 3


def test_grey_films_are_grey(tmp_path):
    save(tmp_path / "a.mp4", channels=1)
    for index, frame in enumerate(decode(tmp_path / "a.mp4")):
        assert psnr(frame, smooth(index, channels=1)) >= 35


def test_a_film_plays_while_it_loads(tmp_path):
    data = save(tmp_path / "a.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_any_order_and_any_number_of_runs_give_the_same_bytes(tmp_path, monkeypatch):
    expected = save(tmp_path / "a.mp4", frames=7).read_bytes()
    for start in ([6, 2], [0, 3]):
        film = create(tmp_path / "b.mp4", 7, resume=True)
        other = Film(tmp_path / "b.mp4", size=(96, 128), channels=3, frames=7, fps=24, job=JOB)  # another process
        for index, writer in zip(start, (film, other), strict=True):
            writer.write(index, smooth(index))
    film = create(tmp_path / "b.mp4", 7, resume=True)
    assert film.missing == [1, 4, 5]
    with pytest.raises(ValueError, match="3 frames are not written, the first is 1"):
        film.finish()
    for index in reversed(film.missing):
        film.write(index, smooth(index))
    film.finish()
    assert (tmp_path / "b.mp4").read_bytes() == expected


KILLED = """
import time
import numpy as np
from PIL import Image
from rendering.video import Film
film = Film.create({path!r}, size=(96, 128), channels=3, frames=4, fps=24, job={job!r}, resume=True)
film.write(1, np.load({pixels!r}))
def save(self, path, **_):
    path.write_bytes(b"half")
    print("now", flush=True)
    time.sleep(60)
Image.Image.save = save
film.write(2, np.load({pixels!r}))
"""


def test_a_killed_run_is_continued(tmp_path):
    expected = save(tmp_path / "whole.mp4", frames=4).read_bytes()
    np.save(tmp_path / "pixels.npy", smooth(1))
    path = tmp_path / "a.mp4"
    path.write_bytes(b"former")
    script = KILLED.format(path=str(path), job=JOB, pixels=str(tmp_path / "pixels.npy"))
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "now\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert path.read_bytes() == b"former"
    film = create(path, 4, resume=True)
    assert film.missing == [0, 2, 3]
    for index in film.missing:
        film.write(index, smooth(index))
    film.finish()
    assert path.read_bytes() == expected
    assert not film.folder.exists()


def test_another_job_is_refused_and_without_resume_it_starts_anew(tmp_path):
    create(tmp_path / "a.mp4").write(0, smooth(0))
    before = contents(tmp_path / "a.mp4.part")
    with pytest.raises(UserError, match=r"seeds = \[0, 1\], and now seeds is \[2\]"):
        create(tmp_path / "a.mp4", job=JOB | {"seeds": [2]}, resume=True)
    assert contents(tmp_path / "a.mp4.part") == before
    assert create(tmp_path / "a.mp4", job=JOB | {"seeds": [2]}).missing == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": (96, 127)}, "even sides, and 127x96 has an odd one; choose 126x96"),
        ({"size": (1, 3)}, "choose 2x2"),
        ({"size": (16386, 16)}, "16384 per side"),
        ({"channels": 4}, "no alpha"),
        ({"fps": 0}, "choose for example 30"),
        ({"fps": float("nan")}, "choose for example 30"),
    ],
)
def test_what_a_film_cannot_hold_is_refused_before_the_work(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        create(tmp_path / "a.mp4", **options)
    assert not list(tmp_path.iterdir())


def test_without_av_a_sentence_comes_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="pip install av"):
        create(tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("index", "pixels"), [(0, smooth(0)[:50]), (0, smooth(0).astype(float)), (3, smooth(0)), (-1, smooth(0))]
)
def test_wrong_frames_are_errors(tmp_path, index, pixels):
    with pytest.raises(ValueError, match="frame"):
        create(tmp_path / "a.mp4").write(index, pixels)


def test_a_disk_that_fills_up_keeps_the_finished_frames(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"former")
    film = create(tmp_path / "a.mp4")
    film.write(0, smooth(0))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(UserError, match=r"No space left on device; .* kept in .*a\.mp4\.part.*--resume"):
            film.write(1, smooth(1))
    film = create(tmp_path / "a.mp4", resume=True)
    assert film.missing == [1, 2]
    for index in film.missing:
        film.write(index, smooth(index))
    with monkeypatch.context() as patch:
        patch.setattr(video, "publish", full)
        patch.setattr(Film, "_encode", lambda *_: (_ for _ in ()).throw(av.error.OSError(errno.ENOSPC, "No space")))
        with pytest.raises(UserError, match=r"No space; .*--resume"):
            film.finish()
    assert (tmp_path / "a.mp4").read_bytes() == b"former"
    film.finish()
    assert len(decode(tmp_path / "a.mp4")) == 3


def test_ctrl_c_while_encoding_keeps_all_frames_and_the_former_file(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"former")
    film = create(tmp_path / "a.mp4")
    for index in range(3):
        film.write(index, smooth(index))

    def press(frames, **_):
        yield next(iter(frames))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(video, "progress", press)
        with pytest.raises(KeyboardInterrupt):
            film.finish()
    assert (tmp_path / "a.mp4").read_bytes() == b"former"
    film = create(tmp_path / "a.mp4", resume=True)
    assert film.missing == []
    assert not (film.folder / "encoding").exists()
    film.finish()
    assert len(decode(tmp_path / "a.mp4")) == 3


def test_films_have_the_permissions_of_any_new_file(tmp_path):
    umask = os.umask(0o027)
    try:
        save(tmp_path / "a.mp4")
    finally:
        os.umask(umask)
    assert (tmp_path / "a.mp4").stat().st_mode & 0o777 == 0o640
