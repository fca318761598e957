"""Laws of several processes and of accumulation: how a batch is split changes only the order of additions."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, environments_of_ranks, run_ranks
from hypothesis import given
from hypothesis import strategies as st

from dnnlib.console import UserError
from torch_utils import checkpoint
from torch_utils.distributed import Processes, check_capability, processes
from torch_utils.randomness import make_rng
from torch_utils.stats import Stats

ALONE = Processes(0, 1, torch.device("cpu"))
EXACT = ("-o", "train.precision=float64", "--aug", "fixed", "--p", 0.5)
# Every process counts its updates, and sees how its own images differ, which are other groups than those of one.
PER_PROCESS = ("Spread", "bad_gradients")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2")


def flat(nest, prefix: str = "") -> dict[str, np.ndarray]:
    """Every tensor and number of a nest of dictionaries and lists, as float64."""
    if isinstance(nest, dict):
        return {k: v for key, value in nest.items() for k, v in flat(value, f"{prefix}.{key}").items()}
    if isinstance(nest, (list, tuple)):
        return flat(dict(enumerate(nest)), prefix)
    return {} if nest is None else {prefix: np.asarray(nest, dtype=np.float64)}


def result(folder: Path) -> dict[str, np.ndarray]:
    state = checkpoint.load(checkpoint.found(folder)[0])
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith(("Timing", "Resources", "timestamp"))} for line in lines]
    return flat({k: v for k, v in state.items() if k not in ("format", "seconds", "written")}) | flat(kept, "stats")


def close(a: Path, b: Path, without: tuple[str, ...] = ()):
    """Asserts that two runs agree to 1e-9, apart from the statistics named."""
    a, b = ({k: v for k, v in result(x).items() if not any(word in k for word in without)} for x in (a, b))
    assert a.keys() == b.keys()
    assert any("pl_mean" in name for name in a)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-9, atol=1e-9, err_msg=name)


# --- processes -------------------------------------------------------------------------------------------------------


def test_two_processes_equal_one_and_one_continues_what_two_began(tiny):
    one = tiny.run(*EXACT, outdir="one")
    printed = run_ranks(tiny.start, ROOT / "train.py", *tiny.new(*EXACT, "--batch-gpu", "auto", outdir="two"))
    (two,) = tiny.runs("two")
    close(one, two, without=PER_PROCESS)
    assert [out.count("kimg 0.016") for out in printed] == [1, 0]

    assert tiny.call("--resume", one, "--kimg", 0.08).exit_code == 0
    assert tiny.call("--resume", two, "--kimg", 0.08).exit_code == 0
    close(one, two, without=PER_PROCESS)


def test_accumulation_labels_mirror_and_windows_on_two_processes_equal_one(tiny):
    large = tiny.images("large", size=(30, 27), labels=True)
    native = (*EXACT, "--cond", "--mirror", "--batch", 16, "--resolution", 8, "--max-scale", 3, "-oG.coords=centers")
    start = tiny.run(*native, "--kimg", 0.016, data=large)
    arguments = (*native, "--kimg", 0.048, "--init-from", start, "-oscales.consistency=1", "-oscales.teacher=1")
    arguments += ("-oloss.pyramid=2", "-oloss.kind=relativistic", "-oloss.r2=true")
    one = tiny.run(*arguments, outdir="one", data=large)
    command = tiny.new(*arguments, "--batch-gpu", 4, outdir="two", data=large)
    run_ranks(tiny.start, ROOT / "train.py", *command)
    (two,) = tiny.runs("two")
    close(one, two, without=PER_PROCESS)


@pytest.mark.slow
def test_two_processes_stopped_and_continued_by_two_equal_one(tiny):
    """The counts of both survive: what ada adjusts by, and the statistics of the report under way.

    Each has one image of a minibatch-std group of two, and one of them none for the path length.
    """
    arguments = ("-otrain.precision=float64", "-oaugment.kimg=0.1", "--aug=ada", "--kimg=0.1", "--tick=0.02")
    arguments += ("--batch=2", "--mbstd-group=2")
    one = tiny.run(*arguments, outdir="one")
    process = tiny.process(*tiny.new(*arguments, "--gpus", 2, outdir="two"))
    for line in process.stdout:
        if line.startswith("kimg"):
            break
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 143, err
    assert "interrupted at" in out
    assert "Traceback" not in err
    (two,) = tiny.runs("two")
    process = tiny.process("--resume", two, "--gpus", 2)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    close(one, two, without=PER_PROCESS)


@pytest.mark.slow
def test_torchrun_stopped_by_a_signal_saves_a_state_although_its_readers_receive_it_as_well(tiny):
    """torchrun signals the process group of each of its processes."""
    arguments = tiny.new("--kimg", 20, "--tick", 0.08, "--snap", 1000, "--workers", 1)
    process = tiny.process(*arguments, launcher=TORCHRUN)
    for line in process.stdout:
        if line.startswith("kimg"):
            break
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=180)
    assert "interrupted at" in out
    assert len(list(tiny.folder.glob("runs/*/training-state-*.pt"))) == 1


@pytest.mark.slow
def test_a_mistake_found_by_one_of_two_processes_is_one_sentence(tiny):
    broken = tiny.folder / "broken.safetensors"
    broken.write_bytes(b"nothing")
    process = tiny.process(*tiny.new("--gpus", 2, "--init-from", broken))
    _, err = process.communicate(timeout=180)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    assert err.count("Error: ") == 1
    assert not tiny.runs()


@pytest.mark.slow
def test_all_start_again_when_one_is_killed_but_not_when_that_repeats_itself_at_once(tiny):
    arguments = (*EXACT, "--kimg", 0.4, "--tick", 0.016, "--snap", 2)
    one = tiny.run(*arguments, outdir="one")
    process = tiny.process(*tiny.new(*arguments, "--gpus", 2, outdir="two"))
    while not list(tiny.folder.glob("two/*/training-state-*.pt")):
        assert process.returncode is None, process.communicate(timeout=1)
        time.sleep(0.02)
    kill_a_child(process.pid)
    assert any("restart 1 of 3" in line for line in process.stdout)
    kill_a_child(process.pid)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert re.fullmatch(r"Error: process \d of 2 was killed by SIGKILL.*resume the run.*\n", err)
    (two,) = tiny.runs("two")
    assert tiny.call("--resume", two).exit_code == 0
    close(one, two, without=PER_PROCESS)


def kill_a_child(pid: int) -> None:
    """Kill one of the training processes of train.py, as soon as there is one."""
    while not (found := [child for child in children(pid) if b"spawn_main" in command_line(child)]):
        time.sleep(0.02)
    os.kill(found[0], signal.SIGKILL)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


# --- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "micro", "group", "kind"), [(6, 3, 3, "creps"), (4, 1, 1, "creps"), (6, 3, 3, "stylegan2")]
)
def test_accumulating_equals_the_whole_batch(tiny, batch, micro, group, kind):
    """Half of an odd part is no whole number, and the path length is taken on half of the batch all the same."""
    tiny.choose(kind)
    arguments = (*EXACT, "--batch", batch, "--kimg", 0.024, "--tick", 0.024, "--mbstd-group", group, "--cond")
    arguments += ("-o", "loss.style_mixing=0.5")
    whole, parts = (tiny.run(*arguments, *extra, data=tiny.labelled) for extra in ((), ("--batch-gpu", micro)))
    close(whole, parts, without=("Spread",))


# --- the value that stands for the processes --------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.booleans())
def test_alone_every_collective_is_the_identity(values, flag):
    x = torch.tensor(values, dtype=torch.float64)
    assert ALONE.sum_(x.clone()).tolist() == values
    assert ALONE.mean_(x.clone()).tolist() == values
    assert ALONE.any(flag) is flag
    assert ALONE.broadcast(values) is values
    assert ALONE.is_first


@pytest.mark.parametrize("value", [None, "", "node-3"])
def test_without_a_launcher_there_is_one_process(monkeypatch, value):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with processes() as procs:
        assert (procs.rank, procs.world) == (0, 1)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("rank", "words"), [("0", "MASTER_ADDR"), ("2", "RANK=2 is not one of 2 processes")])
def test_a_group_that_cannot_meet_is_a_sentence(monkeypatch, rank, words):
    for name, value in {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=words), processes():
        pass


@pytest.mark.slow
@pytest.mark.parametrize("end", ["pass", "sys.exit(2)"])
def test_a_group_is_gone_before_python_ends(end):
    """Else Python is killed by SIGABRT when a thread of the group lets go of its last tensor too late."""
    code = f"""
