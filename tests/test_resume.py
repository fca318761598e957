"""Laws of continuation: a run that was killed, stopped or damaged and then continued is the run that never was."""

import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import GENERATORS, RECIPE

from dnnlib.config import build, merge, read_yaml
from dnnlib.console import UserError
from torch_utils import checkpoint
from torch_utils.distributed import Processes
from training.config import RunConfig
from training.data import ImageArchive
from training.loop import Loop
from training.networks import Generator
from training.runs import open_images, read_config
from training.snapshot import load_generator
from training.state import new_state

VOLATILE = ("Timing/", "Resources/", "timestamp")
PROJECTED = ("D.kind=projected", "D.feature_size=64", "loss.kind=hinge", "augment.mode=diffaug", "D.mbstd_group=2")
VARIANTS = {
    "labels, mirror, micro-batches": ("--cond", "--mirror", "--batch-gpu", 4, "--aug", "fixed", "--p", 0.5),
    "relativistic": ("-o", "loss.kind=relativistic", "-o", "loss.r2=true"),
    "ada without lazy phases": ("--aug", "ada", "-o", "augment.kimg=0.1", "--gamma", 0, "-o", "loss.pl_weight=0"),
    "projected": ("--cond", *(x for o in PROJECTED for x in ("-o", o))),
    "stylegan2": ("--cond", "-o", "loss.style_mixing=0.9"),
}


