"""generate.py: its files are the engine's images, whoever computes them, and a wrong call is a sentence."""

import hashlib
import os
from pathlib import Path

import av
import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner
from conftest import ROOT, run_ranks
from helpers import wait_until
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_released import REFERENCES, Reference, content, dumps

import generate
import rendering
from dnnlib.console import UserError
from rendering import Shot, camera, saved, styles, video
from torch_utils.images import to_uint8
from training.networks import Generator, GeneratorConfig
from training.snapshot import load_generator, save_generator


def tiny(**settings) -> Generator:
    torch.manual_seed(0)
    small = {"img_resolution": 16, "channel_base": 64, "channel_max": 8, "z_dim": 6, "w_dim": 6, "mapping_layers": 1}
    return Generator(GeneratorConfig(**{**small, "biline_channels": 4, "thickness": 3, **settings})).eval()


@pytest.mark.parametrize(("text", "seeds"), [("7", [7]), ("0-3,7", [0, 1, 2, 3, 7]), (" 5 , 5-5", [5, 5])])
def test_seeds(text, seeds):
    assert styles.parse_seeds(text) == seeds


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    made = {"plain": tiny(), "cond": tiny(c_dim=3), "grey": tiny(img_channels=1), "rgba": tiny(img_channels=4)}
    made["smooth"], made["named"] = tiny(bandwidth=0.5), tiny(c_dim=3)
    made["named"].class_names = ["ant", "2", "0"]
    for name, G in made.items():
        save_generator(G, folder / f"{name}.safetensors")
    (folder / "broken.safetensors").write_bytes((folder / "plain.safetensors").read_bytes()[:-10])
    return folder


def run(*arguments):
    return CliRunner().invoke(generate.main, [str(a) for a in arguments])


def read(path) -> np.ndarray:
    """[H,W,C] of a file that may be large."""
    return tifffile.imread(path, level=0) if path.suffix == ".tif" else np.asarray(Image.open(path))


def expected(seed: int, size: tuple[int, int] | None = None, dtype: torch.dtype | None = None, **shot) -> np.ndarray:
    """[H,W,C]: what the engine renders for the network "plain"."""
    G = tiny()
    with torch.no_grad():
        ws = G.mapping(styles.sample_latent(G, seed))
    return to_uint8(rendering.render(G, ws, Shot(size, **shot), dtype=dtype))[0].movedim(0, -1).numpy()


QUARTER = (0.25, 0.25, 0.5, 0.5)
MOVED = rendering.translation(0.5, -0.25) @ rendering.rotation(20) @ rendering.zoom(3)
SHOTS = {
    "": {"size": (16, 16)},
    "--scale=0.5": {"size": (8, 8)},
    "--format=tiff --scale=3": {"size": (48, 48)},
    "--size=31x7 --fit=extend": {"size": (7, 31), "fit": "extend"},
    "--window=0.25,0.25,0.5,0.5": {"size": (16, 16), "window": QUARTER},
    "--window=0.25,0.25,0.5,0.5 --scale=4": {"size": (16, 16), "window": QUARTER},
    "--window=0,0,1,0.5 --scale=2": {"size": (16, 32), "window": (0, 0, 1, 0.5)},
    "--rotate=30 --exact": {"size": (16, 16), "transform": rendering.rotation(30), "exact": True},
    "--zoom=3 --rotate=20 --translate=0.5,-0.25": {"size": (16, 16), "transform": MOVED},
    "--supersample=3 --tile=5": {"size": (16, 16), "supersample": 3},
    "--dtype=bf16": {"size": (16, 16), "dtype": torch.bfloat16},
    "--dtype=fp64": {"size": (16, 16), "dtype": torch.float64},
}


@pytest.mark.parametrize("options", SHOTS)
def test_the_file_is_the_image_of_the_engine(networks, tmp_path, options):
    out = tmp_path / "out"
    result = run("--network", networks / "plain.safetensors", "--seeds=0-1,9", "--outdir", out, *options.split())
    assert result.exit_code == 0, result.output
    suffix = ".tif" if "tiff" in options else ".png"
    assert sorted(p.name for p in out.glob("[!.]*")) == [f"seed000{seed}{suffix}" for seed in (0, 1, 9)]
    found, wanted = read(out / f"seed0009{suffix}"), expected(9, **SHOTS[options])
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).max() <= 1  # a float32 sum may round the other way
    assert not np.array_equal(found, read(out / f"seed0000{suffix}"))


