"""The memory that a training step takes, and the largest micro-batch that fits."""

import contextlib
import functools
import gc
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from dnnlib.console import UserError
from torch_utils.distributed import Processes
from torch_utils.errors import memory_full
from training.config import RunConfig
from training.data import Batch, ImageArchive
from training.state import new_state
from training.trainer import Trainer

GIB = 2**30
USABLE = 0.9  # of the memory: the rest is for fragmentation, metrics and other processes on the machine


def peak_bytes(device: torch.device) -> float:
    """Return the peak of allocations on the GPU since its last reset, or of this process's memory since its start.

    nan on Windows, where Python does not know the latter.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux, ru_maxrss starts at the peak of the process that started this one.
    with contextlib.suppress(OSError, TypeError):
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes() -> int:
    """Return how much more memory this process may take: what the machine, or its container, has left."""
    if not hasattr(os, "sysconf"):
        raise UserError("on Windows the free memory is not known; set train.batch_gpu to a number of images, not auto")
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        found.append(1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" without a limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        cached = re.search(r"^inactive_file (\d+)", Path("/sys/fs/cgroup/memory.stat").read_text(), re.MULTILINE)
        found.append(limit - used + int(cached[1]))  # the kernel gives cached files up first
    return min(found)


def largest_micro_batch(config: RunConfig, images: ImageArchive, procs: Processes) -> int:
    """Return the largest micro-batch that fits into memory on every rank. Every rank calls it. Raises UserError."""
    sizes = config.micro_batches(procs.world)
    if len(sizes) == 1:
        return sizes[0]
    run = functools.partial(try_step, config, images, procs.device)
    fits = _fits_by_trying(run, procs) if procs.device.type == "cuda" else _fits_by_measuring(run, procs, sizes[0])
    for micro in reversed(sizes):
        if not procs.any(not fits(micro)):
            return micro
    raise UserError(f"a GPU does not hold a step of {sizes[0]} images; set train.recompute=all, or smaller networks")


def _fits_by_trying(run: Callable[[int], None], procs: Processes) -> Callable[[int], bool]:
    """Return a predicate: does `run` of N images fit into the GPU memory?"""

    def fits(micro: int) -> bool:
        torch.cuda.set_per_process_memory_fraction(USABLE, procs.device)
        try:
            run(micro)
            full = False
        except RuntimeError as error:
            if not memory_full(error):
                raise
            full = True
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(procs.device)
        torch.cuda.set_per_process_memory_fraction(1.0, procs.device)
        return not full

    return fits


def _fits_by_measuring(run: Callable[[int], None], procs: Processes, few: int) -> Callable[[int], bool]:
    """Return a predicate: do N images fit into the memory of the machine, by what each of `few` uses?"""
    available = USABLE * available_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", procs.world))
    before = peak_bytes(procs.device)
    run(few)
    per_image = (peak_bytes(procs.device) - before) / few
    return lambda micro: micro == few or per_image * micro <= available


def try_step(config: RunConfig, images: ImageArchive, device: torch.device, micro: int) -> None:
    """Run the first step, in which all phases are due, of a run whose whole batch is `micro` augmented images."""
    config = config.with_train(batch=micro, batch_gpu=None)
    state = new_state(config, device)
    state.augment_p = float(config.augment.mode != "none")
    windows = torch.tensor([[1.0, 0.0, 0.0]] * micro, dtype=torch.float64) if config.scales.max > 1 else None
    shape = images.shape[0], *config.scales.larger_shape(images.shape[1:])
    batch = Batch(torch.zeros(micro, *shape, dtype=torch.uint8), torch.zeros(micro, images.label_dim), windows)
    Trainer(config, state, images, Processes(0, 1, device)).step(batch)
