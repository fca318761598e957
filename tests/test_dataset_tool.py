"""Laws of dataset_tool.py, training/archives.py and training/sources.py."""

import io
import json
import os
import pickle
import signal
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner, Result
from helpers import encode, files_up_to, noise_image, wait_until, write_folder, write_zip
from PIL import Image, ImageCms, PngImagePlugin

import dataset_tool
from dnnlib.console import UserError
from training.archives import describe_native
from training.colours import ENDINGS
from training.config import resolve
from training.data import ImageArchive
from training.sources import ImageFiles


def run(*arguments: object) -> Result:
    return CliRunner().invoke(dataset_tool.main, [str(argument) for argument in arguments])


def make(source: object, dest: Path, *options: object) -> str:
    """Run the tool, which must succeed, and return what it printed."""
    result = run("--source", source, "--dest", dest, *options)
    assert result.exit_code == 0, result.output
    return result.output


def ramp(height: int, width: int) -> Image.Image:
    """Return an image whose red is the column and whose green is the row, so that a crop shows its place."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8))


def images_in(path: Path) -> list[np.ndarray]:
    """Decode the images of a finished ZIP by Pillow alone."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        return [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]


def dataset_json(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("dataset.json"))


def labels_in(path: Path) -> list:
    return [label for _, label in dataset_json(path)["labels"]]


def convert(tmp_path: Path, data: bytes, ending: str, *options: object) -> np.ndarray:
    """Convert one file; return its only image."""
    make(write_folder(tmp_path / "in", {f"a.{ending}": data}), tmp_path / "out.zip", *options)
    (image,) = images_in(tmp_path / "out.zip")
    return image


# --- the format -------------------------------------------------------------------------------------------------------


def test_equal_size_images_pass_through_pixel_exact_and_in_order(tmp_path):
    names = ["b/z.png", "a.png", "b/a.bmp", "c/d/e.tiff"]
    files = {name: encode(noise_image(i), name.split(".")[1]) for i, name in enumerate(names)}
    output = make(write_folder(tmp_path / "in", files), tmp_path / "out.zip")
    assert np.array_equal(images_in(tmp_path / "out.zip"), [noise_image(names.index(name)) for name in sorted(names)])
    assert output == f"Wrote {tmp_path / 'out.zip'}: 4 images of 8x6, 3 channels, no labels.\n"


def test_the_zip_is_in_the_format_of_stylegan(tmp_path):
    make(
        write_folder(tmp_path / "in", {f"{i:04d}.png": encode(noise_image(i, 2, 2)) for i in range(1001)}),
        tmp_path / "out.zip",
    )
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        assert archive.namelist() == [f"{i // 1000:05d}/img{i:08d}.png" for i in range(1001)] + ["dataset.json"]
    assert dataset_json(tmp_path / "out.zip") == {"labels": None}


def test_zip_folder_and_a_second_conversion_hold_the_same_bytes(tmp_path):
    source = write_folder(tmp_path / "in", {f"{'ab'[i % 2]}/{i}.png": encode(noise_image(i)) for i in range(5)})
    make(source, tmp_path / "one.zip", "--labels", "folders")
    make(source, tmp_path / "folder", "--labels", "folders")
    make(tmp_path / "one.zip", tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        for name in archive.namelist():
            assert (tmp_path / "folder" / name).read_bytes() == archive.read(name)
    images = ImageArchive(tmp_path / "folder", use_labels=True)
    assert [label.tolist() for _, label in images] == [[1, 0]] * 3 + [[0, 1]] * 2


# --- colours ----------------------------------------------------------------------------------------------------------

BITS, RGBA, GREY_ALPHA = noise_image(0)[..., 0] > 127, noise_image(0, channels=4), noise_image(0, channels=2)
DEEP = np.random.default_rng(0).integers(0, 65536, (6, 8)).astype(np.uint16)
DEEP[0, :2] = 0, 65535
SMALL = (DEEP >> 4).astype(np.uint16)  # 12 bits
DEEP_COLOUR = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], axis=2)
COLOURS, INDICES = noise_image(0, 1, 4)[0], noise_image(1)[..., 0] % 4
PALETTE = Image.fromarray(INDICES)
PALETTE.putpalette(COLOURS.tobytes())


def deep_png(values: np.ndarray) -> bytes:
    """Encode uint16 [H,W,C] as a PNG of 16 bits, which Pillow cannot."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, **options) -> bytes:
    data = io.BytesIO()
    tifffile.imwrite(data, values, photometric="rgb", **options)
    return data.getvalue()


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LINEAR = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def profile(gamma: float) -> bytes:
    """Return an ICC profile with the primaries of sRGB and this gamma."""
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    columns = {b"rXYZ": (0.4361, 0.2225, 0.0139), b"gXYZ": (0.3851, 0.7169, 0.0971), b"bXYZ": (0.1431, 0.0606, 0.7139)}
    columns |= {b"wtpt": (0.9642, 1, 0.8249)}
    text = b"desc\0\0\0\0" + struct.pack(">I", 7) + b"linear\0" + bytes(81)
    tags = {
        name: b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in xyz)) for name, xyz in columns.items()
    }
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve) | {
        b"desc": text,
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
    }
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    head = (
        struct.pack(">I4xI4s4s4s", start + len(data), 0x02100000, b"mntr", b"RGB ", b"XYZ ")
        + bytes(12)
        + b"acsp"
        + bytes(28)
    )
    head += struct.pack(">3i", 63190, 65536, 54061)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + data


def oetf(linear: np.ndarray) -> np.ndarray:
    """Return sRGB's curve of IEC 61966-2-1, 0 to 255."""
    linear = linear / 255
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return colour * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=2)


