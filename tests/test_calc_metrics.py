"""calc_metrics.py and train.py --metrics: one pass serves all, whoever computes it, and a mistake is a sentence."""

import json
import math
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from click.testing import CliRunner
from conftest import ROOT, run_ranks
from helpers import files_up_to
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_features import DINO, crops, dino_state
from torchvision.models import alexnet

import calc_metrics
from dnnlib.files import append_line
from metrics import features, generated
from metrics.evaluation import Evaluation
from metrics.images import cut
from metrics.lines import line_share
from metrics.needs import Settings
from metrics.perceptual import BACKBONES
from metrics.reals import LargeFiles, Windowed, Windows
from metrics.registry import FAMILIES, KNOWN, parse
from torch_utils.distributed import Processes
from training.data import ImageArchive
from training.networks import Generator, GeneratorConfig, StyleGAN2Config
from training.snapshot import load_generator, save_generator
from training.sources import ImageFiles

SIDE = 32  # pixels, which equivariance takes
NETWORK = {
    "img_shape": (SIDE, SIDE),
    "channel_base": 64,
    "channel_max": 8,
    "z_dim": 6,
    "w_dim": 6,
    "mapping_layers": 1,
    "biline_channels": 4,
    "thickness": 2,
}


def save_images(folder: Path, images: torch.Tensor) -> Path:
    """uint8 [N,3,H,W] as files."""
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.movedim(0, -1).numpy()).save(folder / f"{i:03}.png")
    return folder


