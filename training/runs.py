"""A run, new or resumed: its config, directory, processes, and everything that its training needs."""

import contextlib
import functools
import itertools
import logging
import os
import re
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dnnlib.config import build, fields, format_yaml, merge, read_yaml
from dnnlib.console import UserError
from dnnlib.files import atomic_write
from metrics.evaluation import Evaluation
from metrics.generated import Generated
from metrics.needs import Settings
from metrics.reals import EqualFiles
from metrics.registry import Metric, parse
from torch_utils import checkpoint
from torch_utils.command import command
from torch_utils.distributed import Processes, count_gpus, launch_name, launched, processes
from torch_utils.precision import multiplies_bfloat16_fast
from torch_utils.signals import heeded
from training.config import DataConfig, RunConfig
from training.data import ImageArchive
from training.labels import check_class_names
from training.loop import Loop
from training.memory import largest_micro_batch
from training.native import NativeArchive
from training.report import duration
from training.snapshot import load_generator, snapshots
from training.state import TrainState, initialise, new_state

RESTARTS = 3  # of the processes that launch() starts
LAUNCHES = "launches.txt"  # in a run directory: the names of the launches that have trained it


@dataclass(frozen=True)
class NewRun:
    """A run that begins: its directory is made in `outdir` and named after recipe, images and `desc`.

    When its launch starts it again, it continues in the directory that it made before.
    """

    config: RunConfig
    outdir: Path
    recipe: str
    desc: str | None = None
    init_from: Path | None = None  # weights


@dataclass(frozen=True)
class ResumedRun:
    """A run that continues in its directory."""

    config: RunConfig
    folder: Path


def open_images(settings: dict) -> ImageArchive:
    """Open the archive of nested settings, of which only `data` need be complete. Raises UserError."""
    data = build(DataConfig, settings["data"], "data")
    channels = settings.get("G", {}).get("img_channels")
    options = {"use_labels": data.cond, "mirror": data.mirror, "channels": channels}
    if data.resolution is None:
        return ImageArchive(data.path, **options)
    return NativeArchive(data.path, data.resolution, **options)


def read_config(folder: Path, changes: dict) -> RunConfig:
    """Read the config of the run in `folder`, with the allowed `changes`. Raises UserError for others."""
    if not folder.exists():
        raise UserError(f"{folder} does not exist; give a run directory, or a file of weights to start from")
    saved = folder / "options.yaml"
    if not saved.is_file():
        raise UserError(f"{folder} is not a run directory: it has no options.yaml")
    settings = read_yaml(saved)
    before = build(RunConfig, settings, str(saved))
    after = build(RunConfig, merge(settings, changes), str(folder))
    if refused := refused_changes(before, after):
        raise UserError(
            f"{folder} is resumed with its own settings, but {', '.join(refused)}; leave that out, or start a new run "
            "from its weights"
        )
    if not os.path.exists(after.data.path):
        raise UserError(
            f"{folder} was trained on {after.data.path}, which does not exist; give its present location with --data"
        )
    images = open_images(after.model_dump())
    if images.shape[1:] != after.G.img_shape or images.label_dim != after.G.c_dim:
        raise UserError(f"{after.data.path} is not the archive that {folder} was trained on: sizes or labels differ")
    contents = images.summary()
    if before.data.contents not in (None, contents):  # None: of an older run
        raise UserError(
            f"{after.data.path} is not the archive that {folder} was trained on: it holds {contents}, and that one "
            f"{before.data.contents}; give that one, or start a new run from these weights"
        )
    if images.class_names:
        check_class_names(read_class_names(folder), images.class_names, after.data.path)
    return after.model_copy(update={"data": after.data.model_copy(update={"contents": contents})})


def read_class_names(folder: Path) -> list[str]:
    """Return the names of classes in the newest intact snapshot of a run, or []."""
    for path in reversed(snapshots(folder)):
        with contextlib.suppress(UserError):
            return load_generator(path).class_names
    return []


def refused_changes(before: RunConfig, after: RunConfig) -> list[str]:
    """List the changes that a resumed run cannot make."""
    old, new = flat(before.model_dump()), flat(after.model_dump())
    may_change = {dotted for dotted, _, extra in fields(RunConfig) if extra.get("may_change")}
    return [f"{key}={new[key]} (was {old[key]})" for key in new if new[key] != old[key] and key not in may_change]


def snapshot_metrics(config: RunConfig) -> tuple[Metric, ...]:
    """Return the metrics of snapshots. Raises UserError for those that need more than a snapshot and its archive."""
    metrics = parse(",".join(config.metrics) or "none")
    for metric in metrics:
        if metric.family.windows:
            raise UserError(f"{metric.name} needs large images and a size; measure it with calc_metrics.py")
    return metrics