@pytest.mark.parametrize(
    ("data", "ending", "options", "expected", "tolerance"),
    {
        "grey": (encode(noise_image(0)[..., 0]), "png", [], grey(noise_image(0)[..., 0]), 0),
        "two levels": (encode(Image.fromarray(BITS)), "png", [], grey(BITS * 255), 0),
        "palette": (encode(PALETTE), "png", [], COLOURS[INDICES], 0),
        "transparent colour": (
            encode(PALETTE, transparency=2),
            "png",
            [],
            np.where((INDICES == 2)[..., None], 255, COLOURS[INDICES]),
            0,
        ),
        "RGBA over white": (encode(RGBA), "png", [], over_white(RGBA[..., :3], RGBA[..., 3]), 1),
        "RGBA kept": (encode(RGBA), "png", ["--channels", 4], RGBA, 0),
        "grey with alpha": (
            encode(GREY_ALPHA),
            "png",
            [],
            over_white(GREY_ALPHA[..., [0, 0, 0]], GREY_ALPHA[..., 1]),
            1,
        ),
        "CMYK": (
            encode(Image.fromarray(RGBA, "CMYK"), "tiff"),
            "tif",
            [],
            255 * (1 - RGBA[..., :3] / 255) * (1 - RGBA[..., 3:] / 255),
            1,
        ),
        "16 bits in PNG": (encode(DEEP), "png", [], grey(np.round(DEEP / 257)), 0),
        "16 bits in TIFF": (encode(DEEP, "tiff"), "tif", [], grey(np.round(DEEP / 257)), 0),
        "16 bits in PGM": (encode(DEEP, "ppm"), "pgm", [], grey(np.round(DEEP / 257)), 0),
        "12 bits in PNG": (encode(SMALL), "png", [], grey(np.round(SMALL / 4095 * 255)), 0),
        "12 bits in TIFF": (encode(SMALL, "tiff"), "tif", [], grey(np.round(SMALL / 4095 * 255)), 0),
        "16 bits, said to be": (encode(SMALL), "png", ["--bits", 16], grey(np.round(SMALL / 257)), 0),
        "16 bits, by its header": (
            encode(SMALL, "tiff", tiffinfo={281: 65535}),
            "tif",
            [],
            grey(np.round(SMALL / 257)),
            0,
        ),
        "16-bit colour in PNG": (deep_png(DEEP_COLOUR), "png", [], np.round(DEEP_COLOUR / 257), 0),
        "12-bit colour in PNG": (deep_png(DEEP_COLOUR >> 4), "png", [], np.round((DEEP_COLOUR >> 4) / 4095 * 255), 0),
        "12-bit colour in TIFF": (
            tiff(DEEP_COLOUR >> 4, compression="deflate"),
            "tif",
            [],
            np.round((DEEP_COLOUR >> 4) / 4095 * 255),
            0,
        ),
        "16 bits, grey and alpha": (
            deep_png(np.stack([DEEP, DEEP | 65535], axis=2)),
            "png",
            [],
            grey(DEEP >> 8),
            0,
        ),
        "linear profile": (encode(LINEAR, icc_profile=profile(1)), "png", [], oetf(LINEAR), 1),
        "linear profile, alpha": (
            encode(np.dstack([LINEAR, LINEAR[..., 0]]), icc_profile=profile(1)),
            "png",
            ["--channels", 4],
            np.dstack([oetf(LINEAR), LINEAR[..., 0]]),
            1,
        ),
        "linear profile, grey": (
            encode(LINEAR[..., 0], icc_profile=profile(1)),
            "png",
            [],
            grey(oetf(LINEAR[..., 0])),
            1,
        ),
        "profile of sRGB": (encode(noise_image(0), icc_profile=SRGB), "png", [], noise_image(0), 0),
        "damaged profile": (encode(noise_image(0), icc_profile=b"profile"), "png", [], noise_image(0), 0),
        "luma": (encode(noise_image(0)), "png", ["--channels", 1], noise_image(0) @ [0.299, 0.587, 0.114], 1),
        "first frame": (
            encode(Image.new("RGB", (8, 6), "red"), "gif", save_all=True, append_images=[Image.new("RGB", (8, 6))]),
            "gif",
            [],
            np.tile([255, 0, 0], (6, 8, 1)),
            0,
        ),
    }.values(),
)
def test_colours_are_those_of_the_file(tmp_path, data, ending, options, expected, tolerance):
    image = convert(tmp_path, data, ending, *options)
    assert image.shape == expected.shape
    assert np.abs(image - expected.astype(float)).max() <= tolerance