@pytest.mark.parametrize(("name", "mode"), [("plain", "RGB"), ("grey", "L"), ("rgba", "RGBA")])
def test_images_keep_their_channels(networks, tmp_path, name, mode):
    assert run("--network", networks / f"{name}.safetensors", "--seeds", 0, "--outdir", tmp_path).exit_code == 0
    assert Image.open(tmp_path / "seed0000.png").mode == mode


def test_truncation_zero_is_one_image_for_all_seeds(networks, tmp_path):
    run("--network", networks / "plain.safetensors", "--seeds", "0-1", "--trunc", 0, "--outdir", tmp_path)
    assert (tmp_path / "seed0000.png").read_bytes() == (tmp_path / "seed0001.png").read_bytes()


def test_classes_go_round_and_blend(networks, tmp_path):
    call = ("--network", networks / "cond.safetensors", "--outdir", tmp_path)
    assert run(*call, "--seeds=5-8", "--class=0,2,0:0.25+2:0.75").exit_code == 0
    G = tiny(c_dim=3)
    labels = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0.25, 0, 0.75], [1, 0, 0]])
    for seed, c in zip((5, 6, 7, 8), labels, strict=True):
        with torch.no_grad():
            image = rendering.render(G, G.mapping(styles.sample_latent(G, seed), c[None]))
        found = read(tmp_path / f"seed000{seed}.png")
        assert np.array_equal(found, to_uint8(image)[0].movedim(0, -1).numpy())


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("hat", [0, 1, 0, 0]),
        ("3", [0, 0, 0, 1]),
        ("1", [0, 0, 1, 0]),  # the name of class 2
        ("0:0.01", [0.01, 0, 0, 0]),
        ("hat:0.3+shoes:0.7", [0.7, 0.3, 0, 0]),
        ("hat:1 + 3:1", [0, 1, 0, 1]),
        ("hat:-2+hat:0.5", [0, -1.5, 0, 0]),
        ("hat+0", [0.5, 0.5, 0, 0]),
        ("a+b:c", [0, 0, 0, 1]),
        ("[1,0,-1.5,2e-3]", [1, 0, -1.5, 0.002]),
        ("[0, 0, 0, 0]", [0, 0, 0, 0]),
    ],
)
def test_a_label_has_the_numbers_that_were_written(text, label):
    G = tiny(c_dim=4)
    G.class_names = ["shoes", "hat", "1", "a+b:c"]
    assert torch.equal(styles.parse_label(G, text), torch.tensor([label]))


def test_classes_are_split_at_commas_outside_of_brackets_and_quotes():
    text = '3,[1,0,-1],hat:0.3+2:0.7,"tench, fish",[0,1]'
    assert styles.parse_classes(text) == ["3", "[1,0,-1]", "hat:0.3+2:0.7", "tench, fish", "[0,1]"]


def test_without_classes_a_seed_has_one_of_its_own(networks, tmp_path):
    call = ("--network", networks / "cond.safetensors", "--outdir")
    result = run(*call, tmp_path / "alone", "--seeds=5")
    assert result.exit_code == 0
    assert "seed i gets class i mod 3" in result.output
    assert run(*call, tmp_path / "among", "--seeds=4-6").exit_code == 0
    assert run(*call, tmp_path / "chosen", "--seeds=5", "--class=2").exit_code == 0
    named = run("--network", networks / "named.safetensors", "--outdir", tmp_path / "named", "--seeds=5")
    assert "ant, 2, 0" in named.output
    kinds = ("alone", "among", "chosen", "named")
    assert len({(tmp_path / name / "seed0005.png").read_bytes() for name in kinds}) == 1


@pytest.mark.parametrize(
    ("seeds", "size", "rows", "columns", "options"),
    [("3-9", "20x20", 3, 3, ()), ("0-4", "40x16", 3, 2, ()), ("0-4", "20x20", 2, 4, ("--columns=4",))],
)
def test_a_grid_holds_the_images_of_the_seeds_row_by_row(networks, tmp_path, seeds, size, rows, columns, options):
    call = ("--network", networks / "cond.safetensors", f"--seeds={seeds}", f"--size={size}", "--tile=16")
    assert run(*call, "--outdir", tmp_path / "single").exit_code == 0
    assert run(*call, "--grid", tmp_path / "grid.png", *options).exit_code == 0
    width, height = map(int, size.split("x"))
    grid = read(tmp_path / "grid.png")
    assert grid.shape == (rows * height, columns * width, 3)
    cells = [cell for row in np.split(grid, rows) for cell in np.split(row, columns, axis=1)]
    single = sorted((tmp_path / "single").glob("*.png"))
    for path, cell in zip(single, cells, strict=False):
        assert np.array_equal(read(path), cell)
    assert not any(cell.any() for cell in cells[len(single) :])
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == ["grid.png", "single"]


