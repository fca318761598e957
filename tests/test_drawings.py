"""Laws of training/drawings.py: SVG files as images."""

import base64
import math
import time

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import encode, noise_image, write_folder
from PIL import Image

import dataset_tool
from training import drawings
from training.sources import ImageFiles

CIRCLE = '<circle cx="16" cy="16" r="12" fill="#f00"/>'
FRAME = 'viewBox="0 0 32 32"'


def svg(frame: str, content: str, before: str = "") -> bytes:
    return f'{before}<svg xmlns="http://www.w3.org/2000/svg" {frame}>{content}</svg>'.encode()


def pixels(data: bytes, width: int = 32, height: int = 32) -> np.ndarray:
    """Draw: float64 [H,W,4] in 0..1."""
    return np.asarray(drawings.draw(data, (width, height))) / 255


@pytest.mark.parametrize(
    "frame",
    [
        FRAME,
        f'{FRAME} width="1.5" height="1.5"',
        f'{FRAME} width="72.3mm" height="72.3mm"',
        f'{FRAME} width="5000" height="5000"',
        f'{FRAME} width="1000000000" height="1000000000"',
        f'{FRAME} width="100%" height="50%"',
    ],
)
def test_a_circle_has_its_area_whatever_size_the_file_claims(frame):
    for side in (33, 256):
        alpha = pixels(svg(frame, CIRCLE), side, side)[..., 3]
        assert alpha.shape == (side, side)
        assert alpha.sum() == pytest.approx(math.pi * (12 / 32 * side) ** 2, rel=0.01)  # cairo's circles are polygons


def test_an_edge_is_where_the_file_puts_it():
    """The rectangle from 3.1 to 12.7 of 16 units covers pixels 13 to 50 of 64, the first to 0.6 and the last to 0.8."""
    rows = pixels(svg('viewBox="0 0 16 16"', '<rect x="3.1" y="0" width="9.6" height="16"/>'), 64, 64)[..., 3]
    expected = np.zeros(64)
    expected[12:51] = 1
    expected[12], expected[50] = 0.6, 0.8
    assert np.abs(rows - expected).max() < 0.02


def test_the_same_drawing_at_two_sizes_agrees():
    content = '<path d="M2 3L14 5L6 17Z" fill="#0f0"/><circle cx="21" cy="21" r="9" fill="#f00" opacity="0.7"/>'
    large, small = pixels(svg(FRAME, content), 128, 128), pixels(svg(FRAME, content), 32, 32)
    large, small = (image[..., :3] * image[..., 3:] for image in (large, small))
    assert np.abs(large.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3)) - small).max() < 0.03


def test_proportions_stay_and_the_smaller_side_decides():
    wide = svg('viewBox="0 0 50 20"', '<rect width="50" height="20" fill="#fff"/>')
    for cover, size in (((40, 40), (100, 40)), ((100, 40), (100, 40)), ((200, 1), (200, 80))):
        image = drawings.draw(wide, cover)
        assert image.size == size
        assert image.getextrema() == ((255, 255),) * 4


def test_a_source_with_drawings_is_an_archive_over_white_or_with_alpha(tmp_path):
    files = {"a/1.svg": svg(FRAME, CIRCLE), "a/2.png": encode(noise_image(0, 40, 40)), "b/3.SVG": svg(FRAME, CIRCLE)}
    source = write_folder(tmp_path / "in", files)
    for channels, options in ((3, ["--transform", "native"]), (4, ["--transform", "center-crop", "--channels", "4"])):
        dest = tmp_path / f"{channels}.zip"
        options += ["--source", str(source), "--dest", str(dest), "--resolution", "32x32", "--labels", "folders"]
        result = CliRunner().invoke(dataset_tool.main, options)
        assert result.exit_code == 0, result.output
        archive = ImageFiles(dest)
        images = [np.asarray(archive.image(name)) for name in archive.names()]
        assert [len(image) for image in images] == [32, 40 if channels == 3 else 32, 32]
        corner, middle = ([255] * 3, [255, 0, 0]) if channels == 3 else ([0] * 4, [255, 0, 0, 255])
        for image in (images[0], images[2]):
            assert (image[0, 0].tolist(), image[16, 16].tolist()) == (corner, middle)


