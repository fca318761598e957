"""A run, new or resumed: its images, config, directory and processes."""

import functools
import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
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
from torch_utils.distributed import Processes, processes
from training.config import RunConfig
from training.data import ImageArchive
from training.loop import find_state, train
from training.report import duration
from training.trainer import decide_precision, initialise, new_state


@dataclass(frozen=True)
class Task:
    """What the processes of a run are told."""

    config: RunConfig
    outdir: str | None  # where the directory of a new run is made
    cfg: str | None  # the recipe, for its name
    desc: str | None  # added to it
    resume: str | None  # the directory of the run to continue
    init_from: str | None  # a file of weights to begin from


def open_images(settings: dict) -> ImageArchive:
    data = settings.get("data", {})
    return ImageArchive(
        data["path"],
        use_labels=data.get("cond", False),
        mirror=data.get("mirror", False),
        channels=settings.get("G", {}).get("img_channels"),
    )


def continued(folder: Path, changes: dict) -> RunConfig:
    """The config of the run in `folder` with the allowed `changes`. Raises UserError for others."""
    if not folder.exists():
        raise UserError(f"--resume={folder} does not exist; give a run directory, or a file of weights to begin from")
    saved = folder / "options.yaml"
    if not saved.is_file():
        raise UserError(f"--resume={folder} is not a run directory: it has no options.yaml")
    settings = read_yaml(saved)
    before = build(RunConfig, settings, str(saved))
    after = build(RunConfig, merge(settings, changes), f"--resume={folder}")
    old, new = flat(before.model_dump()), flat(after.model_dump())
    may_change = {dotted for dotted, _, extra in fields(RunConfig) if extra.get("may_change")}
    refused = [key for key in new if new[key] != old[key] and key not in may_change]
    if refused:
        listed = ", ".join(f"{key}={new[key]} (was {old[key]})" for key in refused)
        raise UserError(
            f"--resume continues the same run, but {listed}; leave that out, or begin a new run with --init-from"
        )
    images = open_images(after.model_dump())
    if images.shape[1:] != after.G.img_shape or images.label_dim != after.G.c_dim:
        raise UserError(f"{after.data.path} is not the archive that {folder} was trained on: sizes or labels differ")
    return after


def snapshot_metrics(config: RunConfig) -> tuple[Metric, ...]:
    """Raises UserError for unknown ones, and for those that take more than a snapshot and its archive."""
    metrics = parse(",".join(config.metrics) or "none")
    for metric in metrics:
        if metric.family.windows:
            raise UserError(f"{metric.name} takes large photographs and a size; measure it with calc_metrics.py")
    return metrics


def flat(settings: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    result = {}
    for key, value in settings.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip()


def launch(world: int, task: Task) -> int:
    """Starts `world` processes with torch's elastic launcher. Returns the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    count = torch.cuda.device_count()
    if count and world > count:
        raise UserError(f"--gpus={world}, but this machine has {count}; use --gpus={count} or fewer")
    if not count:
        print(f"no GPU found: {world} processes share the CPU")
    # This process only waits from here on, and its log would repeat in many lines what our own sentence says.
    logging.disable(logging.CRITICAL)
    # How long a stopped process may take to end its step and save the state, in seconds, before it is killed.
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
        elastic_launch(config, work_and_exit)(task)
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def work_and_exit(task: Task) -> None:
    """Exits with the code of `work`: elastic_launch hangs if a worker returns after a signal."""
    if code := work(task):
        sys.exit(code)


def work(task: Task) -> int:
    """Runs one process: 0 when the schedule is done, 128 + signal when interrupted, 2 after a user's mistake."""
    at_a_time = task.config.train.batch_gpu or "all"
    memory = f"give a smaller --batch-gpu ({at_a_time} images at a time now)"
    with command(memory=memory, interrupted="no step was taken."), processes() as procs:
        return run(task, procs)


def run(task: Task, procs: Processes) -> int:
    """Begins or continues a run and trains to its end; every process calls it. Returns the exit code."""
    config = task.config
    say = functools.partial(print, flush=True) if procs.is_first else lambda line: None
    if not task.resume:
        config = decide_precision(config, procs.device)
    images = open_images(config.model_dump())
    state = new_state(config, procs.device)
    metrics = snapshot_metrics(config)
    evaluation = Evaluation(metrics, Settings(), procs, EqualFiles(images, config.data.mirror))
    fakes = functools.partial(Generated, labelled=images if config.data.cond else None)
    if metrics:
        pictures, photographs = evaluation.estimate(fakes(state.G_ema))
        first = f", the first ones up to {duration(photographs)} longer" if photographs else ""
        say(f"the metrics of a snapshot take about {duration(pictures)}{first}")
    if task.resume:
        folder = Path(task.resume)
        path = procs.broadcast(find_state(folder, say) if procs.is_first else None)
        state.load_state_dict(checkpoint.load(path), procs)
        say(f"continue {folder} at {state.step * config.train.batch / 1000:g} kimg, from {path.name}")
    else:
        report = initialise(state, task.init_from) if task.init_from else []
        folder = procs.broadcast(new_folder(Path(task.outdir), task.cfg, images, task.desc) if procs.is_first else None)
        for line in [f"run directory {folder}", f"precision: {config.train.precision}", *report]:
            say(line)
    if images.has_labels and not config.data.cond:
        say(f"note: {config.data.path} has labels, and this run ignores them; add --cond to train on them")
    if procs.is_first:
        with atomic_write(folder / "options.yaml") as temporary:
            temporary.write_text(to_yaml(config) + "\n", encoding="utf-8")
    return train(config, folder, state, images, procs, lambda G, stop: evaluation(fakes(G), stop))


def new_folder(outdir: Path, cfg: str, images: ImageArchive, desc: str | None) -> Path:
    """Makes the next of outdir/00000-cfg-data-desc, 00001-…"""
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        numbers = [int(match[0]) for p in outdir.iterdir() if (match := re.match(r"\d+", p.name))]
        name = "-".join(filter(None, [f"{max(numbers, default=-1) + 1:05d}", Path(cfg).stem, images.name, desc]))
        folder = outdir / re.sub(r"[^\w.-]+", "_", name)
        folder.mkdir()
    except OSError as error:
        raise UserError(
            f"cannot make a run directory in {outdir}: {error.strerror}; choose another --outdir"
        ) from error
    return folder
