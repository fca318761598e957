"""The settings of a training run as one frozen value, written to options.yaml in the run directory."""

import functools
import math
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from dnnlib.config import Config, build, is_group, merge, nearest, nested, parse_size, read_yaml, setting
from dnnlib.console import UserError
from training.augment import AugmentConfig
from training.data import ImageArchive
from training.diffaug import Policy
from training.networks import AnyDiscriminatorConfig, AnyGeneratorConfig
from training.networks.mapping import LR_MULT
from training.scales import ScalesConfig, check_scales


class DataConfig(Config):
    path: str = setting(may_change=True, description="ZIP or folder of images")
    contents: str | None = Field(None, description="how a resumed run knows its archive (ImageArchive.summary)")
    cond: bool = setting(False, flag="cond", description="train on the archive's labels")
    mirror: bool = setting(False, flag="mirror", description="train on every image flipped left to right as well")
    resolution: tuple[Annotated[int, Field(ge=8)], Annotated[int, Field(ge=8)]] | None = setting(
        None,
        flag="resolution",
        description="training size, R or WxH, of an archive whose images keep their own sizes",
    )
    workers: int = setting(
        3, ge=0, flag="workers", may_change=True, description="reading processes per training process"
    )

    @field_validator("resolution", mode="before")
    @classmethod
    def _read_size(cls, value: object) -> object:
        return parse_size(str(value)) if isinstance(value, str | int) else value


class AugmentSettings(AugmentConfig):
    mode: Literal["none", "ada", "fixed", "diffaug"] = setting(
        "ada", description="none, adaptive, at fixed strength p, or DiffAugment"
    )
    policy: Policy = Field(("translation", "cutout"), description="parts of diffaug; also color")
    p: float = setting(0.0, ge=0, le=1, flag="p", description="strength: initial for ada, constant for fixed")
    target: float = setting(0.6, ge=-1, le=1, flag="target", description="mean sign of D(real) that ada aims at")
    kimg: float = Field(500.0, gt=0, description="thousand images in which ada can change p by 1")


class LossConfig(Config):
    kind: Literal["logistic", "hinge", "relativistic"] = "logistic"
    pyramid: int = Field(
        1, ge=1, le=3, description="levels that D judges: images, images of half the side, …; the loss is their mean"
    )
    r1_gamma: float = setting(ge=0, flag="gamma", description="weight γ of R1: γ/2 · ‖gradient‖²")
    r1_interval: int = Field(16, ge=1, description="steps between R1 terms; each is multiplied by this")
    r2: bool = Field(False, description="add R2: R1 of generated images, with the same weight and interval")
    pl_weight: float = Field(2.0, ge=0, description="weight of the path-length penalty; 0 turns it off")
    pl_interval: int = Field(4, ge=1, description="steps between path-length terms; each is multiplied by this")
    style_mixing: float = Field(
        0.0, ge=0, le=1, description="share of generated images whose later styles are those of a second latent"
    )
    pl_decay: float = Field(0.01, gt=0, le=1, description="rate of the running mean of the path lengths")


class OptimConfig(Config):
    g_lr: float = setting(0.002, gt=0, flag="glr", description="learning rate of G")
    d_lr: float = setting(0.002, gt=0, flag="dlr", description="learning rate of D")
    mapping_lr: float = Field(
        LR_MULT, gt=0, description="learning rate of the mapping layers, as a share of g_lr and d_lr"
    )
    lr_decay: float = Field(
        0.0, ge=0, le=1, description="share of train.kimg, at its end, in which all learning rates fall linearly to 0"
    )
    beta1: float = Field(0.0, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)


