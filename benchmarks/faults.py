"""Inject faults into the commands and count what goes wrong: kills, a full disk, damaged files, ten thousand images.

python -m benchmarks.faults --out=benchmarks/results/faults.json             # everything: hours on two cores
python -m benchmarks.faults --part=kills --count=10 --out=/tmp/faults.json   # one part, shorter

The file is written after each command or kind of file; started again, the campaign goes on with the next.

A command passes if it ends within a minute of the fault, prints no traceback, fails with a sentence or succeeds, leaves
no incomplete file under a final name, and gives the result of an undisturbed run when started again.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click

from benchmarks.machine import describe
from dnnlib.console import UserError
from dnnlib.files import atomic_write
from torch_utils.command import command

ROOT = Path(__file__).parents[1]
GROWTH = 20  # MiB: more is a leak, of 2 kB for each of 10,000 images
LIMIT = 60  # seconds: a command that still runs this long after a fault counts as hanging
RECIPE = """
base: demo
G: {channel_base: 256, channel_max: 16, mapping_layers: 1, z_dim: 16, w_dim: 16}
D: {channel_base: 256, channel_max: 16, mapping_layers: 1, mbstd_group: 2}
train: {batch: 4, kimg: 0.24, tick: 0.02, snap: 1}
data: {workers: 1}
"""


@dataclass
class Tally:
    """The faults injected into one command, each violation as a sentence, and what was measured."""

    faults: int = 0
    violations: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def require(self, held: bool, violation: str) -> None:
        if not held:
            self.violations.append(violation)
            click.echo(f"  {violation}")


@dataclass
class Ended:
    """The end of a process: its exit code (None if it hung and was killed) and what it printed."""

    code: int | None
    text: str

    def check(self, tally: Tally, what: str) -> None:
        """Require an end without hang or traceback, and a sentence if it failed."""
        tally.require(self.code is not None, f"{what}: still running after {LIMIT} s")
        tally.require("Traceback" not in self.text, f"{what}: traceback: {self.text[-300:]}")
        tally.require(self.code in (0, None) or "Error" in self.text, f"{what}: exit {self.code} without a sentence")


@dataclass(frozen=True)
class Command:
    """A command line, how to start it again after a fault, and the digest of its result (None before there is one)."""

    name: str
    arguments: list[str]
    again: Callable[[Path], list[str]]
    digest: Callable[[Path], str | None]
    incomplete: Callable[[Path], list[str]] = lambda folder: []  # files with a final name that are not whole

    def start(self, folder: Path, again: bool = False, **environment: str) -> subprocess.Popen:
        arguments = self.again(folder) if again else self.arguments
        return subprocess.Popen(
            [sys.executable, *(a.replace("OUT", str(folder)) for a in arguments)],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def finish(process: subprocess.Popen, limit: float = LIMIT) -> Ended:
    """Wait `limit` seconds for the end of a process, then kill its whole session."""
    try:
        text = process.communicate(timeout=limit)[0]
        return Ended(process.returncode, text)
    except subprocess.TimeoutExpired:
        kill(process)
        return Ended(None, process.communicate()[0])


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


# --- commands under test --------------------------------------------------------------------------------------------


def sha256(*paths: Path) -> str | None:
    """Return the digest of files, None if one is missing."""
    if not paths or not all(path.exists() for path in paths):
        return None
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def trained(folder: Path) -> str | None:
    """Return the digest of a finished run: its last snapshot and the steps of its reports."""
    logs = sorted(folder.glob("*/stats.jsonl"))
    if not logs or not list(logs[-1].parent.glob("training-state-000000060.pt")):  # written last: 0.24 kimg by fours
        return None
    kimg = [json.loads(line)["Progress/kimg"] for line in logs[-1].read_text().splitlines()]
    snapshot = sha256(*sorted(logs[-1].parent.glob("network-snapshot-*.safetensors"))[-1:])
    return f"{snapshot} after reports at {kimg}" if kimg and kimg[-1] == 0.24 else None


def again(train: list[str], folder: Path) -> list[str]:
    """Return the arguments that resume the newest run directory with a training state, or start a new run."""
    states = sorted(folder.glob("*/training-state-*.pt"))
    return ["train.py", f"--resume={states[-1].parent}", train[-1]] if states else train


def commands(base: Path) -> list[Command]:
    """Return the commands under test; `base` holds their inputs."""
    archive, recipe = base / "letters.zip", base / "faults.yaml"
    train = ["train.py", "--outdir=OUT", f"--cfg={recipe}", "--cond", f"--data={archive}", "--gpus=1"]
    render = ["generate.py", "--network=letters", "--seeds=0", "--size=3000x3000", "--format=tiff", "--outdir=OUT"]
    make = ["dataset_tool.py", "--source=letters", "--dest=OUT/made.zip", "--resolution=32x32", "--drawings=20"]
    metric = ["calc_metrics.py", "--network=letters", f"--data={archive}", "--metrics=lines100", "--outdir=OUT"]
    measured = "metric-lines100.jsonl"

    def values(folder: Path) -> str | None:
        path = folder / measured
        return json.dumps(json.loads(path.read_text().splitlines()[-1])["results"]) if path.exists() else None

    def broken_lines(folder: Path) -> list[str]:
        path = folder / measured
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [measured for line in lines if not line.endswith("}\n")]

    return [
        Command("dataset_tool.py", make, lambda folder: make, lambda folder: sha256(folder / "made.zip")),
        Command("calc_metrics.py", metric, lambda folder: metric, values, broken_lines),
        Command("generate.py", render, lambda folder: [*render, "--resume"], lambda f: sha256(f / "seed0000.tif")),
        Command("train.py", train, partial(again, train), trained),
        Command("train.py --gpus=2", [*train[:-1], "--gpus=2"], partial(again, [*train[:-1], "--gpus=2"]), trained),
    ]


@contextlib.contextmanager
def inputs() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        (base / "faults.yaml").write_text(RECIPE.replace("base: demo", f"base: {ROOT / 'configs/demo.yaml'}"))
        made = [sys.executable, "dataset_tool.py", "--source=letters", f"--dest={base / 'letters.zip'}"]
        subprocess.run([*made, "--resolution=16x16", "--drawings=8"], cwd=ROOT, check=True, capture_output=True)
        yield base


def undisturbed(command: Command, folder: Path) -> tuple[str, float]:
    """Run a command in `folder`; return the digest of its result and its seconds."""
    began = time.monotonic()
    ended = finish(command.start(folder), 600)
    if ended.code != 0:
        raise UserError(f"{command.name} fails without any fault: {ended.text[-2000:]}")
    return command.digest(folder), time.monotonic() - began


# --- the parts -------------------------------------------------------------------------------------------------------


def kills(count: int, seed: int, done: set[str]) -> Iterator[tuple[str, Tally]]:
    """SIGKILL each command `count` times at random moments, and start it again each time until it finishes."""
    with inputs() as base:
        for command in commands(base):
            if command.name in done:
                continue
            tally, rng = Tally(), random.Random(f"{seed} {command.name}")
            (base / "whole").mkdir()
            expected, seconds = undisturbed(command, base / "whole")
            click.echo(f"{command.name}: {seconds:.1f} s undisturbed")
            while tally.faults < count:
                with tempfile.TemporaryDirectory(dir=base) as temporary:
                    folder, again, ended = Path(temporary), False, None
                    while ended is None:
                        process, again = command.start(folder, again), True
                        try:
                            process.wait(rng.uniform(0, seconds))
                        except subprocess.TimeoutExpired:
                            kill(process)
                            tally.faults += 1
                            for name in command.incomplete(folder):
                                tally.require(False, f"{command.name}: {name} is incomplete")
                            found = command.digest(folder)
                            tally.require(found in (None, expected), f"{command.name}: a wrong result after a kill")
                            process.communicate()
                            if tally.faults >= count:
                                ended = finish(command.start(folder, again), 600)
                        else:
                            ended = finish(process)
                    ended.check(tally, command.name)
                    tally.require(ended.code == 0, f"{command.name}: exit {ended.code}: {ended.text[-300:]}")
                    tally.require(command.digest(folder) == expected, f"{command.name}: a different result")
            subprocess.run(["rm", "-r", base / "whole"], check=True)
            yield command.name, tally


def full_disk(count: int, seed: int, done: set[str]) -> Iterator[tuple[str, Tally]]:
    """Fail all writes of a command from one on, for `count` of its writes, then start it again on a disk with space."""
    with inputs() as base:
        library, counter = base / "full_disk.so", base / "counter"
        compiled = ["cc", "-shared", "-fPIC", "-O1", "-o", library, ROOT / "benchmarks/full_disk.c", "-ldl"]
        subprocess.run(compiled, check=True)

        def disk(folder: Path, at: int) -> dict[str, str]:
            counter.write_bytes(bytes(8))
            names = {"UNDER": str(folder), "COUNTER": str(counter), "AT": str(at)}
            return {"LD_PRELOAD": str(library)} | {f"FULL_DISK_{name}": value for name, value in names.items()}

        for command in commands(base):
            if command.name in done:
                continue
            tally, rng = Tally(), random.Random(f"{seed} {command.name}")
            (base / "whole").mkdir()
            ended = finish(command.start(base / "whole", **disk(base / "whole", 0)), 600)
            expected = command.digest(base / "whole")
            tally.require(ended.code == 0, f"{command.name} fails without any fault: {ended.text[-300:]}")
            writes = int.from_bytes(counter.read_bytes(), sys.byteorder)
            click.echo(f"{command.name}: {writes} writes")
            for at in sorted(rng.sample(range(1, writes + 1), min(count, writes))):
                with tempfile.TemporaryDirectory(dir=base) as temporary:
                    folder, what = Path(temporary), f"{command.name}, write {at}"
                    ended = finish(command.start(folder, **disk(folder, at)), 180)
                    tally.faults += 1
                    ended.check(tally, what)
                    tally.require(ended.code != 0, f"{what}: success on a full disk")
                    for name in command.incomplete(folder):
                        tally.require(False, f"{what}: {name} is incomplete")
                    ended = finish(command.start(folder, again=True), 600)
                    tally.require(ended.code == 0, f"{what}: again: exit {ended.code}: {ended.text[-300:]}")
                    tally.require(command.digest(folder) == expected, f"{what}: a different result")
            subprocess.run(["rm", "-r", base / "whole"], check=True)
            yield command.name, tally


def damage(data: bytes, rng: random.Random) -> bytes:
    """Truncate a file, flip some of its bits, overwrite a part with noise or zeros, or repeat a part."""
    at, length = rng.randrange(len(data)), rng.randrange(1, 1 + min(len(data), 64))
    kind = rng.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    middle = {2: rng.randbytes(length), 3: bytes(length), 4: data[at : at + length] * 2}[kind]
    return data[:at] + middle + data[at + length :]


def forked(arguments: list[str], log: Path) -> Ended:
    """Run a command of this project in a fork of this process, which has imported it already."""
    if (child := os.fork()) == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        module = sys.modules[arguments[0].removesuffix(".py")]
        code = 1
        try:
            module.main(arguments[1:])
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return Ended(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"))
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return Ended(None, log.read_text(errors="replace"))


def mutations(count: int, seed: int, done: set[str]) -> Iterator[tuple[str, Tally]]:
    """Give each command `count` damaged copies of each kind of file that it reads."""
    for name in ("train", "generate", "calc_metrics", "dataset_tool"):
        __import__(name)
    with inputs() as base:
        archive, recipe, out = base / "letters.zip", base / "faults.yaml", base / "out"
        train = ["train.py", f"--outdir={out}", f"--cfg={recipe}", "--cond"]
        subprocess.run(
            [sys.executable, *train, f"--data={archive}", "--kimg=0.02", "-o", "train.tick=0.01"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        (run,) = out.glob("*/")
        snapshot, state = sorted(run.glob("*.safetensors"))[-1], sorted(run.glob("*.pt"))[-1]
        folder = base / "folder"
        subprocess.run(
            [sys.executable, "-m", "zipfile", "-e", archive, folder], check=True
        )  # the same archive as a folder
        image, labels = sorted(folder.rglob("*.png"))[0], folder / "dataset.json"
        sheet = base / "table"
        sheet.mkdir()
        for i, path in enumerate(sorted(folder.rglob("*.png"))[:8]):
            (sheet / f"{i}.png").write_bytes(path.read_bytes())
        (sheet / "labels.csv").write_text("filename,label\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(8)))
        make = ["dataset_tool.py", f"--source={sheet}", f"--dest={base / 'made.zip'}", "--resolution=16x16"]
        dry = ["--dry-run", "-o", "train.kimg=0.02"]
        kinds: dict[str, tuple[Path, list[str]]] = {
            "archive": (archive, ["dataset_tool.py", "check", str(archive)]),
            "image": (image, ["dataset_tool.py", "check", str(folder)]),
            "dataset.json": (labels, ["dataset_tool.py", "check", str(folder)]),
            "image to convert": (sheet / "3.png", make),
            "labels.csv": (sheet / "labels.csv", [*make, "--labels", str(sheet / "labels.csv")]),
            "snapshot": (snapshot, ["generate.py", f"--network={snapshot}", "--seeds=0", f"--outdir={base / 'drawn'}"]),
            "training state": (state, ["train.py", f"--resume={run}", "--kimg=0.02"]),
            "initial weights": (state, [*train, f"--data={archive}", f"--init-from={state}", *dry]),
            "options.yaml": (run / "options.yaml", ["train.py", f"--resume={run}", "--dry-run"]),
            "recipe": (recipe, [*train, f"--data={archive}", *dry]),
        }
        for name, (path, arguments) in kinds.items():
            if name in done:
                continue
            tally, rng = Tally(), random.Random(f"{seed} {name}")
            whole = path.read_bytes()
            ended = forked(arguments, base / "log")
            tally.require(ended.code == 0, f"{name}: exit {ended.code} without any damage: {ended.text[-300:]}")
            for i in range(count):
                kept = {other: other.read_bytes() for other in run.iterdir()} if path.parent == run else {}
                path.write_bytes(damage(whole, rng))
                tally.faults += 1
                forked(arguments, base / "log").check(tally, f"{name}, copy {i}")
                path.write_bytes(whole)
                for other, data in kept.items():
                    other.write_bytes(whole if other == path else data)
            yield name, tally


READ = """
import itertools, sys
from training.data import ImageArchive, batches
for batch in itertools.islice(batches(ImageArchive(sys.argv[1]), batch=10, workers=0), int(sys.argv[2]) // 10):
    print("image\\n" * 10, end="", flush=True)
"""


def memory(count: int, seed: int, done: set[str]) -> Iterator[tuple[str, Tally]]:
    """Render `count` seeds, and read ten times as many images, in fresh processes, whose memory may not grow.

    Each prints a line for each image: their resident memory is read after a tenth of them, and near the end.
    """
    with inputs() as base:
        seeds = [
            "generate.py",
            "--network=letters",
            f"--seeds=0-{count - 1}",
            "--size=16x16",
            f"--outdir={base / 'out'}",
        ]
        read = ["-c", READ, str(base / "letters.zip"), str(10 * count)]
        for name, arguments, images in (("seeds rendered", seeds, count), ("images read", read, 10 * count)):
            if name in done:
                continue
            tally, seen = Tally(), {}
            process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for lines, _ in enumerate(process.stdout, 1):
                tally.faults = lines
                if lines in (images // 10, images * 9 // 10):
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    seen[lines] = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024
            tally.require(process.wait() == 0 and tally.faults == images, f"{name}: {tally.faults} of {images}")
            early, late = seen.values()
            tally.figures = {f"MiB after {lines:,}": round(mib, 1) for lines, mib in seen.items()}
            tally.require(late - early < GROWTH, f"{name}: {early:.0f} MiB became {late:.0f} MiB")
            yield name, tally


PARTS = {
    "kills": (kills, 100),
    "full-disk": (full_disk, 30),
    "mutations": (mutations, 200),
    "memory": (memory, 10_000),
}


@click.command()
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, help="One part; by default all.")
@click.option("--count", type=click.IntRange(1), help="Faults of each kind, or seeds.  [default: 100, 30, 200, 10000]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", metavar="JSON", type=click.Path(path_type=Path), required=True)
@command()
def main(parts, count, seed, out):
    """Disturb the commands and report every violation; the exit code is 1 if there is one."""
    result = json.loads(out.read_text()) if out.exists() else {}
    for part in parts or PARTS:
        function, default = PARTS[part]
        entries = result.setdefault(part, {})
        for name, tally in function(count or default, seed, set(entries)):
            entries[name] = {"faults": tally.faults, "violations": tally.violations, **tally.figures}
            entries[name] |= {"seed": seed, "cpu": describe()["cpu"]}
            with atomic_write(out) as file:
                file.write_text(json.dumps(result, indent=1) + "\n")
            click.echo(f"{part}, {name}: {len(tally.violations)} violations of {tally.faults}")
    if any(entry["violations"] for entries in result.values() for entry in entries.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
