"""Laws of train.py: what it says, what it makes, and that a mistake is one sentence that harms nothing."""

import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import GENERATORS
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import generate
from dnnlib.config import build, read_yaml
from torch_utils import checkpoint
from training import memory
from training.config import RunConfig
from training.networks import Generator, GeneratorConfig
from training.runs import NewRun, flat, new_folder
from training.snapshot import load_generator, save_generator
from training.state import find_weights, initialise, new_state

FLAGS = """
outdir cfg data gpus batch gamma cond mirror resume batch-gpu aug p target augpipe cbase cmax glr dlr map-depth
mbstd-group desc metrics kimg tick snap seed fp32 workers dry-run init-from
"""


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- words -----------------------------------------------------------------------------------------------------------


def test_the_help_names_every_flag(tiny):
    result = tiny.call("--help")
    assert result.exit_code == 0
    for flag in FLAGS.split():
        assert re.search(rf"--{flag}\b", result.output), flag
    assert max(map(len, result.output.splitlines())) <= 110


def test_a_dry_run_prints_the_settings_and_makes_nothing(tiny):
    before = files(tiny.folder)
    result = tiny.call(*tiny.new("--dry-run"))
    assert result.exit_code == 0
    settings = yaml.safe_load(result.output)
    assert settings["train"]["batch"] == 8
    assert settings["G"]["img_shape"] == [8, 8]
    assert settings["loss"]["r1_gamma"] > 0
    assert files(tiny.folder) == before
    assert not tiny.runs()


FLAG_SETTINGS = [
    {
        "--cond": {"data.cond": True, "G.c_dim": 3, "D.c_dim": 3},
        "--mirror": {"data.mirror": True},
        "--batch=16": {"train.batch": 16},
        "--batch-gpu=4": {"train.batch_gpu": 4},
        "--gamma=7": {"loss.r1_gamma": 7},
        "--cbase=128": {"D.channel_base": 128, "G.channel_base": 256},
        "--cmax=16": {"D.channel_max": 16, "G.channel_max": 32},
        "--map-depth=2": {"G.mapping_layers": 2, "D.mapping_layers": 1},
        "--mbstd-group=2": {"D.mbstd_group": 2},
        "--aug=fixed": {"augment.mode": "fixed"},
        "--p=0.3": {"augment.p": 0.3},
        "--workers=2": {"data.workers": 2},
    },
    {
        "--mirror=1": {"data.mirror": True},  # as users of StyleGAN write switches
        "--cond=false": {"data.cond": False},
        "--batch-gpu=auto": {"train.batch_gpu": "auto"},
        "--glr=0.01": {"optim.g_lr": 0.01},
        "--dlr=0.02": {"optim.d_lr": 0.02},
        "--aug=ada": {"augment.mode": "ada"},
        "--target=0.7": {"augment.target": 0.7},
        "--augpipe=blit": {"augment.pipe": "blit"},
        "--kimg=1.5": {"train.kimg": 1.5},
        "--tick=0.5": {"train.tick": 0.5},
        "--snap=3": {"train.snap": 3},
        "--seed=5": {"train.seed": 5},
        "--fp32": {"train.precision": "float32"},
        "--metrics=none": {"metrics": []},
    },
    {
        "--aug=noaug": {"augment.mode": "none"},
        "--batch=16": {},
        "-otrain.batch=4": {"train.batch": 4},
        "-ooptim.beta1=0.5": {"optim.beta1": 0.5},
        "-oG.bandwidth=3": {"G.bandwidth": 3},
    },
]


@pytest.mark.parametrize("given", FLAG_SETTINGS, ids=["first", "second", "-o"])
def test_a_flag_sets_its_setting_over_the_recipe_and_o_over_both(tiny, given):
    result = tiny.call(*tiny.new("--dry-run", *given, data=tiny.labelled))
    assert result.exit_code == 0, result.output
    settings = flat(yaml.safe_load(result.output))
    expected = {dotted: value for setting in given.values() for dotted, value in setting.items()}
    assert {dotted: settings[dotted] for dotted in expected} == expected


# --- a run directory -------------------------------------------------------------------------------------------------