def test_a_network_that_comes_along_goes_by_its_name(networks, models, tmp_path):
    call = ("--seeds=0", "--outdir")
    result = run(*call, tmp_path / "none")
    assert result.exit_code == 2
    assert "--network is missing" in result.output
    for name, kind in (("letters", "plain"), ("clothing", "smooth")):
        (models / f"{name}.safetensors").write_bytes((networks / f"{kind}.safetensors").read_bytes())
    assert run("--network=letters", *call, tmp_path / "named").exit_code == 0
    assert np.array_equal(read(tmp_path / "named" / "seed0000.png"), expected(0))
    result = run(*call, tmp_path / "first")
    assert "--network=clothing" in result.output
    save_generator(tiny(), models / "emoji-people.safetensors")
    result = run(*call, tmp_path / "favourite")
    assert "--network=emoji-people" in result.output
    first, named, favourite = ((tmp_path / x / "seed0000.png").read_bytes() for x in ("first", "named", "favourite"))
    assert first != named == favourite
    result = run("--network=leters", *call, tmp_path / "wrong")
    assert result.exit_code == 2
    assert "did you mean letters?" in result.output
    assert run("convert", "letters", tmp_path / "copy.safetensors").exit_code == 0
    assert (tmp_path / "copy.safetensors").read_bytes() == (models / "letters.safetensors").read_bytes()


def test_mixing_takes_styles_from_another_seed_and_truncation_stops_at_the_cutoff():
    G = tiny()
    G.mapping.w_avg.fill_(0.5)
    a, b = (styles.Styles(0.5, 3, mix=[]).map(G, [seed])[0] for seed in (1, 7))
    mixed = styles.Styles(0.5, 3, mix=["7:0,4-5"]).map(G, [1])[0]
    for i in range(G.config.num_ws):
        assert torch.equal(mixed[i], b[i] if i in (0, 4, 5) else a[i])
    with torch.no_grad():
        w = G.mapping(styles.sample_latent(G, 1))[0]
    assert torch.equal(a[3:], w[3:])
    assert torch.allclose(a[:3], 0.5 + 0.5 * (w[:3] - 0.5))


windows = st.tuples(*[st.floats(-2, 2)] * 2, *[st.floats(0.01, 3)] * 2).map(
    lambda w: (w[0], w[1], w[0] + w[2], w[1] + w[3])
)


@given(windows, windows, st.floats(0, 1), st.floats(0, 1))
def test_the_way_from_window_to_window_is_a_zoom_about_one_point(a, b, t, u):
    at = [np.array(camera.approach(a, b, s)) for s in (0, 1, t, (t + u) / 2, u)]
    assert np.allclose(at[0], a)
    assert np.allclose(at[1], b)
    sides = [w[2] - w[0] for w in at]
    assert np.isclose(sides[3] ** 2, sides[2] * sides[4])  # equal times, equal factors
    if not np.isclose(sides[0], sides[1], rtol=1e-3):
        place = (b[0] * sides[0] - a[0] * sides[1]) / (sides[0] - sides[1])  # the point both show in the same place
        shown = [(place - w[0]) / side for w, side in zip(at, sides, strict=True)]
        assert np.allclose(shown, shown[0], atol=1e-6)


def test_a_path_has_legs_of_equal_time():
    path = camera.parse_path("zoom", "1:4:2", 1, "")
    at = [camera.follow(path, t, camera.geometric)[0] for t in (0, 0.25, 0.5, 0.75, 1)]
    assert np.allclose(at, [1, 2, 4, 8**0.5, 2])


def frames(path) -> list[np.ndarray]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def psnr(a, b) -> float:
    return 10 * np.log10(255**2 / np.square(a.astype(float) - b).mean())


def smooth(networks):
    """A network whose images survive the halved colour resolution of H.264."""
    return networks / "smooth.safetensors"


