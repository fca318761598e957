"""Laws of snapshots: what was saved is loaded, and anything else is one sentence."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from helpers import files_up_to
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dnnlib.console import UserError
from dnnlib.files import sha256
from torch_utils import checkpoint
from training.networks import Generator, GeneratorConfig
from training.networks.layers import Layer, compute_with
from training.snapshot import find_network, load_generator, save_generator, snapshot_name

SETTINGS = {
    "img_resolution": 16,
    "z_dim": 8,
    "w_dim": 8,
    "mapping_layers": 1,
    "channel_base": 64,
    "channel_max": 8,
    "biline_channels": 4,
    "thickness": 2,
}


def generator_of(**settings) -> Generator:
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(**SETTINGS, **settings))
    G.mapping.w_avg.normal_()
    return G


@pytest.mark.parametrize(
    "settings",
    [{"c_dim": 3, "img_channels": 1, "architecture": "orig"}, {"decoders": False, "coords": "centers"}],
    ids=str,
)
def test_a_generator_loaded_is_the_generator_saved(tmp_path, settings):
    G, path = generator_of(**settings).requires_grad_(False), tmp_path / "network.safetensors"
    save_generator(G, path)
    loaded = load_generator(path)
    assert loaded.config == G.config
    assert list(loaded.state_dict()) == list(G.state_dict())
    for name, tensor in G.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    z, c = torch.randn(2, 8), torch.eye(3)[:2] if settings.get("c_dim") else None
    assert torch.equal(loaded(z, c), G(z, c))


def test_names_of_classes_are_kept_and_must_fit(tmp_path):
    G, path = generator_of(c_dim=2), tmp_path / "network.safetensors"
    for names in ([], ["ä", "b, c"]):
        G.class_names = names
        save_generator(G, path)
        assert load_generator(path).class_names == names
    G.class_names = ["alone"]
    save_generator(G, path)
    with pytest.raises(UserError, match="class_names"):
        load_generator(path)


def test_the_header_of_a_snapshot_holds_the_config(tmp_path):
    G, path = generator_of(), tmp_path / "network.safetensors"
    save_generator(G, path)
    with safe_open(path, "pt") as file:
        text = " ".join(file.metadata().values())
    for key, value in G.config.model_dump().items():
        assert f'"{key}":{json.dumps(value)}'.replace(" ", "") in text.replace(" ", "")


def test_equal_generators_are_equal_files(tmp_path):
    G = generator_of()
    files = set()
    for i in range(8):
        save_generator(G, tmp_path / f"{i}.safetensors")
        files.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(files) == 1


def test_a_snapshot_overwrites_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "network.safetensors"
    save_generator(generator_of(c_dim=2), path)
    save_generator(generator_of(), path)
    assert load_generator(path).config.c_dim == 0
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_goes_before_a_name_and_a_name_before_a_folder(models, tmp_path, monkeypatch):
    save_generator(generator_of(c_dim=2), models / "letters.safetensors")
    save_generator(generator_of(c_dim=3), tmp_path / "file" / "letters")
    (tmp_path / "folder" / "letters").mkdir(parents=True)
    for place, c_dim in (("folder", 2), ("file", 3)):
        monkeypatch.chdir(tmp_path / place)
        assert load_generator("letters").config.c_dim == c_dim
    with pytest.raises(UserError, match=r"x/letters does not exist.*did you mean letters\?"):
        load_generator("x/letters")
    with pytest.raises(UserError, match="does not exist"):
        load_generator(f"../{models.name}/letters")  # names are bare


# --- other files -------------------------------------------------------------------------------------


def rewrite(path: Path, change) -> None:
    """The snapshot again, after `change(tensors, metadata)`."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def with_config(**changes):
    def change(tensors, metadata):
        (key,) = [k for k, v in metadata.items() if v.startswith("{")]
        metadata[key] = json.dumps(json.loads(metadata[key]) | changes)

    return change


def with_header(text: str):
    def change(tensors, metadata):
        (key,) = [k for k, v in metadata.items() if v.startswith("{")]
        metadata[key] = text

    return change


def truncate(share: float):
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


