"""Keep statistics of real images on disk, under the digest of everything that they depend on, never under a path.

content = content_digest(archive bytes or pixels, in order)
key = cache_key(content, detector=detector.digest, size=[256, 256], filter="lanczos3")
(moments,) = cached([Statistics("moments", key, detector.num_features)], compute)

A file is whole or absent, and used only if its checksum is right; otherwise its content is computed again.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dnnlib.console import UserError
from dnnlib.files import atomic_write, cache_dir
from metrics.moments import Moments
from torch_utils.distributed import Processes

FORMAT = "creps-statistics-1"  # part of every key: a new number invalidates all older files
ALONE = Processes(0, 1, torch.device("cpu"))

Value = Moments | Tensor


def content_digest(images: Iterable[bytes | Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of images in order, each the bytes of a file or a tensor of pixels.

    Both identify the images; reading bytes is ten times as fast as decoding pixels.
    """
    digest = hashlib.sha256()
    for image in images:
        is_file = isinstance(image, bytes)
        data = image if is_file else image.detach().cpu().contiguous().numpy().tobytes()
        kind = "file" if is_file else f"{image.dtype} {list(image.shape)}"
        digest.update(f"{kind} {len(data)}\n".encode())  # where one ends and the next begins
        digest.update(data)
    return digest.hexdigest()


def cache_key(content: str, **facts: object) -> str:
    """Return the SHA-256, in hexadecimal, of a content_digest and of everything else that affects the statistics.

    facts: the digest of the detector (not its name), the size, the filter, the number of images: any JSON values.
    """
    text = json.dumps({"format": FORMAT, "content": content, "facts": facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Statistics(NamedTuple):
    """The name of the "moments" (a Moments, on the CPU) or the "features" (float32 [N,F]) of some images."""

    kind: str
    key: str  # a cache_key
    num_features: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.key}"


def cached(
    wanted: Sequence[Statistics],
    compute: Callable[[list[Statistics]], Sequence[Value]],
    procs: Processes = ALONE,
) -> list[Value]:
    """Return the statistics on disk, and compute and keep the missing ones.

    `compute` is called by all processes or by none, and returns the same in all. Files that are damaged, or do not hold
    finite statistics of the right form, count as missing.
    """
    folder = cache_dir() / "statistics"
    found = {one: _read(folder / f"{one.name}.safetensors", one) for one in wanted}
    missing = [one for one in wanted if procs.any(found[one] is None)]
    if missing:
        for one, value in zip(missing, compute(missing), strict=True):
            tensors = {"features": value} if isinstance(value, Tensor) else value.tensors()
            tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
            found[one] = PARSE[one.kind](tensors, one.num_features)
            if procs.is_first:
                _write(folder / f"{one.name}.safetensors", one.name, tensors)
    return [found[one] for one in wanted]


def parse_features(tensors: dict[str, Tensor], num_features: int) -> Tensor:
    features = tensors["features"]
    if features.dtype != torch.float32 or features.ndim != 2 or features.shape[1] != num_features:
        raise ValueError(f"not float32 [N,{num_features}]")
    if not features.isfinite().all():
        raise ValueError("not finite")
    return features


# kind -> function(tensors of a file, F) -> value; raises ValueError or KeyError for other tensors
PARSE = {"moments": Moments.from_tensors, "features": parse_features}


def _header(name: str, tensors: dict[str, Tensor]) -> str:
    return json.dumps({"name": name, "sha256": content_digest(tensors[key] for key in sorted(tensors))})


def _read(path: Path, wanted: Statistics) -> Value | None:
    """Return the contents of the file; None if there is none, or, with a note, if it is damaged."""
    if not os.path.exists(path):
        return None
    try:
        with safe_open(path, "pt", device="cpu") as file:
            header = (file.metadata() or {})[FORMAT]
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        if header != _header(wanted.name, tensors):
            raise ValueError("its checksum is wrong")
        return PARSE[wanted.kind](tensors, wanted.num_features)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        print(f"{path} is damaged ({error}); its statistics are computed again", file=sys.stderr, flush=True)
        return None


def _write(path: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """Write the tensors; a failure prints a note only, because the results matter more than the next call."""
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {FORMAT: _header(name, tensors)})
    except (UserError, SafetensorError, OSError) as error:
        print(f"the statistics are not kept for later calls: {error}", file=sys.stderr, flush=True)
