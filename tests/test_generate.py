"""Pictures of any size: strips are the picture, and generate.py says what is wrong with a wrong call."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import generate
import rendering
from dnnlib.console import UserError
from training.networks import Generator, GeneratorConfig, positions
from training.snapshot import save_generator


def tiny(**settings) -> Generator:
    torch.manual_seed(0)
    small = {"img_resolution": 16, "channel_base": 64, "channel_max": 8, "z_dim": 6, "w_dim": 6, "mapping_layers": 1}
    return Generator(GeneratorConfig(**{**small, "biline_channels": 4, "thickness": 3, **settings})).eval()


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), pixels=st.integers(1, 2000), n=st.integers(1, 3))
def test_the_strips_of_a_picture_are_the_picture(height, width, pixels, n):
    G = tiny().double()
    ws = torch.randn(n, G.config.num_ws, 6, dtype=torch.float64)
    rows, cols = (positions(k, "endpoints", torch.float64) for k in (height, width))
    before, rendering.STRIP_PIXELS = rendering.STRIP_PIXELS, pixels
    try:
        parts = list(rendering.strips(G, ws, (height, width)))
    finally:
        rendering.STRIP_PIXELS = before
    covered = [row for part, _ in parts for row in range(height)[part]]
    assert covered == list(range(height))
    with torch.no_grad():
        whole = G.synthesis(ws, rows=rows, cols=cols)
    assert (torch.cat([image for _, image in parts], dim=2) - whole).abs().max() <= 1e-12
    assert (rendering.render(G, ws, (height, width)) - whole).abs().max() <= 1e-12


def test_an_empty_picture_is_refused():
    G = tiny()
    with pytest.raises(ValueError, match="0x3"):
        rendering.render(G, torch.zeros(1, G.config.num_ws, 6), (3, 0))


@pytest.mark.parametrize(("text", "seeds"), [("7", [7]), ("0-3,7", [0, 1, 2, 3, 7]), (" 5 , 5-5", [5, 5])])
def test_seeds(text, seeds):
    assert generate.parse_seeds(text) == seeds


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    made = {"plain": tiny(), "cond": tiny(c_dim=3), "grey": tiny(img_channels=1), "rgba": tiny(img_channels=4)}
    for name, G in made.items():
        save_generator(G, folder / f"{name}.safetensors")
    (folder / "broken.safetensors").write_bytes((folder / "plain.safetensors").read_bytes()[:-10])
    return folder


def run(*arguments):
    return CliRunner().invoke(generate.main, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("options", "size"),
    [([], (16, 16)), (["--scale", "2"], (32, 32)), (["--scale", "0.5"], (8, 8)), (["--size", "31x7"], (31, 7))],
)
def test_generate_writes_the_picture_of_each_seed(networks, tmp_path, options, size):
    result = run(
        "--network", networks / "plain.safetensors", "--seeds", "0-1,9", "--outdir", tmp_path / "out", *options
    )
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["seed0000.png", "seed0001.png", "seed0009.png"]
    G = tiny()
    z = torch.from_numpy(np.random.RandomState(9).randn(1, 6)).float()
    rows, cols = positions(size[1], "endpoints"), positions(size[0], "endpoints")
    with torch.no_grad():
        expected = (G(z, rows=rows, cols=cols)[0] * 127.5 + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    picture = np.asarray(Image.open(tmp_path / "out" / "seed0009.png"))
    assert np.abs(picture.astype(int) - expected).max() <= 1  # a float32 sum may round the other way


@pytest.mark.parametrize(("name", "mode"), [("plain", "RGB"), ("grey", "L"), ("rgba", "RGBA")])
def test_pictures_keep_their_channels(networks, tmp_path, name, mode):
    assert run("--network", networks / f"{name}.safetensors", "--seeds", 0, "--outdir", tmp_path).exit_code == 0
    assert Image.open(tmp_path / "seed0000.png").mode == mode


def test_truncation_zero_is_one_picture_for_all_seeds(networks, tmp_path):
    run("--network", networks / "plain.safetensors", "--seeds", "0-1", "--trunc", 0, "--outdir", tmp_path)
    assert (tmp_path / "seed0000.png").read_bytes() == (tmp_path / "seed0001.png").read_bytes()


def test_classes_differ(networks, tmp_path):
    for number in (0, 2):
        run(
            "--network",
            networks / "cond.safetensors",
            "--seeds",
            0,
            "--class",
            number,
            "--outdir",
            tmp_path / str(number),
        )
    assert (tmp_path / "0/seed0000.png").read_bytes() != (tmp_path / "2/seed0000.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--network", "nothing.safetensors", "--seeds", "0"], ["nothing.safetensors", "does not exist"]),
        (["--network", "broken", "--seeds", "0"], ["broken.safetensors", "not an intact safetensors file"]),
        (["--network", "plain"], ["--seeds"]),
        (["--network", "plain", "--seeds", "a"], ["--seeds=a", "0-3,7"]),
        (["--network", "plain", "--seeds", "5-2"], ["5-2"]),
        (["--network", "plain", "--seeds", "-1"], ["-1"]),
        (["--network", "plain", "--seeds", "0", "--class", "1"], ["--class=1", "no classes"]),
        (["--network", "cond", "--seeds", "0"], ["conditional", "--class=0 to 2"]),
        (["--network", "cond", "--seeds", "0", "--class", "3"], ["--class=3", "classes 0 to 2"]),
        (["--network", "plain", "--seeds", "0", "--size", "12"], ["--size=12", "1024x768"]),
        (["--network", "plain", "--seeds", "0", "--size", "0x5"], ["0x5"]),
        (["--network", "plain", "--seeds", "0", "--size", "99999x99999"], ["99999x99999"]),
        (["--network", "plain", "--seeds", "0", "--size", "8x8", "--scale", "2"], ["--scale", "--size", "one of them"]),
        (["--network", "plain", "--seeds", "0", "--scale", "-1"], ["--scale"]),
        (["--network", "plain", "--seeds", "0", "--scale", "inf"], ["--scale=inf", "finite"]),
        (["--network", "plain", "--seeds", "0", "--size", "1x70000"], ["1x70000", "65,536"]),
        (["--network", "plain", "--seeds", "0", "--trunc", "much"], ["--trunc"]),
        (["--network", "plain", "--seeds", "0", "--trunc", "nan"], ["--trunc=nan", "finite"]),
        (["--network", "", "--seeds", "0"], ["is no file"]),
    ],
)
def test_a_wrong_call_is_a_sentence_and_writes_nothing(networks, tmp_path, options, words):
    options = list(options)
    name = options[1]
    if not name.endswith(".safetensors"):
        options[1] = str(networks / f"{name}.safetensors" if name else networks)
    result = run(*options, "--outdir", tmp_path / "out")
    assert result.exit_code == 2
    for word in words:
        assert word in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_a_sentence(networks, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("--network", networks / "plain.safetensors", "--seeds", "0", "--outdir", tmp_path / "file")
    assert result.exit_code == 2
    assert "cannot write" in result.output
    assert (tmp_path / "file").read_text() == ""


def test_the_seeds_of_the_command_line_raise_user_errors_in_python():
    with pytest.raises(UserError):
        generate.parse_seeds("")