HARM = {
    "empty": (lambda path: path.write_bytes(b""), "is not an intact safetensors file"),
    "a web page": (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>"), "is a web page"),
    "a pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "truncated in its tensors": (truncate(0.9), "is not an intact safetensors file"),
    "longer than its header says": (lambda path: path.open("ab").write(b"x" * 9), "is not an intact safetensors file"),
    "a network of another project": (
        lambda path: save_file({"a": torch.ones(3)}, path, {"format": "pt"}),
        "not hold a CREPS generator",
    ),
    "a tensor is missing": (
        lambda path: rewrite(path, lambda t, m: t.pop("mapping.w_avg")),
        "do not fit its config: mapping.w_avg",
    ),
    "a tensor has another shape": (
        lambda path: rewrite(path, lambda t, m: t.update({"mapping.w_avg": torch.ones(9)})),
        "do not fit its config: mapping.w_avg",
    ),
    "its config is wider": (lambda path: rewrite(path, with_config(w_dim=16)), "do not fit its config: .* and .* more"),
    "its config has an unknown key": (lambda path: rewrite(path, with_config(w_dmi=8)), "did you mean w_dim"),
    "its config has a wrong value": (lambda path: rewrite(path, with_config(z_dim=-1)), "z_dim=-1"),
    "its config is no JSON": (lambda path: rewrite(path, with_header("{")), "config"),
    "its config asks for a vast network": (
        lambda path: rewrite(path, with_config(w_dim=10**12)),
        "do not fit its config",
    ),
    "its config asks for a vast number of layers": (
        lambda path: rewrite(path, with_config(img_shape=(2**60, 2**60))),
        "config",
    ),
    "its config asks for an endless mapping": (
        lambda path: rewrite(path, with_config(mapping_layers=10**9)),
        "mapping_layers=1000000000",
    ),
}


@pytest.mark.parametrize(("harm", "words"), HARM.values(), ids=HARM)
def test_another_file_is_one_sentence(tmp_path, harm, words):
    path = tmp_path / "network.safetensors"
    save_generator(generator_of(), path)
    harm(path)
    with pytest.raises(UserError, match=words) as error:
        load_generator(path)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.pkl", "."])
def test_what_is_not_a_file_is_one_sentence(tmp_path, name):
    with pytest.raises(UserError, match=r"does not exist|is not a file"):
        load_generator(tmp_path / name)


def test_a_half_precision_copy_computes_in_float32(tmp_path):
    path = tmp_path / "network.safetensors"
    save_generator(generator_of(), path)
    rewrite(path, lambda tensors, _: tensors.update({n: t.half() for n, t in tensors.items()}))
    loaded = load_generator(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded(torch.randn(1, 8)).isfinite().all()


# --- saving fails ----------------------------------------------------------------------------------------------------


def test_saving_below_a_file_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*network"):
        save_generator(generator_of(), tmp_path / "file" / "network.safetensors")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(UserError, match="a directory has this name"):
        save_generator(generator_of(), tmp_path)


def test_when_the_disk_is_full_the_old_snapshot_stays_and_nothing_half_written(tmp_path):
    path = tmp_path / "network.safetensors"
    save_generator(generator_of(), path)
    before = path.read_bytes()
    with files_up_to(len(before) // 2), pytest.raises(UserError, match=r"cannot write .*File too large"):
        save_generator(generator_of(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_how_a_generator_was_computed_is_not_saved(tmp_path):
    """A run in plain PyTorch, for comparison, gives snapshots that are rendered as fast as others; older ones too."""
    G, path = generator_of(), tmp_path / "x.safetensors"
    compute_with(G, "reference", "all")
    save_generator(G, path)
    for _ in range(2):
        loaded = load_generator(path)
        assert loaded.config == G.config
        assert {(m.impl, m.recompute) for m in loaded.modules() if isinstance(m, Layer)} == {("auto", "pixels")}
        rewrite(path, with_config(impl="reference", recompute="all"))


def test_a_run_directory_gives_its_newest_snapshot_and_a_training_state_its_average(tmp_path):
    G = generator_of()
    for kimg in (1, 2):
        save_generator(G, tmp_path / snapshot_name(kimg))
    assert find_network(tmp_path) == tmp_path / snapshot_name(2)
    state = checkpoint.save({"G_ema": G.state_dict()}, tmp_path, 3)
    with pytest.raises(UserError, match="needs the options"):
        load_generator(state)
    (tmp_path / "options.yaml").write_text(yaml.safe_dump({"G": G.config.model_dump(mode="json")}))
    loaded = load_generator(state).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in G.state_dict().items())
    with pytest.raises(UserError, match="folder with snapshots"):
        find_network(tmp_path.parent)


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    """Serve tmp_path / "www"; /short breaks off."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=tmp_path / "www")

        def do_GET(self):
            if self.path == "/short":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"cut off")
            else:
                super().do_GET()

        def log_message(self, *_): ...

    (tmp_path / "www").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_network_at_an_address_is_downloaded_once_and_is_the_one_with_that_digest(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CREPS_CACHE", str(tmp_path / "cache"))
    G = generator_of()
    save_generator(G, tmp_path / "www" / "net.safetensors")
    digest = sha256(tmp_path / "www" / "net.safetensors")
    for url, words in {
        f"{server}/net.safetensors": f"write {server}/net.safetensors#sha256=",
        f"{server}/net.safetensors#sha256={digest[:-1]}": "64 digits",
        f"{server}/net.safetensors#sha256={digest[::-1]}": f"SHA-256 is {digest}",
        f"{server}/short#sha256={digest}": "cut short|IncompleteRead",
        f"{server}/gone#sha256={digest}": "404",
        f"http://127.0.0.1:1/x#sha256={digest}": "refused",
        f"http://#sha256={digest}": "failed",
        f"http://[1#sha256={digest}": "failed",
    }.items():
        with pytest.raises(UserError, match=words):
            load_generator(url)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    url = f"{server}/net.safetensors#sha256={digest.upper()}"
    expected = G.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in load_generator(url).state_dict().items())
    (tmp_path / "www" / "net.safetensors").unlink()
    (kept,) = (tmp_path / "cache").rglob("net.safetensors")
    load_generator(url)
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(UserError, match="404"):  # it does not trust what is damaged
        load_generator(url)