def test_exif_orientation_turns_the_image_upright(tmp_path):
    turns = [
        lambda p: p,
        lambda p: p[:, ::-1],
        lambda p: p[::-1, ::-1],
        lambda p: p[::-1],
        lambda p: p.swapaxes(0, 1),
        lambda p: np.rot90(p, -1),
        lambda p: p[::-1, ::-1].swapaxes(0, 1),
        lambda p: np.rot90(p, 1),
    ]
    for orientation, turn in enumerate(turns, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert np.array_equal(convert(tmp_path, encode(noise_image(0), exif=exif), "png"), turn(noise_image(0)))


@pytest.mark.parametrize("damaged", [(0x11A, 2, 4, b"72\0\0"), (0x128, 2, 2, b"2\0\0\0"), (0x102, 8, 1, b"\xff" * 4)])
def test_damaged_exif_data_does_not_stand_in_the_way(tmp_path, damaged):
    """Tags of another type than the standard's, next to the orientation, which Pillow reads and cannot write."""
    tags = [damaged, (0x112, 3, 1, b"\6\0\0\0")]
    exif = (
        b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(struct.pack("<HHI4s", *tag) for tag in tags) + bytes(4)
    )
    assert np.array_equal(convert(tmp_path, encode(noise_image(0), exif=exif), "png"), np.rot90(noise_image(0), -1))


def test_images_with_long_texts_are_read(tmp_path):
    """Programs that generate images store how they did."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("workflow", "x" * 2**21, zip=True)
    assert np.array_equal(convert(tmp_path, encode(noise_image(0), pnginfo=text), "png"), noise_image(0))


# --- transforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "target", "transform"),
    [
        (40, 80, (20, 20), None),
        (40, 80, (20, 20), "center-crop"),
        (80, 40, (20, 20), "center-crop"),
        (40, 80, (10, 30), "center-crop"),
    ],
)
def test_pixels_show_the_part_of_the_image_that_the_transform_chooses(tmp_path, height, width, target, transform):
    options = ["--transform", transform] if transform else []
    image = convert(tmp_path, encode(ramp(height, width)), "png", "--resolution", f"{target[0]}x{target[1]}", *options)
    assert image.shape == (target[1], target[0], 3)
    steps = width / target[0], height / target[1]  # source pixels per pixel
    for axis, channel, full, length, step in ((1, 0, width, target[0], steps[0]), (0, 1, height, target[1], steps[1])):
        step = min(steps) if transform else step
        centres = (full - length * step) / 2 + (np.arange(length) + 0.5) * step - 0.5
        assert np.abs(image[..., channel].mean(axis=1 - axis) - centres)[2:-2].max() <= 1.5


def test_center_crop_of_the_targets_size_is_exact(tmp_path):
    options = ("--resolution", "10x10", "--transform", "center-crop")
    assert np.array_equal(
        convert(tmp_path, encode(noise_image(0, 10, 16)), "png", *options), noise_image(0, 10, 16)[:, 3:13]
    )


def test_center_crop_wide_has_black_bars_above_and_below(tmp_path):
    options = ("--resolution", "16x8", "--transform", "center-crop-wide")
    image = convert(tmp_path, encode(np.full((20, 32, 3), 77, np.uint8)), "png", *options)
    expected = np.zeros((16, 16, 3))
    expected[4:12] = 77
    assert np.array_equal(image, expected)


def random_crops(source: Path, dest: Path, seed: int = 0) -> list[np.ndarray]:
    make(source, dest, "--resolution", "16x12", "--transform", "random-crops", "--crops", 40, "--seed", seed)
    return images_in(dest)


def test_random_crops_keep_the_shape_and_cover_scales_and_places(tmp_path):
    images = random_crops(write_folder(tmp_path / "in", {"a.png": encode(ramp(120, 240))}), tmp_path / "out.zip")
    assert len(images) == 40
    across = np.array([(float(image[6, 13, 0]) - image[6, 2, 0]) / 11 for image in images])  # source columns per pixel
    down = np.array([(float(image[9, 8, 1]) - image[2, 8, 1]) / 7 for image in images])
    assert all(image.shape == (12, 16, 3) for image in images)
    assert np.abs(across - down).max() < 0.5
    # The scale is uniform between 1 (16x12) and 10 (160x120).
    assert 0.9 < across.min() < 2.5
    assert 8.5 < across.max() < 10.1
    assert 4 < across.mean() < 7
    lefts = [int(image[6, 0, 0]) for image in images]
    assert min(lefts) < 40
    assert max(lefts) > 120


def test_random_crops_are_a_function_of_the_seed_and_the_file_name(tmp_path):
    source = write_folder(tmp_path / "in", {"b.png": encode(ramp(120, 240))})
    first = random_crops(source, tmp_path / "1.zip")
    assert np.array_equal(random_crops(source, tmp_path / "2.zip"), first)
    assert not np.array_equal(random_crops(source, tmp_path / "3.zip", seed=1), first)
    write_folder(source, {"a.png": encode(noise_image(0, 30, 30))})
    assert np.array_equal(random_crops(source, tmp_path / "4.zip")[40:], first)


def test_random_crops_repeat_the_label_and_enlarged_images_are_counted(tmp_path):
    images = {"x/a.png": encode(noise_image(0, 4, 4)), "y/b.png": encode(noise_image(1, 16, 16))}
    options = ("--resolution", "8x8", "--transform", "random-crops", "--crops", 2, "--labels", "folders")
    output = make(write_folder(tmp_path / "in", images), tmp_path / "out.zip", *options)
    assert labels_in(tmp_path / "out.zip") == [0, 0, 1, 1]
    assert "2 images had to be enlarged" in output


# --- native sizes -----------------------------------------------------------------------------------------------------


def jpeg(height: int, width: int, **options) -> bytes:
    return encode(ramp(height, width), "jpeg", quality=95, **options)


ON_ITS_SIDE = Image.Exif()
ON_ITS_SIDE[0x0112] = 6
NATIVE = {  # file -> (contents, size, whether they stay)
    "a/1.jpg": (jpeg(40, 60), (60, 40), True),
    "a/2.jpg": (jpeg(40, 60, exif=ON_ITS_SIDE), (40, 60), False),
    "a/3.jpg": (encode(noise_image(0, 32, 32)[..., 0], "jpeg"), (32, 32), False),
    "b/1.jpg": (jpeg(50, 70, icc_profile=profile(1)), (70, 50), False),
    "b/2.jpg": (jpeg(50, 70, icc_profile=SRGB), (70, 50), True),
    "b/3.jpg": (encode(ramp(80, 33), "mpo", save_all=True, append_images=[ramp(8, 8)]), (33, 80), True),
    "b/4.png": (encode(ramp(100, 200)), (200, 100), False),
    "b/5.jpg": (jpeg(31, 200), None, False),
}


def native(tmp_path: Path) -> tuple[Path, str]:
    """Make a ZIP of NATIVE's images of 32 pixels per side and more."""
    source = write_folder(tmp_path / "in", {name: data for name, (data, *_) in NATIVE.items()})
    options = ("--transform", "native", "--min-side", 32, "--labels", "folders")
    return tmp_path / "out.zip", make(source, tmp_path / "out.zip", *options)


def test_native_keeps_sizes_and_the_files_of_jpegs(tmp_path):
    path, output = native(tmp_path)
    assert "7 images of 32x32 to 200x100, 3 channels, 2 classes. Kept the files of 3 JPEGs. Left out 1 image" in output
    kept = {name: entry for name, entry in NATIVE.items() if entry[1]}
    assert dataset_json(path)["sizes"] == [list(size) for _, size, _ in kept.values()]
    assert labels_in(path) == [0, 0, 0, 1, 1, 1, 1]
    read, written = ImageFiles(tmp_path / "in"), ImageFiles(path)
    for (name, (data, size, stays)), target in zip(kept.items(), written.names(), strict=True):
        assert target.endswith(".jpg" if stays else ".png")
        assert ([data] == list(written.contents([target]))) == stays
        with zipfile.ZipFile(path) as archive:
            assert Image.open(io.BytesIO(archive.read(target))).mode == "RGB"
        assert written.image(target).size == size
        assert np.array_equal(written.image(target), read.image(name, 3))


def test_a_second_native_conversion_changes_nothing(tmp_path):
    path, _ = native(tmp_path)
    make(path, tmp_path / "again.zip", "--transform", "native")
    assert (tmp_path / "again.zip").read_bytes() == path.read_bytes()


def test_native_images_of_one_size_are_described_by_one_number():
    assert describe_native(Counter({(64, 48): 3}))[1:] == ["32x32     every image is 1.5 times as large"]


def test_check_says_what_a_native_archive_can_serve(tmp_path):
    path, _ = native(tmp_path)
    result = run("check", path)
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert lines[1:5] == [
        "images 7",
        "size 32x32 (smallest), 40x60 (median), 200x100 (largest)",
        "32x32 every image is 1.0 to 3.1 times as large (median 1.2)",
        "64x64 in 1 of 7 images; leave the others out with min-side 64",
    ]
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    first = next(iter(files))
    checked = run("check", write_zip(tmp_path / "swapped.zip", files | {first: encode(noise_image(0, 60, 40))}))
    assert checked.exit_code == 2
    assert f"{first} is 40x60, but is listed as 60x40" in checked.output


# --- labels -----------------------------------------------------------------------------------------------------------

ROWS = [("dog/2.png", 7), ("cat/1.png", 2), ("dog/1.png", 0)]


@pytest.fixture
def animals(tmp_path):
    return write_folder(tmp_path / "in", {name: encode(noise_image(0)) for name, _ in ROWS})


def test_folders_are_classes(tmp_path, animals):
    output = make(animals, tmp_path / "out.zip", "--labels", "folders", "--max-images", 2)
    entries = [["00000/img00000000.png", 0], ["00000/img00000001.png", 1]]
    assert dataset_json(tmp_path / "out.zip") == {"labels": entries, "class_names": ["cat", "dog"]}
    assert "2 images of 8x6, 3 channels, 2 classes." in output


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.json", json.dumps({"labels": ROWS})),
        ("l.csv", "filename,label\n" + "".join(f"{name},{label}\n" for name, label in ROWS)),
    ],
)
def test_labels_from_a_file(tmp_path, animals, name, text):
    (tmp_path / name).write_text(text)
    make(animals, tmp_path / "out.zip", "--labels", tmp_path / name)
    assert labels_in(tmp_path / "out.zip") == [2, 0, 7]


