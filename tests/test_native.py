"""Laws of archives of native-size images: training/native.py, and `dataset_tool.py --transform native`."""

import io
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import encode, noise_image, write_folder, write_zip
from PIL import Image

from dnnlib.console import UserError
from training.data import ImageArchive, batches, index_at
from training.native import NativeArchive
from training.networks import COORDS
from training.scales import ScalesConfig, positions

SIDE = 8, 12  # height, width of the training images


def middling(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Return random pixels from 64 to 191, whose resampling stays within 0..255."""
    return noise_image(seed, height, width, channels) // 2 + 64


def smooth(height: int, width: int) -> np.ndarray:
    """Return an image of waves of 8 pixels and longer, and of edges: uint8 [H,W,3]."""
    y, x = np.mgrid[:height, :width] + 0.5
    waves = sum(np.sin(2 * np.pi * (y * (k % 3 - 1) + x) / (8 * 2**k) + k) / 2 for k in range(4))
    planes = [128 + 40 * waves, 255.0 * (y + 0.3 * x > height / 2), 255 * x / width]
    return np.stack(planes, axis=2).clip(0, 255).astype(np.uint8)


def weights(start: float, length: float, count: int, available: int) -> np.ndarray:
    """Return the matrix [count, available] of Lanczos resampling: count pixels of start..start+length of a line."""
    scale = length / count
    centres = start + (np.arange(count) + 0.5) * scale
    t = (np.arange(available) + 0.5 - centres[:, None]) / max(scale, 1)
    kernel = np.where(abs(t) < 3, np.sinc(t) * np.sinc(t / 3), 0)
    return kernel / kernel.sum(axis=1, keepdims=True)


def resample(image: np.ndarray, top: float, left: float, height: float, width: float, side=SIDE) -> np.ndarray:
    """Return part of an image [H,W,C] at the size `side`: float64 [C,h,w]."""
    rows, columns = weights(top, height, side[0], image.shape[0]), weights(left, width, side[1], image.shape[1])
    return np.einsum("ih,jw,hwc->cij", rows, columns, image.astype(np.float64))


def folder(path: Path, *images: np.ndarray) -> Path:
    return write_folder(path, {f"{i}.png": encode(image) for i, image in enumerate(images)})


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    rng = np.random.default_rng(0)
    sizes = rng.integers(16, 60, size=(7, 2)).tolist()
    return folder(tmp_path_factory.mktemp("native"), *(middling(i, *size) for i, size in enumerate(sizes)))


# --- the stream -------------------------------------------------------------------------------------------------------


def take(images, count, **settings):
    stream = batches(images, scales=ScalesConfig(max=4, windows=0.8), seed=5, **settings)
    return [torch.cat(part) for part in zip(*itertools.islice(stream, count), strict=True)]


def test_windows_depend_on_seed_and_position_alone_and_show_what_they_say(archive):
    images = NativeArchive(archive, (8, 8), mirror=True)
    pixels, _, windows = take(images, 60, batch=1, workers=0)
    for start, workers in ((0, 2), (4, 0), (20, 0)):
        later = take(images, 5, batch=4, start=start, workers=workers)
        assert torch.equal(later[0], pixels[start : start + 20])
        assert torch.equal(later[2], windows[start : start + 20])
    for i, window in enumerate(windows.tolist()):
        index = index_at(i, len(images), 5)
        assert torch.equal(images.window(index, *window), pixels[i])
        assert 1 <= window[0] <= min(4, images.largest(index))
    zooms = windows[:, 0]
    assert 0.6 < (zooms > 1).double().mean() < 0.97
    assert zooms.max() > 2


def test_positions_of_a_window_are_those_of_the_whole_resampled_picture():
    for zoom, i, j in ((1, 0, 0), (3, 7, 2), (2, 8, 11)):  # the window begins at pixel (i, j) of zoom·8 x zoom·12
        window = torch.tensor([[zoom, i / (zoom * 8), j / (zoom * 12)]], dtype=torch.float64)
        rows, cols = positions(window, SIDE)
        whole = COORDS["centers"].positions
        torch.testing.assert_close(rows[0], whole(zoom * 8, torch.float64)[i : i + 8])
        torch.testing.assert_close(cols[0], whole(zoom * 12, torch.float64)[j : j + 12])


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(40, 60), (47, 60), (40, 71), (8, 12), (9, 33)])
def test_a_window_is_the_part_of_the_largest_centred_box_that_it_names(tmp_path, height, width):
    image = middling(0, height, width)
    images = NativeArchive(folder(tmp_path, image), SIDE)
    largest = min(height / 8, width / 12)
    assert images.largest(0) == largest
    top, left = int((height - 8 * largest) / 2), int((width - 12 * largest) / 2)
    for zoom, y, x in [(1, 0, 0), (largest, 0.3 - 0.3 / largest, 0), (1.7, 0.1, 0.41), (5, 0.8, 0.8)]:
        got = images.window(0, zoom, y, x)
        assert got.dtype == torch.uint8
        box = (top + y * 8 * largest, left + x * 12 * largest, 8 * largest / zoom, 12 * largest / zoom)
        assert np.abs(got.numpy() - resample(image, *box)).max() < 1.3  # Pillow rounds rows and columns
    assert torch.equal(images[0][0], images.window(0, 1, 0, 0))


def test_windows_are_parts_of_one_resampled_frame(tmp_path):
    images = NativeArchive(folder(tmp_path, noise_image(0, 61, 90)), SIDE)
    whole = NativeArchive(tmp_path, (40, 60)).window(0, 1, 0, 0)  # zoom 5
    for i, j in [(0, 0), (7, 13), (32, 48)]:
        window = images.window(0, 5, i / 40, j / 60)
        assert (window.int() - whole[:, i : i + 8, j : j + 12].int()).abs().max() <= 1


def test_a_window_of_more_pixels_is_that_of_an_archive_of_this_size(tmp_path):
    images = NativeArchive(folder(tmp_path, noise_image(0, 61, 90)), SIDE)
    larger = NativeArchive(tmp_path, (12, 18))
    for window in [(1, 0, 0), (2.3, 0.1, 0.4)]:
        assert torch.equal(images.window(0, *window, (12, 18)), larger.window(0, *window))


def test_an_image_of_the_training_size_stays_as_it_is(tmp_path):
    assert np.array_equal(
        NativeArchive(folder(tmp_path, noise_image(0, *SIDE)), SIDE)[0][0], noise_image(0, *SIDE).transpose(2, 0, 1)
    )


def test_mirrored_windows_are_those_of_mirrored_files(tmp_path):
    image = noise_image(0, 40, 66)
    images = NativeArchive(folder(tmp_path / "a", image), SIDE, mirror=True)
    flipped = NativeArchive(folder(tmp_path / "b", image[:, ::-1]), SIDE)
    assert len(images) == 2
    assert images.largest(1) == images.largest(0)
    for window in [(1, 0, 0), (2.5, 0.1, 0.6), (5, 0.2, 0)]:
        assert (images.window(1, *window).int() - flipped.window(0, *window).int()).abs().max() <= 1


def test_a_jpeg_decoded_at_a_fraction_of_its_size_shows_the_same(tmp_path):
    """Within one level in the root mean square, and 8 anywhere."""
    data = encode(smooth(301, 430), "jpeg", quality=90)
    exact = encode(np.asarray(Image.open(io.BytesIO(data))))
    write_folder(tmp_path, {"a.jpg": data, "b.png": exact})
    for side in [(16, 16), (16, 23), (50, 50)]:
        images = NativeArchive(tmp_path, side)
        for window in [(1, 0, 0), (1.3, 0.1, 0.2), (2, 0.5, 0.5), (4.1, 0.5, 0.1)]:
            difference = (images.window(0, *window).double() - images.window(1, *window)).abs()
            assert difference.square().mean() < 1
            assert difference.max() <= 8


def test_transparent_pixels_give_no_colour_to_their_neighbours(tmp_path):
    image = np.full((40, 60, 4), (200, 100, 50, 255), np.uint8)
    image[:, 31:] = 0, 255, 0, 0
    window = NativeArchive(folder(tmp_path, image), SIDE).window(0, 1, 0, 0).numpy().astype(int)
    seen = window[3] > 16
    assert 0 < (window[3, 0] < 250).sum() < 12
    assert np.abs(window[:3, seen] - np.array([[200], [100], [50]])).max() <= 8  # colours of 8 bits times alpha
    white = NativeArchive(tmp_path, SIDE, channels=3).window(0, 1, 0, 0).numpy()
    assert (white[:, :, -1] == 255).all()
    assert np.array_equal(white[:, :, 0], np.broadcast_to([[200], [100], [50]], (3, 8)))


@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "tiff"])
def test_sizes_are_those_of_upright_images(tmp_path, form):
    upright = Image.fromarray(smooth(60, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its left side
    options = {"lossless": True} if form == "webp" else {"quality": 95, "subsampling": 0} if form == "jpeg" else {}
    write_folder(tmp_path, {f"a.{form}": encode(upright.rotate(90, expand=True), form, exif=exif, **options)})
    images = NativeArchive(tmp_path, (10, 8))
    assert images.largest(0) == 4
    expected = resample(np.asarray(upright), 10, 0, 40, 32, (10, 8)).clip(0, 255)
    assert np.abs(images.window(0, 1, 0, 0).numpy() - expected).mean() < 1


def test_16_bits_are_scaled_to_8(tmp_path):
    grey = middling(0, 40, 60)[..., 0]
    write_folder(tmp_path, {"a.png": encode(Image.fromarray(grey * np.uint16(257))), "b.png": encode(grey)})
    images = NativeArchive(tmp_path, SIDE)
    assert images.shape == (1, *SIDE)
    assert torch.equal(images.window(0, 2, 0.1, 0.2), images.window(1, 2, 0.1, 0.2))


# --- archives ---------------------------------------------------------------------------------------------------------


def listed(sizes: list, **files: bytes) -> dict[str, bytes]:
    """Return the files of an archive whose dataset.json lists `sizes`."""
    files = {f"00000/img0000000{i}.png": data for i, data in enumerate(files.values())}
    return files | {
        "dataset.json": json.dumps({"labels": [[n, i % 2] for i, n in enumerate(files)], "sizes": sizes}).encode()
    }


def test_listed_sizes_are_believed_until_an_image_is_read(tmp_path):
    files = listed(
        [[60, 40], [50, 90], [33, 44]], a=encode(noise_image(0, 40, 60)), b=b"damaged", c=encode(noise_image(0, 44, 34))
    )
    path = write_zip(tmp_path / "a.zip", files)
    images = pickle.loads(pickle.dumps(NativeArchive(path, SIDE, use_labels=True, mirror=True)))
    assert (images.shape, images.label_dim, images.name, len(images)) == ((3, *SIDE), 2, "a", 6)
    assert [images.largest(i) for i in range(3)] == [5, 50 / 12, 33 / 12]
    assert images[3][1].tolist() == [1, 0]
    assert torch.equal(images[3][0], images[0][0].flip(2))
    with pytest.raises(UserError, match=r"img00000001.png cannot be read"):
        images[1]
    with pytest.raises(UserError, match=r"img00000002.png is 34x44, but .* 33x44"):
        images[2]


PLAIN = {"a.png": encode(noise_image(0, 40, 60)), "b.png": encode(noise_image(0, 40, 11))}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (PLAIN, r"b.png is 11x40, smaller than the training images, 12x8 \(1 of 2 .* min-side 12"),
        ({"a.png": b"damaged"}, "a.png cannot be read"),
        (listed([[60, 40]], **PLAIN), '"sizes" in .*dataset.json cannot be used'),
        (listed([[60, 40], [11, -40]], **PLAIN), '"sizes" in .*dataset.json cannot be used'),
        (listed([[60, 40], "b"], **PLAIN), '"sizes" in .*dataset.json cannot be used'),
    ],
)
def test_a_wrong_archive_is_refused_at_once(tmp_path, files, words):
    with pytest.raises(UserError, match=words):
        NativeArchive(write_folder(tmp_path, files), SIDE)


def test_an_archive_of_equal_images_is_not_made_of_native_ones(tmp_path):
    with pytest.raises(UserError, match="to the training size"):
        ImageArchive(write_folder(tmp_path, listed([[60, 40], [11, 40]], **PLAIN)))


@pytest.mark.parametrize("window", [(0.9, 0, 0), (2, 0.51, 0), (2, 0, -0.01), (float("nan"), 0, 0)])
def test_a_window_beyond_the_frame_is_refused(tmp_path, window):
    with pytest.raises(ValueError, match="not within the frame"):
        NativeArchive(folder(tmp_path, noise_image(0, 40, 60)), SIDE).window(0, *window)