import atexit, glob, sys, weakref
import torch
from torch_utils.distributed import processes

def threads():  # on Linux
    return [path for path in glob.glob("/proc/self/task/*/comm") if "gloo" in open(path).read()]

atexit.register(lambda: print(group() is None, threads()))
with processes() as procs:
    group = weakref.ref(torch.distributed.group.WORLD)
    torch.optim.Adam([torch.zeros(1)])  # imports more of PyTorch
    procs.barrier()
    print(group() is None)
    {end}
"""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for environment in environments_of_ranks()
    ]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["False\nTrue []\n"] * 2


# --- GPUs ------------------------------------------------------------------------------------------------------------


def test_gpus_that_this_pytorch_cannot_use_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # by the driver's tools …
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # … where the driver is too old
    with pytest.raises(UserError, match=r"cannot use the 2 GPUs .* update it"), processes():
        pass


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 0), False),
        ((7, 5), True),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 0), True),
        ((10, 3), False),
        ((12, 1), True),
    ],
)
def test_binaries_run_on_gpus_of_their_major_version_and_ptx_on_later_ones(capability, runs):
    built = ["sm_75", "sm_86", "sm_90", "sm_100a", "compute_120"]
    with contextlib.nullcontext() if runs else pytest.raises(UserError, match="install a PyTorch for it"):
        check_capability(capability, built)


def test_float32_products_are_exact_whatever_the_environment_asks_for():
    code = "import torch; from torch_utils import precision; b = torch.backends; before = b.cuda.matmul.allow_tf32; "
    code += "precision.disable_tf32(); print(before, b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32)"
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}  # as in NVIDIA's containers
    ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.split() == ["True", "False", "False"]


# --- statistics ------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=6), min_size=1, max_size=5))
def test_statistics_are_those_of_all_values_together(reports):
    stats = Stats()
    for values in reports:
        stats.report("x", torch.tensor(values, dtype=torch.float64))
    (summary,) = stats.collect(ALONE).values()
    together = np.concatenate(reports)
    assert summary["num"] == len(together)
    assert summary["mean"] == pytest.approx(np.mean(together), rel=1e-12, abs=1e-12)
    assert summary["std"] == pytest.approx(np.std(together), rel=1e-6, abs=1e-4)


def test_statistics_are_kept_apart_by_name_and_begin_again_after_each_collection():
    stats = Stats()
    stats.report("b", torch.tensor([1.0, 3.0]))
    stats.report("a", torch.tensor(5.0))
    assert stats.collect(ALONE) == {"a": {"num": 1, "mean": 5, "std": 0}, "b": {"num": 2, "mean": 2, "std": 1}}
    assert stats.collect(ALONE) == {}
    stats.report("b", torch.tensor([[7.0]]))
    assert stats.collect(ALONE) == {"b": {"num": 1, "mean": 7, "std": 0}}


def test_reporting_holds_no_graph():
    stats = Stats()
    stats.report("x", torch.ones(3, requires_grad=True) * 2)
    assert not stats.moments["x"].requires_grad


# --- randomness ------------------------------------------------------------------------------------------------------

ARGUMENTS = st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 10**9), st.text(max_size=20))


@given(ARGUMENTS, ARGUMENTS)
def test_streams_are_equal_for_equal_arguments_and_differ_otherwise(a, b):
    first, again, other = (torch.randn(8, generator=make_rng(*x)) for x in (a, a, b))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (a == b)


def test_streams_of_neighbouring_steps_seeds_and_purposes_are_independent():
    n = 2000
    base = torch.randn(n, generator=make_rng(0, 0, "generator"))
    for arguments in [(1, 0, "generator"), (0, 1, "generator"), (0, 0, "critic"), (0, 0, "path noise 0")]:
        other = torch.randn(n, generator=make_rng(*arguments))
        assert abs(float((base * other).mean())) < 5 / n**0.5


def test_a_stream_leaves_the_global_state_alone():
    before = torch.random.get_rng_state()
    torch.randn(5, generator=make_rng(0, 0, "x"))
    assert torch.equal(before, torch.random.get_rng_state())