class Bench:
    """A network, real images and weights in one folder, and ways to measure with them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.network = self.save("net.safetensors")
        self.data = save_images(
            folder / "data", torch.cat([crops("astronaut", 9, (SIDE, SIDE)), crops("coffee", 8, (SIDE, SIDE))])
        )
        self.weights = folder / "weights"
        self.weights.mkdir()
        torch.save(dino_state(), self.weights / DINO.name)

    def save(self, name: str, **settings) -> Path:
        torch.manual_seed(0)
        save_generator(Generator(GeneratorConfig(**NETWORK | settings)), self.folder / name)
        return self.folder / name

    def arguments(self, *arguments: object, **options: object) -> list[str]:
        given = {"network": self.network, "data": self.data, "weights": self.weights} | options
        return [f"--{name}={value}" for name, value in given.items() if value is not None] + [str(a) for a in arguments]

    def call(self, *arguments: object, **options: object):
        return CliRunner().invoke(calc_metrics.main, self.arguments(*arguments, **options))

    def measure(self, *arguments: object, **options: object) -> dict[str, dict]:
        """The new lines by the names of their files, with what custom weights add cut off."""
        for path in self.folder.glob("*.jsonl"):
            path.unlink()
        result = self.call(*arguments, **options)
        assert result.exit_code == 0, (result.output, result.exception)
        records = {}
        for path in self.folder.glob("*.jsonl"):
            (line,) = path.read_text().splitlines()
            record = json.loads(line)
            assert path.name == f"metric-{record['metric']}.jsonl"
            records[plain(record["metric"])] = record
        return records

    def refused(self, *arguments: object, **options: object) -> str:
        result = self.call(*arguments, **options)
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output
        return result.output


def plain(name: str) -> str:
    return "@".join(part for part in name.split("@") if "custom" not in part)


def value(record: dict) -> float:
    (number,) = record["results"].values()
    return math.inf if number is None else number


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("CREPS_CACHE", str(tmp_path / "cache"))
    return Bench(tmp_path)


def unreachable(*_, **__):
    raise urllib.error.URLError("Network is unreachable")


@pytest.fixture
def seen(monkeypatch):
    """How many images each call of a detector got."""
    counts = []
    look = features.Detector.__call__
    monkeypatch.setattr(
        features.Detector, "__call__", lambda self, images: counts.append(len(images)) or look(self, images)
    )
    return counts


# --- names -----------------------------------------------------------------------------------------------------------


def test_the_usual_names_are_known_and_keep_their_spelling():
    names = "fid50k_full,fid50k,fid5k,kid50k_full,pr50k3_full,is50k,ppl2_wend,eqt50k_int,eqt50k_frac,eqr50k"
    names += ",scale_psnr,scale_ssim,scale_lpips,fd_dinov2_50k_full,pfid50k_full,fid17,ppl2_wend_2k,scale_ssim_7,pr40_3"
    names += ",fid_scales50k_full,fd_lite0_scales_1k_full"
    assert ",".join(metric.name for metric in parse(names)) == names
    assert [metric.family for metric in parse(",".join(KNOWN))] == FAMILIES
    assert parse("none") == ()


@pytest.mark.parametrize(
    ("name", "num", "expected"),
    [
        ("fid50k_full", 1000, "fid1k_full"),
        ("fid50k", 1500, "fid1500"),
        ("pr50k3_full", 2000, "pr2k3_full"),
        ("scale_psnr", 16, "scale_psnr_16"),
        ("FID50K_full", 50_000, "fid50k_full"),
        ("ppl2_wend", 50_000, "ppl2_wend"),
    ],
)
def test_the_name_follows_the_number(name, num, expected):
    (metric,) = parse(name)
    assert metric.of(num).name == expected
    assert parse(expected) == (metric.of(num),)


# --- one pass --------------------------------------------------------------------------------------------------------


def test_batches_end_at_every_limit():
    assert cut([10, 4, 10], 3) == [range(0, 3), range(3, 4), range(4, 7), range(7, 10)]
    assert cut([], 3) == []


def test_one_pass_serves_all_and_each_detector_looks_once(bench, seen):
    names = ["fd_dinov2_12_full", "fd_dinov2_7", "scale_psnr_5", "scale_ssim_6", "eqt4_int", "eqt3_frac", "eqr2"]
    together = bench.measure(metrics=",".join(names))
    assert sum(seen) == 12 + 17
    assert sorted(together) == sorted(names)
    shutil.rmtree(bench.folder / "cache")
    for name in names:
        alone = bench.measure(metrics=name, batch=5)[name]
        assert value(alone) == pytest.approx(value(together[name]), rel=1e-4), name
        assert alone["num_fake"] == together[name]["num_fake"] == parse(name)[0].num
    assert together["fd_dinov2_12_full"]["num_real"] == 17
    assert together["fd_dinov2_7"]["num_real"] == 7


def test_a_line_says_all_that_decides_its_value_and_another_call_adds_the_same(bench):
    record = bench.measure(metrics="fd_dinov2_8_full,scale_psnr_4")["fd_dinov2_8_full"]
    (name,) = record["results"]
    detector = record["detector"]
    assert name == record["metric"] == f"fd_dinov2_8_full@{detector['name']}"
    assert detector["name"] == f"dinov2-custom-{detector['sha256'][:8]}"
    assert record["size"] == record["real_size"] == [SIDE, SIDE]
    assert record["resize"] is None
    assert record["network"] == "net.safetensors"
    assert record["standard_error"] == {name: None}
    assert record["versions"].keys() >= {"creps", "torch", "torchvision"}
    assert bench.call(metrics="scale_psnr_4").exit_code == 0
    line, again = map(json.loads, (bench.folder / "metric-scale_psnr_4.jsonl").read_text().splitlines())
    assert again["results"] == line["results"]
    assert (line["filter"], line["scales"], len(line["values"])) == ("box", [[SIDE, SIDE], [2 * SIDE, 2 * SIDE]], 4)
    assert line["results"]["scale_psnr_4"] == pytest.approx(np.mean(line["values"]), rel=1e-5)


def test_two_processes_give_the_results_of_one(bench, start):
    options = {"metrics": "fd_dinov2_11_full,scale_psnr_7,eqt5_frac", "batch": 2}
    one = bench.measure(**options)
    shutil.rmtree(bench.folder / "cache")
    (bench.folder / "two").mkdir()
    printed = run_ranks(start, ROOT / "calc_metrics.py", *bench.arguments(**options, outdir=bench.folder / "two"))
    assert [out.count("eqt5_frac") for out in printed] == [1, 0]
    for path in (bench.folder / "two").glob("*.jsonl"):
        two = json.loads(path.read_text())
        # Float32 features depend on the size of the batch; an image too many or missing changes 0.3 %.
        assert value(two) == pytest.approx(value(one.pop(plain(two["metric"]))), rel=1e-5)
        assert two["num_gpus"] == 2
    assert not one


@pytest.mark.slow
def test_the_inception_family_and_windows(bench, inception_file):
    with torch.device("meta"):
        state = {f"features.{name}": t.shape for name, t in alexnet().features.state_dict().items()}
    state = {name: 0.1 * torch.randn(shape) for name, shape in state.items()}
    torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, inception_file.parent / BACKBONES["alex"].name)
    few = save_images(bench.folder / "few", crops("coffee", 4, (SIDE, SIDE)))
    large = save_images(bench.folder / "large", crops("astronaut", 3, (70, 90)))
    save_images(bench.folder / "large" / "small", crops("coffee", 2, (40, 50)))
    options = {"weights": inception_file.parent, "num": 10, "data": few}
    records = bench.measure(metrics="fid50k_full,kid50k_full,pr50k3_full,is50k,scale_lpips", **options)
    assert sorted(records) == ["fid10_full", "is10", "kid10_full", "pr10_3_full", "scale_lpips_10"]
    names = [name.split("@")[0] for name in (*records["pr10_3_full"]["results"], *records["is10"]["results"])]
    assert names == ["pr10_3_full_precision", "pr10_3_full_recall", "is10_mean", "is10_std"]
    options |= {"metrics": "pfid50k_full", "size": "64x64", "data": large, "num": 4}
    result = bench.call(**options)
    assert result.exit_code == 0, result.output
    assert "2 images smaller than 64 pixels are left out" in result.output
    (path,) = bench.folder.glob("metric-pfid4_full@64x64@*.jsonl")
    record = json.loads(path.read_text())
    assert (record["num_photographs"], record["num_real"], record["window"]) == (3, 4, SIDE)
    assert value(record) > 0
    fixed = StyleGAN2Config(img_shape=(SIDE, SIDE), channel_base=64, channel_max=8, z_dim=6, w_dim=6)
    save_generator(Generator(fixed), bench.folder / "fixed.safetensors")
    assert "kind stylegan2 does not" in bench.refused(**options | {"network": bench.folder / "fixed.safetensors"})
    oblong = bench.save("oblong.safetensors", img_shape=(SIDE, 2 * SIDE))
    assert "trained on squares, not on 64x32" in bench.refused(**options | {"network": oblong})


def test_windows_at_scale_1_are_the_whole_images(bench):
    large = save_images(bench.folder / "large", crops("astronaut", 9, (2 * SIDE, 2 * SIDE)))
    options = {"weights": None, "num": 9, "data": large}
    scales = bench.measure(metrics="fd_lite0_scales_50k_full", size=f"{2 * SIDE}x{2 * SIDE}", **options)
    whole = bench.measure(metrics="fd_lite0_50k_full", **options)
    values = [v for name, record in scales.items() for v in record["results"].values()]
    names = [name for record in scales.values() for name in record["results"]]
    assert names == [f"fd_lite0_scales_9_full@64x64@x{scale}" for scale in (1, 2)]
    assert values[0] == pytest.approx(value(whole["fd_lite0_9_full"]), rel=1e-4)
    assert values[1] > 1.01 * values[0] or values[1] < 0.99 * values[0]


# --- real images -----------------------------------------------------------------------------------------------------


def test_lite0_gives_the_frechet_distance_of_its_means_without_any_download(bench, seen):
    other = save_images(bench.folder / "other", crops("coffee", 9, (SIDE, SIDE), seed=5))
    options = {"network": None, "weights": None, "outdir": bench.folder, "metrics": "fd_lite0_50k_full"}
    (record,) = bench.measure(images=other, **options).values()
    assert list(record["results"]) == ["fd_lite0_9_full"]  # as many as there are
    assert "9 images are too few" in record["caution"]
    detector = features.Detector("lite0")
    both = [
        detector(torch.stack([images[i][0] for i in range(len(images))])).features.double().numpy()
        for images in (ImageArchive(other), ImageArchive(bench.data))
    ]
    x, y = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in both)
    # With C = xᵀx, the trace of (C_x·C_y)^½ is the sum of the singular values of x·yᵀ.
    expected = np.square(both[0].mean(0) - both[1].mean(0)).sum() + np.square(x).sum() + np.square(y).sum()
    expected -= 2 * np.linalg.svd(x @ y.T, compute_uv=False).sum()
    assert value(record) == pytest.approx(expected, rel=1e-5)
    seen.clear()
    (again,) = bench.measure(images=other, batch=2, **options).values()
    assert value(again) == pytest.approx(expected, rel=1e-5)
    assert sum(seen) == 9  # the moments of the real images were kept
    (record,) = bench.measure(images=bench.data, **options).values()
    assert value(record) == pytest.approx(0, abs=1e-6)


def test_lines_compare_with_the_real_images(bench):
    rows, cols = torch.randint(0, 128, (2, 5, 3, SIDE, 1), dtype=torch.uint8)
    plaid = save_images(bench.folder / "plaid", rows + cols.mT)
    options = {"network": None, "images": plaid, "outdir": bench.folder, "metrics": "lines1k_full"}
    record = bench.measure(**options)["lines5_full"]
    assert bench.measure(**options)["lines5_full"]["results"] == record["results"]
    images = ImageArchive(bench.data)
    shares = line_share(torch.stack([images[i][0] for i in range(17)]))
    mean, error = shares.mean().item(), shares.std().item() / 17**0.5
    assert record["results"]["lines5_full_fake"] == pytest.approx(1, abs=1e-9)
    assert record["results"]["lines5_full_real"] == pytest.approx(mean, rel=1e-9)
    assert record["results"]["lines5_full_ratio"] == pytest.approx(1 / mean, rel=1e-9)
    assert record["standard_error"]["lines5_full_real"] == pytest.approx(error, rel=1e-9)
    assert record["standard_error"]["lines5_full_ratio"] == pytest.approx(error / mean**2, rel=1e-9)


def test_of_images_and_networks_in_models_results_are_kept_where_outdir_says(bench, models, monkeypatch):
    bench.network.rename(models / "letters.safetensors")
    monkeypatch.chdir(bench.folder)
    (bench.folder / "options.yaml").write_text("data: {path: elsewhere.zip}")  # of a run that letters is not from
    letters = {"network": "letters", "data": None, "metrics": "scale_psnr_2"}
    images = {"network": None, "images": bench.data, "metrics": "fd_lite0_50k_full"}
    for options, name in ((letters, "scale_psnr_2"), (images, "fd_lite0_17_full")):
        assert name in bench.call(**options).output
        assert not set(bench.folder.rglob("*.jsonl"))
    (record,) = bench.measure(**letters, outdir=bench.folder).values()
    assert record["network"] == "letters"


def test_an_interrupted_call_resumes_from_complete_statistics_found_by_content(bench, seen, monkeypatch):
    name = "fd_dinov2_6_full"
    with monkeypatch.context() as patch:
        patch.setattr(generated.rendering, "render", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        result = bench.call(metrics=name)
    assert result.exit_code == 130
    assert result.output.count("\n") == 1
    assert "Interrupted" in result.output
    assert sum(seen) == 17
    seen.clear()
    first = value(bench.measure(metrics=name)[name])
    assert sum(seen) == 6
    moved = bench.data.rename(bench.folder / "moved")  # the path does not matter
    assert value(bench.measure(metrics=name, data=moved)[name]) == first
    assert sum(seen) == 6 + 6
    (kept,) = (bench.folder / "cache" / "statistics").iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])
    assert value(bench.measure(metrics=name, data=moved)[name]) == first
    assert sum(seen) == 12 + 17 + 6
    Image.new("RGB", (SIDE, SIDE)).save(moved / "000.png")
    assert value(bench.measure(metrics=name, data=moved)[name]) != first
    assert sum(seen) == 35 + 17 + 6


def test_mirrored_images_are_those_of_a_folder_that_holds_both(bench):
    images = [ImageArchive(bench.data)[i][0] for i in range(17)]
    both = save_images(bench.folder / "both", torch.stack([*images, *(image.flip(2) for image in images)]))
    metrics = "fd_dinov2_6_full"
    mirrored = bench.measure("--mirror", metrics=metrics)[metrics]
    assert mirrored["num_real"] == 34
    assert value(mirrored) == pytest.approx(value(bench.measure(metrics=metrics, data=both)[metrics]), rel=1e-6)


def test_windows_are_where_they_say_in_images_of_any_size():
    windows = Windows(size=16, large=64, filter="box", seed=0)
    boxes = [windows.box("real", number) for number in range(200)]
    parts = np.array([(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes])
    assert np.allclose(parts[:, 0], parts[:, 1])
    assert (min(parts[:, 0]), max(parts[:, 0])) == pytest.approx((0.25, 1), abs=0.05)
    assert min(map(min, boxes)) >= 0
    assert max(map(max, boxes)) <= 1
    assert windows.box("fake", 5) != windows.box("real", 5) == windows.box("real", 5)
    ramp = torch.arange(128, dtype=torch.uint8).expand(1, 160, 128)  # a column's number in every pixel
    for number in range(20):
        x0, _, x1, _ = windows.box("real", number)
        window = windows.crop(ramp, number)
        assert window.shape == (1, 16, 16)
        step = (x1 - x0) * 128 / 16
        expected = x0 * 128 + step * (torch.arange(16) + 0.5) - 0.5
        assert (window[0, 0] - expected).abs().max() <= 1.6  # whole pixels, rounded colours


@pytest.mark.parametrize("limits", [[11], [2, 7, 11]])
def test_windows_of_real_images_are_cut_once_each_in_any_order(bench, limits):
    large = save_images(bench.folder / "large", crops("astronaut", 4, (70, 70)))
    files = LargeFiles(ImageFiles(large), 3, 64)
    kinds = tuple(Windows(16, 64, "box", 0, zoom) for zoom in (None, 1, 4))
    windows = Windowed(files, kinds, torch.device("cpu"))
    assert windows == Windowed(files, kinds, torch.device("cpu"))
    lists = windows.cut(limits, 3)
    assert sorted(number for numbers in lists for number in numbers) == list(range(11))
    assert all(max(numbers) < limit for limit in limits for numbers in lists if numbers[0] < limit)
    for numbers, batch in zip(lists, windows.batches(lists), strict=True):
        assert batch.numbers.tolist() == numbers
        for kind in kinds:
            expected = [kind.crop(files.read(int(windows.order[number % 4])), number) for number in numbers]
            assert torch.equal(batch.windows(kind), torch.stack(expected))


def test_metrics_of_windows_share_one_pass_over_real_images(bench, inception_file, monkeypatch, seen):
    shutil.copy(inception_file, bench.weights)
    large = save_images(bench.folder / "large", crops("astronaut", 5, (64, 64)))
    decoded = []
    read = LargeFiles.read
    monkeypatch.setattr(LargeFiles, "read", lambda self, index: decoded.append(index) or read(self, index))
    bench.measure(metrics="fid_scales5,kid_scales5,fd_lite0_scales_5", size="64x64", data=large)
    assert sorted(decoded) == list(range(5))
    assert sum(seen) == 2 * (2 * 5 + 2 * 5)  # two networks; two scales of generated and of real images


# --- generators ------------------------------------------------------------------------------------------------------


def test_images_depend_on_the_seed_and_their_number_alone(bench):
    G = load_generator(bench.network)
    (together,) = generated.Generated(G).batches([range(5)])
    single = torch.cat([batch.images() for batch in generated.Generated(G).batches([[4], [2]])])
    assert (single.int() - together.images()[[4, 2]].int()).abs().max() <= 1  # a float32 sum may round the other way
    (other,) = generated.Generated(G, seed=1).batches([range(5)])
    assert not torch.equal(other.images(), together.images())


def test_labels_are_distributed_as_those_of_the_real_images_or_take_turns(bench):
    network = bench.save("cond.safetensors", c_dim=3)
    G = load_generator(network)
    names = sorted(path.name for path in bench.data.iterdir())
    labels = [[name, 2 if i % 4 else 0] for i, name in enumerate(names)]
    (bench.data / "dataset.json").write_text(json.dumps({"labels": labels}))
    archive = calc_metrics.open_labelled(str(bench.data), G, mirror=False)
    _, c = generated.Generated(G, labelled=archive).latents(range(2000), "latents")
    share = np.mean([label == 0 for _, label in labels])
    assert c.mean(0).tolist() == pytest.approx([share, 0, 1 - share], abs=0.04)
    _, c = generated.Generated(G).latents(range(1, 7), "latents")
    assert c.argmax(1).tolist() == [1, 2, 0, 1, 2, 0]
    assert bench.measure(metrics="fd_dinov2_4_full", network=network)
    other = bench.save("other.safetensors", c_dim=5)
    assert "the network needs 5" in bench.refused(metrics="fd_dinov2_4_full", network=other)
    (bench.data / "dataset.json").write_text(json.dumps({"labels": labels, "class_names": ["ant", "bee", "cat"]}))
    G.class_names = ["ant", "cat", "bee"]
    save_generator(G, network)
    assert "bee instead of cat" in bench.refused(metrics="fd_dinov2_4_full", network=network)


def test_supersampled_images_are_measured_as_averages_of_larger_ones(bench):
    network = bench.save("centers.safetensors", coords="centers")
    G = load_generator(network)
    ((averaged, larger),) = zip(
        generated.Generated(G, supersample=2).batches([range(3)]),
        generated.Generated(G).batches([range(3)]),
        strict=True,
    )
    height, width = G.config.img_shape
    expected = F.avg_pool2d(larger.colours((2 * height, 2 * width)), 2)
    assert (averaged.colours((height, width)) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert list(bench.measure(metrics="scale_psnr_3", network=network, supersample=2)) == ["scale_psnr_3@supersample2"]


def test_truncation_and_other_sizes_are_in_the_name(bench):
    records = bench.measure(metrics="fd_dinov2_4_full,eqt4_int,scale_psnr_3", trunc=0.5, size="48x96")
    assert sorted(records) == ["eqt4_int@48x96@trunc0.5", "fd_dinov2_4_full@48x96@trunc0.5", "scale_psnr_3@trunc0.5"]
    record = records["fd_dinov2_4_full@48x96@trunc0.5"]
    assert (record["size"], record["resize"]) == ([96, 48], "centre crop, lanczos")
    records = bench.measure(metrics="scale_psnr_3", scales="32,16,64,96x96", filter="lanczos")
    assert sorted(records) == [f"scale_psnr_3@{pair}lanczos" for pair in ("16-32@", "32-96@", "")]


@pytest.mark.parametrize(
    ("coords", "trained", "size"), [("endpoints", (32, 32), "48x40"), ("centers", (32, 64), "64x64")]
)
def test_translation_by_whole_pixels_is_exact_for_an_image_that_is_a_function_of_position(bench, coords, trained, size):
    network = bench.save("net.safetensors", coords=coords, img_shape=trained)
    (record,) = bench.measure(metrics="eqt4_int", network=network, size=size).values()
    assert value(record) > 90


def test_the_training_images_of_a_run_are_found(bench):
    options = {"data": {"path": str(bench.data), "mirror": True}, "train": {"batch": 4}}
    (bench.folder / "options.yaml").write_text(yaml.safe_dump(options))
    network = bench.folder / "network-snapshot-000002.safetensors"
    save_generator(load_generator(bench.network), network, step=567, kimg=2.268)
    (record,) = bench.measure(metrics="fd_dinov2_4_full", data=None, network=network).values()
    assert (record["num_real"], record["kimg"], record["data"]) == (34, 2.268, str(bench.data))
    events = EventAccumulator(str(bench.folder)).Reload()
    assert {e.step for tag in events.Tags()["scalars"] for e in events.Scalars(tag)} == {567}
    (bench.folder / "options.yaml").write_text("data:")
    assert "options.yaml: path is missing" in bench.refused(metrics="fd_dinov2_4_full", data=None, network=network)
    (bench.folder / "options.yaml").write_text(yaml.safe_dump(options))
    bench.data.rename(bench.folder / "elsewhere")
    assert "present location with --data" in bench.refused(metrics="fd_dinov2_4_full", data=None, network=network)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metrics": "fidd50k_full"}, "did you mean fid50k_full?"),
        ({"metrics": "FID"}, "did you mean fid50k_full?"),
        ({"metrics": "none"}, "measures nothing"),
        ({"metrics": "is50k", "num": 9}, "10 images"),
        ({"metrics": "scale_psnr", "num": 10**11}, "100,000,000,000 images are more than"),
        ({"metrics": "fd_dinov2_5_full", "data": None}, "compares with real images; give them with --data"),
        ({"metrics": "fd_dinov2_5_full", "data": "gone"}, "gone does not exist"),
        ({"metrics": "pfid50k_full", "weights": None}, "is needed and was not found"),
        ({"network": "gone.safetensors"}, "gone.safetensors does not exist"),
        ({"network": None}, "either --network"),
        ({"network": None, "images": "x", "metrics": "scale_psnr"}, "scale_psnr needs a generator"),
        ({"size": "64x64", "scale": 2}, "give one of them"),
        ({"size": "big"}, "WIDTHxHEIGHT"),
        ({"scales": "32"}, "two sizes or more"),
        ({"scales": "32,64x48"}, "different shapes"),
        ({"metrics": "scale_ssim", "scales": "8,16"}, "11x11 pixels or more"),
        ({"metrics": "eqr4", "size": "31x40"}, "32x32 pixels or more"),
        ({"trunc": "nan"}, "--trunc=nan"),
        ({"metrics": "fd_dinov2_5", "scales": "32,64"}, "--scales belongs to the metrics scale_*"),
        ({"metrics": "scale_psnr_2", "size": "64x64"}, "give those of scale_* with --scales"),
        ({"metrics": "scale_psnr_2,scale_ssim_2", "scale": 2}, "give those of scale_* with --scales"),
        ({"scale": "nan"}, "--scale=nan"),
    ],
    ids=str,
)
def test_a_wrong_call_is_a_sentence(bench, monkeypatch, options, words):
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    assert words in bench.refused(**options)
    assert not list(bench.folder.glob("*.jsonl"))


def test_a_broken_network_and_one_with_transparency_are_sentences(bench):
    G = load_generator(bench.network)
    G.synthesis.lines.input.weight.fill_(torch.nan)
    save_generator(G, bench.folder / "broken.safetensors")
    for metric in ("scale_psnr_2", "eqt4_int"):
        assert "not finite" in bench.refused(metrics=metric, network=bench.folder / "broken.safetensors")
    rgba = bench.save("rgba.safetensors", img_channels=4)
    assert "4 channels" in bench.refused(metrics="fd_dinov2_4_full", network=rgba)
    assert bench.measure(metrics="fd_dinov2_4_full", network=bench.save("grey.safetensors", img_channels=1))


def test_the_help_is_quick_and_names_every_metric():
    slow = {"torch_fidelity", "torchvision", "matplotlib", "tensorboard", "timm", "lpips"}
    code = f"import sys, calc_metrics; print(sorted({slow} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.stdout.strip() == "[]", process.stderr
    output = CliRunner().invoke(calc_metrics.main, ["--help"]).output
    assert all(name in output for name in KNOWN)
    assert max(map(len, output.splitlines())) <= 110


def test_what_is_not_finite_is_null_in_the_file_and_left_out_of_the_plot(bench):
    """The images of a network without weights are uniform, so its PSNR is infinite."""
    G = load_generator(bench.network)
    for parameter in G.synthesis.parameters():
        parameter.zero_()
    save_generator(G, bench.folder / "uniform.safetensors")
    result = bench.call(metrics="scale_psnr_2,scale_ssim_2", network=bench.folder / "uniform.safetensors")
    assert result.exit_code == 0, result.output
    assert " inf " in result.output
    line = (bench.folder / "metric-scale_psnr_2.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (list(record["results"].values()), record["values"]) == ([None], [None, None])
    result = CliRunner().invoke(calc_metrics.main, ["plot", str(bench.folder), f"--out={bench.folder / 'plot.png'}"])
    assert result.exit_code == 0, result.output


def test_a_line_that_does_not_fit_on_the_disk_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "lines"
    append_line(path, "whole")
    with files_up_to(8), pytest.raises(OSError, match="large"):
        append_line(path, "cut off")
    assert path.read_text() == "whole\n"


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(bench, tiny):
    """Trains on 32² images with the metrics named; returns the result and the run directory."""
    shutil.copytree(bench.weights, bench.folder / "cache")

    def call(metrics: str, outdir: str, *arguments: object):
        options = ("--metrics", metrics, "--mirror", "--kimg", 0.032, "--tick", 0.016, *arguments)
        result = tiny.call(*tiny.new(*options, outdir=outdir, data=bench.data))
        return result, next(iter(tiny.runs(outdir)), None)

    return call


def test_snapshots_are_measured_as_the_command_measures_them(bench, run):
    result, folder = run("fd_dinov2_6_full,scale_psnr_4", "with")
    assert result.exit_code == 0, (result.output, result.exception)
    before, after = result.output.split("run directory")
    assert "the metrics of a snapshot take about" in before
    assert "scale_psnr_4 " in after
    (path,) = folder.glob("metric-fd_dinov2_6_full@*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]  # and none at 0
    assert lines[0]["num_real"] == 34
    records = bench.measure(
        metrics="fd_dinov2_6_full", data=None, network=folder / lines[1]["network"], outdir=bench.folder
    )
    assert value(records["fd_dinov2_6_full"]) == pytest.approx(value(lines[1]), rel=1e-5)
    _, without = run("none", "without")
    network = "network-snapshot-000000.safetensors"
    assert (folder / network).read_bytes() == (without / network).read_bytes()
    assert (folder / "log.txt").read_text().count("\n") == (without / "log.txt").read_text().count("\n")

    result = CliRunner().invoke(calc_metrics.main, ["plot", str(folder), f"--out={bench.folder / 'plot.png'}"])
    assert result.exit_code == 0, result.output
    assert Image.open(bench.folder / "plot.png").width > 500
    result = CliRunner().invoke(calc_metrics.main, ["plot", str(folder), "--published=FFHQ-51"])
    assert (result.exit_code, "did you mean FFHQ-512?" in result.output) == (2, True)
    result = CliRunner().invoke(calc_metrics.main, ["plot", str(without)])
    assert (result.exit_code, "holds no metric" in result.output, "nothing to plot" in result.output) == (2, True, True)
    both = ["plot", str(without), str(folder)]
    result = CliRunner().invoke(calc_metrics.main, [*both, f"--out={bench.folder / 'both.svg'}"])
    assert (result.exit_code, f"{without} holds no metric" in result.output) == (0, True)
    assert (bench.folder / "both.svg").stat().st_size
    result = CliRunner().invoke(calc_metrics.main, [*both, str(bench.folder / "gone")])
    assert (result.exit_code, "gone does not exist" in result.output) == (2, True)
    result = CliRunner().invoke(calc_metrics.main, [*both, f"--out={bench.folder / 'both.xyz'}"])
    assert (result.exit_code, "ends in .png, .pdf or .svg" in result.output) == (2, True)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [("fid50k_full", "was not found"), ("pfid50k_full", "calc_metrics.py"), ("is5", "10 images")],
)
def test_what_cannot_be_measured_is_said_before_the_training(run, monkeypatch, metrics, words):
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    result, folder = run(metrics, "runs")
    assert result.exit_code == 2
    assert words in result.output
    assert folder is None


def test_a_signal_while_measuring_leaves_the_state_and_says_how_to_continue(run, monkeypatch):
    measure = Evaluation.__call__

    def interrupted(self, images, stop):
        signal.raise_signal(signal.SIGTERM)
        return measure(self, images, stop)

    monkeypatch.setattr(Evaluation, "__call__", interrupted)
    result, folder = run("scale_psnr_4", "runs")
    assert result.exit_code == 143, result.output
    assert "to continue: --resume=" in result.output
    assert len(list(folder.glob("training-state-*.pt"))) == 1
    assert not list(folder.glob("metric-*"))


def test_stopping_is_noticed_at_the_next_batch(bench):
    G = load_generator(bench.network)
    calls = []

    def stop():
        calls.append(None)
        return len(calls) == 3

    alone = Processes(0, 1, torch.device("cpu"))
    evaluate = Evaluation(parse("scale_psnr_9"), Settings(batch=2), alone)
    assert evaluate(generated.Generated(G), stop) == []
    assert len(calls) == 3
    assert len(evaluate(generated.Generated(G))) == 1
