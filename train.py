"""Train a CREPS generator on a folder or ZIP of images."""

import functools
import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import get_args

# OpenMP reads this when torch is imported. By default its threads spin at each barrier and starve other processes.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import click
import torch
import yaml

from dnnlib.config import Config, build, merge, nearest, nested, override, read_yaml
from dnnlib.console import UserError
from dnnlib.files import atomic_write
from metrics.evaluation import Evaluation, default_batch
from metrics.plan import Settings
from metrics.registry import Metric, parse
from metrics.runner import load_tools
from metrics.sources import Archive, Generated
from torch_utils.distributed import launched, processes
from training.config import RunConfig, resolve
from training.data import ImageArchive
from training.snapshot import find_network

CONFIGS = Path(__file__).parent / "configs"

# Which settings a flag sets. The discriminator's widths are StyleGAN2's, the generator's twice that, as in the paper.
FLAGS = {
    "data": lambda v: {"data.path": v},
    "cond": lambda v: {"data.cond": v},
    "mirror": lambda v: {"data.mirror": v},
    "workers": lambda v: {"data.workers": v},
    "batch": lambda v: {"train.batch": v},
    "batch_gpu": lambda v: {"train.batch_gpu": v},
    "gamma": lambda v: {"loss.r1_gamma": v},
    "cbase": lambda v: {"D.channel_base": v, "G.channel_base": 2 * v},
    "cmax": lambda v: {"D.channel_max": v, "G.channel_max": 2 * v},
    "map_depth": lambda v: {"G.mapping_layers": v},
    "mbstd_group": lambda v: {"D.mbstd_group": v},
    "glr": lambda v: {"optim.g_lr": v},
    "dlr": lambda v: {"optim.d_lr": v},
    "aug": lambda v: {"augment.mode": {"noaug": "none"}.get(v, v)},
    "p": lambda v: {"augment.p": v},
    "target": lambda v: {"augment.target": v},
    "augpipe": lambda v: {"augment.pipe": v},
    "kimg": lambda v: {"train.kimg": v},
    "tick": lambda v: {"train.tick": v},
    "snap": lambda v: {"train.snap": v},
    "seed": lambda v: {"train.seed": v},
    "fp32": lambda v: {"train.precision": "float32" if v else "auto"},
    "metrics": lambda v: {"metrics": [metric.name for metric in parse(v)]},
}

# What may change when a run is continued: nothing that the networks, the data order or the randomness depend on.
CHANGEABLE = {
    "data.path",
    "data.workers",
    "G.recompute",
    "D.recompute",
    "G.impl",
    "D.impl",
    "train.batch_gpu",
    "train.kimg",
    "train.tick",
    "train.snap",
    "metrics",
}


def switch(name: str, text: str):
    """An option that is on by its name alone, and takes 1/0, true/false, yes/no as StyleGAN2-ADA's do."""
    text += "  [default: no]"
    return click.option(name, type=bool, is_flag=False, flag_value="true", metavar="[BOOL]", help=text)


