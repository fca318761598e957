"""Styles in files: w [N,num_ws,w_dim] in .npz (its array `w`, as of StyleGAN's projector), .npy or .safetensors."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from dnnlib.console import UserError, brief
from dnnlib.files import atomic_write, is_pipe, sha256
from rendering.styles import Seeds
from training.networks import Generator


def read_numpy(path: Path) -> dict[str, np.ndarray]:
    """Read a .npz or .npy; its content decides which it is."""
    content = np.load(path, allow_pickle=False)
    if isinstance(content, np.ndarray):
        return {"w": content}
    with content:
        return dict(content)


# ending -> functions that read {name: array} from a path, and write w to a path
FILES = {
    ".npz": (read_numpy, lambda path, w: np.savez(path, w=w)),
    ".npy": (read_numpy, np.save),
    ".safetensors": (load_file, lambda path, w: save_file({"w": w}, path)),
}


def choose_file(path: Path) -> tuple:
    """Return the entry of FILES. Raises UserError."""
    if path.suffix not in FILES:
        raise UserError(f"{path}: styles are in files that end in {', '.join(FILES)}")
    return FILES[path.suffix]


def read_styles(path: Path, G: Generator) -> Tensor:
    """Return w, float32 [N,num_ws,w_dim], of a file for G. Raises UserError.

    The file may also hold [num_ws,w_dim], one image, or [N,1,w_dim], one style for all layers.
    """
    read, _ = choose_file(path)
    if is_pipe(path):
        raise UserError(f"{path} is a pipe or device; give a file of styles")
    try:
        arrays = read(path)
    # numpy reports broken bytes by all of these
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, SafetensorError, SyntaxError) as error:
        raise UserError(f"cannot read the styles in {path}: {brief(error)}; give another file") from error
    if "w" not in arrays and len(arrays) != 1:
        raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}; the styles must have the name w")
    w = arrays["w"] if "w" in arrays else next(iter(arrays.values()))
    count, width = G.config.num_ws, G.config.w_dim
    w = w[None] if w.ndim == 2 else w
    if w.dtype.kind != "f" or w.ndim != 3 or not len(w) or w.shape[1] not in (1, count) or w.shape[2] != width:
        raise UserError(
            f"{path} holds {w.dtype} {list(w.shape)}, and the styles of this network are floats [N,{count},{width}]; "
            "give another file"
        )
    if not np.isfinite(w).all():
        raise UserError(f"{path} holds styles that are not finite; give another file")
    return torch.from_numpy(np.array(w, np.float32)).expand(-1, count, -1)


def write_styles(images: Seeds, path: Path) -> None:
    """Write w of all images. Raises UserError."""
    _, write = choose_file(path)
    w = np.stack([images.ws(i).cpu().numpy() for i in range(len(images))])
    try:
        with atomic_write(path) as temporary:
            write(temporary, w)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}; free some space, or choose another disk") from error


class SavedStyles:
    """The images of styles in a file; like rendering.styles.Seeds."""

    def __init__(self, G: Generator, path: Path):
        """Raises UserError."""
        self.w = read_styles(path, G).to(G.mapping.w_avg)
        self.digest = sha256(path)

    def __len__(self) -> int:
        return len(self.w)

    def name(self, i: int) -> str:
        return f"w{i:04d}"

    def settings(self, i: int | None = None) -> dict:
        return {"styles": self.digest} | ({} if i is None else {"index": i})

    def ws(self, i: int) -> Tensor:
        return self.w[i]