class TrainConfig(Config):
    batch: int = setting(ge=1, flag="batch", description="images per step over all processes")
    batch_gpu: int | Literal["auto"] | None = setting(
        None,
        flag="batch-gpu",
        may_change=True,
        description="images per process at a time, the rest accumulated; auto: the most that fit into memory",
    )
    kimg: float = setting(25000.0, gt=0, flag="kimg", may_change=True, description="length in thousands of real images")
    tick: float = setting(4.0, gt=0, flag="tick", may_change=True, description="kimg between reports")
    snap: int = setting(50, ge=1, flag="snap", may_change=True, description="ticks between snapshots")
    seed: int = setting(0, ge=0, lt=2**31, flag="seed", description="seed of weights, data order and latents")
    precision: Literal["auto", "float32", "float64", "bfloat16"] = Field(
        "auto",
        description="bfloat16 mixes with float32; auto does so where it is fast: GPUs and CPUs with bfloat16",
    )
    impl: Literal["auto", "reference"] = setting(
        "auto", may_change=True, description="implementation of operations: the fastest on the device, or plain PyTorch"
    )
    recompute: Literal["none", "pixels", "all"] = setting(
        "pixels", may_change=True, description="what backward passes recompute instead of storing"
    )
    ema_kimg: float = Field(ge=0, description="half-life of the EMA of G, in thousand images")
    ema_rampup: float | None = Field(0.05, gt=0, description="half-life at most this share of the images seen")
    w_avg_decay: float = Field(0.998, ge=0, le=1, description="share of w_avg that a step keeps")
    max_bad_steps: int = Field(20, ge=1, description="steps in a row with non-finite gradients that end the run")

    @property
    def steps(self) -> int:
        """Return the steps of the whole run."""
        return math.ceil(round(self.kimg * 1000) / self.batch)

    @field_validator("batch_gpu", mode="plain")
    @classmethod
    def _count_or_auto(cls, value: object) -> object:
        count = int(value) if isinstance(value, str) and value.isdecimal() else value  # a flag's value is text
        if count not in (None, "auto") and (type(count) is not int or count < 1):
            raise ValueError(f"{value!r} is not a number of images; give 1 or more, or auto")
        return count


class RunConfig(Config):
    data: DataConfig
    G: AnyGeneratorConfig = Field(discriminator="kind")
    D: AnyDiscriminatorConfig = Field(discriminator="kind")
    loss: LossConfig
    optim: OptimConfig = OptimConfig()
    augment: AugmentSettings = AugmentSettings()
    scales: ScalesConfig = ScalesConfig()
    train: TrainConfig
    metrics: tuple[str, ...] = setting((), may_change=True, description="measured at every snapshot")

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, settings: object) -> object:
        """Read older run directories: without kinds, as recipes may be, and with impl and recompute in G and D."""
        groups = [settings.get(name) for name in ("G", "D", "train")] if isinstance(settings, dict) else [None]
        if not all(isinstance(group, dict) for group in groups):
            return settings
        settings = merge({"G": {"kind": "creps"}, "D": {"kind": "residual"}}, settings)
        of_G, of_D = ({key: settings[n].pop(key, None) for key in ("impl", "recompute")} for n in ("G", "D"))
        older = of_G | ({"recompute": "all"} if of_D["recompute"] == "images" else {})
        settings["train"] = {key: value for key, value in older.items() if value} | settings["train"]
        return settings

    @model_validator(mode="after")
    def _consistent(self):
        for name in ("img_shape", "img_channels", "c_dim"):
            g, d = getattr(self.G, name), getattr(self.D, name)
            if g != d:
                raise ValueError(f"G.{name}={g} and D.{name}={d} must be equal; set one of them")
        if self.loss.style_mixing and self.G.num_ws < 2:
            raise ValueError(f"loss.style_mixing needs several styles, and G.kind={self.G.kind} has one; set it to 0")
        if self.loss.r2 and not self.loss.r1_gamma:
            raise ValueError("loss.r2=true has the weight loss.r1_gamma, which is 0; set --gamma, or loss.r2=false")
        if self.augment.mode == "fixed" and not self.augment.p:
            raise ValueError(
                "augment.mode=fixed augments with strength augment.p, which is 0; set it, for example to 0.2"
            )
        check_scales(self)
        height, width = self.D.img_shape
        parts = 2 ** (self.loss.pyramid - 1)
        if any(side % parts for side in (height, width, *self.scales.larger_shape((height, width)))):
            raise ValueError(
                f"loss.pyramid={self.loss.pyramid} halves images {self.loss.pyramid - 1} times, and the sides of "
                f"{width}x{height}, or of larger images, do not divide by {parts}; use fewer levels or another size"
            )
        return self

    @property
    def mbstd_group(self) -> int:
        """Return how many images form a minibatch-std group."""
        return min(self.D.mbstd_group, self.train.batch)

    def micro_batches(self, world: int) -> list[int]:
        """List the micro-batches that each of `world` processes can accumulate a step from, in images, ascending.

        Each holds whole minibatch-std groups. Where a process has too few images for that, the groups are those of
        all processes, and its only micro-batch is all of its images. Raises UserError when there is none.
        """
        batch, group = self.train.batch, self.mbstd_group
        if batch % world:
            advice = batch // world * world or world
            raise UserError(f"train.batch={batch} does not divide over {world} processes; try {advice}")
        if batch % group:
            divisor = next(n for n in range(group, 0, -1) if batch % n == 0)
            raise UserError(
                f"train.batch={batch} does not divide into minibatch-std groups of {group}; set it to a multiple, or "
                f"D.mbstd_group={divisor}"
            )
        own = batch // world
        return [n for n in range(group, own + 1, group) if own % n == 0] or [own]

    def micro_batch(self, world: int) -> int:
        """Return how many images each of `world` processes takes at a time. Raises UserError."""
        sizes = self.micro_batches(world)
        micro = sizes[-1] if self.train.batch_gpu in (None, "auto") else self.train.batch_gpu
        if micro not in sizes:
            raise UserError(
                f"train.batch_gpu={micro} does not divide the {sizes[-1]} images per process into whole minibatch-std "
                f"groups; use {' or '.join(map(str, sizes))}"
            )
        return micro

    def with_train(self, **changes: object) -> "RunConfig":
        """Return a copy with `changes` to `train`."""
        return self.model_copy(update={"train": self.train.model_copy(update=changes)})