def equal(a, b, where="state"):
    """Asserts that two nests of tensors and values are the same to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def final_state(folder: Path) -> dict:
    state = checkpoint.load(checkpoint.found(folder)[0])
    # Clocks, and the lengths of logs that print clocks.
    return {key: value for key, value in state.items() if key not in ("seconds", "written")}


def stats(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(VOLATILE)} for line in lines]


def log(folder: Path) -> list[str]:
    """log.txt without the clocks."""
    lines = (folder / "log.txt").read_text().splitlines()
    return [re.sub(r"(time .* )?memory +\S+", "", line) for line in lines]


def same_run(continued: Path, unbroken: Path):
    equal(final_state(continued), final_state(unbroken))
    assert stats(continued) == stats(unbroken)
    assert log(continued) == log(unbroken)
    # A kill while a file is written leaves a part of it under a hidden name.
    pictures = sorted(p.name for p in unbroken.glob("[!.]*.png"))
    assert sorted(p.name for p in continued.glob("[!.]*.png")) == pictures
    for name in pictures:
        assert (continued / name).read_bytes() == (unbroken / name).read_bytes(), name
    snapshots = sorted(p.name for p in unbroken.glob("[!.]*.safetensors"))
    assert sorted(p.name for p in continued.glob("[!.]*.safetensors")) == snapshots
    for name in snapshots:
        assert (continued / name).read_bytes() == (unbroken / name).read_bytes(), name


def pull_the_plug(images: ImageArchive, fatal: int, number: int | Exception) -> None:
    """Let reading the `fatal`-th image raise a signal or an exception."""
    pixels, counter = images._pixels, itertools.count(1)

    def read(*arguments):
        if next(counter) == fatal:
            if isinstance(number, Exception):
                raise number
            signal.raise_signal(number)
        return pixels(*arguments)

    images._pixels = read


def interrupted(folder: Path, config: RunConfig, steps: int, number=signal.SIGTERM) -> int:
    """Train in `folder`, resuming what is there, until interrupted in the `steps`-th step from now."""
    images = open_images(config.model_dump())
    procs = Processes(0, 1, torch.device("cpu"))
    state = new_state(config, procs.device)
    states = checkpoint.found(folder)
    if states:
        state.load_state_dict(checkpoint.load(states[0]), procs)
    # A new run first reads the images of its grids of reals.
    grid = 0 if state.step else 8 * 12 * (2 if config.scales.max > 1 else 1)
    pull_the_plug(images, grid + (steps - 1) * config.train.batch + 1, number)
    return Loop(config, folder, state, images, procs, lambda G, stop: []).run()


def fresh(folder: Path, unbroken: Path) -> tuple[Path, RunConfig]:
    """An empty run directory with the options of another run."""
    folder.mkdir()
    shutil.copy(unbroken / "options.yaml", folder)
    return folder, build(RunConfig, read_yaml(folder / "options.yaml"), "options.yaml")


# --- a teacher ---


def test_the_teacher_is_the_network_that_a_run_started_from_however_often_it_is_resumed(tiny):
    """The file that it came from is gone by then."""
    native = ("--resolution", 8, "--max-scale", 3, "-o", "G.coords=centers")
    large = tiny.images("large", size=(30, 27))
    first = tiny.run(*native, "--kimg", 0.008, data=large)
    file = shutil.copy(sorted(first.glob("*.safetensors"))[-1], tiny.folder / "first.safetensors")
    taught = (*native, "--init-from", file, "-o", "scales.teacher=5", "--kimg")
    unbroken = tiny.run(*taught, 0.032, data=large)
    broken = tiny.run(*taught, 0.016, data=large)
    file.unlink()
    assert tiny.call("--resume", broken, "--kimg", 0.032).exit_code == 0
    equal(final_state(broken), final_state(unbroken))
    equal(final_state(broken)["teacher"], final_state(first)["G_ema"])
    moved = final_state(broken)["G_ema"]
    assert any(not torch.equal(value, final_state(broken)["teacher"][name]) for name, value in moved.items())


def test_the_teacher_of_a_thicker_generator_is_the_network_that_it_started_from(tiny):
    native = ("--resolution", 8, "--max-scale", 3, "-o", "G.coords=centers", "--kimg", 0.008)
    large = tiny.images("large", size=(30, 27))
    file = sorted(tiny.run(*native, data=large).glob("*.safetensors"))[-1]
    thicker = ("-o", f"G.thickness={2 * RECIPE['G']['thickness']}")
    folder = tiny.run(*native, *thicker, "--init-from", file, "-o", "scales.teacher=5", data=large)
    before = load_generator(file)
    teacher = Generator(read_config(folder, {}).G)
    teacher.load_state_dict(final_state(folder)["teacher"])
    ws = torch.randn(2, before.config.num_ws, before.config.w_dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(teacher.synthesis(ws), before.synthesis(ws), rtol=1e-4, atol=1e-4)


# --- stopped at every step -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_interrupted_and_continued_is_the_unbroken_run_whatever_its_settings(tiny, variant):
    if variant in GENERATORS:
        tiny.choose(variant)
    unbroken = tiny.run(*VARIANTS[variant], data=tiny.labelled)
    for steps in (1, 4, 5):
        folder, config = fresh(tiny.folder / f"stopped-{steps}", unbroken)
        assert interrupted(folder, config, steps) == 128 + signal.SIGTERM
        assert checkpoint.load(checkpoint.found(folder)[0])["step"] == steps
        result = tiny.call("--resume", folder)
        assert result.exit_code == 0, result.output
        same_run(folder, unbroken)


@pytest.mark.slow
def test_a_run_interrupted_at_every_step_is_the_unbroken_run(tiny):
    rates = ("-o", "optim.lr_decay=0.7", "-o", "optim.mapping_lr=0.1")
    unbroken = tiny.run("--aug", "ada", "-o", "augment.kimg=0.1", *rates)
    folder, config = fresh(tiny.folder / "stopped", unbroken)
    for step in range(1, 7):
        number = signal.SIGTERM if step % 2 else signal.SIGINT
        assert interrupted(folder, config, 1, number) == 128 + number
        assert checkpoint.load(checkpoint.found(folder)[0])["step"] == step
    assert tiny.call("--resume", folder).exit_code == 0
    same_run(folder, unbroken)


def test_a_run_on_windows_of_native_pictures_interrupted_and_continued_is_the_unbroken_run(tiny):
    options = ("--resolution", 8, "--max-scale", 3, "--mirror", "-oscales.consistency=1")
    unbroken = tiny.run(*options, data=tiny.native_images())
    folder, config = fresh(tiny.folder / "stopped", unbroken)
    for steps in (1, 4):
        assert interrupted(folder, config, steps) == 128 + signal.SIGTERM
    assert checkpoint.load(checkpoint.found(folder)[0])["step"] == 5
    assert tiny.call("--resume", folder).exit_code == 0
    same_run(folder, unbroken)
    assert {"reals-windows.png", "fakes-windows000000.png"} <= {p.name for p in folder.iterdir()}


def test_an_interrupt_says_how_to_continue(tiny, capsys):
    unbroken = tiny.run()
    folder, config = fresh(tiny.folder / "stopped", unbroken)
    capsys.readouterr()
    assert interrupted(folder, config, 2, signal.SIGINT) == 130
    assert f"interrupted at 0.016 kimg; to continue: --resume={folder}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # given back


@pytest.mark.parametrize("error", [UserError("cut short"), KeyError("odd")])
def test_an_error_between_steps_saves_the_state_first(tiny, error):
    unbroken = tiny.run()
    folder, config = fresh(tiny.folder / "broken", unbroken)
    with pytest.raises(UserError, match=r"(cut short|KeyError).*--resume=.*broken"):
        interrupted(folder, config, 4, error)
    assert checkpoint.found(folder)[0].name == "training-state-000000003.pt"
    assert ("in __getitem__" in (folder / "log.txt").read_text()) == isinstance(error, KeyError)
    assert tiny.call("--resume", folder).exit_code == 0
    same_run(folder, unbroken)


def test_an_interrupt_in_the_last_step_is_ignored(tiny):
    unbroken = tiny.run()
    folder, config = fresh(tiny.folder / "stopped", unbroken)
    assert interrupted(folder, config, 7) == 0
    same_run(folder, unbroken)


def test_lines_written_after_the_state_are_not_doubled(tiny):
    """Killed twice: the second process was continued, interrupted before its first report, and then killed later."""
    unbroken = tiny.run("--snap", 2, "--kimg", 0.08)  # reports at 2, 4, 6, 8, 10; states at 4, 8, 10
    folder, config = fresh(tiny.folder / "killed", unbroken)
    interrupted(folder, config, 7)  # states at 4 and 7
    checkpoint.found(folder)[0].unlink()  # as if the machine had lost power: newest state 4, logs up to 7
    assert len(stats(folder)) == 3
    interrupted(folder, config, 1)  # a state at 5 with nothing reported since 4
    assert len(stats(folder)) == 2
    state = checkpoint.found(folder)[0]
    kept = state.read_bytes()
    interrupted(folder, config, 2)  # reports at 6
    checkpoint.found(folder)[0].unlink()
    state.write_bytes(kept)  # lost again: newest state 5
    assert tiny.call("--resume", folder).exit_code == 0
    same_run(folder, unbroken)


def test_a_state_counts_the_bytes_written_before_it(tiny):
    unbroken = tiny.run()
    folder, config = fresh(tiny.folder / "stopped", unbroken)
    interrupted(folder, config, 3)
    interrupted(folder, config, 1)
    for name, size in checkpoint.load(checkpoint.found(folder)[0])["written"].items():
        lines = (folder / name).read_bytes()[:size].decode().splitlines()
        assert "interrupted" not in lines[-1], name  # that line is for the console; a resumed run lacks it
        assert size <= (folder / name).stat().st_size, name


# --- killed ----------------------------------------------------------------------------------------------------------

# Importing torch takes seconds, so one process imports it and forks the runs that are killed.
KILLER = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch, torch._dynamo, train, training.loop, training.trainer
    torch.optim.Adam([torch.zeros(1)])
    start, resume, folder, seed = sys.argv[1].split("\\n"), sys.argv[2].split("\\n"), Path(sys.argv[3]), sys.argv[4]
    random.seed(seed)
    kills = 0
    for attempt in range(40):
        again = any(folder.glob("training-state-*.pt"))
        child = os.fork()
        if child == 0:
            train.main(resume if again else start)
        until = time.monotonic() + random.uniform(0.2, 2.0) * (1 + attempt / 8)  # a busy machine gets there, too
        ended = (0, 0)
        while ended[0] == 0 and (time.monotonic() < until or not any(folder.glob("training-state-*.pt"))):
            time.sleep(0.002)
            ended = os.waitpid(child, os.WNOHANG)
        if ended[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
        else:
            print("kills", kills)
            sys.exit(os.waitstatus_to_exitcode(ended[1]))
"""


