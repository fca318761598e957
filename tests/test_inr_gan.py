"""Laws of INR-GAN. tests/reference has numbers of the released network in the upper left corner of an image."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import error, noise
from test_official import Reference

from dnnlib.console import UserError
from training.networks import Generator
from training.networks.inr_gan import CoordinateFeatures, INRGANConfig
from training.networks.official import generator_from_official

INR_GAN = Path(__file__).parent / "reference" / "inr_gan_64.safetensors"


@pytest.fixture(scope="module")
def ref():
    return Reference(INR_GAN)


def released_tensors(ref: Reference) -> dict[str, torch.Tensor]:
    tensors = ref.under("G/")
    for name, side in (("b4.input.input", 32), ("b64", 64)):
        stored = tensors[f"synthesis.{name}.coord_fuser.const_embs"]
        missing = side - stored.shape[-1]
        tensors[f"synthesis.{name}.coord_fuser.const_embs"] = F.pad(stored, (0, missing, 0, missing))
    return tensors


@pytest.fixture
def tensors(ref):
    return released_tensors(ref)


@pytest.fixture
def G(ref, tensors):
    return generator_from_official(tensors, ref.config)


def test_released_weights_give_the_released_images(ref, G):
    assert error(G.mapping(ref.all["in/z"]), ref.all["out/ws"]) <= 1e-5
    image = G(ref.all["in/z"])
    assert image.shape == (2, 3, 64, 64)
    assert error(image[:, :, :16, :16], ref.all["out/img"]) <= 1e-5


def test_bilinear_networks_are_refused(ref, tensors):
    with pytest.raises(UserError, match="bilinear"):
        generator_from_official(tensors, ref.config | {"upsampling_mode": "bilinear"})


@pytest.fixture
def fine() -> Generator:
    """Return a network for 128×128 in float64, with all parameters random."""
    config = INRGANConfig(img_shape=(128, 128), z_dim=5, w_dim=5, mapping_layers=1, channel_base=512, channel_max=6)
    G = Generator(config).to(torch.float64)
    G.load_state_dict({name: noise(*t.shape, seed=i) for i, (name, t) in enumerate(G.state_dict().items())})
    return G.requires_grad_(False)


def test_a_window_is_a_part_of_the_image(fine):
    ws, t = fine.mapping(noise(2, 5)), (torch.arange(90, dtype=torch.float64) + 0.5) / 90
    image = fine.synthesis(ws, t, t)
    assert error(fine.synthesis(ws, t[20:31], t[60:]), image[:, :, 20:31, 60:]) <= 1e-12
    windows = fine.synthesis(ws, torch.stack([t[:9], t[50:59]]), torch.stack([t[70:75], t[2:7]]))
    assert error(windows, torch.stack([image[0, :, :9, 70:75], image[1, :, 50:59, 2:7]])) <= 1e-12


def test_coarse_grids_are_read_at_the_nearest_cells(fine):
    ws, t = fine.mapping(noise(2, 5)), (torch.arange(60, dtype=torch.float64) + 0.5) / 384
    part = fine.synthesis(ws, t, t)  # three pixels of an image of 384×384 for each of the training image
    assert error(part[:, :, 1::3, 1::3], fine.synthesis(ws)[:, :, :20, :20]) <= 1e-9
    last = fine.synthesis.inputs["128"]
    for values in (last.log_basis, last.random_basis, last.embedding):
        values.zero_()
    part = fine.synthesis(ws, t, t)  # without features of the last grid, the cells of the one before are constant
    assert error(part, part[:, :, ::6, ::6].repeat_interleave(6, 2).repeat_interleave(6, 3)) <= 1e-12


@pytest.mark.parametrize(("side", "channels"), [(32, 40 + 128), (64, 48 + 128), (128, 92 + 64), (256, 96 + 64)])
def test_the_published_coordinate_features(side, channels):
    features = CoordinateFeatures(side)
    middle = torch.tensor([0.5 - 0.5 / side])  # where the row before the middle has y = 0, and its column x = -2/side
    values = features(middle, middle)[0, 0].detach()
    assert values.shape == (channels,)
    octaves = side.bit_length() - 1
    cosines = values[(channels - features.embedding.shape[-1]) // 2 :]
    assert cosines[:octaves] == pytest.approx([1] * octaves, abs=1e-5)
    angles = torch.pi / 2 * 2 ** torch.arange(octaves) * 2 / side
    assert error(cosines[octaves : 2 * octaves], angles.cos()) <= 1e-5


def test_the_published_widths():
    config = INRGANConfig(img_shape=(256, 256))
    assert [config.channels(k) for k in config.blocks] == [512] * 5 + [256, 128]
    assert config.num_ws == 16
    assert INRGANConfig(img_shape=(256, 256), extra_layers=False).num_ws == 14
    for side in (48, 16):
        with pytest.raises(ValueError, match="squares of 32"):
            INRGANConfig(img_shape=(side, side))
