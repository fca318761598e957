"""Generators as files: safetensors with the config in the header. Nothing in them can execute."""

import json
import os
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dnnlib.config import Config, build, nearest, read_yaml
from dnnlib.console import UserError
from dnnlib.files import atomic_write, fetch
from torch_utils import checkpoint
from training.networks import AnyGeneratorConfig, Generator
from training.networks.released import is_released, load_released

FORMAT = "creps-generator-1"
MODELS = Path(__file__).parents[1] / "models"  # NAME.safetensors of each included network, with its card NAME.md
# How files begin that a failed download leaves in place of a network, and what they are.
WRONG_DOWNLOADS = {
    b"version https://git-lfs": "a pointer of git-lfs; get the file itself with: git lfs pull",
    b"<!doctype": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}


class Saved(Config):
    """The config in a header, whose `kind` selects the class."""

    G: AnyGeneratorConfig = Field(discriminator="kind")


def network_names() -> list[str]:
    """List the networks in models/: emoji-people first, the others in alphabetical order."""
    return sorted((path.stem for path in MODELS.glob("*.safetensors")), key=lambda name: (name != "emoji-people", name))


def find_network(network: str | os.PathLike) -> Path:
    """Return the file of a network: a path, a run directory (its newest snapshot), a name in models/, or an address.

    An address ends in the SHA-256 of its file, see dnnlib.files.fetch. Raises UserError.
    """
    if str(network).startswith(("https://", "http://")):
        return fetch(str(network))
    path, names = Path(network), network_names()
    if os.path.isfile(path):
        try:
            with open(path, "rb") as file:
                start = file.read(64).lstrip().lower()
        except OSError as error:
            error.filename = str(path)  # a broken disk names none
            raise
        for known, what in WRONG_DOWNLOADS.items():
            if start.startswith(known):
                raise UserError(f"{path} is {what}")
        return path
    if os.path.isdir(path) and snapshots(path):
        return snapshots(path)[-1]
    if str(network) in names:
        return MODELS / f"{network}.safetensors"
    what = "is not a file, nor a folder with snapshots" if os.path.exists(path) else "does not exist"
    known = f", or one of the networks in models/; {nearest(str(network), names)}" if names else ""
    raise UserError(f"{path} {what}; give a network-snapshot-*.safetensors of a training run or a released file{known}")


def snapshot_name(kimg: float) -> str:
    """Return the name of a snapshot's file, by the thousand images seen."""
    return f"network-snapshot-{int(kimg):06d}.safetensors"


def snapshots(run: Path) -> list[Path]:
    """List the snapshots in a run directory, oldest first."""
    return sorted(run.glob("network-snapshot-*.safetensors"))


def save_generator(G: Generator, path: str | os.PathLike, **trained: float) -> None:
    """Write parameters, buffers, config and class names of G to `path` (.safetensors), whole or not at all.

    `trained`: of a snapshot, its `step` and the thousand images (`kimg`) it has seen; `read_trained` reads them.
    """
    tensors = {name: t.detach().contiguous().cpu() for name, t in G.state_dict().items()}
    names = {"class_names": G.class_names} if G.class_names else {}
    # One entry: safetensors writes several in random order, and equal generators should give equal files.
    header = {FORMAT: json.dumps(G.config.model_dump() | names | {"trained": trained})}
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, header)
    except SafetensorError as error:
        raise UserError(f"cannot write {path}: {error}; free some space, or choose another disk") from error


def load_generator(path: str | os.PathLike, device: str | torch.device = "cpu") -> Generator:
    """Load the generator that `find_network` finds at `path`, in eval mode and without gradients.

    Reads files of `save_generator`, and the G_ema of a training state or of a file that authors released. Raises
    UserError when the file is missing, broken or something else, or holds numbers that are not finite.
    """
    path = find_network(path)
    G = load_released(path, ("G_ema",))["G_ema"] if is_released(path) else _load(path)
    for name, tensor in G.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds numbers that are not finite; use an earlier snapshot")
    return G.eval().requires_grad_(False).to(device)


def _load(path: Path) -> Generator:
    settings, tensors = _read(path, tensors=True)
    for name in ("trained", "impl", "recompute"):  # the last two in older files
        settings.pop(name, None)
    names = settings.pop("class_names", [])
    config = build(Saved, {"G": {"kind": "creps"} | settings}, f"the config in {path}").G
    with torch.device("meta"):
        G = Generator(config)
    if not (isinstance(names, list) and len(names) in (0, config.c_dim) and all(isinstance(n, str) for n in names)):
        raise UserError(f"the class_names in {path} are not {config.c_dim} texts; copy or download it again")
    G.class_names = names
    expected = {name: tuple(t.shape) for name, t in G.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"the tensors in {path} do not fit its config: {wrong[0]}{more}; copy or download it again")
    # Files in half precision are fine to keep, but the networks compute in float32 at least. Copies are aligned; from
    # other addresses, libraries round differently.
    tensors = {name: t.to(torch.promote_types(t.dtype, torch.float32), copy=True) for name, t in tensors.items()}
    G.load_state_dict(tensors, assign=True)
    return G


def read_trained(path: Path) -> dict[str, float]:
    """Return the `step` and `kimg` of a snapshot, and {} of another file. Raises UserError as `load_generator`."""
    return {} if is_released(path) else _read(path, tensors=False)[0].get("trained", {})


def _read(path: Path, tensors: bool) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return the header and, with `tensors`, those of a file; of a training state, the settings of G and the G_ema."""
    if path.suffix == ".pt":
        state, options = checkpoint.load(path), path.parent / "options.yaml"
        settings = read_yaml(options).get("G") if options.is_file() else None
        if not isinstance(settings, dict):
            raise UserError(f"{path} needs the options.yaml of its run next to it, which says how G is built")
        return settings, state["G_ema"]
    try:
        with safe_open(path, "pt", device="cpu") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not an intact safetensors file ({error}); copy or download it again") from error
    if FORMAT not in metadata:
        raise UserError(f"{path} does not hold a CREPS generator (its header has no {FORMAT}); give another file")
    try:
        header = json.loads(metadata[FORMAT])
    except ValueError as error:
        raise UserError(f"{path} has no readable config in its header; it was not written by this project") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} has a config that is not a mapping; it was not written by this project")
    return header, found