def test_a_run_directory_holds_the_files_of_stylegan(tiny):
    folder = tiny.run("--desc", "a/strange desc!", "--cond", data=tiny.labelled)
    assert folder.name == "00000-tiny-labelled-a_strange_desc_"
    names = {p.name for p in folder.iterdir()}
    assert {"options.yaml", "log.txt", "stats.jsonl", "reals.png", "fakes000000.png"} <= names
    for pattern in ("events*", "network-snapshot-*.safetensors", "training-state-*.pt"):
        assert list(folder.glob(pattern)), pattern
    assert not [name for name in names if name.startswith(".")]
    for name in ("reals.png", "fakes000000.png"):
        assert Image.open(folder / name).size == (12 * 8, 8 * 8)
    G = load_generator(folder / "network-snapshot-000000.safetensors")
    assert (G.config.c_dim, G.class_names) == (3, ["ant", "bee", "cat"])
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert [line["Progress/kimg"] for line in lines] == [0.016, 0.032, 0.048, 0.056]
    for key in ("Loss/G/loss", "Loss/D/loss", "Loss/scores/fake", "Loss/scores/real", "Loss/signs/real"):
        assert lines[0][key]["num"] == 16, key
    assert lines[0]["Loss/r1_penalty"]["num"] == 8
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Scalars("Progress/kimg")] == [2, 4, 6, 7]


def test_the_next_run_has_the_next_number_whatever_else_lies_there(tiny):
    (tiny.folder / "runs").mkdir()
    (tiny.folder / "runs" / "notes").mkdir()
    (tiny.folder / "runs" / "00041-old").mkdir()
    assert tiny.run().name == "00042-tiny-images"
    assert tiny.run().name == "00043-tiny-images"


def test_runs_that_begin_at_once_have_directories_of_their_own(tmp_path):
    new, images, ready = NewRun(None, tmp_path, "tiny"), SimpleNamespace(name="images"), threading.Barrier(8)

    def begin(_):
        ready.wait()
        return new_folder(new, images)

    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(begin, range(8)))
    assert sorted(folders) == sorted(tmp_path.iterdir())
    assert len(set(folders)) == 8


def test_the_weights_reported_are_those_of_the_average(tiny):
    folder = tiny.run()
    state = checkpoint.load(checkpoint.found(folder)[0])
    snapshot = load_generator(folder / "network-snapshot-000000.safetensors").state_dict()
    assert snapshot.keys() == state["G_ema"].keys()
    for name, tensor in snapshot.items():
        assert torch.equal(tensor, state["G_ema"][name]), name


def test_labels_that_are_ignored_are_mentioned(tiny):
    assert "start one with --cond" in tiny.call(*tiny.new("--kimg", 0.008, data=tiny.labelled)).output
    assert "start one with --cond" not in tiny.call(*tiny.new("--kimg", 0.008, "--cond", data=tiny.labelled)).output


# --- beginning from other weights ------------------------------------------------------------------------------------


def test_a_run_begins_from_a_network_in_models(tiny, models):
    old = tiny.run()
    snapshot = (old / "network-snapshot-000000.safetensors").rename(models / "letters.safetensors")
    result = tiny.call(*tiny.new("--init-from=letters", "--kimg", 0.008, "--glr", 1e-12))
    assert result.exit_code == 0, result.output
    total = len(load_generator(snapshot).state_dict())
    assert f"G: {total} of {total} tensors from {snapshot}" in result.output
    assert f"G_ema: {total} of {total} tensors" in result.output
    assert "D: starts from new weights" in result.output
    (new,) = tiny.runs() - {old}
    state, weights = checkpoint.load(checkpoint.found(new)[0]), load_generator(snapshot).state_dict()
    for name, tensor in state["G"].items():
        if "w_avg" not in name:
            torch.testing.assert_close(tensor, weights[name], rtol=1e-6, atol=1e-6)
    assert yaml.safe_load((new / "options.yaml").read_text())["augment"]["kimg"] == 100


def test_the_settings_with_which_a_network_would_fit_are_named(tiny, models):
    old = tiny.run("-oG.biline_channels=6", "-oG.thickness=5")
    (old / "network-snapshot-000000.safetensors").rename(models / "letters.safetensors")
    new = tiny.new("--init-from=letters", "--kimg", 0.008)
    (line,) = [line for line in tiny.call(*new).output.splitlines() if line.startswith("to take more of")]
    settings = line.split(": ")[1].split()
    assert settings == ["-o", "G.biline_channels=6", "-o", "G.thickness=5"]
    output = tiny.call(*new, *settings).output
    assert "fresh" not in output
    assert "to take" not in output