@click.command(context_settings={"max_content_width": 110})
@click.option("--outdir", metavar="DIR", help="Where run directories are made.  [required for a new run]")
@click.option(
    "--cfg", metavar="NAME|FILE", help="A recipe: a name in configs/, or a YAML file.  [required for a new run]"
)
@click.option("--data", metavar="ZIP|DIR", help="Images, as dataset_tool.py writes them.  [required for a new run]")
@click.option(
    "--gpus", type=click.IntRange(min=1), help="Processes to start, one per GPU (or sharing the CPU).  [default: 1]"
)
@click.option(
    "--batch", type=click.IntRange(min=1), help="Images per step, all processes together.  [default: the recipe's]"
)
@click.option(
    "--batch-gpu",
    type=click.IntRange(min=1),
    help="Images per process at a time, the rest accumulated.  [default: all]",
)
@click.option("--gamma", type=click.FloatRange(min=0), help="R1 weight.  [default: from size and batch]")
@switch("--cond", "Train on the archive's labels.")
@switch("--mirror", "Also show every image mirrored.")
@click.option(
    "--resume",
    metavar="RUN_DIR",
    help="Continue the run in this directory from its newest intact state. With a file: the same as --init-from.",
)
@click.option(
    "--init-from",
    metavar="NAME|FILE",
    help="Start a new run from the weights of a network in models/, a snapshot, a training state or a released .pkl.",
)
@click.option(
    "--aug",
    type=click.Choice(["noaug", "ada", "fixed", "diffaug"]),
    help="Augmentation.  [default: the recipe's, else ada]",
)
@click.option("--p", type=click.FloatRange(0, 1), help="Strength of --aug=fixed, or where ada begins.  [default: 0]")
@click.option("--target", type=click.FloatRange(-1, 1), help="What ada steers the sign of D(real) to.  [default: 0.6]")
@click.option(
    "--augpipe", type=click.Choice(["blit", "geom", "color", "bg", "bgc"]), help="Which augmentations.  [default: bgc]"
)
@click.option("--cbase", type=click.IntRange(min=1), help="Channel base of D; G gets twice as many.  [default: 32768]")
@click.option("--cmax", type=click.IntRange(min=1), help="Most channels of D; G gets twice as many.  [default: 512]")
@click.option("--map-depth", type=click.IntRange(min=1), help="Layers of the mapping network.  [default: 8]")
@click.option(
    "--mbstd-group", type=click.IntRange(min=1), help="Group of the minibatch standard deviation.  [default: 4]"
)
@click.option("--glr", type=click.FloatRange(min=0, min_open=True), help="Learning rate of G.  [default: 0.002]")
@click.option("--dlr", type=click.FloatRange(min=0, min_open=True), help="Learning rate of D.  [default: 0.002]")
@click.option(
    "--kimg", type=click.FloatRange(min=0, min_open=True), help="Length in thousand images.  [default: 25000]"
)
@click.option(
    "--tick", type=click.FloatRange(min=0, min_open=True), help="Thousand images between reports.  [default: 4]"
)
@click.option("--snap", type=click.IntRange(min=1), help="Ticks between snapshots.  [default: 50]")
@click.option("--seed", type=click.IntRange(min=0), help="Of weights, data order and latents.  [default: 0]")
@switch("--fp32", "float32 even where mixing it with bfloat16 is faster.")
@click.option("--workers", type=click.IntRange(min=0), help="Reading processes per training process.  [default: 3]")
@click.option("--metrics", metavar="A,B|none", help="Measured at every snapshot.  [default: none]")
@click.option("--desc", metavar="TEXT", help="Added to the name of the run directory.")
@click.option(
    "-o", "overrides", metavar="KEY.SUB=VALUE", multiple=True, help="Any setting of the config; may be repeated."
)
@click.option("-n", "--dry-run", is_flag=True, help="Print the settings and stop.")
def main(outdir, cfg, gpus, resume, init_from, desc, overrides, dry_run, **flags):
    """Train a CREPS generator.

    \b
    New run:    python train.py --outdir=runs --cfg=ffhq128 --data=faces.zip --gpus=8
    Continue:   python train.py --resume=runs/00000-ffhq128-faces
    On several machines, start the same command with torchrun on each.
    """
    settings = command_settings(cfg, flags, overrides)
    if resume and init_from:
        raise UserError("--resume continues a run and --init-from begins one; give one of them")
    if resume and Path(resume).is_file():  # as people of StyleGAN begin a new run from old weights
        resume, init_from = None, resume
    if resume:
        config = continued(Path(resume), settings)
    else:
        path = settings.get("data", {}).get("path")
        missing = [name for name, v in (("--outdir", outdir), ("--cfg", cfg), ("--data", path)) if not v]
        if missing:
            raise UserError(f"a new run needs {', '.join(missing)}; to continue a run, give --resume=RUN_DIR")
        if init_from:
            settings = merge(nested("augment.kimg", 100.0), settings)
            init_from = str(find_network(init_from))
        config = resolve(settings, open_images(settings), f"--cfg={cfg}")

    under_torchrun = launched()
    world = int(os.environ["WORLD_SIZE"]) if under_torchrun else gpus or 1
    if under_torchrun and gpus not in (None, world):
        raise UserError(f"--gpus={gpus}, but torchrun started {world} processes; leave --gpus out under torchrun")
    config.rounds(world)
    snapshot_metrics(config)
    if dry_run:
        click.echo(to_yaml(config))
        return
    task = (config.model_dump_json(), outdir, cfg, desc, resume, init_from)
    if under_torchrun or world == 1:
        sys.exit(work(*task))
    sys.exit(launch(world, task))


