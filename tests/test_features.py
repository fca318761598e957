"""Detectors, the files their weights come from, and the cache of what they saw. No file of real weights is needed."""

import contextlib
import functools
import os
import shutil
import types
import urllib.error
import urllib.request

import numpy as np
import pytest
import skimage.data
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchvision.models import VisionTransformer
from torchvision.transforms.functional import gaussian_blur, normalize, resize

from benchmarks.metrics import random_weights
from dnnlib.console import UserError
from dnnlib.files import RemoteFile, locate, sha256
from metrics import cache as statistics
from metrics.cache import cache_key, content_digest
from metrics.distances import frechet_distance, inception_score, kernel_distance, precision_recall
from metrics.features import DETECTORS, SIZE, Detector, DINOv2, inception, resize_positions
from metrics.moments import Moments
from torch_utils.lite0 import Lite0

INCEPTION, DINO = DETECTORS["inception"].weights, DETECTORS["dinov2"].weights


def dino_state(seed=0, positions=26, dim=128, depth=2):
    """Random tensors under the names of the released files."""
    random = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        net = timm.models.VisionTransformer(
            SIZE, 14, embed_dim=dim, depth=depth, num_heads=2, init_values=1, num_classes=0
        )
    shapes = {name: t.shape for name, t in net.state_dict().items()}
    shapes |= {"mask_token": (1, dim), "pos_embed": (1, positions, dim)}
    std = {1: 0.5, 2: 0.05, 3: 0.05, 4: 0.05}  # by the number of dimensions
    return {name: torch.randn(shape, generator=random) * std[len(shape)] for name, shape in shapes.items()}


def crops(name, num, size=(64, 64), seed=0):
    """uint8 [num,3,height,width] from a photograph of scikit-image."""
    photograph = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)
    random = np.random.default_rng(seed)
    far = [have - want for have, want in zip(photograph.shape[1:], size, strict=True)]
    return torch.stack([photograph[:, y : y + size[0], x : x + size[1]] for y, x in random.integers(0, far, (num, 2))])