def test_a_run_begins_from_a_training_state_with_its_discriminator(tiny):
    old = tiny.run()
    path = checkpoint.found(old)[0]
    result = tiny.call(*tiny.new("--init-from", path, "--kimg", 0.008, "--glr", 1e-12, "--dlr", 1e-12))
    assert result.exit_code == 0, result.output
    (new,) = tiny.runs() - {old}
    saved, state = checkpoint.load(path), checkpoint.load(checkpoint.found(new)[0])
    assert state["step"] == 1
    for network in ("G", "D"):
        for name, tensor in state[network].items():
            if "w_avg" not in name:
                torch.testing.assert_close(tensor, saved[network][name], rtol=1e-6, atol=1e-6)
        assert f"{network}: {len(saved[network])} of {len(saved[network])} tensors" in result.output


def test_a_run_on_windows_begins_from_the_networks_of_a_run_at_one_size(tiny):
    old = tiny.run()
    options = ("--resolution", 8, "--max-scale", 3, "-oG.coords=centers", "--kimg", 0.008)
    result = tiny.call(*tiny.new("--init-from", old, *options, data=tiny.native_images()))
    assert result.exit_code == 0, result.output
    (run,) = tiny.runs() - {old}
    state = new_state(build(RunConfig, read_yaml(run / "options.yaml"), "options"), torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in state.D.state_dict().items()}
    initialise(state, find_weights(str(old)))
    path = checkpoint.found(old)[0]
    saved = checkpoint.load(path)
    for network in ("G", "G_ema", "D"):
        tensors = getattr(state, network).state_dict()
        fresh = [name for name in tensors if network == "D" and name.startswith(("mapping.", "epilogue.out."))]
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[name] if name in fresh else saved[network][name]), name
        taken, total = len(tensors) - len(fresh), len(tensors)
        line = f"{network}: {taken} of {total} tensors from {path}"
        if fresh:
            line += f"; fresh: {', '.join(fresh[:3])}, and {len(fresh) - 3} more"
            line += "; not taken: epilogue.out.weight, epilogue.out.bias"
        assert line in result.output.splitlines()


def test_a_thicker_network_takes_everything(tiny):
    old = tiny.run()
    thickness = yaml.safe_load((old / "options.yaml").read_text())["G"]["thickness"]
    result = tiny.call(*tiny.new("--init-from", old, f"-oG.thickness={2 * thickness}", "--kimg", 0.008))
    assert result.exit_code == 0, result.output
    for network in ("G", "G_ema"):
        (report,) = re.findall(rf"^{network}: (\d+) of (\d+) tensors from .*(; .*)$", result.output, re.MULTILINE)
        assert report[0] == report[1]
        assert report[2] == f"; thickness {thickness} copied to {2 * thickness}"
    result = tiny.call(*tiny.new("--init-from", old, f"-oG.thickness={2 * thickness + 1}", "--kimg", 0.008))
    assert "fresh: synthesis.lines.input" in result.output


def test_a_larger_network_takes_what_fits_and_says_what_does_not(tiny):
    old = tiny.run()
    path = checkpoint.found(old)[0]
    large = tiny.images("large", size=(16, 16))
    result = tiny.call(*tiny.new("--init-from", path, "--kimg", 0.008, data=large))
    assert result.exit_code == 0, result.output
    report = re.search(r"^G: (\d+) of (\d+) tensors .*; fresh: (.*)$", result.output, re.MULTILINE)
    assert 0 < int(report[1]) < int(report[2])
    assert "synthesis.lines.blocks.2" in report[3]
    assert re.search(r", and \d+ more", report[3])
    assert "synthesis.lines.blocks.1" not in report[3]
    assert re.search(r"^D: .*; fresh: .*blocks\.16", result.output, re.MULTILINE)
    # Of the same depth, G takes everything, as the published 1024² networks do from 512²: the lines are twice as long.
    arguments = ("--resume", old / "network-snapshot-000000.safetensors", "--kimg", 0.008, "-o", "G.depth=2")
    result = tiny.call(*tiny.new(*arguments, data=large))
    assert result.exit_code == 0, result.output
    report = re.search(r"^G: (\d+) of (\d+) tensors", result.output, re.MULTILINE)
    assert report[1] == report[2]