@pytest.mark.slow
def test_a_run_killed_at_random_moments_and_continued_is_the_unbroken_run(tiny):
    arguments = ("--kimg", 0.24, "--aug", "ada", "--p", 0.2, "--cond", "--mirror", "-o", "augment.kimg=0.5")
    unbroken = tiny.run(*arguments, data=tiny.labelled)
    start = tiny.new(*arguments, data=tiny.labelled, outdir="killed")
    folder = tiny.folder / "killed" / unbroken.name
    seed = str(time.time_ns())
    command = [sys.executable, "-c", textwrap.dedent(KILLER), "\n".join(start), f"--resume={folder}", folder, seed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, (seed, done.stderr)
    assert int(re.search(r"kills (\d+)", done.stdout)[1]) > 0, seed
    same_run(folder, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_whole_process_group_saves_a_state_first(tiny, number):
    """As from a terminal, systemd, Slurm or torchrun: the processes that read images receive it as well."""
    process = tiny.process(*tiny.new("--kimg", 20, "--tick", 0.08, "--snap", 1000, "--workers", 1))
    for line in process.stdout:
        if line.startswith("kimg"):
            break
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=180)
    assert "Traceback" not in err
    assert process.returncode == 128 + number, err
    (folder,) = tiny.runs()
    assert "interrupted at" in out
    assert len(checkpoint.found(folder)) == 1


# --- damaged ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tiny):
    """(unbroken run, a run with the states of the steps 4 and 5)."""
    unbroken = tiny.run()
    folder, config = fresh(tiny.folder / "stopped", unbroken)
    interrupted(folder, config, 5)
    assert [int(p.stem[-9:]) for p in checkpoint.found(folder)] == [5, 4]
    return unbroken, folder


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "a stray pickle": lambda data: b"0" + data[:20],
    "its end is missing": lambda data: data[:-1],
    "a bit is flipped": lambda data: flip_a_bit_of_the_largest_entry(data),
}


