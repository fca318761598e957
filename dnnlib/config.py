"""Defines settings as frozen, validated values; reads them from YAML and from overrides with dotted keys."""

import copy
import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from dnnlib.console import UserError


class Config(BaseModel):
    """Base of every settings class: immutable and typed; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


C = TypeVar("C", bound=Config)


def setting(default=..., *, flag: str | None = None, may_change: bool = False, **limits):
    """Declare a field of a Config. `flag`: its name on the command line; `may_change`: when a run is resumed."""
    return Field(default, json_schema_extra={"flag": flag, "may_change": may_change}, **limits)


def fields(kind: type[Config], prefix: str = "") -> Iterator[tuple[str, FieldInfo, dict]]:
    """Yield (dotted name such as "train.batch", field, its flag and may_change); fields of unions once."""
    found = {}
    for name, field in kind.model_fields.items():
        groups = [k for k in (field.annotation, *get_args(field.annotation)) if is_group(k)]
        inner = [entry for group in groups for entry in fields(group, f"{prefix}{name}.")]
        for dotted, leaf, extra in inner or [(prefix + name, field, field.json_schema_extra or {})]:
            found.setdefault(dotted, (dotted, leaf, extra))
    yield from found.values()


def is_group(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Config)


def nearest(word: str, known: Iterable[str], essence: Callable[[str], str] = str.lower) -> str:
    """Return a clause that names the known word closest to `word` by its `essence`, or lists the known ones."""
    known = {essence(name): name for name in known}
    close = difflib.get_close_matches(essence(word), known, n=1, cutoff=0.5)
    return f"did you mean {known[close[0]]}?" if close else f"known are {', '.join(known.values())}"


def parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) of "1024x512", width first, or of "512", a square. Raises UserError."""
    match = re.fullmatch(r"\s*0*([1-9]\d{0,8})(?:[xX×]0*([1-9]\d{0,8}))?\s*", text)
    if not match:
        raise UserError(f"{text!r} is not a size in pixels; write WIDTHxHEIGHT, or one number for a square")
    width, height = match.groups()
    return int(height or width), int(width)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML takes the last one, and reads numbers as decimal.

    In YAML 1.1, 010 is 8, 0x20 is 32, 1:30 is 90 and 1e3 is a text. Here 010 is 10, 1e3 is 1000 and the others are
    texts, which a setting that is a number refuses.
    """

    yaml_implicit_resolvers: ClassVar = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key, _ in node.value if keys.count(key.value) > 1]:
            raise yaml.constructor.ConstructorError(
                problem=f"{twice[-1].value} is given twice", problem_mark=twice[-1].start_mark
            )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.1 or _Loader would take for something else."""


INT, FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float"))
_DIGITS = "[0-9]+(?:_[0-9]+)*"
_WORDS = {  # tag -> (pattern of the whole word, its first characters)
    INT: (rf"[-+]?{_DIGITS}", "-+0123456789"),
    FLOAT: (rf"[-+]?(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    "tag:yaml.org,2002:bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:merge": ("<<", "<"),
}
for _tag, (_pattern, _first) in _WORDS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))
_Loader.add_constructor(INT, lambda loader, node: int(loader.construct_scalar(node)))
_Loader.add_constructor(FLOAT, lambda loader, node: float(loader.construct_scalar(node)))


def parse_yaml(text: str, where: str) -> object:
    """Return the value of a YAML text. Raises UserError, which begins with `where`."""
    try:
        return yaml.load(text, _Loader)
    # All but the first two are what PyYAML raises for tags that do not fit their values.
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def format_yaml(settings: dict) -> str:
    """Return the text from which parse_yaml makes `settings`."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True).rstrip("\n")


def read_yaml(path: str | Path) -> dict:
    """Read the mapping in a YAML file; an empty file is an empty mapping. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    settings = parse_yaml(text, path) or {}
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold settings like `train: {{batch: 32}}`, not {type(settings).__name__}")
    return settings


def merge(settings: dict, changes: dict) -> dict:
    """Return a copy of nested `settings` updated by nested `changes`."""
    merged = copy.deepcopy(settings)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def nested(dotted: str, value: object) -> dict:
    """Turn "a.b" and 1 into {"a": {"b": 1}}."""
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def override(assignment: str) -> dict:
    """Parse `key.sub=value` into nested settings; the value is YAML. Raises UserError."""
    dotted, equals, text = assignment.partition("=")
    if not equals or not all(part.isidentifier() for part in dotted.split(".")):
        raise UserError(
            f"cannot read the setting {assignment!r}; write it as key.sub=value, for example train.batch=32"
        )
    return nested(dotted, parse_yaml(text, f"the value of {assignment!r}"))


def build(kind: type[C], settings: dict, where: str) -> C:
    """Make a `kind` from `settings`. Raises one UserError that begins with `where` and names every mistake."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        problems = [_sentence(kind, problem) for problem in error.errors()]
        raise UserError(f"{where}: " + "; ".join(problems)) from error


def _sentence(kind: type[Config], problem: dict) -> str:
    path, owner = [], kind
    for i, part in enumerate(problem["loc"]):
        kinds = [k for k in get_args(owner) if is_group(k)]
        if len(kinds) > 1:  # a union of configs: the part is the kind that was given
            owner = next((k for k in kinds if k.model_fields["kind"].default == part), None)
            continue
        path.append(str(part))
        if i < len(problem["loc"]) - 1:
            owner = owner.model_fields[part].annotation if part in getattr(owner, "model_fields", {}) else None
    dotted = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"there is no setting {dotted}; {nearest(path[-1], owner.model_fields)}"
    if problem["type"] == "union_tag_invalid":
        known = problem["ctx"]["expected_tags"].replace("'", "")
        return f"{dotted}.kind={problem['ctx']['tag']!r} is unknown; use one of {known}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{dotted} is missing"
    if not path or problem["type"] == "value_error":
        return f"{dotted}: {message}" if dotted else message
    if problem["type"] == "tuple_type":
        message = "input should be a list, in [brackets]"
    return f"{dotted}={problem['input']!r}: {message[0].lower()}{message[1:]}"
