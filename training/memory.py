"""The memory that a training step takes, and the largest micro-batch that fits."""

import contextlib
import gc
import os
import re
import resource
import sys
from pathlib import Path

import torch

from dnnlib.console import UserError
from torch_utils.distributed import Processes
from training.config import RunConfig
from training.data import ImageArchive
from training.state import new_state
from training.trainer import Trainer

GIB = 2**30
USABLE = 0.9  # of the memory: the rest is for fragmentation, metrics and whatever else runs on the machine


def peak_bytes(device: torch.device) -> int:
    """Return the peak of allocations on the GPU since its last reset, or of this process's memory since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes() -> int:
    """Return how much more memory this process may take: what the machine, or its container, has left."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        found.append(1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" without a limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found.append(limit - used)
    return min(found)


def decide_micro_batch(config: RunConfig, images: ImageArchive, procs: Processes) -> RunConfig:
    """Replace `batch_gpu: auto` by the largest micro-batch that fits, so that a resumed run computes the same.

    Every rank calls it. Raises UserError when a GPU does not hold the smallest.
    """
    if config.train.batch_gpu != "auto":
        return config
    sizes = config.micro_batches(procs.world)
    largest = largest_by_trying if procs.device.type == "cuda" else largest_by_measuring
    micro = largest(config, images, procs, sizes) if len(sizes) > 1 else sizes[0]
    return config.with_train(batch_gpu=micro)


def largest_by_trying(config: RunConfig, images: ImageArchive, procs: Processes, sizes: list[int]) -> int:
    """Return the largest of `sizes` whose step no rank runs out of GPU memory in."""
    torch.cuda.set_per_process_memory_fraction(USABLE, procs.device)
    for micro in reversed(sizes):
        try:
            try_step(config, images, procs.device, micro)
            full = False
        except torch.OutOfMemoryError:
            full = True
        gc.collect()
        torch.cuda.empty_cache()
        if not procs.any(full):
            torch.cuda.set_per_process_memory_fraction(1.0, procs.device)
            torch.cuda.reset_peak_memory_stats(procs.device)
            return micro
    raise UserError(f"the GPU does not hold a step of {sizes[0]} images; try train.recompute=all, or smaller networks")


def largest_by_measuring(config: RunConfig, images: ImageArchive, procs: Processes, sizes: list[int]) -> int:
    """Return the largest of `sizes` that fits into the memory of the machine, by what one image takes."""
    available = USABLE * available_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", procs.world))
    peaks = [peak_bytes(procs.device)]
    for micro in sizes[:2]:
        try_step(config, images, procs.device, micro)
        peaks.append(peak_bytes(procs.device))
    per_image = (peaks[2] - peaks[1]) / (sizes[1] - sizes[0])
    fitting = [n for n in sizes if peaks[1] - peaks[0] + per_image * (n - sizes[0]) <= available]
    return procs.broadcast(max(fitting, default=sizes[0]))


def try_step(config: RunConfig, images: ImageArchive, device: torch.device, micro: int) -> None:
    """Run the first step, in which all phases are due, of a run whose whole batch is `micro` augmented images."""
    config = config.with_train(batch=micro, batch_gpu=None)
    state = new_state(config, device)
    state.augment_p = float(config.augment.mode != "none")
    real, c = torch.zeros(micro, *images.shape, dtype=torch.uint8), torch.zeros(micro, images.label_dim)
    Trainer(config, state, images, Processes(0, 1, device)).step(real, c)