def test_a_full_circle_in_twelve_frames(networks, tmp_path):
    film = tmp_path / "circle.mp4"
    result = run(
        "--network", smooth(networks), "--seeds=3", "--size=64x64", "--rotate=0:360", "--w-frames=12", "--video", film
    )
    assert result.exit_code == 0, result.output
    shown = frames(film)
    assert len(shown) == 12
    G = load_generator(smooth(networks))
    ws = G.mapping(styles.sample_latent(G, 3))
    for i in range(12):
        image = rendering.render(G, ws, Shot((64, 64), transform=rendering.rotation(30 * i)))
        assert psnr(shown[i], to_uint8(image)[0].movedim(0, -1).numpy()) >= 30
    for i in (3, 6, 9):  # quarter turns
        assert psnr(shown[i], np.rot90(shown[0], i // 3)) >= 30
    assert not film.with_name("circle.mp4.part").exists()


def test_a_walk_through_seeds_visits_each_and_is_resumed(networks, tmp_path, monkeypatch):
    call = ("--network", smooth(networks), "--seeds=3,5,8", "--size=32x32", "--w-frames=4", "--zoom=1:2")
    assert run(*call, "--video", tmp_path / "whole.mp4").exit_code == 0
    shown = frames(tmp_path / "whole.mp4")
    assert len(shown) == 12
    G = load_generator(smooth(networks))
    for i, seed in enumerate((3, 5, 8)):
        zoomed = rendering.render(
            G, G.mapping(styles.sample_latent(G, seed)), Shot((32, 32), transform=rendering.zoom(2 ** (i / 3)))
        )
        assert psnr(shown[4 * i], to_uint8(zoomed)[0].movedim(0, -1).numpy()) >= 28

    write, written = video.Film.write, []

    def stopping(self, index, pixels):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(index)
        write(self, index, pixels)

    monkeypatch.setattr(video.Film, "write", stopping)
    result = run(*call, "--video", tmp_path / "parts.mp4")
    assert result.exit_code == 130
    assert "--resume" in result.output
    assert not (tmp_path / "parts.mp4").exists()
    monkeypatch.setattr(
        video.Film, "write", lambda self, index, pixels: (written.append(index), write(self, index, pixels))
    )
    assert run(*call, "--video", tmp_path / "parts.mp4", "--resume").exit_code == 0
    assert sorted(written) == list(range(12))
    assert (tmp_path / "parts.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_killed_image_is_resumed_to_the_same_bytes(networks, tmp_path, start):
    size = ("--network", networks / "plain.safetensors", "--seeds=4", "--size=500x400", "--format=tiff", "--tile=20")
    assert run(*size, "--outdir", tmp_path / "whole").exit_code == 0
    out = tmp_path / "killed"
    out.mkdir()
    (out / "seed0004.tif").write_bytes(b"former")
    code = (
        "import sys, time; from rendering import writers; writers.FLUSH_SECONDS = 0; write = writers.Canvas.write\n"
        "def slowly(*a): write(*a); time.sleep(0.01)\n"
        "writers.Canvas.write = slowly; import generate; generate.main(sys.argv[1:])"
    )
    process = start("-c", code, *size, "--outdir", out)
    done = out / "seed0004.tif.part" / "done"
    wait_until(lambda: done.exists() and done.read_bytes().count(1) > 50)
    process.kill()
    process.communicate(timeout=60)
    before = done.read_bytes().count(1)
    assert 50 < before < 25 * 20
    assert (out / "seed0004.tif").read_bytes() == b"former"

    other = run(*size[:-1], "--tile=40", "--outdir", out, "--resume")
    assert other.exit_code == 2
    assert "tile = 20" in other.output
    assert done.read_bytes().count(1) == before

    assert run(*size, "--outdir", out, "--resume").exit_code == 0
    assert (out / "seed0004.tif").read_bytes() == (tmp_path / "whole" / "seed0004.tif").read_bytes()
    assert sorted(p.name for p in out.glob("[!.]*")) == ["seed0004.tif"]


@pytest.mark.parametrize(
    ("more", "out"), [("--seeds=0-2", "--outdir={}"), ("", "--grid={}/x.png"), ("", "--video={}/x.mp4 --w-frames=2")]
)
def test_resuming_keeps_what_is_finished_if_it_is_of_the_same_job(networks, tmp_path, more, out):
    call = ("--network", networks / "smooth.safetensors", "--seeds=0-1", *out.format(tmp_path).split())
    assert run(*call).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[!.]*")}
    result = run(*call, "--trunc=0.5", "--resume")
    assert result.exit_code == 2
    assert "started with truncation = [1.0, null], and now truncation is [0.5, null]" in result.output
    result = run(*call, *more.split(), "--resume")
    assert result.exit_code == 0, result.output
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert {Path(path): end == "kept" for path, _, end in lines} == {
        path: path in before for path in tmp_path.glob("[!.]*")
    }
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(lines) == len(before) + bool(more)
    assert run(*call, "--trunc=0.5").exit_code == 0  # starts over
    assert all(path.stat().st_mtime_ns != time for path, time in before.items())


def test_resuming_a_film_at_another_speed_is_refused(networks, tmp_path):
    call = ("--network", networks / "smooth.safetensors", "--seeds=0-1", "--w-frames=1", "--video", tmp_path / "x.mp4")
    assert run(*call).exit_code == 0
    result = run(*call, "--fps=60", "--resume")
    assert (result.exit_code, "fps = 30" in result.output) == (2, True)


@pytest.mark.parametrize("suffix", saved.FILES)
def test_saved_styles_give_the_images_of_their_seeds(networks, tmp_path, suffix):
    call = ("--network", networks / "cond.safetensors")
    ws = tmp_path / f"ws{suffix}"
    chosen = ("--seeds=3,7", "--trunc=0.7", "--mix=5:2-3", "--class=1,2")
    assert run(*call, *chosen, "--outdir", tmp_path, "--save-w", ws).exit_code == 0
    result = run(*call, "--projected-w", ws, "--outdir", tmp_path)
    assert result.exit_code == 0, result.output
    for seed, number in (("seed0003", "w0000"), ("seed0007", "w0001")):
        assert (tmp_path / f"{number}.png").read_bytes() == (tmp_path / f"{seed}.png").read_bytes()
    film = ("--w-frames=2", "--size=32x32", "--video")
    assert run(*call, "--w", ws, *film, tmp_path / "w.mp4").exit_code == 0
    assert run(*call, *chosen, *film, tmp_path / "seeds.mp4").exit_code == 0
    assert (tmp_path / "w.mp4").read_bytes() == (tmp_path / "seeds.mp4").read_bytes()


@pytest.mark.parametrize(("content", "name"), [(".npz", ".npy"), (".npy", ".npz")])
def test_styles_under_the_other_name_of_numpy_are_read(networks, tmp_path, content, name):
    G, w = load_generator(networks / "plain.safetensors"), np.random.default_rng(0).normal(size=(2, 7, 6))
    saved.FILES[content][1](tmp_path / f"w{content}", w)
    (tmp_path / f"w{content}").rename(tmp_path / f"w{name}")
    assert np.array_equal(saved.read_styles(tmp_path / f"w{name}", G), w.astype(np.float32))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: np.save(path, np.zeros((2, 7, 5))), "floats [N,7,6]"),
        (lambda path: np.save(path, np.zeros((2, 7, 6), int)), "int64"),
        (lambda path: np.save(path, np.full((7, 6), np.nan)), "not finite"),
        (lambda path: np.save(path, np.array([None]), allow_pickle=True), "cannot read the styles"),
        (lambda path: path.write_bytes(b"\x93NUMPY"), "cannot read the styles"),
        (os.mkfifo, "w.npy is a pipe or device; give a file of styles"),
        (lambda path: None, "No such file"),
    ],
)
def test_unfit_styles_are_a_sentence(networks, tmp_path, write, words):
    write(tmp_path / "w.npy")
    call = ("--network", networks / "plain.safetensors", "--outdir", tmp_path / "out")
    result = run(*call, "--w", tmp_path / "w.npy")
    assert result.exit_code == 2
    assert words in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("seeds", "out"), [("4", "--outdir={}"), ("4-6", "--outdir={}"), ("4-6", "--grid={}/x.png")])