def moments(features):
    result = Moments(features.shape[1])
    result.update(features)
    return result


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache directory."""
    monkeypatch.setenv("CREPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def dino_file(tmp_path):
    path = tmp_path / DINO.name
    torch.save(dino_state(), path)
    return path


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


# --- the numbers -----------------------------------------------------------------------------------------------------


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.mark.slow
def test_images_give_the_numbers_of_torch_fidelity(inception_file):
    fake, real = crops("astronaut", 10), crops("coffee", 4)  # the least for a score, and for neighbours
    expected = calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        **{"isc": True, "fid": True, "kid": True, "prc": True, "kid_subset_size": 4, "kid_subsets": 50},
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_file),
        **{"cuda": False, "batch_size": 5, "cache": False, "save_cpu_ram": True, "verbose": False},
    )
    detector = Detector("inception", inception_file.parent)
    detector.batch = 7
    assert detector.name == f"inception-custom-{sha256(inception_file)[:8]}"
    (fake_features, logits), (real_features, _) = detector(fake), detector(real)
    assert fake_features.shape == (10, detector.num_features)

    fid = frechet_distance(moments(fake_features), moments(real_features))
    assert fid.value == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    kid = kernel_distance(fake_features, real_features, subset_size=4, subsets=50)
    assert kid.value == pytest.approx(expected["kernel_inception_distance_mean"], abs=kid.standard_error)
    assert inception_score(logits)["_mean"].value == pytest.approx(expected["inception_score_mean"], rel=1e-3)
    precision, recall = precision_recall(fake_features, real_features).values()
    assert precision.value == pytest.approx(expected["precision"], rel=1e-3)
    assert recall.value == pytest.approx(expected["recall"], rel=1e-3)


@pytest.mark.parametrize("damage", ["noise", "blur"])
def test_every_step_of_damage_adds_to_the_distance(dino_file, damage):
    detector = Detector("dinov2", dino_file.parent)
    clean = crops("astronaut", 32)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    distances = []
    for step in range(4):
        if damage == "noise":
            images = (clean + 20 * step * noise).round().clamp(0, 255).byte()
        else:
            images = gaussian_blur(clean, 25, 1.5 * step) if step else clean
        distances.append(frechet_distance(moments(detector(images).features), moments(detector(clean).features)).value)
    assert distances[0] < 1e-6
    assert distances == sorted(distances)
    assert distances[1] > 1e-4


# --- detectors -------------------------------------------------------------------------------------------------------


def test_grey_is_repeated_the_batch_changes_nothing_and_alpha_is_refused(dino_file):
    images = crops("astronaut", 5, (40, 70))
    one, two = (Detector("dinov2", dino_file.parent) for _ in range(2))
    one.batch, two.batch = 1, 2
    torch.testing.assert_close(one(images).features, two(images).features, rtol=1e-4, atol=1e-5)
    grey = images[:, :1]
    assert torch.equal(one(grey).features, one(grey.repeat(1, 3, 1, 1)).features)
    assert one(grey).features.shape == (5, one.num_features)
    assert one(grey).logits is None
    with pytest.raises(UserError, match="alpha channel"):
        one(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


def test_features_that_are_not_finite_end_in_a_sentence(tmp_path):
    torch.save(dino_state() | {"norm.bias": torch.full([128], torch.nan)}, tmp_path / DINO.name)
    with pytest.raises(UserError, match="not finite"):
        Detector("dinov2", tmp_path)(crops("astronaut", 1))


def test_only_the_published_weights_have_the_published_name(dino_file, monkeypatch):
    detector = Detector("dinov2", dino_file.parent)
    assert (detector.digest, detector.standard) == (sha256(dino_file), False)
    assert detector.name == f"dinov2-custom-{detector.digest[:8]}"
    entry = DETECTORS["dinov2"]
    for digest, standard in ((detector.digest[:8], True), ("00000000", False)):
        monkeypatch.setitem(DETECTORS, "dinov2", entry._replace(weights=entry.weights._replace(digest=digest)))
        again = Detector("dinov2", dino_file.parent)
        assert again.standard is standard
        assert (again.name == "dinov2-vitl14") is standard
    assert INCEPTION == ("weights-inception-2015-12-05-6726825d.pth", URL_INCEPTION_V3, "6726825d")


def test_building_a_network_leaves_the_random_numbers_of_others_alone():
    state = random_weights()
    before = torch.get_rng_state()
    inception(state)
    DINOv2(dino_state())
    assert torch.equal(torch.get_rng_state(), before)


def test_dinov2_equals_the_transformer_of_torchvision():
    state = dino_state(positions=257)
    names = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed"}
    for here, there in (("conv_proj", "patch_embed.proj"), ("encoder.ln", "norm")):
        names |= {f"{here}.{kind}": f"{there}.{kind}" for kind in ("weight", "bias")}
    for i in range(2):
        here, there = f"encoder.layers.encoder_layer_{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            names |= {
                f"{here}.ln_1.{kind}": f"{there}.norm1.{kind}",
                f"{here}.self_attention.in_proj_{kind}": f"{there}.attn.qkv.{kind}",
                f"{here}.self_attention.out_proj.{kind}": f"{there}.attn.proj.{kind}",
                f"{here}.ln_2.{kind}": f"{there}.norm2.{kind}",
                f"{here}.mlp.0.{kind}": f"{there}.mlp.fc1.{kind}",
                f"{here}.mlp.3.{kind}": f"{there}.mlp.fc2.{kind}",
            }
    theirs = {here: state[there] for here, there in names.items()}
    for i in range(2):  # torchvision has no scale after attention and network: it goes into their last layers
        for last, scale in (("self_attention.out_proj", "ls1"), ("mlp.3", "ls2")):
            gamma, where = state[f"blocks.{i}.{scale}.gamma"], f"encoder.layers.encoder_layer_{i}.{last}"
            theirs[f"{where}.weight"] = theirs[f"{where}.weight"] * gamma[:, None]
            theirs[f"{where}.bias"] = theirs[f"{where}.bias"] * gamma
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    twin = VisionTransformer(224, 14, 2, num_heads=2, hidden_dim=128, mlp_dim=512, norm_layer=norm).eval()
    twin.heads = nn.Identity()
    twin.load_state_dict(theirs)
    images = crops("astronaut", 2, (224, 224))
    with torch.no_grad():
        expected = twin(normalize(images / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        (found,) = DINOv2(state).eval()(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 80), (300, 260)], ids=["up", "down"])
def test_dinov2_resizes_as_pillow_does(size):
    (image,) = crops("astronaut", 1, size)
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
    expected = np.asarray(pillow.resize((224, 224), Image.Resampling.BICUBIC))
    found = DINOv2.resize(image[None])[0].permute(1, 2, 0).numpy()
    error = np.abs(found - expected)
    assert error.max() <= 3
    assert (error > 1).mean() < 1e-3  # of the values; PyTorch's weights differ a little when shrinking


def test_dinov2_samples_its_positions_where_the_released_code_does():
    state = dino_state(positions=1 + 37**2)
    state["pos_embed"][0, 1:, 0] = torch.arange(37.0).repeat(37)
    state["pos_embed"][0, 1:, 1] = torch.arange(37.0).repeat_interleave(37)
    found = resize_positions(state["pos_embed"])
    torch.testing.assert_close(found[0, 0], state["pos_embed"][0, 0])
    columns, rows = found[0, 1:, :2].unflatten(0, (16, 16)).unbind(2)
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    for line in (*columns, *rows.T):
        # The bicubic kernel reproduces a ramp to 0.05; 16 in place of 16.1 would move the last positions by 0.2.
        torch.testing.assert_close(line[1:-1], expected[1:-1], rtol=0, atol=0.07)


def test_lite0_needs_no_download_and_shows_the_means_of_its_four_features(cache, offline):
    detector = Detector("lite0")
    detector.batch = 2
    assert (detector.name, detector.standard, detector.num_features) == ("efficientnet-lite0", True, 496)
    images = crops("astronaut", 3, (64, 48))
    with torch.no_grad():
        parts = Lite0()(resize(images.float(), [224, 224], antialias=True) / 127.5 - 1)
    expected = [part.mean((2, 3)) / part.shape[1] ** 0.5 for part in parts]
    torch.testing.assert_close(detector(images).features, torch.cat(expected, 1), rtol=1e-4, atol=1e-5)
    assert not cache.exists()


# --- files of weights ------------------------------------------------------------------------------------------------


def test_weights_are_looked_for_in_the_cache_and_then_in_the_folder(cache, dino_file, offline):
    assert Detector("dinov2", dino_file.parent).digest == sha256(dino_file)
    cache.mkdir()
    torch.save(dino_state(seed=1), cache / DINO.name)
    assert Detector("dinov2", dino_file.parent).digest == sha256(cache / DINO.name) != sha256(dino_file)


@pytest.mark.parametrize("kind", ["inception", "dinov2"])
def test_offline_one_sentence_says_which_file_from_where_must_be_where(cache, tmp_path, offline, kind):
    file = DETECTORS[kind].weights
    with pytest.raises(UserError) as caught:
        Detector(kind, tmp_path / "weights")
    for words in (file.name, file.url, str(cache / file.name), str(tmp_path / "weights" / file.name)):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def test_a_download_is_kept_unless_its_digest_is_wrong(cache, tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(3 * 2**20 + 5))
    with pytest.raises(UserError, match="begins with 00000000") as caught:
        locate(RemoteFile("a.bin", source.as_uri(), "00000000"))
    assert source.as_uri() in str(caught.value)
    assert list(cache.iterdir()) == []
    file = RemoteFile("a.bin", source.as_uri(), sha256(source)[:8])
    path = locate(file)
    assert path == cache / "a.bin"
    assert path.read_bytes() == source.read_bytes()
    source.unlink()
    assert locate(file) == path


def test_a_download_that_breaks_off_leaves_nothing(cache, monkeypatch):
    blocks = iter([b"the beginning"])

    def read(size):
        for block in blocks:
            return block
        raise TimeoutError("timed out")

    answer = types.SimpleNamespace(headers={}, read=read)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: contextlib.nullcontext(answer))
    with pytest.raises(UserError, match="timed out"):
        locate(INCEPTION)
    assert list(cache.iterdir()) == []


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_file_of_weights_is_executed(tmp_path):
    torch.save({"fc.weight": Bomb(str(tmp_path / "exploded"))}, tmp_path / INCEPTION.name)
    with pytest.raises(UserError, match="holds no weights"):
        Detector("inception", tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("inception", b""),
        ("dinov2", b"nonsense"),
        ("inception", [1]),
        ("dinov2", {"a": 1}),
        ("inception", {1: torch.zeros(2)}),
        ("inception", {"a": torch.zeros(2)}),
        ("dinov2", {"a": torch.zeros(2)}),
        ("dinov2", dino_state() | {"more": torch.zeros(1)}),
        ("dinov2", {name: t for name, t in dino_state().items() if name != "norm.bias"}),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_file_without_the_weights_is_a_sentence(tmp_path, kind, content):
    path = tmp_path / DETECTORS[kind].weights.name
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=r"\.pth holds .*; replace it with https://") as caught:
        Detector(kind, tmp_path)
    assert "\n" not in str(caught.value)


# --- cached statistics -----------------------------------------------------------------------------------------------

FEATURES = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
KEY = cache_key("content", detector="detector")


def cached_one(kind, value, key=KEY):
    """The statistics that the next call reads, and whether `value` had to be written first."""
    missing = statistics.read(kind, key) is None
    if missing:
        statistics.write(kind, key, value)
    return statistics.read(kind, key), missing


def test_statistics_are_computed_once(cache):
    sums = moments(FEATURES)
    for computed in (True, False, False):
        found, called = cached_one("features", FEATURES)
        assert (torch.equal(found, FEATURES), called) == (True, computed)
        found, called = cached_one("moments", sums)
        assert (found.count, called) == (9, computed)
        assert torch.equal(found.mean, sums.mean)
        assert torch.equal(found.scatter, sums.scatter)
    assert len(list((cache / "statistics").iterdir())) == 2


def test_the_key_is_made_of_the_content_its_order_and_all_facts():
    pixels = torch.arange(12, dtype=torch.uint8)
    contents = [[b"ab", b"c"], [b"c", b"ab"], [b"a", b"bc"], [b"abc"], []]
    contents += [[pixels.view(3, 2, 2)], [pixels.view(1, 3, 4)], [pixels.numpy().tobytes()]]
    digests = [content_digest(images) for images in contents]
    assert len(set(digests)) == len(contents)
    assert digests == [content_digest(iter(images)) for images in contents]
    keys = [cache_key(*c, **f) for c in (["a"], ["b"]) for f in ({}, {"size": [8, 8]}, {"size": [8, 9]}, {"num": 8})]
    assert len(set(keys)) == len(keys)
    assert cache_key("a", size=(8, 8), filter="box") == cache_key("a", filter="box", size=[8, 8])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def put_another(path):
    other = cache_key("other content", detector="detector")
    cached_one("features", FEATURES + 1, other)
    shutil.move(path.with_name(f"features-{other}.safetensors"), path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size // 2),
        flip_a_bit,
        put_another,
        lambda path: path.write_bytes(b"nonsense" * 100),
        lambda path: save_file({"features": FEATURES}, path),
    ],
    ids=["cut", "bit", "another", "nonsense", "no header"],
)
def test_a_damaged_cache_is_computed_again_and_replaced(cache, capsys, damage):
    cached_one("features", FEATURES)
    (path,) = (cache / "statistics").iterdir()
    damage(path)
    for computed in (True, False):
        found, called = cached_one("features", FEATURES)
        assert (torch.equal(found, FEATURES), called) == (True, computed)
    assert capsys.readouterr().err.count("is damaged") == 1


def test_a_cache_that_cannot_be_written_costs_no_result(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("CREPS_CACHE", str(tmp_path / "file"))
    statistics.write("features", KEY, FEATURES)
    assert "not kept" in capsys.readouterr().err
