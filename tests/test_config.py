"""Laws of the settings: every recipe builds, nonsense is refused by name, and what was written is read again."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import Field, ValidationError

from dnnlib.config import (
    Config,
    build,
    format_yaml,
    merge,
    nearest,
    nested,
    override,
    parse_size,
    parse_yaml,
    read_yaml,
)
from dnnlib.console import UserError
from training.config import (
    CONFIGS,
    DataConfig,
    RunConfig,
    TrainConfig,
    default_ema_kimg,
    default_gamma,
    read_recipe,
    resolve,
)
from training.data import ImageArchive
from training.networks import Generator, build_discriminator
from training.runs import to_yaml

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))

KEYS = st.sampled_from("abcd")
NESTS = st.recursive(
    st.dictionaries(KEYS, st.integers(), max_size=3), lambda inner: st.dictionaries(KEYS, inner | st.integers())
)


def one_image(folder: Path, size: int) -> ImageArchive:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (size, size)).save(folder / "0.png")
    return ImageArchive(folder)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_networks_of_its_size_refuses_others_and_survives_its_yaml(path, tmp_path):
    size = read_recipe(str(path)).get("G", {}).get("img_resolution")
    settings = merge(read_recipe(str(path)), {"data": {"path": "a ünusual: name #1"}, "metrics": ["x", "y"]})
    config = resolve(settings, one_image(tmp_path / "images", size or 64), path.name)
    assert config.micro_batch(1) == config.train.batch
    with torch.device("meta"):
        G, D = Generator(config.G), build_discriminator(config.D)
        image = G(torch.empty(4, config.G.z_dim))
        assert image.shape == (4, 3, size or 64, size or 64)
        c = torch.empty(4, config.D.label_dim) if config.D.label_dim else None
        assert D(image, c).shape == (4, 8 if config.D.kind == "projected" else 1)
    assert build(RunConfig, yaml.safe_load(to_yaml(config)), "options.yaml") == config
    for part in ("optim", "augment"):
        defaults = RunConfig.model_fields[part].default.model_dump()
        for key, value in settings.get(part, {}).items():
            assert value != defaults[key], f"{part}.{key}={value} is the default"
    if size:
        with pytest.raises(UserError, match=f"for images of {size}x{size}, .*{2 * size}x{2 * size}"):
            resolve(settings, one_image(tmp_path / "images", 2 * size), path.name)


@pytest.mark.parametrize(
    ("G", "D", "expected"),
    [
        ({"recompute": "all", "impl": "reference"}, {"recompute": "none"}, ("reference", "all")),
        ({"recompute": "none"}, {"recompute": "images", "impl": "auto"}, ("auto", "all")),
    ],
)
def test_options_of_older_runs_are_read(G, D, expected):
    """Of squares named by a resolution, of D without a kind, of networks that said how they are computed."""
    older = {"data": {"path": "x"}, "loss": {"r1_gamma": 1}, "train": {"batch": 4, "ema_kimg": 1}}
    config = build(RunConfig, older | {"G": G | {"img_resolution": 64}, "D": D | {"img_resolution": 64}}, "options")
    assert (config.train.impl, config.train.recompute) == expected
    assert config.G.img_shape == config.D.img_shape == (64, 64)
    assert config.D.kind == "residual"


def test_a_recipe_changes_that_of_its_base(tmp_path):
    for name, text in {"a": "base: b.yaml\nG: {z_dim: 3}", "b": "base: ffhq128\nG: {z_dim: 2, w_dim: 2}"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    assert read_recipe(str(tmp_path / "a.yaml")) == merge(read_recipe("ffhq128"), {"G": {"z_dim": 3, "w_dim": 2}})
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(UserError, match=r"base: a.yaml in .*b.yaml: a recipe cannot be its own base"):
        read_recipe(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("base: ffhq1288")
    with pytest.raises(UserError, match=r"base: ffhq1288 in .*b.yaml: .*did you mean ffhq128"):
        read_recipe(str(tmp_path / "a.yaml"))


# --- defaults --------------------------------------------------------------------------------------------------------


def test_the_default_gamma_goes_through_the_published_values():
    assert default_gamma(128**2, 128) == pytest.approx(0.5)
    assert default_gamma(1024**2, 8) == pytest.approx(32)
    assert 0.5 * 10 < default_gamma(512**2, 32) < 2 * 10


@given(st.integers(3, 11), st.integers(1, 512))
def test_the_default_gamma_is_a_power_law_of_pixels_per_image_of_the_batch(k, batch):
    assert default_gamma(4**k, 4 * batch) == pytest.approx(default_gamma(4 ** (k - 1), batch))
    assert default_gamma(4**k, batch) < default_gamma(4 ** (k + 1), batch)


def test_the_default_half_life_of_the_average_is_ten_kimg_at_batch_32():
    assert default_ema_kimg(32) == 10
    assert default_ema_kimg(128) == 40


def test_what_the_images_decide_is_filled_in_and_what_is_set_stays(tmp_path):
    images = one_image(tmp_path, 32)
    settings = {"data": {"path": str(tmp_path)}, "train": {"batch": 8}}
    config = resolve(settings, images, "x")
    assert config.G.img_shape == config.D.img_shape == (32, 32)
    assert (config.G.img_channels, config.G.c_dim) == (3, 0)
    assert config.loss.r1_gamma == pytest.approx(default_gamma(32**2, 8))
    assert resolve(merge(settings, {"train": {"batch": "8"}}), images, "x") == config  # quoted in YAML
    assert config.train.ema_kimg == pytest.approx(2.5)
    settings = merge(settings, {"loss": {"r1_gamma": 0.0}, "train": {"ema_kimg": 7.0}})
    config = resolve(settings, images, "x")
    assert (config.loss.r1_gamma, config.train.ema_kimg) == (0, 7)
    assert (config.G.coords, config.D.scale_aware) == ("endpoints", False)
    windows = merge(settings, {"data": {"resolution": 32}, "scales": {"max": 2}})
    config = resolve(windows, images, "x")
    assert (config.G.coords, config.D.scale_aware) == ("centers", True)
    with pytest.raises(UserError, match=r"needs G\.coords=centers"):
        resolve(merge(windows, {"G": {"coords": "endpoints"}}), images, "x")


# --- how a batch is split --------------------------------------------------------------------------------------------


def run_config(batch: int, batch_gpu: int | None, group: int) -> RunConfig:
    return RunConfig(
        data={"path": "x"},
        G={"img_resolution": 8},
        D={"img_resolution": 8, "mbstd_group": group},
        loss={"r1_gamma": 1},
        train={"batch": batch, "batch_gpu": batch_gpu, "ema_kimg": 1},
    )


@given(st.integers(1, 64), st.none() | st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_a_batch_is_split_evenly_or_refused(batch, batch_gpu, group, world):
    config = run_config(batch, batch_gpu, group)
    micro = batch_gpu or batch / world
    group = min(group, batch)
    whole = micro % group == 0 or (
        batch // world % group and micro == batch // world
    )  # else groups are of all processes
    possible = batch % world == 0 and batch % group == 0 and batch // world % micro == 0 and whole
    if possible:
        assert config.micro_batch(world) == micro
    else:
        with pytest.raises(UserError, match=r"do(es)? not divide"):
            config.micro_batch(world)


@pytest.mark.parametrize(
    ("split", "advice"),
    [
        ((10, None, 4, 3), "try 9"),
        ((12, 5, 1, 1), "use .* or 4 or"),
        ((6, None, 4, 1), "D.mbstd_group=3"),
        ((1, None, 4, 2), "2"),
    ],
)
def test_the_advice_on_splits_is_good(split, advice):
    *settings, world = split
    with pytest.raises(UserError, match=advice):
        run_config(*settings).micro_batch(world)


@pytest.mark.parametrize("recipe", [p.stem for p in CONFIGS.glob("*.yaml")])
def test_every_recipe_runs_on_up_to_sixteen_processes_that_divide_its_batch(recipe):
    train = TrainConfig(**{"ema_kimg": 1} | read_recipe(recipe)["train"])
    config = run_config(train.batch, None, 4)
    for world in (1, 2, 4, 8, 16):
        if train.batch % world == 0:
            assert config.micro_batch(world) == train.batch // world


@pytest.mark.parametrize("kind", ["stylegan2", "cips", "inr_gan"])
def test_the_recipes_to_compare_generators_differ_in_the_generator_alone(kind, tmp_path):
    images, sizes = one_image(tmp_path / "images", 64), []
    recipes = [read_recipe(name) for name in ("projected", f"projected-{kind}")]
    for recipe in recipes:
        config = resolve(merge(recipe, {"data": {"path": "x"}}), images, "recipe")
        with torch.device("meta"):
            sizes.append(sum(p.numel() for p in Generator(config.G).parameters()))
        del recipe["G"]
    assert config.G.kind == kind
    assert recipes[0] == recipes[1]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.15)


# --- refusals --------------------------------------------------------------------------------------------------------


class Inner(Config):
    width: int = Field(3, ge=1)
    rate: float = 0.5


class Outer(Config):
    inner: Inner = Inner()
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inner": {"widht": 2}}, "there is no setting inner.widht; did you mean width?"),
        ({"inner": {"width": 0}}, "inner.width=0: input should be greater than or equal to 1"),
        ({"inner": {"width": "x"}}, "inner.width='x': input should be a valid integer"),
        ({"inner": {"rate": math.nan}}, "inner.rate=nan"),
        ({"inner": {"width": 0}, "names": "abc"}, "inner.width=0"),
        ({"names": "abc"}, "names='abc': input should be a list, in [brackets]"),
        ({"inner": {1: 2}}, "1"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(settings, words):
    with pytest.raises(UserError) as error:
        build(Outer, settings, "somewhere")
    assert str(error.value).startswith("somewhere: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_cannot_be_changed():
    config = Outer()
    with pytest.raises(ValidationError):
        config.inner = Inner(width=5)
    assert config.inner.width == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"- a\n", "not list"),
        (b"a: [", "not valid YAML"),
        (b"a: {b: 1}\na: {c: 2}\n", "a is given twice .* line 2"),
        (b"a: " + b"[" * 9999, "not valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_file_without_settings_is_refused(tmp_path, text, words):
    path = tmp_path / "x.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=words) as error:
        read_yaml(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused_and_an_empty_one_is_empty_settings(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}


# --- -o and merging --------------------------------------------------------------------------------------------------


def test_an_override_is_a_dotted_key_and_a_yaml_value():
    read = {
        "a=1": {"a": 1},
        "a.b.c=1.5": {"a": {"b": {"c": 1.5}}},
        "a.b=true": {"a": {"b": True}},
        "a.b=": {"a": {"b": None}},
        "a.b=x=y": {"a": {"b": "x=y"}},
        "a=[1, two]": {"a": [1, "two"]},
        "a='1'": {"a": "1"},
        "a=010": {"a": 10},
        "a=1_000": {"a": 1000},
        "a=1e3": {"a": 1000},
        "a=-5.e-1": {"a": -0.5},
    }
    assert {assignment: override(assignment) for assignment in read} == read


@pytest.mark.parametrize(
    "value", ["0o10", "0x20", "1:30", "1__0", "1,000", "2020-12-31", "2020-99-99", "yes", "y", "off"]
)
def test_words_that_yaml_takes_for_other_numbers_are_texts_and_refused_by_numbers(value):
    assert override(f"inner.width={value}") == {"inner": {"width": value}}
    with pytest.raises(UserError, match=f"inner.width='{value}'"):
        build(Outer, override(f"inner.width={value}"), "x")


def test_every_word_for_a_switch_is_understood(tmp_path):
    for word, meant in {"yes": True, "on": True, "True": True, "no": False, "off": False, "FALSE": False}.items():
        assert build(DataConfig, merge({"path": "x"}, override(f"mirror={word}")), "x").mirror == meant


@pytest.mark.parametrize(
    "assignment",
    ["", "a", "=1", "a..b=1", "a b=1", "a=[", "a=!!x y", "a=!!int x", "a=!!bool 1", "a=!!map [b]", f"a={'[' * 9999}"],
    ids=lambda text: text[:20],
)
def test_an_override_that_cannot_be_read_is_named(assignment):
    with pytest.raises(UserError) as error:
        override(assignment)
    assert repr(assignment) in str(error.value)


@given(NESTS, NESTS)
def test_in_a_merge_the_changes_win_and_the_rest_stays(settings, changes):
    def expected(a, b):
        if isinstance(a, dict) and isinstance(b, dict):
            return {key: expected(a.get(key, b.get(key)), b.get(key, a.get(key))) for key in {**a, **b}}
        return b

    before = repr(settings), repr(changes)
    assert merge(settings, changes) == expected(settings, changes)
    assert (repr(settings), repr(changes)) == before
    assert merge(settings, {}) == settings
    assert merge(merge(settings, changes), changes) == merge(settings, changes)


@given(st.lists(KEYS, min_size=1, max_size=5), st.integers())
def test_a_dotted_key_leads_to_its_value(keys, value):
    settings = nested(".".join(keys), value)
    for key in keys:
        assert len(settings) == 1
        settings = settings[key]
    assert settings == value


def test_the_nearest_word_is_suggested_or_all_are_listed():
    assert nearest("ffhq521", ["ffhq512", "demo"]) == "did you mean ffhq512?"
    assert nearest("xyz", ["ffhq512", "demo"]) == "known are ffhq512, demo"


# --- round trip ------------------------------------------------------------------------------------------------------


@given(st.floats(1e-12, 1e12), st.floats(1e-12, 1e12))
def test_numbers_survive_the_yaml_exactly(rate, kimg):
    config = run_config(4, None, 4)
    settings = merge(config.model_dump(), {"optim": {"g_lr": rate}, "train": {"kimg": kimg}})
    config = build(RunConfig, settings, "x")
    for read in (yaml.safe_load, lambda text: parse_yaml(text, "x")):
        assert build(RunConfig, read(to_yaml(config)), "x") == config


LETTERS = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")))


@given(LETTERS | st.sampled_from(["1e3", "09", "010", "1:30", "0x10", "yes", "~", "<<", "2020-12-31", ".inf"]))
def test_texts_survive_the_yaml_whoever_reads_it(text):
    written = format_yaml({"a": text})
    assert parse_yaml(written, "x") == yaml.safe_load(written) == {"a": text}


@given(st.integers(1, 10**9 - 1), st.integers(1, 10**9 - 1))
def test_sizes_are_written_width_first_or_as_one_number(height, width):
    assert parse_size(f"{width}x{height}") == parse_size(f"{width}×{height}") == (height, width)
    assert parse_size(str(width)) == (width, width)


@pytest.mark.parametrize("text", ["", "0", "8x", "x8", "8x0", "-8", "8.5", "8x8x8", "big", "9" * 12])
def test_what_is_not_a_size_is_a_sentence(text):
    with pytest.raises(UserError, match="WIDTHxHEIGHT"):
        parse_size(text)