def test_without_a_size_drawings_are_left_out_and_the_way_to_draw_them_is_said(tmp_path):
    source = write_folder(tmp_path / "in", {"1.svg": svg(FRAME, CIRCLE), "2.png": encode(noise_image(0))})
    files = ImageFiles(source)
    assert files.names() == ["2.png"]
    assert files.notes(3) == ["left out: 1 .svg; .svg: dataset_tool.py draws them with --resolution"]


# --- files by strangers -----------------------------------------------------------------------------------------------


def test_no_other_file_is_read(tmp_path, monkeypatch):
    """Every reference is drawn as if nothing were there, or refused."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (32, 32), "red").save(secret)
    (tmp_path / "secret.svg").write_bytes(svg(FRAME, CIRCLE.replace("<circle", '<circle id="a"')))
    (tmp_path / "secret.css").write_text("circle { fill: #f00 }")
    (tmp_path / "secret.txt").write_text(CIRCLE)
    monkeypatch.chdir(tmp_path)
    inline = f"data:image/png;base64,{base64.b64encode(secret.read_bytes()).decode()}"
    assert pixels(svg(FRAME, f'<image href="{inline}" width="32" height="32"/>'))[..., 3].all()  # a picture is drawn
    for folder in ("", f"../{tmp_path.name}/", f"{tmp_path}/", f"{tmp_path.as_uri()}/"):
        content = f"""<image href="{folder}secret.png" width="32" height="32"/>
            <image href="{folder}secret.svg" width="32" height="32"/>
            <use href="{folder}secret.svg#a"/>
            <filter id="f"><feImage href="{folder}secret.png"/></filter>
            <rect width="32" height="32" filter="url(#f)"/>
            <x:include xmlns:x="http://www.w3.org/2001/XInclude" href="{folder}secret.svg"/>"""
        assert not pixels(svg(FRAME, content))[..., 3].any()
        black = f'<style>@import url("{folder}secret.css");</style><circle r="16"/>'
        assert not pixels(svg(FRAME, black, f'<?xml-stylesheet href="{folder}secret.css"?>'))[..., :3].any()
        with pytest.raises(ValueError, match="'x' not defined"):
            drawings.draw(svg(FRAME, "&x;", f'<!DOCTYPE svg [<!ENTITY x SYSTEM "{folder}secret.txt">]>'), (32, 32))


def nested(start: str, times: int) -> str:
    """Return <defs> of groups, each of ten times the one before; group 0 is `start`."""
    groups = (f'<g id="g{i + 1}">{f"""<use href="#g{i}"/>""" * 10}</g>' for i in range(times))
    return f'<defs><g id="g0">{start}</g>{"".join(groups)}</defs><use href="#g{times}"/>'


ENTITIES = "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(9))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (svg(FRAME, "<text>&l9;</text>", f'<!DOCTYPE svg [<!ENTITY l0 "l">{ENTITIES}]>'), "amplification"),
        (svg(FRAME, "<g>" * 10**5 + "</g>" * 10**5), "Excessive depth"),
        (svg('viewBox="0 0 1000000 1"', ""), "256000000x256, too many pixels"),
        (svg('viewBox="0 0 32 32" width="1e30" height="1e30"', CIRCLE), "zero-sized"),
        (svg('width="0" height="0"', CIRCLE), "bad dimensions"),
        (svg(FRAME, CIRCLE)[:-5], "invalid element"),
        (b"", "too short"),
        (b"\x89PNG\r\n\x1a\n", "Start tag expected"),
    ],
)
def test_a_file_that_asks_for_too_much_or_is_broken_is_refused(data, words):
    with pytest.raises(ValueError, match=words):
        drawings.draw(data, (256, 256))


def test_a_drawing_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr(drawings, "SECONDS", 1)
    noise = '<filter id="f"><feTurbulence numOctaves="100"/></filter><rect width="32" height="32" filter="url(#f)"/>'
    before = time.monotonic()
    with pytest.raises(ValueError, match="takes more than 1 seconds"):
        drawings.draw(svg(FRAME, nested(noise, 5)), (256, 256))
    assert time.monotonic() - before < 30
