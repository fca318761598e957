"""Laws of dataset_tool.py."""

import csv
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import dataset_tool
from dnnlib.console import UserError
from training.config import resolve
from training.data import ImageArchive

TOOL = Path(dataset_tool.__file__)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(dataset_tool.main, [str(argument) for argument in arguments])


def make(source: object, dest: Path, *options: object) -> str:
    """Runs the tool, which must succeed, and returns what it printed."""
    result = run("--source", source, "--dest", dest, *options)
    assert result.exit_code == 0, result.output
    return result.output


def noise(seed: int, height: int = 6, width: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def ramp(height: int, width: int) -> Image.Image:
    """Red is the column and green the row, so that a crop tells where it was taken."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8))


def encoded(image: np.ndarray | Image.Image, form: str = "png", **options) -> bytes:
    data = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(data, form, **options)
    return data.getvalue()


def folder_of(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def zip_of(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def pictures_in(path: Path) -> list[np.ndarray]:
    """The pictures of a finished ZIP, decoded by Pillow alone."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        return [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]


def dataset_json(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("dataset.json"))


def converted(tmp_path: Path, data: bytes, ending: str, *options: object) -> np.ndarray:
    make(folder_of(tmp_path / "in", {f"a.{ending}": data}), tmp_path / "out.zip", *options)
    (picture,) = pictures_in(tmp_path / "out.zip")
    return picture


# The format


def test_equal_size_images_pass_through_pixel_exact_and_in_order(tmp_path):
    names = ["b/z.png", "a.png", "b/a.bmp", "c/d/e.tif"]
    source = folder_of(
        tmp_path / "in", {n: encoded(noise(i), n[-3:].replace("tif", "tiff")) for i, n in enumerate(names)}
    )
    output = make(source, tmp_path / "out.zip")
    expected = [noise(names.index(name)) for name in sorted(names)]
    assert all(np.array_equal(a, b) for a, b in zip(pictures_in(tmp_path / "out.zip"), expected, strict=True))
    assert output == f"Wrote {tmp_path / 'out.zip'}: 4 images of 8x6, 3 channels, no labels.\n"


def test_the_zip_is_in_the_format_of_stylegan(tmp_path):
    source = folder_of(tmp_path / "in", {f"{i:04d}.png": encoded(noise(i, 2, 2)) for i in range(1001)})
    make(source, tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        assert archive.namelist() == [f"{i // 1000:05d}/img{i:08d}.png" for i in range(1001)] + ["dataset.json"]
        assert json.loads(archive.read("dataset.json")) == {"labels": None}


def test_a_folder_holds_what_the_zip_holds_and_both_train_alike(tmp_path):
    source = folder_of(tmp_path / "in", {f"{'ab'[i % 2]}/{i}.png": encoded(noise(i)) for i in range(5)})
    make(source, tmp_path / "out.zip", "--labels", "folders")
    make(source, tmp_path / "out", "--labels", "folders")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        for name in archive.namelist():
            assert (tmp_path / "out" / name).read_bytes() == archive.read(name)
    zipped, folder = (ImageArchive(tmp_path / name, use_labels=True) for name in ("out.zip", "out"))
    assert [image.tolist() for image, _ in zipped] == [image.tolist() for image, _ in folder]
    assert [label.tolist() for _, label in zipped] == [[1, 0]] * 3 + [[0, 1]] * 2


def test_the_tools_own_output_as_source_gives_the_same_bytes(tmp_path):
    source = folder_of(tmp_path / "in", {f"{'ab'[i % 2]}/{i}.png": encoded(noise(i)) for i in range(4)})
    make(source, tmp_path / "one.zip", "--labels", "folders")
    make(tmp_path / "one.zip", tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


# Colour


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    alpha = alpha[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


def test_grey_becomes_equal_red_green_and_blue(tmp_path):
    grey = noise(0)[:, :, 0]
    assert np.array_equal(converted(tmp_path, encoded(grey), "png"), np.stack([grey] * 3, axis=2))


def test_bilevel_becomes_black_and_white(tmp_path):
    bits = noise(0)[:, :, 0] > 127
    picture = converted(tmp_path, encoded(Image.fromarray(bits)), "png")
    assert np.array_equal(picture, np.stack([bits * 255] * 3, axis=2))


@pytest.mark.parametrize("transparent", [False, True])
def test_palette_images_show_their_colours_and_white_where_transparent(tmp_path, transparent):
    colours, indices = noise(0, 1, 4)[0], noise(1)[:, :, 0] % 4
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    picture = converted(tmp_path, encoded(image, **({"transparency": 2} if transparent else {})), "png")
    expected = colours[indices]
    if transparent:
        expected[indices == 2] = 255
    assert np.array_equal(picture, expected)


def test_rgba_is_laid_over_white(tmp_path):
    pixels = noise(0, channels=4)
    picture = converted(tmp_path, encoded(pixels), "png")
    assert np.abs(picture - over_white(pixels[..., :3], pixels[..., 3])).max() <= 1


def test_grey_with_alpha_is_laid_over_white(tmp_path):
    pixels = noise(0, channels=2)
    picture = converted(tmp_path, encoded(pixels), "png")
    assert np.abs(picture - over_white(pixels[..., [0, 0, 0]], pixels[..., 1])).max() <= 1


def test_cmyk_becomes_rgb(tmp_path):
    pixels = noise(0, channels=4)
    picture = converted(tmp_path, encoded(Image.fromarray(pixels, "CMYK"), "tiff"), "tif")
    ink = pixels / 255
    assert np.abs(picture - 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])).max() <= 1


@pytest.mark.parametrize(("form", "ending"), [("png", "png"), ("tiff", "tif"), ("ppm", "pgm")])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, form, ending):
    values = np.random.default_rng(0).integers(0, 65536, (6, 8)).astype(np.uint16)
    values[0, :2] = 0, 65535
    picture = converted(tmp_path, encoded(values, form), ending)
    assert np.array_equal(picture, np.stack([np.round(values / 257)] * 3, axis=2))


def test_one_channel_is_the_luma_and_four_keep_the_alpha(tmp_path):
    pixels = noise(0)
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    assert np.abs(converted(tmp_path / "1", encoded(pixels), "png", "--channels", 1) - luma).max() <= 1
    transparent = noise(1, channels=4)
    assert np.array_equal(converted(tmp_path / "4", encoded(transparent), "png", "--channels", 4), transparent)


TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_turns_the_image_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = converted(tmp_path, encoded(noise(0), exif=exif), "png")
    assert np.array_equal(picture, TURNS[orientation](noise(0)))


def test_animations_give_their_first_frame(tmp_path):
    first, second = (Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (10, 200))
    picture = converted(tmp_path, encoded(first, "gif", save_all=True, append_images=[second]), "gif")
    assert np.array_equal(picture, np.full((4, 4, 3), 10))


# Transforms


def test_resolution_alone_stretches_the_whole_image(tmp_path):
    picture = converted(tmp_path, encoded(ramp(40, 80)), "png", "--resolution", "20x20")
    middle = picture[10, 10]
    assert picture.shape == (20, 20, 3)
    assert abs(middle[0] - 41.5) <= 1  # column 10.5 of 20 is column 42 - 0.5 of 80
    assert abs(middle[1] - 20.5) <= 1


@pytest.mark.parametrize(("height", "width", "target"), [(40, 80, "20x20"), (80, 40, "20x20"), (40, 80, "10x30")])
def test_center_crop_takes_the_largest_centred_part_of_the_targets_shape(tmp_path, height, width, target):
    picture = converted(
        tmp_path, encoded(ramp(height, width)), "png", "--resolution", target, "--transform", "center-crop"
    )
    target_width, target_height = map(int, target.split("x"))
    step = min(width / target_width, height / target_height)
    assert picture.shape == (target_height, target_width, 3)
    for axis, channel, full, length in ((1, 0, width, target_width), (0, 1, height, target_height)):
        centres = (full - length * step) / 2 + (np.arange(length) + 0.5) * step - 0.5
        found = picture[..., channel].mean(axis=1 - axis)
        assert np.abs(found - centres)[2:-2].max() <= 1.5


def test_center_crop_of_the_targets_size_is_exact(tmp_path):
    picture = converted(
        tmp_path, encoded(noise(0, 10, 16)), "png", "--resolution", "10x10", "--transform", "center-crop"
    )
    assert np.array_equal(picture, noise(0, 10, 16)[:, 3:13])


def test_center_crop_wide_has_black_bars_above_and_below(tmp_path):
    options = ("--resolution", "16x8", "--transform", "center-crop-wide")
    picture = converted(tmp_path, encoded(np.full((20, 32, 3), 77, np.uint8)), "png", *options)
    assert picture.shape == (16, 16, 3)
    assert (picture[4:12] == 77).all()
    assert not picture[:4].any()
    assert not picture[12:].any()


def random_crops(tmp_path: Path, source: Path, name: str, seed: int = 0) -> bytes:
    options = ("--resolution", "16x12", "--transform", "random-crops", "--crops", 40, "--seed", seed)
    make(source, tmp_path / name, *options)
    return (tmp_path / name).read_bytes()


def test_random_crops_keep_the_shape_and_cover_scales_and_places(tmp_path):
    random_crops(tmp_path, folder_of(tmp_path / "in", {"a.png": encoded(ramp(120, 240))}), "out.zip")
    pictures = pictures_in(tmp_path / "out.zip")
    assert len(pictures) == 40
    spans = []
    for picture in pictures:
        assert picture.shape == (12, 16, 3)
        across = (float(picture[6, 13, 0]) - picture[6, 2, 0]) / 11  # source columns per pixel
        down = (float(picture[9, 8, 1]) - picture[2, 8, 1]) / 7
        assert abs(across - down) < 0.5
        spans.append(across)
    # The scale is uniform between 1 (16x12) and 10 (160x120).
    assert 0.9 < min(spans) < 2.5
    assert 8.5 < max(spans) < 10.1
    assert 4 < np.mean(spans) < 7
    lefts = [int(picture[6, 0, 0]) for picture in pictures]
    assert min(lefts) < 40
    assert max(lefts) > 120


def test_random_crops_are_a_function_of_the_seed_and_the_file_name(tmp_path):
    source = folder_of(tmp_path / "in", {"b.png": encoded(ramp(120, 240))})
    first = random_crops(tmp_path, source, "1.zip")
    assert random_crops(tmp_path, source, "2.zip") == first
    assert random_crops(tmp_path, source, "3.zip", seed=1) != first
    folder_of(source, {"a.png": encoded(noise(0, 30, 30))})
    random_crops(tmp_path, source, "4.zip")
    alone, after_another = pictures_in(tmp_path / "1.zip"), pictures_in(tmp_path / "4.zip")[40:]
    assert np.array_equal(alone, after_another)


def test_random_crops_repeat_the_label_and_enlarged_images_are_counted(tmp_path):
    source = folder_of(tmp_path / "in", {"x/a.png": encoded(noise(0, 4, 4)), "y/b.png": encoded(noise(1, 16, 16))})
    options = ("--resolution", "8x8", "--transform", "random-crops", "--crops", 2, "--labels", "folders")
    output = make(source, tmp_path / "out.zip", *options)
    assert [label for _, label in dataset_json(tmp_path / "out.zip")["labels"]] == [0, 0, 1, 1]
    assert "2 images had to be enlarged" in output


# Labels


def label_source(tmp_path: Path, extra: dict[str, bytes]) -> Path:
    images = {name: encoded(noise(0)) for name in ("cat/1.png", "dog/1.png", "dog/2.png")}
    return folder_of(tmp_path / "in", images | extra)


def test_labels_by_folders(tmp_path):
    make(label_source(tmp_path, {}), tmp_path / "out.zip", "--labels", "folders")
    assert dataset_json(tmp_path / "out.zip") == {
        "labels": [["00000/img00000000.png", 0], ["00000/img00000001.png", 1], ["00000/img00000002.png", 1]],
        "class_names": ["cat", "dog"],
    }


ROWS = [("dog/2.png", 7), ("cat/1.png", 2), ("dog/1.png", 0)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.json", json.dumps({"labels": ROWS})),
        ("l.json", json.dumps({"labels": dict(ROWS)})),
        ("l.json", json.dumps({"labels": [(name.replace("/", "\\"), label) for name, label in ROWS]})),
        ("l.csv", "filename,label\n" + "".join(f"{name},{label}\n" for name, label in ROWS)),
        ("l.csv", "".join(f"{name}, {label}\r\n" for name, label in ROWS)),
    ],
)
def test_labels_from_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    make(label_source(tmp_path, {}), tmp_path / "out.zip", "--labels", tmp_path / name)
    assert [label for _, label in dataset_json(tmp_path / "out.zip")["labels"]] == [2, 0, 7]


