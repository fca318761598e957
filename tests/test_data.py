"""Laws of the training reader: training/data.py."""

import itertools
import json
import multiprocessing
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import encode, noise_image, write_folder, write_zip
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dnnlib.console import UserError
from training.data import ImageArchive, batches, epoch_order, index_at
from training.sources import ImageFiles

COUNT = 11
GOLDEN_ORDER = [0, 2, 1, 5, 4, 3, 6, 7]  # count 8, seed 0, epoch 0


def contents(count: int = COUNT, labels: object = None) -> dict[str, bytes]:
    """Return the files of a small StyleGAN dataset."""
    files = {f"{i // 5:05d}/img{i:08d}.png": encode(noise_image(i)) for i in range(count)}
    if labels is not None:
        files["dataset.json"] = json.dumps({"labels": labels}).encode()
    return files


def class_labels(count: int = COUNT) -> list:
    return [[f"{i // 5:05d}/img{i:08d}.png", i % 3] for i in range(count)]


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return write_zip(tmp_path_factory.mktemp("data") / "tiny.zip", contents(labels=class_labels()))


def take(stream, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(itertools.islice(stream, count))


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_images_and_labels_are_those_of_the_files(archive, tmp_path, kind):
    path = archive if kind == "zip" else write_folder(tmp_path / "tiny", contents(labels=class_labels()))
    images = ImageArchive(path, use_labels=True)
    assert (images.shape, images.label_dim, images.has_labels) == ((3, 6, 8), 3, True)
    assert (images.name, len(images)) == ("tiny", COUNT)
    for i in range(COUNT):
        image, label = images[i]
        assert image.dtype == torch.uint8
        assert label.dtype == torch.float32
        assert np.array_equal(image.permute(1, 2, 0).numpy(), noise_image(i))
        assert label.tolist() == images.label(i).tolist() == [float(i % 3 == k) for k in range(3)]
    with pytest.raises(IndexError):
        images[COUNT]


def test_mirror_adds_each_image_flipped_left_to_right(archive):
    plain, mirrored = ImageArchive(archive), ImageArchive(archive, mirror=True)
    assert len(mirrored) == 2 * COUNT
    for i in range(COUNT):
        assert torch.equal(mirrored[i][0], plain[i][0])
        assert torch.equal(mirrored[COUNT + i][0], plain[i][0].flip(2))


def test_labels_unused_are_known_but_empty(archive):
    images = ImageArchive(archive)
    assert images.has_labels
    assert images.label_dim == 0
    assert images[0][1].shape == (0,)


def test_vector_labels_stay_as_they_are(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    labels = {f"00000/img{i:08d}.png": vectors[i].tolist() for i in range(3)}
    images = ImageArchive(write_zip(tmp_path / "v.zip", contents(3, labels)), use_labels=True)
    assert images.label_dim == 2
    assert np.array_equal(torch.stack([label for _, label in images]).numpy(), vectors)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_files_come_with_the_channels_asked_for(tmp_path, channels):
    grey = noise_image(0)[:, :, 0]
    image, _ = ImageArchive(write_folder(tmp_path, {"a.png": encode(grey)}), channels=channels)[0]
    expected = np.stack([grey] * min(channels, 3) + [np.full_like(grey, 255)] * (channels == 4))
    assert np.array_equal(image.numpy(), expected)


def test_hidden_files_and_apples_shadow_files_are_no_images(tmp_path):
    shadows = {"__MACOSX/._a.png": b"x", "._a.png": b"x", ".cache/b.png": b"x", "notes.txt": b"x"}
    shadows |= {"seed0001.png.part/pixels.tif": b"x"}  # unfinished, of generate.py
    assert ImageFiles(write_zip(tmp_path / "a.zip", {"a.png": encode(noise_image(0)), **shadows})).names() == ["a.png"]


def test_links_to_folders_are_followed_and_rings_end(tmp_path):
    write_folder(tmp_path / "elsewhere", {"b.png": encode(noise_image(0))})
    folder = write_folder(tmp_path / "images", {"a.png": encode(noise_image(1))})
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "ring").symlink_to(folder)
    assert ImageFiles(folder).names() == ["a.png", "linked/b.png"]


# --- the order of the images ------------------------------------------------------------------------------------------


@given(count=st.integers(1, 200), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
@settings(max_examples=50)
def test_an_epoch_shows_every_image_once(count, seed, epoch):
    assert sorted(index_at(epoch * count + i, count, seed) for i in range(count)) == list(range(count))


def test_epochs_and_seeds_differ_and_the_order_is_the_one_of_every_version():
    assert not np.array_equal(epoch_order(100, 0, 0), epoch_order(100, 0, 1))
    assert not np.array_equal(epoch_order(100, 0, 0), epoch_order(100, 1, 0))
    assert epoch_order(8, 0, 0).tolist() == GOLDEN_ORDER


@given(
    start=st.integers(0, 5 * COUNT),
    world=st.integers(1, 3),
    shard=st.integers(1, 7),
    seed=st.integers(0, 9),
)
@settings(max_examples=30)
def test_the_shards_of_all_ranks_are_the_whole_batches_from_any_start(archive, start, world, shard, seed):
    images, batch = ImageArchive(archive, use_labels=True), world * shard
    streams = [
        batches(images, batch=batch, start=start, rank=r, world=world, seed=seed, workers=0) for r in range(world)
    ]
    position = start
    for _ in range(3):
        parts = [next(stream) for stream in streams]
        assert all(len(part[0]) == shard for part in parts)
        for place in range(batch):
            image, label = images[index_at(position, COUNT, seed)]
            part = parts[place % world]
            assert torch.equal(part[0][place // world], image)
            assert torch.equal(part[1][place // world], label)
            position += 1


@given(seen=st.integers(0, 40))
@settings(max_examples=20)
def test_a_run_resumed_at_any_image_sees_what_the_uninterrupted_one_would(archive, seen):
    images = ImageArchive(archive, mirror=True)
    whole = torch.cat([batch.images for batch in take(batches(images, batch=1, workers=0, seed=3), seen + 20)])
    resumed = torch.cat([batch.images for batch in take(batches(images, batch=4, start=seen, workers=0, seed=3), 5)])
    assert torch.equal(resumed, whole[seen:])


def test_worker_processes_change_nothing(archive):
    images = ImageArchive(archive, use_labels=True, mirror=True)
    images[3]  # the ZIP is open when the workers fork
    alone = take(batches(images, batch=4, workers=0), 12)
    helped = take(batches(images, batch=4, workers=2), 12)
    for (image, label, _), (image_helped, label_helped, _) in zip(alone, helped, strict=True):
        assert torch.equal(image, image_helped)
        assert torch.equal(label, label_helped)


def test_an_open_archive_survives_pickling(archive):
    images = ImageArchive(archive, use_labels=True)
    images[0]
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again[7][0], images[7][0])
    assert torch.equal(again[7][1], images[7][1])


def read_all(images: ImageArchive, expected: list[bytes], rounds: int) -> None:
    for _ in range(rounds):
        for i, data in enumerate(expected):
            if images[i][0].numpy().tobytes() != data:
                os._exit(1)


def test_forked_readers_do_not_disturb_each_other(archive):
    images = ImageArchive(archive)
    expected = [image.numpy().tobytes() for image, _ in images]
    processes = [
        multiprocessing.get_context("fork").Process(target=read_all, args=(images, expected, 20)) for _ in "ab"
    ]
    for process in processes:
        process.start()
    read_all(images, expected, 20)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def test_memory_stays_flat_over_thousands_of_reads(tmp_path):
    big = {f"{i}.png": encode(np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)) for i in range(8)}
    images = ImageArchive(write_zip(tmp_path / "big.zip", big))

    def read(count):
        for i in range(count):
            images[i % 8]
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = read(200)
    # 2,000 images of 12 KB would be 25 MB if they were kept.
    assert read(2000) - before < 4e6


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_ends_the_stream_with_one_sentence(tmp_path, workers):
    files = contents(6)
    broken = "00001/img00000005.png"
    files[broken] = files[broken][:60]
    images = ImageArchive(write_zip(tmp_path / "broken.zip", files))
    with pytest.raises(UserError) as caught:
        take(batches(images, batch=2, workers=workers), 3)
    assert broken in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


ONE, TWO = encode(noise_image(0)), encode(noise_image(1, 5, 6))
LABELS = [  # (labels of a.png and b.png, words of the sentence)
    (None, "holds no labels"),
    ([["a.png", 0]], "no label for b.png"),
    ([["a.png", 0], ["b.png", -1]], "labels b.png as -1"),
    ([["a.png", 0], ["b.png", 0.5]], "labels b.png as 0.5"),
    ([["a.png", 0], ["b.png", 10**9]], "labels b.png as 1e[+]09"),
    ([["a.png", 0], ["b.png", "cat"]], "vectors of one length"),
    ([["a.png", [1]], ["b.png", [1, 2]]], "vectors of one length"),
    ([["a.png", []], ["b.png", []]], "vectors of one length"),
    ([["a.png", 0], ["b.png", float("nan")]], "vectors of one length"),
]


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        ({"a.png": ONE, "b.png": TWO, "c.png": ONE}, {}, "b.png is 6x5, .* first image is 8x6 .1 of 3 images differ"),
        ({"00000/img00000000.png": ONE, "00000/img00000001.png": TWO}, {}, "01.png is 6x5, but the first image is 8x6"),
        ({"a.png": ONE}, {"channels": 2}, "channels=2"),
        ({"a.png": ONE, "dataset.json": b"[]"}, {}, "is not of the form"),
        ({"a.png": ONE, "dataset.json": b'{"labels": [1, 2]}'}, {}, "is not of the form"),
        *(
            (
                {"a.png": ONE, "b.png": ONE, "dataset.json": json.dumps({"labels": labels}).encode()},
                {"use_labels": True},
                w,
            )
            for labels, w in LABELS
        ),
    ],
)
def test_a_wrong_archive_is_refused_in_one_sentence(tmp_path, files, options, words):
    """tests/test_dataset_tool.py has damaged files and ZIPs."""
    path = write_zip(tmp_path / "wrong.zip", files)
    with pytest.raises(UserError, match=words) as caught:
        list(ImageArchive(path, **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 0},
        {"batch": 5, "world": 2},
        {"batch": 4, "rank": 2, "world": 2},
        {"batch": 4, "start": -1},
        {"batch": 4, "workers": -1},
    ],
)
def test_impossible_batches_are_refused_before_anything_is_read(archive, options):
    with pytest.raises(UserError):
        batches(ImageArchive(archive), **options)


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        (["L", "1", "I;16"], 1),
        (["L", "RGB"], 3),
        (["RGB", "L"], 3),
        (["P"], 3),
        (["RGBA", "LA"], 4),
        (["RGBA", "RGB"], 3),
        (["opaque"], 3),
    ],
)
def test_all_files_decide_the_channels_not_the_first_one(tmp_path, modes, expected):
    clear = Image.new("RGBA", (8, 8), (0, 128, 0, 100))
    for number, mode in enumerate(modes):
        image = clear if mode in ("RGBA", "LA") else clear.convert("RGB")
        image = (
            image.convert("L").convert(mode) if mode == "I;16" else image.convert({"opaque": "RGBA"}.get(mode, mode))
        )
        image.save(tmp_path / f"{number}.png")
    images = ImageArchive(tmp_path)
    assert images.shape == (expected, 8, 8)
    assert {image.shape for image, _ in images} == {(expected, 8, 8)}
    assert ("grey" in " ".join(images.notes())) == (modes.count("L") == 1 and expected == 3)
    assert ImageArchive(tmp_path, channels=3).shape == (3, 8, 8)
    files = ImageFiles(tmp_path)
    assert {files.image(name).mode for name in files.names()} <= {"L", "RGB", "RGBA"}
