"""A run, new or resumed: its config, directory, processes, and everything that its training needs."""

import functools
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from dnnlib.config import build, fields, merge, read_yaml
from dnnlib.console import UserError
from dnnlib.files import atomic_write
from metrics.evaluation import Evaluation
from metrics.generated import Generated
from metrics.needs import Settings
from metrics.reals import EqualFiles
from metrics.registry import Metric, parse
from torch_utils import checkpoint
from torch_utils.command import command
from torch_utils.distributed import Processes, count_gpus, processes
from torch_utils.precision import multiplies_bfloat16_fast
from torch_utils.signals import heeded
from training.config import RunConfig
from training.data import ImageArchive
from training.loop import Loop
from training.memory import largest_micro_batch
from training.report import duration
from training.state import TrainState, initialise, new_state


@dataclass(frozen=True)
class NewRun:
    """A run that begins: its directory is made in `outdir` and named after recipe, images and `desc`."""

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
    """Open the archive of nested settings, which may be incomplete."""
    data = settings.get("data", {})
    return ImageArchive(
        data["path"],
        use_labels=data.get("cond", False),
        mirror=data.get("mirror", False),
        channels=settings.get("G", {}).get("img_channels"),
    )


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
    old, new = flat(before.model_dump()), flat(after.model_dump())
    may_change = {dotted for dotted, _, extra in fields(RunConfig) if extra.get("may_change")}
    refused = [key for key in new if new[key] != old[key] and key not in may_change]
    if refused:
        listed = ", ".join(f"{key}={new[key]} (was {old[key]})" for key in refused)
        raise UserError(
            f"{folder} is resumed with its own settings, but {listed}; leave that out, or start a new run from its "
            "weights"
        )
    images = open_images(after.model_dump())
    if images.shape[1:] != after.G.img_shape or images.label_dim != after.G.c_dim:
        raise UserError(f"{after.data.path} is not the archive that {folder} was trained on: sizes or labels differ")
    contents = images.summary()
    if before.data.contents not in (None, contents):  # None: of an older run
        raise UserError(
            f"{after.data.path} is not the archive that {folder} was trained on: it holds {contents}, and that one "
            f"{before.data.contents}; give that one, or start a new run from the weights of this one"
        )
    return after.model_copy(update={"data": after.data.model_copy(update={"contents": contents})})


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
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip()


# --- processes -------------------------------------------------------------------------------------------------------


def launch(world: int, task: NewRun | ResumedRun) -> int:
    """Run `task` in `world` processes of torch's elastic launcher. Returns the exit code."""
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
        run_id="creps",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    try:
        elastic_launch(config, work)(task)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # it has printed a sentence
            return failure.exitcode
        raise UserError(
            f"process {rank} of {world} was killed by {signal.Signals(-failure.exitcode).name}, as systems do when "
            "memory runs out; resume the run, with less memory per process or fewer of them"
        ) from error
    except SignalException as error:
        return 128 + error.sigval
    return 0


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
    config, images = task.config, open_images(task.config.model_dump())
    if config.train.precision == "auto":  # decided once, so that a resumed run computes the same
        # Older runs that say auto computed in float32 on every CPU.
        half = multiplies_bfloat16_fast(procs.device) and (isinstance(task, NewRun) or procs.device.type == "cuda")
        config = config.with_train(precision="bfloat16" if half else "float32")
    if config.train.batch_gpu == "auto":
        config = config.with_train(batch_gpu=largest_micro_batch(config, images, procs))
    state = new_state(config, procs.device)
    state.G_ema.class_names = images.class_names
    evaluate = snapshot_evaluation(config, images, state, procs, say)
    if isinstance(task, NewRun):
        report = initialise(state, task.init_from) if task.init_from else []
        folder = procs.broadcast(new_folder(task, images) if procs.is_first else None)
        lines = [f"run directory {folder}", f"precision: {config.train.precision}", *report]
    else:
        folder = task.folder
        path, saved = find_state(folder, say) if procs.is_first else (None, None)
        path = procs.broadcast(path)
        state.load_state_dict(saved or checkpoint.load(path), procs)
        lines = [f"resume {folder} at {state.step * config.train.batch / 1000:g} kimg, from {path.name}"]
    if task.config.train.batch_gpu == "auto":
        lines.append(f"micro-batch: {config.train.batch_gpu} images per process, the most that fit into memory")
    if images.has_labels and not config.data.cond:
        lines.append(f"note: {config.data.path} has labels, and this run ignores them; set data.cond to train on them")
    for line in lines:
        say(line)
    if procs.is_first:
        with atomic_write(folder / "options.yaml") as temporary:
            temporary.write_text(to_yaml(config) + "\n", encoding="utf-8")
    return Loop(config, folder, state, images, procs, evaluate).run()


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
        words = [f"{max(numbers, default=-1) + 1:05d}", Path(new.recipe).stem, images.name, new.desc]
        folder = new.outdir / re.sub(r"[^\w.-]+", "_", "-".join(filter(None, words)))
        folder.mkdir()
    except OSError as error:
        raise UserError(
            f"cannot make a run directory in {new.outdir}: {error.strerror}; choose another folder for runs"
        ) from error
    return folder


def find_state(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict]:
    """Load the newest intact state in a run directory; return its path as well. Name the broken ones before it.

    Raises UserError.
    """
    paths = checkpoint.found(folder)
    for path in paths:
        try:
            return path, checkpoint.load(path)
        except UserError as error:
            say(f"passed over: {error}")
    if paths:
        raise UserError(f"no training state in {folder} is intact; start a new run from a snapshot instead")
    raise UserError(f"{folder} holds no training-state-*.pt to resume from; give the directory of a run")