def test_class_names_in_a_csv_are_numbered_in_sorted_order(tmp_path, animals):
    (tmp_path / "l.csv").write_text('cat/1.png,tom\ndog/1.png,rex\ndog/2.png,"a, b"\n')
    make(animals, tmp_path / "out.zip", "--labels", tmp_path / "l.csv")
    assert dataset_json(tmp_path / "out.zip")["class_names"] == ["a, b", "rex", "tom"]
    assert labels_in(tmp_path / "out.zip") == [2, 1, 0]


def test_the_sources_own_labels_are_carried_over_unless_declined(tmp_path, animals):
    (animals / "dataset.json").write_text(json.dumps({"labels": [[name, [label, 0.5]] for name, label in ROWS]}))
    make(animals, tmp_path / "out.zip")
    assert labels_in(tmp_path / "out.zip") == [[2, 0.5], [0, 0.5], [7, 0.5]]
    make(animals, tmp_path / "none.zip", "--labels", "none")
    assert dataset_json(tmp_path / "none.zip") == {"labels": None}


# --- bad files and wrong calls ----------------------------------------------------------------------------------------


def test_skip_bad_leaves_broken_files_out_with_labels_in_step(tmp_path):
    images = {f"{'ab'[i % 2]}/{i}.png": encode(noise_image(i)) for i in range(6)}
    source = write_folder(tmp_path / "in", images | {"a/2.png": b"", "b/3.png": images["b/3.png"][:80]})
    output = make(source, tmp_path / "out.zip", "--skip-bad", "--labels", "folders")
    assert "Skipped 2 unreadable files." in output
    assert f"{source}/a/2.png cannot be read as an image: the file is empty" in output
    assert np.array_equal(images_in(tmp_path / "out.zip"), [noise_image(i) for i in (0, 4, 1, 5)])
    assert labels_in(tmp_path / "out.zip") == [0, 0, 1, 1]
    make(source, tmp_path / "first.zip", "--skip-bad", "--max-images", 2)
    assert np.array_equal(images_in(tmp_path / "first.zip"), [noise_image(i) for i in (0, 4)])


