"""The released weights give the released images, logits and gradients (tests/reference/README.md)."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import error
from safetensors import safe_open

from dnnlib.console import UserError
from training import losses
from training.networks import COORDS
from training.networks.official import discriminator_from_official, generator_from_official

FOLDER = Path(__file__).parent / "reference"
REFERENCES = sorted(FOLDER.glob("reference_*.safetensors"))
STYLEGAN2 = sorted(FOLDER.glob("stylegan2_*.safetensors"))


class Reference:
    def __init__(self, path: Path):
        with safe_open(path, "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.all = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.all.items() if name.startswith(prefix)}


@pytest.fixture(params=REFERENCES, ids=lambda path: path.stem)
def ref(request):
    return Reference(request.param)


@pytest.fixture
def G(ref):
    return generator_from_official(ref.under("G/"), ref.config)


@pytest.fixture
def D(ref):
    return discriminator_from_official(ref.under("D/"), ref.config)


def label(ref):
    return ref.all["in/c"] if ref.config["c_dim"] else None


def test_mapping_and_truncation(ref, G):
    z, c = ref.all["in/z"], label(ref)
    assert error(G.mapping(z, c), ref.all["out/ws"]) <= 1e-5
    assert error(G.mapping(z, c, truncation_psi=0.7), ref.all["out/ws_psi0.7"]) <= 1e-5
    assert error(G.mapping(z, c, 0.5, 3), ref.all["out/ws_psi0.5_cutoff3"]) <= 1e-5


def test_images_at_every_scale(ref, G):
    for scale in ref.config["scales"]:
        side = round(ref.config["img_resolution"] * scale)
        t = COORDS["endpoints"].positions(side)
        image = G.synthesis(ref.all["out/ws"], rows=t, cols=t)
        assert error(image, ref.all[f"out/img_x{scale}"]) <= 1e-4
    assert error(G(ref.all["in/z"], label(ref)), ref.all["out/img_x1"]) <= 1e-4


def test_logits(ref, D):
    assert error(D(ref.all["in/real"], label(ref)), ref.all["out/D_real"]) <= 1e-4
    assert error(D(ref.all["out/img_x1"], label(ref)), ref.all["out/D_fake"]) <= 1e-4


@pytest.mark.parametrize("path", STYLEGAN2, ids=lambda path: path.stem)
def test_stylegan2(path):
    ref = Reference(path)
    z, c, ws, image = ref.all["in/z"], label(ref), ref.all["out/ws"], ref.all["out/img_noise_const"]
    G, silent = (generator_from_official(ref.under("G/"), ref.config | {"use_noise": on}) for on in (True, False))
    D = discriminator_from_official(ref.under("D/"), ref.config | {"mbstd_group_size": ref.config["mbstd_group"]})
    assert error(G.mapping(z, c), ws) <= 1e-5
    assert error(G.mapping(z, c, truncation_psi=0.7), ref.all["out/ws_psi0.7"]) <= 1e-5
    assert error(G.synthesis(ws), image) <= 1e-5
    assert error(silent.synthesis(ws), ref.all["out/img_noise_none"]) <= 1e-5
    assert error(D(image, c), ref.all["out/D_img"]) <= 1e-5


def released_gradients(ref, term: str, module, kind: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Our gradients beside the reference's, both in our layout: the importer itself rearranges the reference's."""
    make = {"G": generator_from_official, "D": discriminator_from_official}[kind]
    tensors = ref.under(f"{kind}/")
    expected = {name: torch.zeros_like(t) if "resample" not in name else t for name, t in tensors.items()}
    expected |= ref.under(f"grad/{term}/")
    reference = dict(make(expected, ref.config).named_parameters())
    return {name: (p.grad, reference[name]) for name, p in module.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("term", ["Gmain", "Greg", "Dmain", "Dreg"])
def test_gradients(ref, G, D, term, dtype):
    """Tensor by tensor in float64, which gives one result on every processor; in float32 as one vector.

    Where the input of a leaky ReLU is nearly 0, float32's rounding decides its sign, which differs between processors
    and changes the gradient of a tensor by up to 0.4 %. Gmain of reference_uncond_32 holds such a sign: 0.26 %.
    """
    G.to(dtype).requires_grad_(term[0] == "G")
    D.to(dtype).requires_grad_(term[0] == "D")
    z, c, real, noise = (ref.all[f"in/{name}"].to(dtype) for name in ("z", "c", "real", "pl_noise_unscaled"))
    c, config = c if ref.config["c_dim"] else None, ref.config
    exact = dtype == torch.float64
    if term == "Gmain":
        loss = losses.logistic_G(D(G(z, c), c))
    elif term == "Greg":
        lengths = losses.path_lengths(G.synthesis, G.mapping(z, c), noise)
        before = torch.tensor(config["pl_mean_before"], dtype=dtype)
        penalty, mean = losses.path_penalty(lengths, before, config["pl_decay"])
        assert error(mean, ref.all["out/pl_mean_after"]) <= (1e-5 if exact else 1e-3)
        loss = config["pl_weight"] * penalty
    elif term == "Dmain":
        loss = losses.logistic_D(D(real, c), D(G(z, c), c))
    else:
        loss = config["r1_gamma"] / 2 * losses.r1(lambda x: D(x, c), real)
    loss.mean().backward()
    module = G if term[0] == "G" else D
    pairs = released_gradients(ref, term, module, term[0])
    assert len(pairs) >= 20
    norms = {}  # name -> (norm of the difference, norm of the reference's gradient)
    for name, (got, expected) in pairs.items():
        difference = expected if got is None else got - expected
        norms[name] = difference.norm().item(), expected.norm().item()
        tolerance = 4e-3 if term == "Gmain" else 1e-3
        assert not exact or norms[name][0] <= tolerance * max(norms[name][1], 1e-6), name
    difference, whole = (math.hypot(*values) for values in zip(*norms.values(), strict=True))
    assert difference <= 1e-3 * whole


def test_wrong_tensors_are_one_clear_error(ref):
    tensors = ref.under("G/")
    tensors["synthesis.surprise"] = tensors.pop("synthesis.decoder_img.bias")
    tensors["mapping.w_avg"] = tensors["mapping.w_avg"][1:]
    with pytest.raises(UserError) as refusal:
        generator_from_official(tensors, ref.config)
    for part in (
        "missing synthesis.decoder_img.bias",
        "unexpected synthesis.surprise",
        "mapping.w_avg is [",
        "instead of",
    ):
        assert part in str(refusal.value)


def test_another_resampling_filter_is_refused(ref):
    tensors = ref.under("D/")
    tensors["b8.conv1.resample_filter"] = torch.full((4, 4), 1 / 16)
    with pytest.raises(UserError, match=r"b8\.conv1\.resample_filter"):
        discriminator_from_official(tensors, ref.config)
