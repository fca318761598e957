"""Keep statistics of real images on disk, under the digest of everything that they depend on, never under a path.

content = content_digest(bytes of the files, in order)
key = cache_key(content, detector=detector.digest, size=[256, 256], filter="lanczos3")
moments = read("moments", key)

A file is whole or absent, and used only if its checksum is right.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dnnlib.console import UserError
from dnnlib.files import atomic_write, cache_dir
from metrics.moments import Moments

FORMAT = "creps-statistics-1"  # part of every key: a new number invalidates all older files
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


def _path(kind: str, key: str) -> Path:
    return cache_dir() / "statistics" / f"{kind}-{key}.safetensors"


def _header(name: str, tensors: dict[str, Tensor]) -> str:
    return json.dumps({"name": name, "sha256": content_digest(tensors[key] for key in sorted(tensors))})


def read(kind: str, key: str) -> Value | None:
    """Return the "moments" (a Moments, on the CPU) or the "features" (float32 [N,F]) under a cache_key.

    None if there are none or, with a note, if the file is damaged.
    """
    path = _path(kind, key)
    if not os.path.exists(path):
        return None
    try:
        with safe_open(path, "pt", device="cpu") as file:
            header = (file.metadata() or {})[FORMAT]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header != _header(path.stem, tensors):
            raise ValueError("its checksum is wrong")
        return tensors["features"] if kind == "features" else Moments.from_tensors(tensors)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        print(f"{path} is damaged ({error}); its statistics are computed again", file=sys.stderr, flush=True)
        return None


def write(kind: str, key: str, value: Value) -> None:
    """Keep statistics; a failure prints a note only, because the results matter more than the next call."""
    path = _path(kind, key)
    tensors = {"features": value} if isinstance(value, Tensor) else value.tensors()
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {FORMAT: _header(path.stem, tensors)})
    except (UserError, SafetensorError, OSError) as error:
        print(f"the statistics are not kept for later calls: {error}", file=sys.stderr, flush=True)
