"""Laws of films: rendering/video.py. What they share with images is in test_writers.py."""

import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dnnlib.console import UserError
from rendering import video
from rendering.video import Film

av = pytest.importorskip("av")

BT709 = np.array([0.2126, 0.7152, 0.0722])


def smooth(index: int, size: tuple[int, int] = (96, 128), channels: int = 3) -> np.ndarray:
    """uint8 [H,W,C]: colours that change slowly with the frame."""
    y, x = np.mgrid[: size[0], : size[1]]
    waves = [x / 30 + index / 5, y / 25 - index / 7, (x + y) / 40 + index / 9]
    return np.stack([127 + 110 * np.sin(wave) for wave in waves][:channels], -1).astype(np.uint8)


def start(path: Path, frames: int = 3, size=(96, 128), channels: int = 3, fps: float = 24, resume=False) -> Film:
    film = Film(path, {"seeds": [0, 1]}, size=size, channels=channels, frames=frames, fps=fps)
    film.start(resume)
    return film


def finish(film: Film, order=None) -> Path:
    """Write the missing frames and finish."""
    for index in order or film.missing:
        film.write(index, smooth(index, film.size, film.channels))
    film.finish()
    return film.path


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


@pytest.mark.parametrize("fps", [1, 29.97])
def test_a_film_shows_every_frame_at_its_time(tmp_path, fps):
    path = finish(start(tmp_path / "a.mp4", frames=5, fps=fps))
    with av.open(str(path)) as file:
        assert float(file.streams.video[0].average_rate) == pytest.approx(fps)
        times = [float(frame.time) for frame in file.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(5) / fps, atol=1e-4)
    assert [p.name for p in tmp_path.glob("[!.]*")] == ["a.mp4"]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_colours_are_those_of_the_frames_and_the_file_says_which_they_are(tmp_path, channels):
    path = finish(start(tmp_path / "a.mp4", frames=8, channels=channels))
    for index, frame in enumerate(decode(path)):
        assert psnr(frame, smooth(index, channels=channels)) >= 35
        assert np.abs((frame - smooth(index, channels=channels)).mean((0, 1))).max() < 1
    with av.open(str(path)) as file:
        context = file.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        # BT.709 is number 1 in the tables of H.264, and limited is number 1 of FFmpeg's ranges.
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")  # plays while it loads


def test_flat_colours_come_back(tmp_path):
    colours = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 200, 90)]
    film = start(tmp_path / "a.mp4", len(colours), (32, 32))
    for index, colour in enumerate(colours):
        film.write(index, np.full((32, 32, 3), colour, np.uint8))
    film.finish()
    for colour, frame in zip(colours, decode(film.path), strict=True):
        assert np.abs(frame.mean((0, 1)) - colour).max() <= 3


def test_any_order_and_any_number_of_runs_give_the_same_bytes(tmp_path):
    expected = finish(start(tmp_path / "a.mp4", frames=7)).read_bytes()
    for index in (6, 2, 0, 3):
        start(tmp_path / "b.mp4", 7, resume=True).write(index, smooth(index))
    film = start(tmp_path / "b.mp4", 7, resume=True)
    assert film.missing == [1, 4, 5]
    with pytest.raises(ValueError, match="3 parts are missing, the first is 1"):
        film.finish()
    assert finish(film, [5, 4, 1]).read_bytes() == expected
    assert start(tmp_path / "b.mp4", 7).missing == list(range(7))  # without resume, it starts anew


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": (96, 127)}, "even sides, and 127x96 has an odd one; choose 126x96"),
        ({"size": (1, 3)}, "choose 2x2"),
        ({"size": (16386, 16)}, "16384 per side"),
        ({"channels": 4}, "no alpha"),
        ({"fps": 0}, "choose for example 30"),
        ({"fps": float("nan")}, "choose for example 30"),
        ({"path": Path("a.avi")}, "ends in .mp4"),
    ],
)
def test_what_a_film_cannot_hold_is_refused_before_the_work(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        start(**{"path": tmp_path / "a.mp4"} | options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["PyAV", "its encoder"])
def test_without_av_a_sentence_comes_before_the_work(tmp_path, monkeypatch, missing):
    if missing == "PyAV":
        monkeypatch.setitem(sys.modules, "av", None)
    else:
        monkeypatch.setattr(video, "CODEC", "libx2640")
    with pytest.raises(UserError, match="pip install av"):
        start(tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("index", "pixels"), [(0, smooth(0)[:50]), (0, smooth(0).astype(float)), (3, smooth(0)), (-1, smooth(0))]
)
def test_wrong_frames_are_errors(tmp_path, index, pixels):
    with pytest.raises(ValueError, match="frame"):
        start(tmp_path / "a.mp4").write(index, pixels)


def test_what_ends_early_keeps_the_finished_frames_and_the_former_file(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"former")
    film = start(tmp_path / "a.mp4")
    film.write(0, smooth(0))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_encoder(*_, **__):
        raise av.error.OSError(errno.ENOSPC, "No space")

    def press(frames, **_):
        yield next(iter(frames))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(UserError, match=r"No space left on device; .* kept in .*part"):
            film.write(1, smooth(1))
    film = start(tmp_path / "a.mp4", resume=True)
    assert film.missing == [1, 2]
    for index in film.missing:
        film.write(index, smooth(index))
    with monkeypatch.context() as patch:
        patch.setattr(av, "open", full_encoder)
        with pytest.raises(UserError, match=r"No space; .* resume"):
            film.finish()
    with monkeypatch.context() as patch:
        patch.setattr(video, "progress", press)
        with pytest.raises(KeyboardInterrupt):
            film.finish()
    assert (tmp_path / "a.mp4").read_bytes() == b"former"
    assert not (film.folder / "encoding").exists()
    film = start(tmp_path / "a.mp4", resume=True)
    assert film.missing == []
    assert len(decode(finish(film))) == 3


def test_films_have_the_permissions_of_any_new_file(tmp_path):
    umask = os.umask(0o027)
    try:
        path = finish(start(tmp_path / "a.mp4"))
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640