def flip_a_bit_of_the_largest_entry(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        tensor = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
    place = data.index(tensor) + len(tensor) // 2
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_newest_state_is_named_and_the_one_before_is_used(tiny, stopped, damage):
    unbroken, folder = stopped
    newest, before = checkpoint.found(folder)
    newest.write_bytes(DAMAGE[damage](newest.read_bytes()))
    result = tiny.call("--resume", folder)
    assert result.exit_code == 0, result.output
    assert re.search(rf"passed over: .*{newest.name} is not an intact", result.output)
    assert f"from {before.name}" in result.output
    same_run(folder, unbroken)


def test_an_older_state_without_fused_adam_and_with_integer_counts_is_resumed(tiny, stopped):
    unbroken, folder = stopped
    path = checkpoint.found(folder)[0]
    state = checkpoint.load(path)
    assert state["bad_steps"].keys() == {"G loss", "G path length", "D loss", "D R1"}
    state["bad_steps"] = {name: int(count) for name, count in state["bad_steps"].items()}
    for name in ("G_opt", "D_opt"):
        state[name]["param_groups"] = [group | {"fused": None} for group in state[name]["param_groups"]]
    torch.save(state, path)
    assert tiny.call("--resume", folder).exit_code == 0
    same_run(folder, unbroken)


def test_broken_bytes_are_always_a_sentence(tmp_path):
    path = tmp_path / "training-state-1.pt"
    dice = random.Random(0)
    for i in range(100):
        path.write_bytes((b"\x80\x02" if i % 2 else b"") + dice.randbytes(dice.randrange(1, 60)))
        with pytest.raises(ValueError, match="is not an intact training state"):
            checkpoint.load(path)


def test_files_of_torch_that_are_not_states_are_a_sentence(tiny, stopped):
    _, folder = stopped
    for path, content in zip(checkpoint.found(folder), ([1, 2], {"G": 3}), strict=True):
        torch.save(content, path)
    result = tiny.call("--resume", folder)
    assert result.exit_code == 2, result.exception
    assert "intact" in result.output


def test_when_all_states_are_broken_the_run_ends_with_a_sentence_and_nothing_is_harmed(tiny, stopped):
    _, folder = stopped
    for path in checkpoint.found(folder):
        path.write_bytes(path.read_bytes()[:1000])
    before = {p: p.read_bytes() for p in folder.iterdir()}
    result = tiny.call("--resume", folder)
    assert result.exit_code == 2
    assert re.search(r"Error: no training state in .* is intact; ", result.output)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_code_in_a_state_is_refused_and_not_run(tiny, stopped):
    _, folder = stopped
    trap = folder / "trap"

    class Trap:
        def __reduce__(self):
            return Path.touch, (trap,)

    for path in checkpoint.found(folder):
        torch.save({"step": Trap()}, path)
    assert tiny.call("--resume", folder).exit_code == 2
    assert not trap.exists()


def test_a_file_that_asks_for_memory_is_refused(tmp_path):
    class Greedy:
        def __reduce__(self):
            return bytearray, (2**50,)

    torch.save({"step": Greedy()}, tmp_path / "state.pt")
    with pytest.raises(UserError, match="bytearray"):
        checkpoint.load(tmp_path / "state.pt")


@pytest.mark.slow
def test_a_run_resumed_while_it_runs_is_continued_by_the_second_process_alone(tiny):
    arguments = ("--kimg", 0.4, "--tick", 0.016, "--snap", 2)
    unbroken = tiny.run(*arguments, outdir="one")
    process = tiny.process(*tiny.new(*arguments, outdir="two"))
    while not (states := list(tiny.folder.glob("two/*/training-state-*.pt"))):
        assert process.returncode is None, process.communicate(timeout=1)
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGSTOP)  # as a machine that is cut off
    folder = states[0].parent
    assert tiny.call("--resume", folder).exit_code == 0
    os.kill(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.fullmatch(
        rf"Error: process {os.getpid()} on \S+ has taken over .*; this one ends without saving.*\n", err
    )
    same_run(folder, unbroken)


# --- what lies in the directory --------------------------------------------------------------------------------------


def test_only_the_last_two_states_are_kept_and_they_hold_only_plain_values(tiny):
    folder = tiny.run()
    states = sorted(folder.glob("training-state-*.pt"))
    assert [p.name for p in states] == ["training-state-000000006.pt", "training-state-000000007.pt"]
    for step, path in zip((6, 7), states, strict=True):
        assert torch.load(path, weights_only=True)["step"] == step


def test_a_finished_run_continued_does_nothing(tiny):
    folder = tiny.run()
    before = {p: p.read_bytes() for p in folder.iterdir()}
    for shorter in ((), ("--kimg", 0.008)):
        result = tiny.call("--resume", folder, *shorter)
        assert (result.exit_code, "give a larger --kimg" in result.output) == (0, True)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_a_continued_run_keeps_the_measurements_that_others_left_in_its_directory(tiny):
    """calc_metrics.py appends to metric-<name>.jsonl beside the snapshot."""
    folder = tiny.run("--kimg", 0.032)
    line = '{"metric": "fid50k_full", "results": {"fid50k_full": 3.0}}\n'
    (folder / "metric-fid50k_full.jsonl").write_text(line)
    (folder / "notes.jsonl").write_text(line)
    assert tiny.call("--resume", folder, "--kimg", 0.064).exit_code == 0
    assert (folder / "metric-fid50k_full.jsonl").read_text() == line
    assert (folder / "notes.jsonl").read_text() == line


def test_a_longer_run_is_a_shorter_one_continued(tiny):
    """At multiples of the tick, where the shorter run reports as the longer one does."""
    longer = tiny.run("--kimg", 0.064, outdir="longer")
    shorter = tiny.run("--kimg", 0.032)
    result = tiny.call("--resume", shorter, "--kimg", 0.064)
    assert result.exit_code == 0, result.output
    equal(final_state(shorter), final_state(longer))
    assert stats(shorter) == stats(longer)
    settings = merge(read_yaml(longer / "options.yaml"), {})
    assert read_yaml(shorter / "options.yaml") == settings
