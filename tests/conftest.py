"""Fixtures that several test files share: processes, and tiny training runs on 24 images of 8×8."""

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from helpers import encode, noise_image, write_folder

import train
from torch_utils import build
from training import snapshot

hypothesis.settings.register_profile("busy", deadline=None)  # no test depends on the speed of the machine
hypothesis.settings.load_profile("busy")

ROOT = Path(__file__).parents[1]
GPU_TENSOR = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda:0"))  # all that build.choose reads
STYLES = {"z_dim": 8, "w_dim": 8, "mapping_layers": 1}
GENERATORS = {
    "creps": STYLES | {"channel_base": 64, "channel_max": 8, "biline_channels": 4, "thickness": 2},
    "stylegan2": STYLES | {"kind": "stylegan2", "channel_base": 64, "channel_max": 8},
}
RECIPE = {
    "G": GENERATORS["creps"],
    "D": {"channel_base": 64, "channel_max": 8, "mapping_layers": 1},
    "loss": {"r1_interval": 3, "pl_interval": 2},
    "augment": {"mode": "none"},
    "data": {"workers": 0},
    "train": {"batch": 8, "kimg": 0.056, "tick": 0.016, "snap": 1, "precision": "float32"},
}


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> Iterator[None]:
    """Let SIGINT interrupt this process and its children: background jobs of a shell inherit it as ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# Importing PyTorch takes seconds. One process imports it and does nothing else; tests fork theirs from it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "generate", "calc_metrics", "dataset_tool", "torch._dynamo"])


def run_forked(command: list[str], environment: dict[str, str], out: Connection, err: Connection) -> None:
    """Do what `python *command` does, in a process group of its own."""
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    for number, pipe in ((1, out), (2, err)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    # The server's own may be files, which can seek.
    sys.stdout, sys.stderr = (open(n, "w", buffering=size, closefd=False) for n, size in ((1, -1), (2, 1)))  # noqa: SIM115
    sys.argv = command[command[0] in ("-c", "-m") :]
    if command[0] == "-c":
        exec(command[1], {"__name__": "__main__"})
    elif command[0] == "-m":
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


class Forked:
    """A process that runs `python *command` in one thread, with a part of the interface of subprocess.Popen."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        (out, to_out), (err, to_err) = (SERVER.Pipe(duplex=False) for _ in range(2))
        self.process = SERVER.Process(target=run_forked, args=(command, environment, to_out, to_err))
        self.process.start()
        to_out.close()
        to_err.close()
        self.pid = self.process.pid
        self.stdout, self.stderr = (os.fdopen(os.dup(pipe.fileno())) for pipe in (out, err))

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end, which is forced after `timeout` seconds. Return what is left of stdout and of stderr."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        printed = self.stdout.read(), self.stderr.read()
        self.process.join()
        timer.cancel()
        return printed

    def kill(self) -> None:
        """Kill the processes of the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process, its group and its pipes."""
        self.process.terminate()  # a launcher passes it on to its workers, which have process groups of their own
        self.process.join(20)
        self.kill()
        self.process.join()
        self.stdout.close()
        self.stderr.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Forked]]:
    """Return a function that starts `python *command`, with more environment. No process outlives the test."""
    started = []

    def start(*command: object, **environment: str) -> Forked:
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        started.append(Forked([str(c) for c in command], environment))
        return started[-1]

    yield start
    for process in started:
        process.close()


def environments_of_ranks() -> list[dict[str, str]]:
    """Return what a launcher sets for each of two processes of one group."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def run_ranks(start: Callable[..., Forked], *command: object) -> list[str]:
    """Run `python *command` in two processes of one group, to its end. Return what each prints to stdout."""
    ranks = [start(*command, **environment) for environment in environments_of_ranks()]
    printed = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    return [out for out, _ in printed]


def folder_contents(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Tiny:
    """A recipe and images in one folder, and ways to train with them."""

    def __init__(self, folder: Path, start: Callable[..., Forked] | None = None):
        self.folder = folder
        self.start = start
        self.recipe = folder / "tiny.yaml"
        self.choose("creps")
        self.archive = self.images("images")
        self.labelled = self.images("labelled", labels=True)

    def choose(self, kind: str) -> None:
        """Let the recipe have a G of this kind."""
        self.recipe.write_text(yaml.safe_dump(RECIPE | {"G": GENERATORS[kind]}))

    def images(self, name: str, size: tuple[int, int] = (8, 8), count: int = 24, labels: bool = False) -> Path:
        """Write a folder of `count` random images, `size` = (width, height)."""
        files = {f"{i:03}.png": encode(noise_image(i, *size[::-1])) for i in range(count)}
        if labels:
            labelled = [[file, i % 3] for i, file in enumerate(files)]
            files["dataset.json"] = json.dumps({"labels": labelled, "class_names": ["ant", "bee", "cat"]}).encode()
        return write_folder(self.folder / name, files)

    def native_images(self) -> Path:
        """Write a folder of 24 random images of sizes of their own, up to three times 8×8 in the frame."""
        files = {f"{i:03}.png": encode(noise_image(i, 8 + i, 40 - i)) for i in range(24)}
        return write_folder(self.folder / "native", files)

    def new(self, *arguments: object, outdir: str = "runs", data: Path | None = None) -> list[str]:
        """Return the arguments of train.py for a new run."""
        start = ("--outdir", self.folder / outdir, "--cfg", self.recipe, "--data", data or self.archive)
        return [str(a) for a in (*start, *arguments)]

    def call(self, *arguments: object) -> Result:
        """Call train.py with these arguments, in this process."""
        return CliRunner().invoke(train.main, [str(a) for a in arguments])

    def run(self, *arguments: object, outdir: str = "runs", data: Path | None = None) -> Path:
        """Train a new run to its end; return its directory."""
        before = self.runs(outdir)
        result = self.call(*self.new(*arguments, outdir=outdir, data=data))
        assert result.exit_code == 0, (result.output, result.exception)
        (folder,) = self.runs(outdir) - before
        return folder

    def runs(self, outdir: str = "runs") -> set[Path]:
        return set((self.folder / outdir).glob("*"))

    def process(self, *arguments: object, launcher: tuple[str, ...] = ()) -> Forked:
        """Start train.py in its own process."""
        return self.start(*launcher, ROOT / "train.py", *arguments)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch) -> Iterator[Path]:
    """Return the empty cache directory of a process that has built no C++ or CUDA code yet."""
    monkeypatch.setenv("CREPS_CACHE", str(tmp_path / "cache"))
    for function in (build.kernels, build.nvrtc, build.say_once):
        function.cache_clear()
    yield tmp_path / "cache"
    for function in (build.kernels, build.nvrtc, build.say_once):
        function.cache_clear()


@pytest.fixture
def fresh_gpu(fresh_cache, monkeypatch) -> Path:
    """Return the same for a machine with a GPU of compute capability 9.0."""
    card = SimpleNamespace(major=9, minor=0, multi_processor_count=1, max_threads_per_multi_processor=2048)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return fresh_cache


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory) -> Path:
    """Return a file of random weights of Inception, under the name of the released one."""
    from benchmarks.metrics import random_weights
    from metrics.features import DETECTORS

    path = tmp_path_factory.mktemp("weights") / DETECTORS["inception"].weights.name
    torch.save(random_weights(), path)
    return path


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Return an empty folder in place of models/."""
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setattr(snapshot, "MODELS", folder)
    return folder


@pytest.fixture
def tiny(tmp_path, monkeypatch, start):
    # The order of float additions depends on the number of threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield Tiny(tmp_path, start)
    torch.set_num_threads(threads)