def huge_png(side: int) -> bytes:
    """Return a PNG whose header claims side x side pixels."""
    data = bytearray(encode(noise_image(0)))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def patched_zip(local: dict[int, bytes], central: dict[int, bytes]):
    """Return what writes a ZIP of one image with bytes of its two headers replaced at these offsets."""

    def write(path: Path) -> Path:
        data = bytearray(write_zip(path / "a.zip", {"a.png": encode(noise_image(0))}).read_bytes())
        for start, changes in ((0, local), (data.index(b"PK\x01\x02"), central)):
            for offset, value in changes.items():
                data[start + offset : start + offset + len(value)] = value
        return write_file(path / "a.zip", data)

    return write


GOOD = {"cat/a.png": encode(noise_image(0)), "dog/b.png": encode(noise_image(1))}


def folder_with(*files: tuple[str, bytes]):
    return lambda path: write_folder(path / "in", GOOD | dict(files))


def write_file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def special_file(make):
    def write(path: Path) -> Path:
        make(folder_with()(path) / "c.png")
        return path / "in"

    return write


def labels_file(name: str, text: str):
    return lambda path: ["--labels", write_file(path / name, text.encode("latin-1"))]


def pipe(path: Path) -> Path:
    os.mkfifo(path / "pipe")
    return path / "pipe"


