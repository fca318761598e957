"""LPIPS against the package that its authors publish, with the same seeded weights; path lengths in closed form."""

import warnings
from importlib.metadata import PackageNotFoundError

import lpips as reference
import numpy as np
import pytest
import torch

from dnnlib.console import UserError
from metrics import perceptual
from metrics.path_length import path_lengths, trimmed
from metrics.perceptual import LPIPS, NETS


@pytest.fixture(scope="module", params=["vgg", "alex"])
def both(request, tmp_path_factory):
    """The package's LPIPS with seeded random weights, and ours from a file of them."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about the package's old arguments
        theirs = reference.LPIPS(net=request.param, pnet_rand=True, verbose=False)
    # Its layers lie in slices, under the numbers that they have in torchvision.
    state = {f"features.{name.split('.', 1)[1]}": value for name, value in theirs.net.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / NETS[request.param].weights.name
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, path)
    return theirs, LPIPS(request.param, path), path


def pictures(*shape, seed=0):
    """Blobs and noise in [-1,1]."""
    coarse = torch.rand(*shape[:2], 4, 4, generator=torch.Generator().manual_seed(seed))
    noise = torch.rand(*shape, generator=torch.Generator().manual_seed(seed + 1))
    return torch.nn.functional.interpolate(coarse, shape[2:], mode="bilinear") * 1.4 + noise * 0.6 - 1


@pytest.mark.parametrize("size", [(64, 64), (50, 37)], ids=str)
def test_lpips_equals_the_package(both, size):
    theirs, ours, _ = both
    a, b = pictures(3, 3, *size), pictures(3, 3, *size, seed=5)
    b[2] = a[2] + 0.01 * b[2]
    with torch.no_grad():
        expected, found = theirs(a, b).flatten(), ours(a, b)
    assert expected[2] < expected[0] / 5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_lpips_is_zero_for_equal_pictures_symmetric_and_one_by_one(both):
    _, lpips, _ = both
    a, b = pictures(2, 3, 40, 40), pictures(2, 3, 40, 40, seed=5)
    assert torch.equal(lpips(a, a), torch.zeros(2))
    torch.testing.assert_close(lpips(a, b), lpips(b, a))
    torch.testing.assert_close(lpips(a, b), torch.cat([lpips(x[None], y[None]) for x, y in zip(a, b, strict=True)]))


def test_grey_pictures_are_repeated(both):
    _, lpips, _ = both
    a, b = pictures(2, 1, 40, 40), pictures(2, 1, 40, 40, seed=5)
    torch.testing.assert_close(lpips(a, b), lpips(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


def test_the_smallest_pictures_pass_and_smaller_ones_are_refused(both):
    _, lpips, _ = both
    least = lpips.net.least
    a = pictures(1, 3, least, least)
    assert lpips(a, -a).isfinite().all()
    with pytest.raises(ValueError, match=f"at least {least} pixels"):
        lpips(a[..., 1:], a[..., 1:])
    with pytest.raises(ValueError, match="of one shape"):
        lpips(a, a.repeat(2, 1, 1, 1))


def test_other_weights_do_not_carry_the_standard_name(both, monkeypatch):
    _, lpips, path = both
    net = next(name for name, value in NETS.items() if value.weights.name == path.name)
    assert not lpips.standard  # though the file has the standard name
    assert lpips.name == f"lpips-{net}-custom-{lpips.digest[:8]}"
    standard = NETS[net].weights._replace(digest=lpips.digest[:8])
    monkeypatch.setitem(NETS, net, NETS[net]._replace(weights=standard))
    same = LPIPS(net, path)
    assert same.standard
    assert same.name == f"lpips-{net}"


class Bomb:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("content", ["missing", "text", "code", "another network", "a layer less", "folder"])
def test_what_is_no_file_of_weights_is_a_sentence(tmp_path, capsys, content):
    path = tmp_path / "alexnet.pth"
    if content == "text":
        path.write_text("<html>not found</html>")
    elif content == "code":
        torch.save({"features.0.weight": Bomb()}, path)
    elif content == "another network":
        torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    elif content == "a layer less":
        with torch.device("meta"):
            shapes = NETS["alex"].build().state_dict()
        torch.save({name: torch.zeros(t.shape) for name, t in shapes.items() if name == "features.0.bias"}, path)
    elif content == "folder":
        path.mkdir()
    with pytest.raises(UserError, match=r"alexnet\.pth\b.*https://download\.pytorch\.org/models/alexnet"):
        LPIPS("alex", path)
    assert "executed" not in capsys.readouterr().out


def test_an_unknown_net_and_missing_heads_are_sentences(both, monkeypatch):
    _, _, path = both
    with pytest.raises(UserError, match="did you mean vgg"):
        LPIPS("vgg16", path)

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(perceptual, "distribution", missing)
    with pytest.raises(UserError, match=r"pip install --no-deps lpips==0\.1\.4"):
        perceptual.read_heads("vgg")


def linear(seed=0, styles=6, colours=12):
    """A mapping, a linear synthesis and a squared distance, float64, and the matrix of the synthesis."""
    matrix = torch.randn(styles, colours, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def mapping(z, c):
        return (z + c)[:, None].repeat(1, 3, 1)

    def synthesis(ws):
        return (ws[:, 1] @ matrix).view(len(ws), 3, 2, 2)

    return mapping, synthesis, lambda a, b: (a - b).square().sum((1, 2, 3)), matrix


def latents(count, seed=0):
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, 6, dtype=torch.float64, generator=random) for _ in range(3))


def test_a_linear_synthesis_has_the_closed_form():
    mapping, synthesis, distance, matrix = linear()
    z, towards, c = latents(50)
    lengths = path_lengths(mapping, synthesis, distance, z, towards, c)
    torch.testing.assert_close(lengths, ((towards - z) @ matrix).square().sum(1), rtol=1e-9, atol=0)


def test_the_lowest_and_the_highest_percent_are_left_out():
    mapping, synthesis, distance, matrix = linear()
    z, towards, c = latents(500)
    expected = ((towards - z) @ matrix).square().sum(1).numpy()
    low, high = np.percentile(expected, 1, method="lower"), np.percentile(expected, 99, method="higher")
    kept = expected[(low <= expected) & (expected <= high)]
    lengths = trimmed(path_lengths(mapping, synthesis, distance, z, towards, c))
    assert len(lengths) == len(kept) == 492
    np.testing.assert_allclose(lengths, kept, rtol=1e-9)
    assert torch.equal(trimmed(torch.arange(201).double()), torch.arange(2, 199).double())


def test_pictures_above_256_pixels_are_averaged_down():
    seen = []

    def distance(a, b):
        seen.append(a)
        return torch.zeros(len(a))

    large = torch.rand(2, 1, 520, 1030)
    path_lengths(lambda z, c: z, lambda ws: large, distance, *(torch.zeros(1, 1),) * 3)
    torch.testing.assert_close(seen[0], large[:1].unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5)))


def test_pictures_that_are_not_finite_end_the_metric():
    mapping, _, distance, _ = linear()
    with pytest.raises(ValueError, match="NaN or infinite"):
        path_lengths(mapping, lambda ws: torch.full((len(ws), 3, 2, 2), torch.nan), distance, *latents(2))