@pytest.mark.parametrize(("size", "kind"), [((20, 28), "residual"), ((24, 16), "projected")])
def test_rectangles_train_and_are_rendered_in_their_shape(tiny, size, kind):
    kinds = ("-o", f"D.kind={kind}", "-o", "G.channel_max=4", "-o", "D.channel_max=4")
    folder = tiny.run("--kimg", 0.016, *kinds, data=tiny.images("oblong", size=size, count=8))
    width, height = size
    for name in ("reals.png", "fakes000000.png"):
        across, down = Image.open(folder / name).size
        assert (across % width, down % height) == (0, 0)
    (snapshot,) = folder.glob("network-snapshot-*.safetensors")
    arguments = ["--network", snapshot, "--seeds", "0", "--outdir", folder / "out", "--scale", "2"]
    rendered = CliRunner().invoke(generate.main, [str(a) for a in arguments])
    assert rendered.exit_code == 0, rendered.output
    assert Image.open(folder / "out" / "seed0000.png").size == (2 * width, 2 * height)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_batch_gpu_auto_takes_the_most_that_fit_and_stays_in_the_options(tiny, monkeypatch):
    given = tiny.run("--batch", 16, "--batch-gpu", 16, "--kimg", 0.032)
    auto = tiny.run("--batch", 16, "--batch-gpu", "auto", "--kimg", 0.032)
    assert files(auto)["options.yaml"] == files(given)["options.yaml"]
    name = "network-snapshot-000000.safetensors"
    assert files(auto)[name] == files(given)[name]

    monkeypatch.setattr(memory, "available_bytes", lambda: -(2**50))
    folder = tiny.run("--batch", 16, "--batch-gpu", "auto", "--kimg", 0.016)
    assert yaml.safe_load((folder / "options.yaml").read_text())["train"]["batch_gpu"] == 4
    monkeypatch.undo()
    assert tiny.call("--resume", folder, "--kimg", 0.032).exit_code == 0
    assert yaml.safe_load((folder / "options.yaml").read_text())["train"]["batch_gpu"] == 4
    assert re.search(r"memory \d+\.\d\d GiB per process", (folder / "log.txt").read_text())


def test_the_machine_has_less_memory_left_than_it_has():
    assert 0 < memory.available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# --- continuing with other settings ----------------------------------------------------------------------------------