good = folder_with()
CROP = ["--resolution", "8x8", "--transform"]
WRONG = [  # (source, further options, words of the sentence)
    (lambda path: path / "nothing", [], "does not exist"),
    (lambda path: write_folder(path / "in", {}), [], "holds no images"),
    (lambda path: write_folder(path / "in", {"a.txt": b"hi"}), [], "holds no images"),
    (lambda path: write_zip(path / "a.zip", {}), [], "holds no images"),
    (lambda path: write_file(path / "a.png", GOOD["cat/a.png"]), [], "neither a folder nor a whole ZIP"),
    (lambda path: write_file(path / "a.zip", write_zip(path / "w", GOOD).read_bytes()[:-30]), [], "whole ZIP"),
    (patched_zip({6: b"\1"}, {8: b"\1"}), [], "is encrypted"),
    (patched_zip({14: b"1234"}, {16: b"1234"}), [], "Bad CRC-32"),
    (patched_zip({8: b"\x63"}, {10: b"\x63"}), [], "compression"),
    (patched_zip({}, {24: b"\0\0\0\xc0"}), [], "claims 3.0 GiB"),
    (lambda path: write_zip(path / "a.zip", {"../a.png": b"x"}), [], "points outside"),
    (lambda path: write_zip(path / "a.zip", {"/a.png": b"x"}), [], "points outside"),
    (folder_with(("c.png", b"")), [], "c.png cannot be read as an image: the file is empty"),
    (folder_with(("c.png", GOOD["cat/a.png"][:90])), [], "--skip-bad"),
    (folder_with(("c.jpg", encode(noise_image(0, 64, 64), "jpeg")[:900])), [], "truncated"),
    (folder_with(("c.png", b"hello")), [], "no known image format"),
    (folder_with(("c.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), [], "no known image format"),
    (folder_with(("c.png", huge_png(60000))), [], "more than 1,074 million pixels"),
    (folder_with(("c.tif", encode(np.ones((6, 8), np.float32), "tiff"))), [], "no agreed range"),
    (folder_with(("c.tif", encode(np.full((6, 8), 70000, np.int32), "tiff"))), [], "no agreed range"),
    (folder_with(("c.svg", b"<svg>")), ["--resolution", "8x6"], "c.svg cannot be read as an image: "),
    (lambda path: write_folder(path / "in", {"a.svg": b""}), ["--transform", "native"], "draws them with --resolution"),
    (special_file(os.mkfifo), [], "not a regular file"),
    (pipe, [], "pipe is a pipe or device; give a folder or a ZIP"),
    (lambda path: Path("/dev/zero"), [], "/dev/zero is a pipe or device"),
    (good, lambda path: ["--labels", pipe(path)], "pipe is a pipe or device; give folders, none, or a file"),
    (special_file(lambda path: path.symlink_to(path.name)), [], "c.png cannot be read"),
    (folder_with(("dog/c.png", encode(noise_image(0, 5, 8)))), [], "dog/c.png is 8x5, but cat/a.png is 8x6"),
    (folder_with(("dataset.json", b"{")), [], "is not of the form"),
    (folder_with(("dataset.json", b'{"labels": [["cat/a.png", 0]]}')), [], "no label for dog/b.png"),
    (lambda path: write_folder(path / "in", {"a.png": b""}), ["--skip-bad"], "no image that can be read"),
    (good, ["--transform", "native", "--min-side", 8], "no image that can be read and has 8 pixels per side"),
    (good, ["--min-side", 8], "add transform native"),
    (good, ["--transform", "native", "--resolution", "8x8"], "native keeps"),
    (good, ["--resolution", "256x"], "WIDTHxHEIGHT"),
    (good, ["--resolution", "0x8"], "WIDTHxHEIGHT"),
    (good, ["--resolution", "99999x8"], "16384"),
    (good, ["--transform", "center-crop"], "resolution"),
    (good, [*CROP, "random-crops"], "go together"),
    (good, [*CROP, "center-crop", "--crops", 3], "go together"),
    (good, [*CROP, "random-crops", "--crops", 0], "--crops"),
    (good, ["--resolution", "8x9", "--transform", "center-crop-wide"], "width must be the larger"),
    (good, ["--transform", "zoom"], "center-crop"),
    (good, ["--seed", 0], "--seed chooses random crops or letters"),
    (good, ["--channels", 2], "--channels"),
    (good, ["--max-images", -1], "--max-images"),
    (good, ["--labels", "nothing.csv"], "nothing.csv"),
    (folder_with(("c.png", GOOD["cat/a.png"])), ["--labels", "folders"], "c.png is in no folder"),
    (lambda path: good(path) / "cat", ["--labels", "folders"], "a.png is in no folder"),
    (good, labels_file("l.csv", "cat/a.png,1\n"), "no label for dog/b.png"),
    (good, labels_file("l.csv", "\xff\xfe\0"), "CSV"),
    (good, labels_file("l.json", '{"labels": null}'), 'holds no "labels"'),
]


@pytest.mark.parametrize(("source", "options", "words"), WRONG)
def test_a_wrong_call_ends_in_one_sentence_and_harms_no_file(tmp_path, source, options, words):
    source = source(tmp_path)
    options = options(tmp_path) if callable(options) else options
    out = write_folder(tmp_path / "out", {"kept.zip": b"as it was"})
    for dest in (out / "kept.zip", out / "folder"):
        result = run("--source", source, "--dest", dest, *options)
        assert result.exit_code == 2, result.output
        assert words in result.output
        assert "Traceback" not in result.output
        assert result.output.count("Error:") == 1
    assert [path.name for path in out.iterdir()] == ["kept.zip"]
    assert (out / "kept.zip").read_bytes() == b"as it was"


@pytest.mark.parametrize(
    "dest", ["in", "in/out", "full", "dir.zip", "file", "file/out.zip", "file/out", f"{'x' * 256}.zip", "x" * 256]
)
def test_a_wrong_destination_is_refused_and_left_as_it_was(tmp_path, dest):
    source = good(tmp_path)
    write_folder(tmp_path, {"full/x.txt": b"x", "file": b"x"})
    (tmp_path / "dir.zip").mkdir()
    before = sorted(tmp_path.rglob("*"))
    result = run("--source", source, "--dest", tmp_path / dest)
    assert result.exit_code == 2
    assert f"{tmp_path / dest}" in result.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.TGZ", "x.7z", "x.rar"])
def test_an_archive_of_another_kind_is_refused_and_no_folder_of_its_name_is_made(tmp_path, name):
    result = run("--source", good(tmp_path), "--dest", tmp_path / name)
    assert (result.exit_code, "choose a name that ends in .zip" in result.output) == (2, True)
    assert not (tmp_path / name).exists()


def test_missing_options_are_named():
    assert "Missing option '--source'" in run("--dest", "x.zip").output
    assert "Missing option '--dest'" in run("--source", "x").output


@pytest.mark.parametrize("name", ["out.zip", "out"])
def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing(tmp_path, name):
    source = write_folder(tmp_path / "in", {f"{i}.png": encode(noise_image(i, 200, 200)) for i in range(3)})
    with files_up_to(50_000):  # less than one image
        result = run("--source", source, "--dest", tmp_path / name)
    assert result.exit_code == 2
    assert f"Error: cannot write {tmp_path / name}" in result.output
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_leaves_nothing_half_written(tmp_path, start, number, code):
    source = write_folder(tmp_path / "in", {f"{i}.png": encode(noise_image(i, 64, 64)) for i in range(3)})
    options = ["--resolution", "256x256", "--transform", "random-crops", "--crops", "100000"]
    dest = tmp_path / "out" / "a.zip"
    process = start(dataset_tool.__file__, "--source", source, "--dest", dest, *options)
    wait_until(lambda: dest.parent.exists() and any(dest.parent.iterdir()))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.endswith("Interrupted; nothing was written.\n")
    assert list(dest.parent.iterdir()) == []


def test_a_finished_archive_replaces_a_zip_or_an_empty_folder(tmp_path):
    (tmp_path / "out.zip").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    make(good(tmp_path), tmp_path / "out.zip")
    make(tmp_path / "in", tmp_path / "folder")
    assert len(images_in(tmp_path / "out.zip")) == 2
    assert (tmp_path / "folder" / "00000" / "img00000001.png").exists()
    assert (tmp_path / "folder").stat().st_mode & 0o777 == (tmp_path / "in").stat().st_mode & 0o777


def test_where_a_destination_is_a_link_the_archive_is_where_it_leads(tmp_path):
    (tmp_path / "empty").mkdir()
    for link, target in (("link.zip", "elsewhere.zip"), ("link", "empty")):
        (tmp_path / link).symlink_to(tmp_path / target)
        make(good(tmp_path), tmp_path / link)
        assert (tmp_path / link).is_symlink()
        assert len(ImageArchive(tmp_path / target)) == 2


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_reports_what_a_good_archive_holds(tmp_path):
    images = {f"{'ab'[i % 3 == 0]}/{i}.png": encode(noise_image(i, 8, 8)) for i in range(5)}
    make(write_folder(tmp_path / "in", images), tmp_path / "out.zip", "--labels", "folders")
    result = run("check", tmp_path / "out.zip")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert lines[1:] == ["images 5", "size 8x8 (5)", "channels 3 (5)", "labels 2 classes: a 3, b 2"]


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (24, 24), (8, 6), (17, 16), (100, 64)])
def test_check_says_of_a_size_what_training_says(tmp_path, size):
    width, height = size
    folder = write_folder(tmp_path / "in", {"a.png": encode(noise_image(0, height, width, 4))})
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
        ({"c.png": encode(noise_image(0, 5, 5))}, ["1 image not of the most frequent size 8x6", "e.g. c.png of 5x5"]),
        ({"c.png": b"", "d.png": b"x"}, ["c.png cannot be read", "d.png cannot be read"]),
        ({"c.tif": encode(np.ones((6, 8), np.float32), "tiff")}, ["c.tif cannot be read as an image: 32-bit float"]),
        ({f"bad{i:02d}.png": b"" for i in range(14)}, ["bad09.png", "and 4 more"]),
        ({"dataset.json": b'{"labels": [["cat/a.png", 0]]}'}, ["1 image without a label", "dog/b.png"]),
        (
            {"dataset.json": b'{"labels": [["cat/a.png", 0], ["dog/b.png", 0], ["x.png", 1]]}'},
            ["labels 1 file that is not there", "x.png"],
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
    result = run("check", write_folder(tmp_path / "in", GOOD | files))
    assert result.exit_code == 2
    assert "not fit for training" in result.output
    assert "Traceback" not in result.output
    assert all(text in result.output for text in words)


# --- what is read, and what is said of it -----------------------------------------------------------------------------


def test_files_are_known_by_ending_or_contents_and_those_left_out_are_counted(tmp_path):
    png = encode(noise_image(0))
    images = {
        "a.PNG": png,
        "b.jpe": encode(noise_image(0), "jpeg"),
        "c": png,
        "d.png": encode(noise_image(0), "gif"),
        "g": encode(noise_image(0), "bmp"),
    }
    others = {"e.xyz": png, "f.XYZ": png, "notes.txt": b"x", "README": b"x", ".DS_Store": b"x", "__MACOSX/a.png": b"x"}
    output = make(write_folder(tmp_path / "in", images | others), tmp_path / "out.zip")
    assert len(images_in(tmp_path / "out.zip")) == 5
    assert "left out: 2 .xyz, 1 .txt, 1 without an ending" in output.splitlines()


def test_changes_of_the_images_are_said(tmp_path):
    images = {
        "grey.png": encode(noise_image(0)[..., 0]),
        "linear.png": encode(LINEAR, icc_profile=profile(1)),
        "deep.png": encode(SMALL),
    }
    output = make(write_folder(tmp_path / "in", images), tmp_path / "out.zip")
    assert "channels: RGB (2 grey, of 3; converted)" in output
    assert "read as 12 bits" in output
    assert "converted to sRGB from 1 linear" in output


def test_16_bit_files_share_one_scale(tmp_path):
    files = {"a.png": encode(SMALL // 20), "b.png": encode(SMALL)}
    make(write_folder(tmp_path / "in", files), tmp_path / "out.zip")
    assert np.array_equal(images_in(tmp_path / "out.zip")[0], grey(np.round(SMALL // 20 / 4095 * 255)))
    assert "and 8 bits end at 255" in run("--source", tmp_path / "in", "--dest", tmp_path / "8.zip", "--bits", 8).output


def test_a_photograph_of_180_megapixels_is_allowed(tmp_path):
    folder = write_folder(tmp_path, {"a.png": huge_png(13416)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ImageFiles(folder).sizes().tolist() == [[13416, 13416]]


def test_jpegs_are_written_on_request(tmp_path):
    smooth = np.asarray(ramp(64, 64))
    make(write_folder(tmp_path / "in", {"a.png": encode(smooth)}), tmp_path / "out.zip", "--format", "jpg")
    image, _ = ImageArchive(tmp_path / "out.zip")[0]
    assert np.abs(image.permute(1, 2, 0).numpy() - smooth.astype(int)).max() < 8
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.read("00000/img00000000.jpg").startswith(b"\xff\xd8\xff")


def test_archives_for_training_are_read_as_they_are(tmp_path):
    path = write_folder(tmp_path, {"00000/img00000000.png": encode(LINEAR, icc_profile=profile(1))})
    assert np.array_equal(ImageArchive(path)[0][0].permute(1, 2, 0).numpy(), LINEAR)


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tar.xz"])
def test_a_tar_holds_the_same_images_as_a_folder(tmp_path, ending):
    files = {f"{'ab'[i % 2]}/{i}.png": encode(noise_image(i)) for i in range(4)}
    folder = write_folder(tmp_path / "in", files)
    os.link(folder / "a" / "0.png", folder / "b" / "same.png")  # in the TAR, a link to the other file
    with tarfile.open(tmp_path / f"x.{ending}", f"w:{ending.partition('.')[2]}") as archive:
        archive.add(folder, ".")
        link = tarfile.TarInfo("a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    for source, dest in ((folder, "1.zip"), (tmp_path / f"x.{ending}", "2.zip")):
        make(source, tmp_path / dest, "--labels", "folders")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    again = pickle.loads(pickle.dumps(ImageArchive(tmp_path / f"x.{ending}")))
    assert again.name == "x"
    assert len(again) == 5
    assert np.array_equal(again[1][0].permute(1, 2, 0), noise_image(2))


def cifar(values: np.ndarray, order: str) -> dict[str, bytes]:
    """Return the files of CIFAR-10 with images [N,3,32,32], as its authors pickle them."""
    batch = {b"data": np.array(values.reshape(-1, 3072), order=order), b"labels": [1, 0]}
    files = {f"data_batch_{i}": batch for i in (1, 2)} | {"test_batch": batch}
    files |= {"batches.meta": {b"label_names": [b"cat", b"dog"]}}
    return {f"cifar-10-batches-py/{name}": pickle.dumps(content, 4) for name, content in files.items()}


@pytest.mark.parametrize("order", ["C", "F"])
def test_cifar_is_read_as_its_authors_publish_it(tmp_path, order):
    values = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    make(write_folder(tmp_path / "in", cifar(values, order)), tmp_path / "out.zip")
    assert np.array_equal(images_in(tmp_path / "out.zip"), np.concatenate([values, values]).transpose(0, 2, 3, 1))
    assert labels_in(tmp_path / "out.zip") == [1, 0, 1, 0]
    assert dataset_json(tmp_path / "out.zip")["class_names"] == ["cat", "dog"]


def test_a_pickle_of_cifar_executes_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    files = cifar(np.zeros((2, 3, 32, 32), np.uint8), "C")
    files["cifar-10-batches-py/data_batch_2"] = pickle.dumps({b"data": Hostile(), b"labels": [0]})
    output = run("--source", write_folder(tmp_path / "in", files), "--dest", tmp_path / "out.zip").output
    assert "data_batch_2 is not a file of CIFAR (it names posix.mkdir)" in output
    assert not (tmp_path / "executed").exists()


def test_an_lmdb_is_read_as_lsun_has_it(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "in")) as database, database.begin(write=True) as values:
        for i in range(3):
            values.put(b"key%d" % i, encode(noise_image(i), "webp", lossless=True))
    make(tmp_path / "in", tmp_path / "out.zip")
    assert np.array_equal(images_in(tmp_path / "out.zip"), [noise_image(i) for i in range(3)])


@pytest.mark.parametrize("ending", ["avif", "heic"])
def test_photographs_of_telephones_are_read_or_their_decoder_is_named(tmp_path, ending):
    image, form = np.asarray(ramp(64, 64)), {"heic": "HEIF"}.get(ending, ending)
    if ending not in ENDINGS:
        output = run("--source", write_folder(tmp_path, {f"a.{ending}": b"x"}), "--dest", tmp_path / "out.zip").output
        assert "left out: 1 .heic; .heic: pip install pillow-heif" in output
        return
    found = convert(tmp_path, encode(image, form, quality=90), ending)
    assert np.abs(found.astype(int) - image).mean() < 8