def test_class_names_in_a_csv_are_numbered_in_sorted_order(tmp_path):
    with open(tmp_path / "l.csv", "w", newline="") as file:
        csv.writer(file).writerows([("cat/1.png", "tom"), ("dog/1.png", "rex"), ("dog/2.png", "a, b")])
    make(label_source(tmp_path, {}), tmp_path / "out.zip", "--labels", tmp_path / "l.csv")
    content = dataset_json(tmp_path / "out.zip")
    assert content["class_names"] == ["a, b", "rex", "tom"]
    assert [label for _, label in content["labels"]] == [2, 1, 0]


def test_the_sources_own_labels_are_carried_over_unless_declined(tmp_path):
    own = json.dumps({"labels": [[name, [label, 0.5]] for name, label in ROWS]}).encode()
    source = label_source(tmp_path, {"dataset.json": own})
    make(source, tmp_path / "out.zip")
    assert [label for _, label in dataset_json(tmp_path / "out.zip")["labels"]] == [[2, 0.5], [0, 0.5], [7, 0.5]]
    make(source, tmp_path / "none.zip", "--labels", "none")
    assert dataset_json(tmp_path / "none.zip") == {"labels": None}


# Bad files and wrong calls


def test_skip_bad_leaves_broken_files_out_with_labels_in_step(tmp_path):
    images = {f"{'ab'[i % 2]}/{i}.png": encoded(noise(i)) for i in range(6)}
    source = folder_of(tmp_path / "in", images | {"a/2.png": b"", "b/3.png": images["b/3.png"][:80]})
    output = make(source, tmp_path / "out.zip", "--skip-bad", "--labels", "folders")
    assert "Skipped 2 unreadable files." in output
    assert f"{source}/a/2.png cannot be read as an image: the file is empty" in output
    expected = [noise(i) for i in (0, 4, 1, 5)]
    assert np.array_equal(pictures_in(tmp_path / "out.zip"), expected)
    assert [label for _, label in dataset_json(tmp_path / "out.zip")["labels"]] == [0, 0, 1, 1]