def test_two_processes_write_the_bytes_of_one(networks, tmp_path, start, seeds, out):
    call = ("--network", networks / "plain.safetensors", f"--seeds={seeds}", "--size=300x200", "--tile=16")
    assert run(*call, out.format(tmp_path / "one")).exit_code == 0
    run_ranks(start, ROOT / "generate.py", *call, out.format(tmp_path / "two"))
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("[!.]*")} for name in ("one", "two"))
    assert one == two


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file as the authors release them, with random weights."""
    path = tmp_path_factory.mktemp("released") / "network.pkl"
    path.write_bytes(dumps(content(Reference(next(p for p in REFERENCES if "uncond" in p.name)))))
    return path


def test_a_released_file_is_rendered_and_converted(released, tmp_path):
    assert run("convert", released, tmp_path / "net.safetensors").exit_code == 0
    for network, out in ((released, "a"), (tmp_path / "net.safetensors", "b")):
        assert run("--network", network, "--seeds=2", "--scale=2", "--outdir", tmp_path / out).exit_code == 0
    digests = {hashlib.sha256((tmp_path / out / "seed0002.png").read_bytes()).hexdigest() for out in "ab"}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("source", "dest", "words"),
    [
        ("network.pkl", "out.pkl", ["out.pkl", ".safetensors"]),
        ("missing.pkl", "out.safetensors", ["missing.pkl", "does not exist"]),
        ("evil.pkl", "out.safetensors", ["evil.pkl", "posix.system"]),
        (
            "sg3.pkl",
            "out.safetensors",
            ["training.networks_stylegan3.Generator", "give a file of CREPS, StyleGAN2, CIPS"],
        ),
    ],
)
def test_a_wrong_conversion_is_a_sentence(released, tmp_path, source, dest, words):
    (tmp_path / "network.pkl").write_bytes(released.read_bytes())
    (tmp_path / "evil.pkl").write_bytes(b"\x80\x02cposix\nsystem\n(S'touch " + bytes(tmp_path) + b"/ran'\ntR.")
    (tmp_path / "sg3.pkl").write_bytes(
        b"\x80\x02}X\x05\x00\x00\x00G_emactraining.networks_stylegan3\nGenerator\n)\x81s."
    )
    result = run("convert", tmp_path / source, tmp_path / dest)
    assert result.exit_code == 2
    for word in words:
        assert word in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / dest).exists()
    assert not (tmp_path / "ran").exists()


# Options besides --network --seeds=0 --outdir=out (an empty one is left out) -> a word of the sentence.
WRONG = {
    "--network=": "is not a file",
    "--network=missing.safetensors": "does not exist",
    "--network=broken": "broken.safetensors",
    "--network=/proc/self/mem": "/proc/self/mem: Input/output error; check the disk",
    "--seeds=": "--seeds is missing",
    "--seeds=a": "seeds=a: cannot read 'a'",
    "--seeds=5-2": "5-2",
    "--seeds=-1": "-1",
    "--outdir=": "one of --outdir",
    "--video=x.mp4": "one of --outdir",
    "--grid=x.png": "one of --outdir",
    "--columns=2": "--columns belongs to --grid",
    "--fps=30": "--fps belongs to --video",
    "--w-frames=60": "--w-frames belongs to --video",
    "--trunc-cutoff=2": "--trunc-cutoff belongs to --trunc",
    "--outdir= --save-w=out/w.npz --size=64": "--size belongs to --outdir or --grid or --video",
    "--outdir= --grid=out/x.png --format=tiff": "--format belongs to --outdir",
    "--size=big": "'big' is not a size",
    "--size=0x5": "0x5",
    "--size=999999999x999999999": "999999999x999999999",
    "--size=8x8 --scale=2": "one of them",
    "--scale=-1": "--scale",
    "--scale=inf": "--scale=inf",
    "--trunc=much": "--trunc",
    "--trunc=nan": "--trunc=nan",
    "--trunc=1e308": "--trunc=1e+308",
    "--trunc=0.5 --trunc-cutoff=99": "7 styles",
    "--class=1": "no classes",
    "--network=cond --class=3": "class=3: there is no class '3'; the network has classes 0 to 2",
    "--network=cond --class=1:x": "2:0.3+5:0.7",
    "--network=cond --class=0:0": "larger",
    "--network=cond --class=0:1+2": "every part",
    "--network=cond --class=[1,0]": "3 numbers",
    "--network=named --class=and": "classes 0 to 2: ant, 2, 0; did you mean ant?",
    "--network=cond --seeds=3,3 --class=0,1": "two images would be seed0003.png",
    "--seeds=0-4294967295": "1,000,000",
    "--w=w.npy": "--seeds does not go with --w",
    "--mix=7": "7:4-8",
    "--mix=7:99": "styles 0 to 6",
    "--window=0,0,1": "window=0.25,0.25,0.5,0.5",
    "--window=1,0,0,1": "left < right",
    "--window=0,0,1e-16,1e-16": "float64",
    "--window=0,0,1e308,1e308 --scale=2": "cannot be written",
    "--zoom=0": "above 0",
    "--zoom=a": "zoom=2",
    "--rotate=inf": "rotate=inf",
    "--translate=1": "0.3,0",
    "--rotate=0:90": "--video",
    "--supersample=0": "--supersample",
    "--tile=0": "--tile",
    "--dtype=fp16": "GPUs",
    "--format=jpg": "--format",
    "--size=20000x10 --format=webp": "16383",
    "--outdir= --grid=out/sheet.jpg": ".png",
    "--outdir= --video=out/x.mp4": "not move",
    "--outdir= --video=out/x.avi --seeds=0-1": ".mp4",
    "--outdir= --video=out/x.mp4 --seeds=0-1 --size=31x32": "30x32",
    "--outdir= --video=out/x.mp4 --seeds=0-1 --fps=0": "--fps",
}


@pytest.mark.parametrize("options", WRONG)
def test_a_wrong_call_is_a_sentence_and_writes_nothing(networks, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    given = {"--network": "plain", "--seeds": "0", "--outdir": "out"}
    given |= dict(option.split("=", 1) for option in options.split())
    if given["--network"].isalpha():
        given["--network"] = f"{networks / given['--network']}.safetensors"
    elif not given["--network"]:
        given["--network"] = str(networks)
    result = run(*(f"{name}={value}" for name, value in given.items() if value))
    assert result.exit_code == 2
    assert WRONG[options] in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def overflowing(G: Generator) -> None:
    """Weights that are finite, with products that are not."""
    for layer in G.synthesis.pixels.refinement:
        layer.head.weight.fill_(3e38)
        layer.head.affine.bias.fill_(3e38)
    G.synthesis.pixels.decoder_img.weight.fill_(3e38)


@pytest.mark.parametrize(
    ("breaking", "out"),
    [
        ("weights", "--outdir={}"),
        ("styles", "--outdir={}"),
        ("products", "--outdir={} --resume --format=tiff"),
        ("products", "--grid={}/x.png"),
        ("products", "--video={}/x.mp4"),
    ],
)
def test_numbers_that_are_not_finite_are_a_sentence_and_no_file(tmp_path, breaking, out):
    G = tiny().requires_grad_(False)
    if breaking == "weights":
        G.synthesis.pixels.refinement[0].head.bias.fill_(torch.inf)  # a clamp would make it 256
    elif breaking == "products":
        overflowing(G)
    save_generator(G, tmp_path / "net.safetensors")
    result = run(
        *("--network", tmp_path / "net.safetensors", "--seeds=0-1", f"--trunc={1e30 if breaking == 'styles' else 1}"),
        *out.format(tmp_path / "out").split(),
    )
    assert result.exit_code == 2, result.output
    assert "finite" in result.output
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("former", [b"former", None])
@pytest.mark.parametrize("out", ["grid=a.png", "grid=a.dzi", "video=a.mp4 --w-frames=1", "save-w=a.npz"])
def test_a_link_stays_and_its_target_is_written(networks, tmp_path, monkeypatch, out, former):
    monkeypatch.chdir(tmp_path)
    call = ("--network", networks / "plain.safetensors", "--seeds=0-1", *f"--{out}".split())
    path, target = Path(out.split("=")[1].split()[0]), Path("elsewhere") / "target"
    path.symlink_to(target)
    if former:
        target.parent.mkdir()
        target.write_bytes(former)
    result = run(*call)
    assert result.exit_code == 0, result.output
    assert path.readlink() == target
    path.unlink()
    assert run(*call).exit_code == 0
    assert target.read_bytes() == path.read_bytes() != former


def test_a_folder_that_cannot_be_made_is_a_sentence(networks, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("--network", networks / "plain.safetensors", "--seeds", "0", "--outdir", tmp_path / "file")
    assert result.exit_code == 2
    assert "cannot write" in result.output
    assert (tmp_path / "file").read_text() == ""


def test_the_seeds_of_the_command_line_raise_user_errors_in_python():
    with pytest.raises(UserError):
        styles.parse_seeds("")
