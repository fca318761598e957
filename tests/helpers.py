"""Functions that several test files share. They import nothing of the project, so tests/gpu can use them too."""

import contextlib
import io
import itertools
import resource
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler"
)
CPP = pytest.param("cpp", marks=needs_compiler)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return standard normal numbers, a function of the shape, the seed and the type."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise_image(seed: int, height: int = 6, width: int = 8, channels: int = 3) -> np.ndarray:
    """Return random pixels: uint8 [H,W,C]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(image: np.ndarray | Image.Image, form: str = "png", **options) -> bytes:
    """Return an image as the bytes of a file."""
    data = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(data, form, **options)
    return data.getvalue()


def write_folder(folder: Path, contents: dict[str, bytes]) -> Path:
    """Write {name: bytes} as files of a folder, which need not exist. Return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path: Path, contents: dict[str, bytes]) -> Path:
    """Write {name: bytes} as a ZIP. Return its path."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Look every 20 ms, for some time, until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Limit the files that this process writes to `size` bytes: beyond, writing fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return copies that can be differentiated by."""
    return [t.detach().requires_grad_() for t in tensors]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected number."""
    return ((got - expected).abs().max() / expected.abs().max()).item() if expected.numel() else 0.0


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative root mean square of the difference. A sign that rounding flips changes it little."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def pairwise(*axes) -> list[tuple]:
    """Return few combinations of a value from each axis, so that any two values of different axes meet in one."""
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in itertools.product(*axes)}
    chosen, left = [], set().union(*pairs.values())
    while left:
        chosen.append(max(pairs, key=lambda case: len(pairs[case] & left)))
        left -= pairs[chosen[-1]]
    return chosen