def test_max_images_counts_the_good_ones(tmp_path):
    images = {f"{i}.png": encoded(noise(i)) for i in range(6)} | {"1.png": b"broken"}
    make(folder_of(tmp_path / "in", images), tmp_path / "out.zip", "--skip-bad", "--max-images", 3)
    assert np.array_equal(pictures_in(tmp_path / "out.zip"), [noise(i) for i in (0, 2, 3)])


def test_the_summary_counts_the_classes_that_were_written(tmp_path):
    source = folder_of(tmp_path / "in", {f"{name}/1.png": encoded(noise(0)) for name in "abc"})
    assert "2 classes" in make(source, tmp_path / "out.zip", "--labels", "folders", "--max-images", 2)


def huge_png() -> bytes:
    """A PNG whose header claims 60000 x 60000 pixels."""
    data = bytearray(encoded(noise(0)))
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def patched_zip(path: Path, local: dict[int, bytes], central: dict[int, bytes]) -> Path:
    """A ZIP of one image, with bytes of its two headers replaced at these offsets."""
    zip_of(path, {"a.png": encoded(noise(0))})
    data = bytearray(path.read_bytes())
    for start, changes in ((0, local), (data.index(b"PK\x01\x02"), central)):
        for offset, value in changes.items():
            data[start + offset : start + offset + len(value)] = value
    path.write_bytes(data)
    return path


