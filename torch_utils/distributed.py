"""Several processes as one value: who am I, on which device, and the sums that all must agree on."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `world`, computing on `device`. With world 1, no communication takes place."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """Replaces x by its sum over the processes, and returns it."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def mean_(self, x: torch.Tensor) -> torch.Tensor:
        return self.sum_(x).div_(self.world)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return bool(self.sum_(torch.tensor(float(flag), device=self.device)))

    def share(self, value: object) -> object:
        """The first process's value, in every process."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Joins the group that torchrun's environment names (none: a single process) and leaves it at the end.

    nccl with one GPU per process where there are GPUs, gloo on CPUs.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32; speed comes from bfloat16
    elif "OMP_NUM_THREADS" not in os.environ:
        # Processes that share the cores get equal parts; more threads than cores would only wait for each other.
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, torch.get_num_threads() // local_world))
    if world > 1:
        # The others wait while the first process measures a snapshot; a dead one is the launcher's to notice.
        patience = datetime.timedelta(hours=6)
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=patience, device_id=device if on_gpu else None)
    try:
        yield Processes(rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()
