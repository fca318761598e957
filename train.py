"""Train a CREPS generator on a folder or ZIP of images."""

import functools
import os
import sys
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

# OpenMP reads this when torch is imported. By default its threads spin at each barrier and starve other processes.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import click
from pydantic.fields import FieldInfo

from dnnlib.config import fields, merge, nested, override
from dnnlib.console import UserError
from metrics.registry import parse
from torch_utils.command import Command, command
from torch_utils.distributed import launched
from training.config import RunConfig, gather, resolve
from training.runs import NewRun, ResumedRun, launch, open_images, read_config, snapshot_metrics, to_yaml, work
from training.state import find_weights

# Flags that no RunConfig field declares: the click option, and a function from its value to settings. The
# discriminator's widths are StyleGAN2's, the generator's twice that, as in the paper.
OTHERS = {
    "data": (
        {"metavar": "ZIP|DIR", "help": "Images, as dataset_tool.py writes them.  [required for a new run]"},
        lambda value: {"data": {"path": value}},
    ),
    "aug": (
        {"type": click.Choice(["noaug", "ada", "fixed", "diffaug"]), "help": "Augmentation.  [default: ada]"},
        lambda value: {"augment": {"mode": {"noaug": "none"}.get(value, value)}},
    ),
    "cbase": (
        {"type": int, "help": "Channel base of D; G gets twice as many.  [default: 32768]"},
        lambda value: {"D": {"channel_base": value}, "G": {"channel_base": 2 * value}},
    ),
    "cmax": (
        {"type": int, "help": "Most channels of D; G gets twice as many.  [default: 512]"},
        lambda value: {"D": {"channel_max": value}, "G": {"channel_max": 2 * value}},
    ),
    "fp32": (
        {"type": bool, "help": "float32 even where mixing it with bfloat16 is faster.  [default: no]"},
        lambda value: {"train": {"precision": "float32" if value else "auto"}},
    ),
    "metrics": (
        {"metavar": "A,B|none", "help": "Metrics of every snapshot.  [default: none]"},
        lambda value: {"metrics": [metric.name for metric in parse(value)]},
    ),
}
# Defaults in words, of settings that have none of their own.
DEFAULTS = {
    "batch": "the recipe's",
    "batch-gpu": "all",
    "gamma": "from size and batch",
    "resolution": "that of all images",
}


def setting_option(flag: str, field: FieldInfo) -> dict:
    """Return the click option of a setting; RunConfig checks its value."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType]
    literal = get_origin(field.annotation) is Literal
    default = DEFAULTS.get(flag, "no" if field.default is False else field.default)
    default = f"{default:g}" if isinstance(default, float) else default
    text = field.description[0].upper() + field.description[1:] + "."
    simple = len(kinds) == 1 and kinds[0] in (bool, int, float)
    kind = click.Choice(kinds) if literal else kinds[0] if simple else str
    return {"type": kind, "help": f"{text}  [default: {default}]"}


FLAGS = OTHERS | {
    extra["flag"]: (setting_option(extra["flag"], field), functools.partial(nested, dotted))
    for dotted, field, extra in fields(RunConfig)
    if extra.get("flag")
}


def flags_of_settings(function):
    """Decorate a command with FLAGS. Switches take 1/0, true/false, yes/no too, as StyleGAN2-ADA's do."""
    for flag, (option, _) in reversed(FLAGS.items()):
        if option.get("type") is bool:
            option = option | {"is_flag": False, "flag_value": "true", "metavar": "[BOOL]"}
        function = click.option(f"--{flag}", **option)(function)
    return function


# Flags that only some augmentations heed, and these.
HEEDED = {"augpipe": ("ada", "fixed"), "p": ("ada", "fixed"), "target": ("ada",)}
# What to do instead of flags of StyleGAN2-ADA that this project lacks.
FORMER = {
    "--subset": "make a smaller archive with dataset_tool.py --max-images",
    "--freezed": "layers are not frozen; lower the learning rate of D with --dlr",
    "--nhwc": "the memory format is chosen by device",
    "--nobench": "cuDNN's benchmark is always on; leave it out",
    "--allow-tf32": "TF32 is never used; mixing with bfloat16 is, see --fp32",
}


