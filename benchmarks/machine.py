"""Describe the machine of a measurement, time tasks, and write random images."""

import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def describe() -> dict:
    """Return the processor, cores, features, threads, GPU and versions, as plain values."""
    cpu = platform.processor() or platform.machine()
    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        cpu = f"{fields.get('model name', cpu)} (family {fields.get('cpu family')}, model {fields.get('model')})"
        flags = set(fields.get("flags", "").split())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "features": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile"}),
        "threads": torch.get_num_threads(),
        "driver": driver(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def driver() -> str | None:
    """Return the version of NVIDIA's driver."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def device_name(kind: str) -> str:
    """Return "cpu" or the GPU's name, for names of files."""
    return "cpu" if kind == "cpu" else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())


def peak_mib() -> float:
    """Return the peak resident memory of this process in MiB (getrusage returns the parent's if that is larger)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def interleaved(
    tasks: dict[str, Callable], rounds: int, sync: Callable = lambda: None, warm: bool = True
) -> dict[str, list[float]]:
    """Time tasks that take turns, after one round to warm up; return the seconds of each task in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for i in range(rounds + warm):
        for name, task in tasks.items():
            sync()
            start = time.perf_counter()
            task()
            sync()
            if i or not warm:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def write_images(folder: Path, count: int, size: int) -> None:
    """Write `count` PNGs of random pixels into an existing folder."""
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def matmul_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Measure FLOP/s of [2048,1024] @ [1024,1024], the median of 15."""
    a, b = torch.randn(2048, 1024, device=device, dtype=dtype), torch.randn(1024, 1024, device=device, dtype=dtype)
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    (seconds,) = interleaved({"product": lambda: a @ b}, 15, sync).values()
    return 2 * 2048 * 1024 * 1024 / statistics.median(seconds)