def flat(settings: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    result = {}
    for key, value in settings.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def to_yaml(config: RunConfig) -> str:
    return format_yaml(config.model_dump(mode="json"))


# --- processes -------------------------------------------------------------------------------------------------------


def launch(world: int, task: NewRun | ResumedRun) -> int:
    """Run `task` in `world` processes of torch's elastic launcher. Returns the exit code.

    When a process dies after a new state was saved, all of them start again from there, RESTARTS times at most.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    count = count_gpus()
    if count and world > count:
        raise UserError(f"{world} processes need as many GPUs, and this machine has {count}; use {count} or fewer")
    if not count:
        print(f"no GPU found: {world} processes share the CPU")
    # This process only waits from here on, and its log would repeat in many lines what our own sentence says.
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", ",".join(number.name for number in heeded()))
    # Seconds that a stopped process may take to end its step and save the state before it is killed.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,  # torch would also start those again that end because of a mistake
        start_method="spawn",
    )
    folder, before = (task.folder, checkpoint.found(task.folder)) if isinstance(task, ResumedRun) else (None, [])
    for restart in range(1, RESTARTS + 2):
        try:
            elastic_launch(config, work)(task)
            return 0
        except SignalException as error:
            return 128 + error.sigval
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code == 2 or code > 128:  # a mistake or an interruption, which the process has reported
            return code
        ended = f"process {rank} of {world} " + (
            f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed"
        )
        folder = folder or find_folder(task, config.run_id)
        states = checkpoint.found(folder) if folder else []
        if states[:1] == before[:1] or restart > RESTARTS:
            break
        print(f"{ended}; restart {restart} of {RESTARTS}", flush=True)
        before = states
    if code > 0:  # it has printed a sentence
        return code
    raise UserError(
        f"{ended}, as systems do when memory runs out; resume the run, with less memory per process or fewer of them"
    )


def work(task: NewRun | ResumedRun) -> None:
    """Run one process of `task`, and exit with 128 + signal if it was interrupted."""
    memory = f"set train.batch_gpu, now {task.config.train.batch_gpu or 'all'}, to fewer images or to auto"
    with command(memory=memory, interrupted="no step was taken."), processes() as procs:
        code = run(task, procs)
    if code:
        sys.exit(code)  # elastic_launch hangs if a worker returns after a signal


def run(task: NewRun | ResumedRun, procs: Processes) -> int:
    """Begin or resume a run and train to its end. Every rank calls it. Returns the exit code."""
    say = functools.partial(print, flush=True) if procs.is_first else lambda line: None
    ours = launch_name() if launched() else None
    config, folder = task.config, task.folder if isinstance(task, ResumedRun) else None
    if isinstance(task, NewRun) and ours:  # perhaps its launch starts it again, on other machines
        folder = next(filter(None, procs.gather_objects(find_folder(task, ours))), None)
        if folder:
            config = read_config(folder, {})
            fits = config.train.batch_gpu in config.micro_batches(procs.world)
            if task.config.train.batch_gpu == "auto" and not fits:  # there are more processes than before
                config = config.with_train(batch_gpu="auto")
    images = open_images(config.model_dump())
    config = resolve_auto(config, images, procs, resumed=isinstance(task, ResumedRun))
    state = new_state(config, procs.device)
    # An archive may have lost the names; its labels are those of the run (read_config).
    state.G_ema.class_names = images.class_names or (read_class_names(folder) if folder and images.label_dim else [])
    evaluate = snapshot_evaluation(config, images, state, procs, say)
    path, saved = find_state(folder, say) if folder and procs.is_first else (None, None)
    path = procs.broadcast(path)
    if path:
        state.load_state_dict(saved or checkpoint.load(path), procs)
        say(f"resume {folder} at {state.step * config.train.batch / 1000:g} kimg, from {path.name}")
        if state.step >= config.train.steps:
            say("the run has ended; to train further, give a larger --kimg")
            return 0
    elif isinstance(task, ResumedRun):
        raise UserError(f"{folder} holds no training-state-*.pt to resume from; give the directory of a run")
    else:
        report = initialise(state, task.init_from) if task.init_from else []
        folder = procs.broadcast((folder or new_folder(task, images)) if procs.is_first else None)
        for line in (f"run directory {folder}", f"precision: {config.train.precision}", *report):
            say(line)
    if task.config.train.batch_gpu == "auto":
        say(f"micro-batch: {config.train.batch_gpu} images per process, the most that fit into memory")
    if images.has_labels and not config.data.cond:
        say(f"note: {config.data.path} has labels, and this run ignores them; start one with --cond to train on them")
    if procs.is_first:
        with atomic_write(folder / "options.yaml") as temporary:
            temporary.write_text(to_yaml(config) + "\n", encoding="utf-8")
    if ours:
        record_launch(folder, ours, procs)
    return Loop(config, folder, state, images, procs, evaluate).run()


def resolve_auto(config: RunConfig, images: ImageArchive, procs: Processes, *, resumed: bool) -> RunConfig:
    """Decide what is "auto", once: a resumed run computes the same. Every rank calls it."""
    if config.train.precision == "auto":
        # Older runs that say auto computed in float32 on every CPU.
        half = multiplies_bfloat16_fast(procs.device) and not (resumed and procs.device.type == "cpu")
        config = config.with_train(precision="bfloat16" if half else "float32")
    if config.train.batch_gpu == "auto":
        config = config.with_train(batch_gpu=largest_micro_batch(config, images, procs))
    return config


def snapshot_evaluation(
    config: RunConfig, images: ImageArchive, state: TrainState, procs: Processes, say: Callable[[str], None]
) -> Callable[..., list[dict]]:
    """Return Loop's `evaluate`, after a trial that raises the UserErrors of measuring and says how long it takes."""
    metrics = snapshot_metrics(config)
    evaluation = Evaluation(metrics, Settings(), procs, EqualFiles(images, config.data.mirror))
    generated = functools.partial(Generated, labelled=images if config.data.cond else None)
    if metrics:
        each, first = evaluation.estimate(generated(state.G_ema))
        longer = f", the first ones up to {duration(first)} longer" if first else ""
        say(f"the metrics of a snapshot take about {duration(each)}{longer}")
    return lambda G, stop: evaluation(generated(G), stop)


# --- directories -----------------------------------------------------------------------------------------------------


def new_folder(new: NewRun, images: ImageArchive) -> Path:
    """Make the next of outdir/00000-recipe-images-desc, 00001-… Raises UserError."""
    try:
        new.outdir.mkdir(parents=True, exist_ok=True)
        numbers = [int(match[0]) for p in new.outdir.iterdir() if (match := re.match(r"\d+", p.name))]
        words = "-".join(filter(None, [Path(new.recipe).stem, images.name, new.desc]))
        name = re.sub(r"[^\w.-]+", "_", words)
        for number in itertools.count(max(numbers, default=-1) + 1):
            with contextlib.suppress(FileExistsError):  # of a run that began at the same moment
                folder = new.outdir / f"{number:05d}-{name}"
                folder.mkdir()
                return folder
    except OSError as error:
        raise UserError(
            f"cannot make a run directory in {new.outdir}: {error.strerror}; choose another folder for runs"
        ) from error


def find_folder(new: NewRun, launch: str) -> Path | None:
    """Find the directory that a run made when its launch started it before."""
    for path in new.outdir.glob(f"*/{LAUNCHES}"):
        if launch in path.read_text().splitlines():
            saved = build(RunConfig, read_yaml(path.parent / "options.yaml"), str(path.parent))
            unresolved = {"precision": "auto"} if new.config.train.precision == "auto" else {}
            if not refused_changes(saved.with_train(**unresolved), new.config):
                return path.parent
    return None


def record_launch(folder: Path, launch: str, procs: Processes) -> None:
    """Add this launch to a run directory. Raises UserError unless all machines share it."""
    path = folder / LAUNCHES
    launches = procs.gather_objects(launch)
    if procs.is_first:
        launches = dict.fromkeys([*(path.read_text().splitlines() if path.is_file() else []), *launches])
        with atomic_write(path) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in launches))
    procs.barrier()
    until = time.monotonic() + 60  # network file systems may show new files late
    while not (sees := path.is_file() and launch in path.read_text().splitlines()) and time.monotonic() < until:
        time.sleep(1)
    machines = procs.gather_objects(None if sees else socket.gethostname())
    if any(machines):
        raise UserError(
            f"{', '.join(filter(None, machines))}: does not see {folder} of the first process; choose a folder for "
            "runs that all machines share"
        )


def find_state(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict] | tuple[None, None]:
    """Load the newest intact state in a run directory, if it has states; return its path as well.

    Names the broken ones before it. Raises UserError when all of them are broken.
    """
    paths = checkpoint.found(folder)
    for path in paths:
        try:
            return path, checkpoint.load(path)
        except UserError as error:
            say(f"passed over: {error}")
    if paths:
        raise UserError(f"no training state in {folder} is intact; start a new run from a snapshot instead")
    return None, None
