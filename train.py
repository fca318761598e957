"""Train a CREPS generator on a folder or ZIP of images."""

import os
import sys
from pathlib import Path
from typing import get_args

# OpenMP reads this when torch is imported. By default its threads spin at each barrier and starve other processes.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import click

from dnnlib.config import Config, merge, nearest, nested, override, read_yaml
from dnnlib.console import UserError
from metrics.registry import parse
from torch_utils.command import command
from torch_utils.distributed import launched
from training.config import RunConfig, resolve
from training.runs import Task, continued, launch, open_images, snapshot_metrics, to_yaml, work
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
@command()
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
    task = Task(config, outdir, cfg, desc, resume, init_from)
    if under_torchrun or world == 1:
        sys.exit(work(task))
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


if __name__ == "__main__":
    main()