GOOD = {"cat/a.png": encoded(noise(0)), "dog/b.png": encoded(noise(1))}


def with_file(name: str, data: bytes):
    return lambda path: folder_of(path / "in", GOOD | {name: data})


def good(path: Path) -> Path:
    return folder_of(path / "in", GOOD)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def sources_ring(path: Path) -> Path:
    (folder_of(path / "in", GOOD) / "c.png").symlink_to("c.png")
    return path / "in"


def pipe(path: Path) -> Path:
    os.mkfifo(folder_of(path / "in", GOOD) / "c.png")
    return path / "in"


def labels_file(name: str, text: str):
    return lambda path: ["--labels", written(path / name, text.encode())]


CROP = ["--resolution", "8x8", "--transform"]
WRONG = {
    # name: (source, further options, words of the sentence)
    "no source": (lambda path: path / "nothing", [], "does not exist"),
    "empty folder": (lambda path: folder_of(path / "in", {}), [], "holds no images"),
    "folder of text": (lambda path: folder_of(path / "in", {"a.txt": b"hi"}), [], "holds no images"),
    "a single image": (lambda path: written(path / "a.png", GOOD["cat/a.png"]), [], "neither a folder nor a whole ZIP"),
    "cut ZIP": (lambda path: written(path / "a.zip", zip_of(path / "w", GOOD).read_bytes()[:-30]), [], "whole ZIP"),
    "empty ZIP": (lambda path: zip_of(path / "a.zip", {}), [], "holds no images"),
    "encrypted ZIP": (lambda path: patched_zip(path / "a.zip", {6: b"\1"}, {8: b"\1"}), [], "is encrypted"),
    "wrong checksum": (lambda path: patched_zip(path / "a.zip", {14: b"1234"}, {16: b"1234"}), [], "Bad CRC-32"),
    "unknown compression": (lambda path: patched_zip(path / "a.zip", {8: b"\x63"}, {10: b"\x63"}), [], "compression"),
    "ZIP entry of 3 GiB": (lambda path: patched_zip(path / "a.zip", {}, {24: b"\0\0\0\xc0"}), [], "claims 3.0 GiB"),
    "name outside the ZIP": (
        lambda path: zip_of(path / "a.zip", {"../a.png": GOOD["cat/a.png"]}),
        [],
        "points outside",
    ),
    "empty file": (with_file("c.png", b""), [], "c.png cannot be read as an image: the file is empty"),
    "truncated file": (with_file("c.png", GOOD["cat/a.png"][:90]), [], "c.png cannot be read"),
    "truncated JPEG": (with_file("c.jpg", encoded(noise(0, 64, 64), "jpeg")[:900]), [], "truncated"),
    "text called png": (with_file("c.png", b"hello"), [], "no known image format"),
    "page called html": (with_file("c.jpg", b"<html>404</html>"), [], "no known image format"),
    "decompression bomb": (with_file("c.png", huge_png()), [], "decompression bomb"),
    "float pixels": (with_file("c.tif", encoded(np.ones((6, 8), np.float32), "tiff")), [], "no agreed range"),
    "32-bit pixels": (with_file("c.tif", encoded(np.full((6, 8), 70000, np.int32), "tiff")), [], "no agreed range"),
    "named pipe": (pipe, [], "not a regular file"),
    "link to itself": (sources_ring, [], "c.png cannot be read"),
    "other size": (with_file("dog/c.png", encoded(noise(0, 5, 8))), [], "dog/c.png is 8x5, but cat/a.png is 8x6"),
    "broken dataset.json": (with_file("dataset.json", b"{"), [], "is not of the form"),
    "partial dataset.json": (
        with_file("dataset.json", b'{"labels": [["cat/a.png", 0]]}'),
        [],
        "no label for dog/b.png",
    ),
    "only bad files": (
        lambda path: folder_of(path / "in", {"a.png": b""}),
        ["--skip-bad"],
        "no image that can be read",
    ),
    "resolution": (good, ["--resolution", "256"], "WIDTHxHEIGHT"),
    "resolution 0": (good, ["--resolution", "0x8"], "WIDTHxHEIGHT"),
    "resolution too large": (good, ["--resolution", "99999x8"], "WIDTHxHEIGHT"),
    "crop without size": (good, ["--transform", "center-crop"], "add --resolution"),
    "crops without number": (good, [*CROP, "random-crops"], "--crops go together"),
    "number without crops": (good, [*CROP, "center-crop", "--crops", 3], "--crops go together"),
    "no crops": (good, [*CROP, "random-crops", "--crops", 0], "--crops"),
    "wide but tall": (good, ["--resolution", "8x9", "--transform", "center-crop-wide"], "width must be the larger"),
    "unknown transform": (good, ["--transform", "zoom"], "center-crop"),
    "two channels": (good, ["--channels", 2], "--channels"),
    "negative count": (good, ["--max-images", -1], "--max-images"),
    "unknown option": (good, ["--width", 8], "--width"),
    "labels missing": (good, ["--labels", "nothing.csv"], "cannot read --labels nothing.csv"),
    "loose image": (with_file("c.png", GOOD["cat/a.png"]), ["--labels", "folders"], "c.png lies in no folder"),
    "one class": (lambda path: good(path) / "..", ["--labels", "folders"], "the folder above the classes"),
    "three columns": (good, labels_file("l.csv", "cat/a.png,1,2\n"), "line 1: 3 columns"),
    "two labels": (good, labels_file("l.csv", "cat/a.png,1\ncat/a.png,2\n"), "both 1 and 2"),
    "unlabelled": (good, labels_file("l.csv", "cat/a.png,1\n"), "no label for dog/b.png"),
    "binary CSV": (good, lambda path: ["--labels", written(path / "l.csv", b"\xff\xfe\0")], "is no CSV"),
    "null labels": (good, labels_file("l.json", '{"labels": null}'), "holds no"),
    "negative label": (
        good,
        labels_file("l.json", '{"labels": {"cat/a.png": -1, "dog/b.png": 0}}'),
        "labels cat/a.png as -1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_ends_in_one_sentence_and_harms_no_file(tmp_path, case):
    source, options, words = WRONG[case]
    source = source(tmp_path)
    options = options(tmp_path) if callable(options) else options
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept.zip").write_bytes(b"as it was")
    for dest in (out / "kept.zip", out / "new.zip", out / "folder"):
        result = run("--source", source, "--dest", dest, *options)
        assert result.exit_code == 2, result.output
        assert words in result.output
        assert "Traceback" not in result.output
        assert result.output.count("Error:") == 1
    assert [path.name for path in out.iterdir()] == ["kept.zip"]
    assert (out / "kept.zip").read_bytes() == b"as it was"


@pytest.mark.parametrize(
    ("dest", "words"),
    [
        ("in", "is the source itself"),
        ("full", "holds files already"),
        ("dir.zip", "is a folder"),
        ("file", "is a file"),
        ("file/out.zip", "cannot write"),
        ("file/out", "cannot write"),
    ],
)
def test_a_wrong_destination_is_refused_and_left_as_it_was(tmp_path, dest, words):
    source = good(tmp_path)
    folder_of(tmp_path / "full", {"x.txt": b"x"})
    (tmp_path / "dir.zip").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    before = sorted(tmp_path.rglob("*"))
    result = run("--source", source, "--dest", tmp_path / dest)
    assert result.exit_code == 2
    assert words in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_options_are_named():
    assert "Missing option '--source'" in run("--dest", "x.zip").output
    assert "Missing option '--dest'" in run("--source", "x").output
    assert run("--source", "x", "check", "y").exit_code == 2


@pytest.mark.parametrize("name", ["out.zip", "out"])
def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing(tmp_path, name):
    source = folder_of(tmp_path / "in", {f"{i}.png": encoded(noise(i, 200, 200)) for i in range(3)})
    done = subprocess.run(
        [sys.executable, TOOL, "--source", source, "--dest", tmp_path / name],
        capture_output=True,
        text=True,
        # 50 KB is less than one picture; writing beyond it fails as on a full disk.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 2
    assert f"Error: cannot write {tmp_path / name}" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_ctrl_c_leaves_nothing_half_written(tmp_path, start):
    source = folder_of(tmp_path / "in", {f"{i}.png": encoded(noise(i, 64, 64)) for i in range(3)})
    options = ["--resolution", "256x256", "--transform", "random-crops", "--crops", "100000"]
    dest = tmp_path / "out" / "a.zip"
    process = start([sys.executable, TOOL, "--source", source, "--dest", dest, *options], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (dest.parent.exists() and any(dest.parent.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert any(dest.parent.iterdir())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"Traceback" not in errors
    assert list(dest.parent.iterdir()) == []


def test_a_finished_dataset_replaces_the_old_one(tmp_path):
    (tmp_path / "out.zip").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    make(good(tmp_path), tmp_path / "out.zip")
    make(tmp_path / "in", tmp_path / "folder")
    assert len(pictures_in(tmp_path / "out.zip")) == 2
    assert (tmp_path / "folder" / "00000" / "img00000001.png").exists()
    assert (tmp_path / "folder").stat().st_mode & 0o777 == (tmp_path / "in").stat().st_mode & 0o777


# check


def test_check_tells_what_a_good_dataset_holds(tmp_path):
    source = folder_of(tmp_path / "in", {f"{'ab'[i % 3 == 0]}/{i}.png": encoded(noise(i, 8, 8)) for i in range(5)})
    make(source, tmp_path / "out.zip", "--labels", "folders")
    result = run("check", tmp_path / "out.zip")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert lines[1:] == ["images 5", "size 8x8 (5)", "channels 3 (5)", "labels 2 classes: a 3, b 2"]


@pytest.mark.parametrize("size", [(8, 8), (12, 8), (16, 24), (24, 24), (8, 6), (17, 16), (100, 64), (20, 28)])
def test_check_says_of_a_size_what_training_says(tmp_path, size):
    width, height = size
    folder = folder_of(tmp_path / "in", {"a.png": encoded(noise(0, height, width, 4))})
    checked = run("check", folder)
    assert "channels  4 (1)" in checked.output
    problem = ""
    try:
        resolve({"data": {"path": str(folder)}, "train": {"batch": 4}}, ImageArchive(folder), "--cfg=x")
    except UserError as error:
        problem = str(error).removeprefix("--cfg=x: ").removeprefix("D: ")
    assert checked.exit_code == (2 if problem else 0)
    assert problem in checked.output


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"c.png": encoded(noise(0, 5, 5))}, ["1 image not of the most frequent size 8x6", "e.g. c.png of 5x5"]),
        ({"c.png": b"", "d.png": b"x"}, ["c.png cannot be read", "d.png cannot be read"]),
        ({"c.tif": encoded(np.ones((6, 8), np.float32), "tiff")}, ["c.tif: 32-bit float"]),
        ({f"bad{i:02d}.png": b"" for i in range(14)}, ["bad09.png", "and 5 more"]),
        ({"dataset.json": b'{"labels": [["cat/a.png", 0]]}'}, ["1 image without a label", "dog/b.png"]),
        (
            {"dataset.json": b'{"labels": [["cat/a.png", 0], ["dog/b.png", 0], ["x.png", 1]]}'},
            ["labels 1 file that are not there", "x.png"],
        ),
        ({"dataset.json": b'{"labels": [["cat/a.png", 0], ["dog/b.png", "x"]]}'}, ["labels must be class numbers"]),
        ({"dataset.json": b"[]"}, ["is not of the form"]),
        (
            {"dataset.json": b'{"labels": [["cat/a.png", 0], ["dog/b.png", 1]], "class_names": ["cat"]}'},
            ["names 1 class and uses 2"],
        ),
    ],
)
def test_check_names_what_is_wrong(tmp_path, files, words):
    result = run("check", folder_of(tmp_path / "in", GOOD | files))
    assert result.exit_code == 2
    assert "not fit for training" in result.output
    assert "Traceback" not in result.output
    for text in words:
        assert text in result.output