CONFIGS = Path(__file__).parents[1] / "configs"


def read_recipe(name: str, *over: Path) -> dict:
    """Read a recipe: a name in configs/, or a YAML file, and its `base`, another recipe. Raises UserError.

    over: the recipes based on this one.
    """
    is_file = name.endswith((".yaml", ".yml"))
    path = (over[0].parent if over else Path()) / name if is_file else CONFIGS / f"{name}.yaml"
    where = f"base: {name} in {over[0]}" if over else f"recipe {name}"
    if not path.is_file():
        recipes = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
        known = f"; {nearest(path.stem, recipes)}" if not is_file or path.stem in recipes else ""
        raise UserError(f"{where}: {path} does not exist{known}")
    if path in over:
        raise UserError(f"{where}: a recipe cannot be its own base; name another one")
    settings = {key: {} if value is None else value for key, value in read_yaml(path).items()}
    base = settings.pop("base", None)
    return merge(read_recipe(str(base), path, *over), settings) if base else settings


def gather(recipe: str | None, *changes: dict) -> dict:
    """Read a recipe and apply nested `changes`, the last one wins. Raises UserError where a group has a value."""
    settings = functools.reduce(merge, changes, read_recipe(recipe) if recipe else {})
    for name, field in RunConfig.model_fields.items():
        group = any(is_group(kind) for kind in (field.annotation, *get_args(field.annotation)))
        if group and not isinstance(settings.get(name, {}), dict):
            raise UserError(f"{name}={settings[name]!r}: this is a group of settings; set one of them, {name}.…")
    path = settings.get("data", {}).get("path")
    if not isinstance(path, str | None):
        raise UserError(f"data.path={path!r} is not the path of a ZIP or folder")
    return settings


def default_gamma(pixels: int, batch: int) -> float:
    """Return R1's γ by the power law through the published 128² (batch 128, γ 0.5) and 1024² (batch 8, γ 32).

    It gives 6 for 512² with batch 32; the published γ is 10.
    """
    return 0.5 * (pixels / batch / 128) ** 0.6


def default_ema_kimg(batch: int) -> float:
    return batch * 10 / 32


def resolve(settings: dict, images: ImageArchive, where: str) -> RunConfig:
    """Build the config from nested `settings` and the images. Raises UserError, which begins with `where`.

    Size, channels, label length and contents come from the images; γ and the EMA half-life, if not set, from size and
    batch; what windows need, if not set, from scales.max.
    """
    channels, height, width = images.shape
    path = settings["data"]["path"]
    settings = merge(merge({"G": {}, "D": {}}, settings), nested("data.contents", images.summary()))
    for network in ("G", "D"):
        side = settings[network].pop("img_resolution", None)
        given = settings[network].get("img_shape", (height, width) if side is None else (side, side))
        if isinstance(given, list | tuple) and list(given) != [height, width]:
            raise UserError(
                f"{where} is for images of {'x'.join(map(str, given[::-1]))}, but {path} holds {width}x{height}; "
                "make another archive with dataset_tool.py, or choose another --cfg"
            )
        found = {"img_shape": (height, width), "img_channels": channels, "c_dim": images.label_dim}
        settings[network] = found | settings[network]

    def number(group: str, name: str) -> float:
        try:
            return max(1.0, float(settings.get(group, {}).get(name)))
        except (TypeError, ValueError):
            return 1.0  # build refuses a wrong one

    windows, batch = number("scales", "max") > 1, number("train", "batch")
    defaults = {
        "D.scale_aware": windows or number("loss", "pyramid") > 1,
        "loss.r1_gamma": default_gamma(height * width, batch),
        "train.ema_kimg": default_ema_kimg(batch),
    } | ({"G.coords": "centers"} if windows else {})
    for dotted, value in defaults.items():
        settings = merge(nested(dotted, value), settings)
    return build(RunConfig, settings, where)