class Training(Command):
    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        try:
            return super().parse_args(context, arguments)
        except click.NoSuchOption as error:
            if error.option_name in FORMER:
                raise click.UsageError(
                    f"{error.option_name} is a flag of StyleGAN2-ADA: {FORMER[error.option_name]}", context
                ) from error
            raise


@click.command(cls=Training, context_settings={"max_content_width": 110})
@click.option("--outdir", metavar="DIR", help="Where run directories are made.  [required for a new run]")
@click.option(
    "--cfg", metavar="NAME|FILE", help="A recipe: a name in configs/, or a YAML file.  [required for a new run]"
)
@flags_of_settings
@click.option(
    "--gpus", type=click.IntRange(min=1), help="Processes to start, one per GPU (or sharing the CPU).  [default: 1]"
)
@click.option(
    "--resume",
    metavar="RUN_DIR",
    help="Resume the run in this directory from its newest intact state. With a file: the same as --init-from.",
)
@click.option(
    "--init-from",
    metavar="NAME|FILE",
    help="Start a new run from the weights of a network in models/, a snapshot, a run directory (its newest training "
    "state), a training state or a released file.",
)
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
    Resume:     python train.py --resume=runs/00000-ffhq128-faces
    On several machines, start the same command with torchrun on each.
    """
    given = [FLAGS[name.replace("_", "-")][1](value) for name, value in flags.items() if value is not None]
    settings = gather(cfg, *given, *map(override, overrides))
    if resume and init_from:
        raise UserError("--resume continues a run and --init-from starts one; give one of them")
    if resume and Path(resume).is_file():  # as users of StyleGAN start a new run from old weights
        resume, init_from = None, resume
    if resume:
        if desc:
            raise UserError(f"--desc names a new run, and {resume} has its name; leave it out")
        if outdir and os.path.isdir(resume) and os.path.realpath(outdir) != os.path.dirname(os.path.realpath(resume)):
            raise UserError(
                f"--resume continues {resume} where it is, not in {outdir}; leave out --outdir, or start a new run "
                f"there with --init-from={resume}"
            )
        task = ResumedRun(read_config(Path(resume), settings), Path(resume))
    else:
        path = settings.get("data", {}).get("path")
        missing = [name for name, v in (("--outdir", outdir), ("--cfg", cfg), ("--data", path)) if not v]
        if missing:
            raise UserError(f"a new run needs {', '.join(missing)}; to resume a run, give --resume=RUN_DIR")
        runs = Path(os.path.realpath(outdir))
        if Path(os.path.realpath(path)) in (runs, *runs.parents):
            raise UserError(
                f"--outdir={outdir} is in {path}, whose images are trained on; choose another place for runs"
            )
        if init_from:
            settings = merge(nested("augment.kimg", 100.0), settings)
            init_from = find_weights(init_from)
        images = open_images(settings)
        config = resolve(settings, images, f"recipe {cfg}")
        mode = config.augment.mode
        for flag, modes in HEEDED.items():
            if flags[flag] is not None and mode not in modes:
                raise UserError(
                    f"--{flag} belongs to --aug={' or '.join(modes)}, and this run has {mode}; leave it out"
                )
        if config.scales.teacher and not init_from:
            raise UserError("scales.teacher compares with the network that a run starts from; give it with --init-from")
        if os.environ.get("RANK", "0") == "0":
            for note in images.notes():
                click.echo(f"note: {note}", err=True)
        task = NewRun(config, Path(outdir), cfg, desc, init_from)

    under_torchrun = launched()
    world = int(os.environ["WORLD_SIZE"]) if under_torchrun else gpus or 1
    if under_torchrun and gpus not in (None, world):
        raise UserError(f"--gpus={gpus}, but torchrun started {world} processes; leave --gpus out under torchrun")
    task.config.micro_batch(world)
    snapshot_metrics(task.config)
    if dry_run:
        if not under_torchrun or os.environ["RANK"] == "0":
            click.echo(to_yaml(task.config))
    elif under_torchrun or world == 1:
        work(task)
    else:
        sys.exit(launch(world, task))


if __name__ == "__main__":
    main()