def test_a_run_is_continued_with_another_length_and_the_options_say_so(tiny):
    folder = tiny.run("--kimg", 0.016)
    result = tiny.call("--resume", folder, "--kimg", 0.032, "--snap", 7, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert checkpoint.load(checkpoint.found(folder)[0])["step"] == 4
    options = yaml.safe_load((folder / "options.yaml").read_text())
    assert (options["train"]["kimg"], options["train"]["snap"], options["data"]["workers"]) == (0.032, 7, 1)


def test_what_a_resumed_run_depends_on_cannot_change(tiny):
    folder = tiny.run("--kimg", 0.016)
    before = files(folder)
    changes = [
        "--cbase=128",
        "-oG.w_dim=16",
        "--batch=16",
        "--seed=1",
        "--gamma=3",
        "--glr=0.1",
        "--mirror",
        "--aug=ada",
    ]
    for change in [*changes, "-otrain.precision=float64"]:
        result = tiny.call("--resume", folder, change)
        assert result.exit_code == 2, change
        assert re.search(r"Error: .* with its own settings, but \S+=\S+ \(was \S+\)", result.output), change
    assert files(folder) == before


def test_a_run_is_continued_on_a_moved_archive_but_not_on_another(tiny):
    folder = tiny.run("--kimg", 0.016)
    moved = tiny.archive.rename(tiny.folder / "moved")
    assert "present location with --data" in tiny.call("--resume", folder).output
    assert tiny.call("--resume", folder, "--data", moved).exit_code == 0
    result = tiny.call("--resume", folder, "--data", tiny.images("large", size=(16, 16)))
    assert result.exit_code == 2
    assert "not the archive" in result.output
    result = tiny.call("--resume", folder, "--data", tiny.images("fewer", count=20))
    assert result.exit_code == 2
    assert "20 images" in result.output
    (moved / "007.png").write_bytes((moved / "008.png").read_bytes())
    assert tiny.call("--resume", folder, "--data", moved).exit_code == 2
    options = (folder / "options.yaml").read_text()
    (folder / "options.yaml").write_text(re.sub(r"  contents: .*\n", "", options))  # as older runs have them
    assert tiny.call("--resume", folder, "--data", moved).exit_code == 0


def test_a_run_is_not_continued_with_its_classes_named_otherwise(tiny):
    folder = tiny.run("--cond", "--kimg", 0.016, data=tiny.labelled)
    labels = (tiny.labelled / "dataset.json").read_text()
    (tiny.labelled / "dataset.json").write_text(labels.replace("ant", "dog"))
    result = tiny.call("--resume", folder, "--kimg", 0.032)
    assert result.exit_code == 2
    assert "dog instead of ant" in result.output
    (tiny.labelled / "dataset.json").write_text(labels)
    for path in folder.glob("network-snapshot-*"):  # a damaged one does not matter: the state is intact
        path.write_bytes(path.read_bytes()[:100])
    assert tiny.call("--resume", folder, "--kimg", 0.032).exit_code == 0


def test_a_run_keeps_the_names_of_its_classes_if_its_archive_loses_them(tiny):
    folder = tiny.run("--cond", "--kimg", 0.016, data=tiny.labelled)
    labels = json.loads((tiny.labelled / "dataset.json").read_text())
    (tiny.labelled / "dataset.json").write_text(json.dumps({"labels": labels["labels"]}))
    assert tiny.call("--resume", folder, "--kimg", 0.032).exit_code == 0
    names = [load_generator(path).class_names for path in sorted(folder.glob("*.safetensors"))]
    assert names == [["ant", "bee", "cat"]] * len(names)


# --- torchrun --------------------------------------------------------------------------------------------------------


def test_under_torchrun_gpus_must_agree_and_rank_0_alone_prints_a_dry_run(tiny, monkeypatch):
    printed = []
    for rank in range(2):
        for name, value in (("LOCAL_RANK", rank), ("RANK", rank), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        printed.append(tiny.call(*tiny.new("--gpus", 2, "-n")).output)
    assert "img_shape" in printed[0]
    assert printed[1] == ""
    monkeypatch.setenv("RANK", "0")
    result = tiny.call(*tiny.new("--gpus", 3))
    assert result.exit_code == 2
    assert "--gpus=3, but torchrun started 2 processes" in result.output


# --- mistakes --------------------------------------------------------------------------------------------------------


def yaml_file(text: str):
    def prepare(tiny):
        (tiny.folder / "mine.yaml").write_text(text)
        return [*tiny.new(), "--cfg", tiny.folder / "mine.yaml"]

    return prepare


def data(make):
    def prepare(tiny):
        path = make(tiny)
        return tiny.new(data=path)

    return prepare


def extra(*arguments):
    return lambda tiny: tiny.new(*arguments)


def written(tiny, name: str, content: bytes | str) -> Path:
    path = tiny.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def empty_folder(tiny) -> Path:
    (tiny.folder / "empty").mkdir()
    return tiny.folder / "empty"


def mixed_sizes(tiny) -> Path:
    folder = tiny.images("mixed")
    Image.new("RGB", (16, 16)).save(folder / "005.png")
    return folder


def labels_for_half(tiny) -> Path:
    folder = tiny.images("half")
    (folder / "dataset.json").write_text(json.dumps({"labels": [["000.png", 1]]}))
    return folder


def run_without_states(tiny) -> list:
    folder = tiny.run("--kimg", 0.008)
    for path in checkpoint.found(folder):
        path.unlink()
    return ["--resume", folder]


def run_with_broken_options(text: str):
    def prepare(tiny):
        folder = tiny.run("--kimg", 0.008)
        (folder / "options.yaml").write_text(text)
        return ["--resume", folder]

    return prepare


def foreign_weights(tiny) -> list:
    path = tiny.folder / "foreign.pt"
    torch.save({"format": checkpoint.FORMAT, "G": {"a": torch.ones(3)}, "D": {}}, path)
    return tiny.new("--init-from", path)


TAUGHT = ("-o", "scales.teacher=5", "--resolution", 8, "--max-scale", 2, "-o", "G.coords=centers")


def another_teacher(tiny) -> list:
    G = Generator(GeneratorConfig(img_shape=(8, 8), **GENERATORS["creps"] | {"thickness": 3}))
    save_generator(G, tiny.folder / "teacher.safetensors")
    return tiny.new(*TAUGHT, "--init-from", tiny.folder / "teacher.safetensors")


MISTAKES = {
    # options
    "nothing": (lambda tiny: [], "needs --outdir, --cfg, --data"),
    "no data": (lambda tiny: tiny.new()[:4], "needs --data"),
    "an unknown option": (extra("--gama", 1), "--gama.*--gamma"),
    "an unknown recipe": (extra("--cfg", "ffhq521"), "ffhq521.*did you mean ffhq512"),
    "a word for a number": (extra("--batch", "many"), "--batch"),
    "a negative gamma": (extra("--gamma", -1), "loss.r1_gamma=-1"),
    "R2 without weight": (extra("-oloss.r2=true", "--gamma=0"), "loss.r2=true has the weight loss.r1_gamma, .* 0"),
    "p above 1": (extra("--p", 1.5), "augment.p=1.5"),
    "p without its augmentation": (extra("--p", 0.5), "--p belongs to --aug=ada or fixed, and this run has none"),
    "target of another": (extra("--aug=fixed", "--p=0.5", "--target=0.5"), "--target belongs to --aug=ada, .* fixed"),
    "an unknown metric": (extra("--metrics", "fidd50k_full"), "did you mean fid50k_full"),
    "batch not dividing": (extra("--batch", 9, "--gpus", 2), "train.batch=9 does not divide over 2 processes; try 8"),
    "batch-gpu in words": (extra("--batch-gpu", "few"), "train.batch_gpu: 'few' is not a number.*auto"),
    "batch-gpu not dividing": (extra("--batch-gpu", 3), "train.batch_gpu=3 does not divide the 8 images.*use 4 or 8"),
    "minibatch groups": (extra("--batch", 6), "minibatch-std groups of 4.*D.mbstd_group=3"),
    "channels": (extra("--cbase", 4), "channel_base=4"),
    # -o
    "-o without a value": (extra("-o", "train.batch"), "train.batch.*key.sub=value"),
    "-o of an unknown key": (extra("-o", "train.bach=3"), "no setting train.bach; did you mean batch"),
    "-o of a wrong choice": (extra("-o", "train.precision=16"), "train.precision=16.*'bfloat16'"),
    "-o of a section": (extra("-o", "G=5"), "G"),
    "-o of an empty section": (extra("-o", "train="), "train"),
    "-o of a path that is a number": (extra("-o", "data.path=5"), "data.path"),
    "-o of channels": (extra("-o", "G.img_channels=[1]"), "channels"),
    "-o of a batch in words": (extra("-o", "train.batch=abc"), r"tiny\.yaml: train\.batch='abc'[^;]*$"),
    # recipes
    "broken YAML": (yaml_file("G: ["), "mine.yaml is not valid YAML"),
    "a recipe without a batch": (yaml_file("train: {kimg: 1}"), r"mine\.yaml: train\.batch is missing$"),
    "a recipe of another size": (yaml_file("G: {img_resolution: 16}\ntrain: {batch: 8}"), "of 16x16, .*holds 8x8"),
    # data
    "no archive": (data(lambda tiny: tiny.folder / "none.zip"), "none.zip does not exist"),
    "an empty folder": (data(empty_folder), "holds no images"),
    "a broken image": (data(lambda tiny: written(tiny, "pictures/0.png", b"x").parent), "0.png cannot be read"),
    "a side that cannot be halved": (data(lambda tiny: tiny.images("odd", size=(17, 8))), "17x8 .*multiples of 2"),
    "a shape and a resolution": (extra("-o", "G.img_shape=5", "-o", "G.img_resolution=8"), "G.img_shape=5"),
    "no labels": (extra("--cond"), "holds no labels"),
    "labels for half": (lambda tiny: tiny.new("--cond", data=labels_for_half(tiny)), "dataset.json"),
    "images of two sizes": (data(mixed_sizes), r"005\.png is 16x16, but the first image is 8x8 .1 of 24 images"),
    "fixed augmentation without strength": (extra("--aug", "fixed"), "augment.p, which is 0"),
    # directories
    "runs among the images": (
        lambda tiny: tiny.new("--outdir", tiny.archive / "runs"),
        "is in .*images are trained on",
    ),
    "resume elsewhere": (
        lambda tiny: ["--resume", tiny.run("--kimg", 0.008), "--outdir", tiny.folder / "other"],
        "where it is, not in .*other",
    ),
    "resume under a new name": (extra("--resume", "x", "--desc", "y"), "--desc names a new run"),
    "outdir is below a file": (
        lambda tiny: tiny.new("--outdir", written(tiny, "taken", "mine") / "runs"),
        "cannot make a run directory in .*taken",
    ),
    # continuing
    "resume a file alone": (lambda tiny: ["--resume", tiny.recipe], "a new run needs --outdir.*--resume=RUN_DIR"),
    "resume nothing": (lambda tiny: ["--resume", tiny.folder / "none"], "none does not exist; give a run directory"),
    "resume an empty folder": (lambda tiny: ["--resume", empty_folder(tiny)], "not a run directory.*options.yaml"),
    "resume without a state": (run_without_states, "holds no training-state"),
    "resume with broken options": (run_with_broken_options("G: ["), "options.yaml is not valid YAML"),
    "resume and init-from": (lambda tiny: ["--resume", "x", "--init-from", "y"], "--resume.*--init-from"),
    # beginning from
    "init-from nothing": (extra("--init-from", "none.safetensors"), "none.safetensors does not exist"),
    "init-from garbage": (
        lambda tiny: tiny.new("--init-from", written(tiny, "x.safetensors", b"x" * 99)),
        "x.safetensors is not an intact",
    ),
    "init-from a broken state": (
        lambda tiny: tiny.new("--init-from", written(tiny, "x.pt", b"x" * 99)),
        "x.pt is not an intact",
    ),
    "init-from what does not fit": (foreign_weights, "nothing in .*foreign.pt fits"),
    "a teacher from nowhere": (extra(*TAUGHT), "scales.teacher compares with .* give it with --init-from"),
    "a teacher of another shape": (another_teacher, "scales.teacher needs all of G from .*teacher.safetensors.*lacks"),
}


@pytest.mark.parametrize(("prepare", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_and_harms_nothing(tiny, prepare, words):
    arguments = prepare(tiny)
    before = files(tiny.folder)
    result = tiny.call(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    (sentence,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert re.search(words, sentence), sentence
    assert files(tiny.folder) == before
    assert not list((tiny.folder / "runs").glob("*")) or "--resume" in map(str, arguments)


def test_bfloat16_trains_float32_weights_near_those_of_float32(tiny):
    options = ("--aug", "fixed", "--p", 0.5, "--kimg", 0.032)
    half, full = (tiny.run(*options, "-o", f"train.precision={p}") for p in ("bfloat16", "float32"))
    a, b = (load_generator(next(folder.glob("*.safetensors"))).state_dict() for folder in (half, full))
    for name in a:
        assert a[name].dtype == torch.float32
        # Four steps of Adam at 0.002 move a weight by 0.008 at most, whichever way rounding turns a gradient.
        assert (a[name] - b[name]).abs().max() <= 0.02, name


def test_measurements_are_neither_lost_nor_doubled_and_half_a_line_is_dropped(tiny):
    folder = tiny.run("--metrics", "scale_psnr_8", "--kimg", 0.032)  # snapshots at steps 2 and 4
    path = folder / "metric-scale_psnr_8.jsonl"
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    by_hand = '{"metric": "scale_psnr_8", "results": {"scale_psnr_8": 1.0}}'
    path.write_text("\n".join([*lines, by_hand, '{"step": 6, "metric": "scale_psnr_8"}', '{"metr']))
    assert tiny.call("--resume", folder, "--kimg", 0.048).exit_code == 0
    after = path.read_text().splitlines()
    assert after[:3] == [*lines, by_hand]
    assert [json.loads(line)["step"] for line in after[3:]] == [6]


def test_a_section_left_empty_in_a_recipe_is_the_defaults(tiny):
    recipe = written(tiny, "mine.yaml", "G:\ntrain: {batch: 8}")
    result = tiny.call("--outdir", tiny.folder / "runs", "--cfg", recipe, "--data", tiny.archive, "--dry-run")
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.output)["G"]["channel_base"] == 65536


@pytest.mark.slow
def test_as_a_process_a_mistake_is_one_sentence_on_stderr(tiny):
    process = tiny.process(*tiny.new(data=tiny.folder / "none"))
    out, err = process.communicate(timeout=180)
    assert process.returncode == 2
    assert out == ""
    assert err.strip().splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in err
    assert not os.path.exists(tiny.folder / "runs")
