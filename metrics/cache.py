"""Statistics of real pictures, kept on disk under the digest of all that they were computed from, never under a path.

content = content_digest(archive bytes or pixels, in order)
key = cache_key(content, detector=detector.digest, size=[256, 256], filter="lanczos3")
moments = cached_moments(key, detector.num_features, compute)

A file is whole or absent, and read only when its own checksum is right; otherwise its content is computed again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import click
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dnnlib.console import UserError
from dnnlib.files import atomic_write, cache_dir
from metrics.moments import Moments
from torch_utils.distributed import Processes

FORMAT = "creps-statistics-1"  # part of every key: a new number forgets all older files
ALONE = Processes(0, 1, torch.device("cpu"))

T = TypeVar("T")


def content_digest(pictures: Iterable[bytes | Tensor]) -> str:
    """SHA-256, in hexadecimal, of pictures in their order: the bytes of each file, or its pixels, a tensor.

    Both tell the same pictures from others; the bytes are read ten times as fast as pixels are decoded.
    """
    digest = hashlib.sha256()
    for picture in pictures:
        is_file = isinstance(picture, bytes)
        data = picture if is_file else picture.detach().cpu().contiguous().numpy().tobytes()
        kind = "file" if is_file else f"{picture.dtype} {list(picture.shape)}"
        digest.update(f"{kind} {len(data)}\n".encode())  # where one ends and the next begins
        digest.update(data)
    return digest.hexdigest()


def cache_key(content: str, **facts: object) -> str:
    """SHA-256, in hexadecimal, of a content_digest and of all else that decides the statistics.

    That is the digest of the detector (not its name), the size, the filter, how many pictures: anything JSON holds.
    """
    text = json.dumps({"format": FORMAT, "content": content, "facts": facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cached_moments(key: str, num_features: int, compute: Callable[[], Moments], procs: Processes = ALONE) -> Moments:
    """The moments kept under `key`, or else compute(), which are then kept. On the CPU.

    `compute` is called by all processes or by none, and returns the same in all. It is called too when the file is
    damaged or holds anything but finite moments of `num_features` features.
    """
    return _cached(
        f"moments-{key}", compute, Moments.tensors, lambda tensors: Moments.from_tensors(tensors, num_features), procs
    )


def cached_features(key: str, num_features: int, compute: Callable[[], Tensor], procs: Processes = ALONE) -> Tensor:
    """float32 [N,num_features], as cached_moments."""

    def parse(tensors: dict[str, Tensor]) -> Tensor:
        features = tensors["features"]
        if features.dtype != torch.float32 or features.ndim != 2 or features.shape[1] != num_features:
            raise ValueError(f"not float32 [N,{num_features}]")
        if not features.isfinite().all():
            raise ValueError("not finite")
        return features

    return _cached(f"features-{key}", compute, lambda features: {"features": features}, parse, procs)


def _cached(
    name: str,
    compute: Callable[[], T],
    unpack: Callable[[T], dict[str, Tensor]],
    parse: Callable[[dict[str, Tensor]], T],  # raises ValueError or KeyError for other tensors
    procs: Processes,
) -> T:
    path = cache_dir() / "statistics" / f"{name}.safetensors"
    value = _read(path, name, parse)
    if not procs.any(value is None):
        return value
    tensors = {key: t.detach().cpu().contiguous() for key, t in unpack(compute()).items()}
    value = parse(tensors)
    if procs.is_first:
        _write(path, name, tensors)
    return value


def _header(name: str, tensors: dict[str, Tensor]) -> str:
    return json.dumps({"name": name, "sha256": content_digest(tensors[key] for key in sorted(tensors))})


def _read(path: Path, name: str, parse: Callable[[dict[str, Tensor]], T]) -> T | None:
    """What the file holds; None when there is none, or, with a note, when it is damaged."""
    if not os.path.exists(path):
        return None
    try:
        with safe_open(path, "pt", device="cpu") as file:
            header = (file.metadata() or {})[FORMAT]
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        if header != _header(name, tensors):
            raise ValueError("its checksum is wrong")
        return parse(tensors)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        click.echo(f"{path} is damaged ({error}); its statistics are computed again", err=True)
        return None


def _write(path: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """Keeps the tensors; when that fails, says so and goes on, for computing them took longer than it takes to lose."""
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {FORMAT: _header(name, tensors)})
    except (UserError, SafetensorError, OSError) as error:
        click.echo(f"the statistics are not kept for the next time: {error}", err=True)