def command_settings(cfg: str | None, flags: dict, overrides: tuple[str, ...]) -> dict:
    """Nested settings from the recipe, then the flags that were given, then -o."""
    settings = {}
    if cfg:
        path = Path(cfg) if cfg.endswith((".yaml", ".yml")) else CONFIGS / f"{cfg}.yaml"
        if not path.is_file():
            known = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
            hint = "" if path.parent != CONFIGS else f"; {nearest(cfg, known)}"
            raise UserError(f"--cfg={cfg}: {path} does not exist{hint}")
        settings = {name: {} if value is None else value for name, value in read_yaml(path).items()}
    for name, value in flags.items():
        if value is not None:
            for dotted, setting in FLAGS[name](value).items():
                settings = merge(settings, nested(dotted, setting))
    for assignment in overrides:
        settings = merge(settings, override(assignment))
    for name, field in RunConfig.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        is_group = any(issubclass(kind, Config) for kind in kinds)
        if is_group and not isinstance(settings.get(name, {}), dict):
            raise UserError(f"{name}={settings[name]!r}: this is a group of settings; set one of them, {name}.…")
    path = settings.get("data", {}).get("path")
    if not isinstance(path, str | None):
        raise UserError(f"data.path={path!r} is not the path of a ZIP or folder")
    return settings


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
    refused = [key for key in new if new[key] != old[key] and key not in CHANGEABLE]
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
        if metric.family == "pfid":
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


def launch(world: int, task: tuple) -> int:
    """Starts `world` processes with torch's elastic launcher. Returns the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    count = torch.cuda.device_count()
    if count and world > count:
        raise UserError(f"--gpus={world}, but this machine has {count}; use --gpus={count} or fewer")
    if not count:
        click.echo(f"no GPU found: {world} processes share the CPU")
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
        elastic_launch(config, work_and_exit)(*task)
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def work_and_exit(*task) -> None:
    """`work` in a process of the launcher, which waits in vain for one that returns after a signal."""
    if code := work(*task):
        sys.exit(code)


def work(config_json: str, outdir: str | None, cfg: str | None, desc: str | None, resume, init_from) -> int:
    """One process of a run: 0 when the schedule is done, 128 + signal when interrupted, 2 after a user's mistake."""
    config = RunConfig.model_validate_json(config_json)
    try:
        with processes() as procs:
            return run(config, procs, outdir, cfg, desc, resume, init_from)
    except torch.OutOfMemoryError:
        at_a_time = config.train.batch_gpu or "all"
        mistake = UserError(f"the GPU's memory is full; give a smaller --batch-gpu ({at_a_time} images at a time now)")
    except UserError as error:
        mistake = error
    # One that every process finds is said once: the launcher ends the others while they hold back.
    time.sleep(5 * min(int(os.environ.get("RANK", 0)), 1))
    mistake.show()
    sys.exit(mistake.exit_code)


def run(config, procs, outdir, cfg, desc, resume, init_from) -> int:
    from torch_utils import checkpoint
    from training.loop import find_state, train
    from training.report import duration
    from training.trainer import decide_precision, initialise, new_state

    say = click.echo if procs.is_first else lambda line: None
    if not resume:
        config = decide_precision(config, procs.device)
    images = open_images(config.model_dump())
    state = new_state(config, procs.device)
    metrics = snapshot_metrics(config)
    evaluation = Evaluation(
        metrics,
        Archive(images, config.data.mirror),
        None,
        load_tools(metrics, procs),
        Settings(batch=default_batch(procs.device)),
        procs,
    )
    fakes = functools.partial(Generated, labelled=images if config.data.cond else None)
    if metrics:
        pictures, photographs = evaluation.estimate(fakes(state.G_ema))
        first = f", the first ones up to {duration(photographs)} longer" if photographs else ""
        say(f"the metrics of a snapshot take about {duration(pictures)}{first}")
    if resume:
        folder = Path(resume)
        path = procs.share(find_state(folder, say) if procs.is_first else None)
        state.load_state_dict(checkpoint.load(path), procs)
        say(f"continue {folder} at {state.step * config.train.batch / 1000:g} kimg, from {path.name}")
    else:
        report = initialise(state, init_from) if init_from else []
        folder = procs.share(new_folder(Path(outdir), cfg, images, desc) if procs.is_first else None)
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


if __name__ == "__main__":
    main()
