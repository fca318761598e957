"""LPIPS from files of weights equals the package's own; path lengths in closed form."""

import warnings

import lpips as package
import numpy as np
import pytest
import torch

from dnnlib.console import UserError
from metrics.path_length import path_lengths, trimmed
from metrics.perceptual import BACKBONES, LPIPS
from metrics.registry import FAMILIES


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CREPS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=["vgg", "alex"])
def both(request, tmp_path_factory):
    """The package's LPIPS with seeded random weights, ours from a file of them, and the file."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about the package's old arguments
        theirs = package.LPIPS(net=request.param, pnet_rand=True, verbose=False)
    # Its layers are in slices, under the numbers that they have in torchvision.
    state = {f"features.{name.split('.', 1)[1]}": value for name, value in theirs.net.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / BACKBONES[request.param].name
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, path)
    return theirs, LPIPS(request.param, path.parent), path


def images(*shape, seed=0):
    """Blobs and noise in [-1,1]."""
    coarse = torch.rand(*shape[:2], 4, 4, generator=torch.Generator().manual_seed(seed))
    noise = torch.rand(*shape, generator=torch.Generator().manual_seed(seed + 1))
    return torch.nn.functional.interpolate(coarse, shape[2:], mode="bilinear") * 1.4 + noise * 0.6 - 1


def test_lpips_equals_the_package_and_is_0_for_equal_images(both):
    theirs, ours, _ = both
    a, b = images(3, 3, 50, 37), images(3, 3, 50, 37, seed=5)
    b[2] = a[2] + 0.01 * b[2]
    with torch.no_grad():
        expected, found = theirs(a, b).flatten(), ours(a, b)
    assert expected[2] < expected[0] / 5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert torch.equal(ours(a, a), torch.zeros(3))


def test_grey_images_are_repeated(both):
    _, ours, _ = both
    a, b = images(2, 1, 40, 40), images(2, 1, 40, 40, seed=5)
    torch.testing.assert_close(ours(a, b), ours(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


def test_the_smallest_images_that_metrics_admit_pass(both):
    _, ours, path = both
    least = next(f.side for f in FAMILIES if f.pattern.startswith("scale_lpips" if "alex" in path.name else "ppl2"))
    a = images(1, 3, least, least)
    assert ours(a, -a).isfinite().all()


def test_only_the_published_weights_carry_the_plain_name(both, monkeypatch):
    _, ours, path = both
    net = next(name for name, entry in BACKBONES.items() if entry.name == path.name)
    assert (ours.standard, ours.name) == (False, f"lpips-{net}-custom-{ours.digest[:8]}")
    monkeypatch.setitem(BACKBONES, net, BACKBONES[net]._replace(digest=ours.digest[:8]))
    same = LPIPS(net, path.parent)
    assert (same.standard, same.name) == (True, f"lpips-{net}")


def test_lpips_neither_downloads_nor_draws_and_lacks_no_tensor(both, tmp_path):
    _, ours, path = both
    before = torch.get_rng_state()
    LPIPS(ours.name.split("-")[1], path.parent)
    assert torch.equal(torch.get_rng_state(), before)
    state = torch.load(path)
    del state["features.0.bias"]
    torch.save(state, tmp_path / path.name)
    with pytest.raises(UserError, match=r"holds other tensors .*https://download\.pytorch\.org/models/"):
        LPIPS(ours.name.split("-")[1], tmp_path)


def linear():
    """A mapping, a linear synthesis and a squared distance, float64, and the matrix of the synthesis."""
    matrix = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def mapping(z, c):
        return (z + c)[:, None].repeat(1, 3, 1)

    def synthesis(ws):
        return (ws[:, 1] @ matrix).view(len(ws), 3, 2, 2)

    return mapping, synthesis, lambda a, b: (a - b).square().sum((1, 2, 3)), matrix


def test_a_linear_synthesis_has_the_closed_form_without_the_extreme_percents():
    mapping, synthesis, distance, matrix = linear()
    rng = torch.Generator().manual_seed(0)
    z, towards, c = (torch.randn(500, 6, dtype=torch.float64, generator=rng) for _ in range(3))
    expected = ((towards - z) @ matrix).square().sum(1)
    lengths = path_lengths(mapping, synthesis, distance, z, towards, c)
    torch.testing.assert_close(lengths, expected, rtol=1e-9, atol=0)
    low, high = np.percentile(expected, 1, method="lower"), np.percentile(expected, 99, method="higher")
    kept = expected[(low <= expected) & (expected <= high)]
    assert len(kept) == 492
    torch.testing.assert_close(trimmed(lengths), kept, rtol=1e-9, atol=0)
    assert torch.equal(trimmed(torch.arange(201).double()), torch.arange(2, 199).double())


def test_images_above_256_pixels_are_averaged_down():
    seen = []

    def distance(a, b):
        seen.append(a)
        return torch.zeros(len(a))

    large = torch.rand(2, 1, 520, 1030)
    path_lengths(lambda z, c: z, lambda ws: large, distance, *(torch.zeros(1, 1),) * 3)
    torch.testing.assert_close(seen[0], large[:1].unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5)))
