"""Several processes as one value: who am I, on which device, and the sums that all must agree on."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dnnlib.console import UserError


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

    def barrier(self) -> None:
        """Waits for all processes."""
        self.any(False)

    def share(self, value: object) -> object:
        """The first process's value, in every process."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def launched() -> bool:
    """Whether torchrun, or our own use of its launcher, started this process."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Joins the group that torchrun's environment names (none: a single process) and leaves it after a clean end.

    nccl with one GPU per process where there are GPUs, gloo on CPUs. Raises UserError when there are too few GPUs.
    """
    rank, world, local_rank = (
        (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) if launched() else (0, 1, 0)
    )
    gpus = torch.cuda.device_count()
    if gpus and local_rank >= gpus:
        raise UserError(f"there are more processes than the {gpus} GPUs of this machine; use --nproc-per-node={gpus}")
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
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
        dist.init_process_group("nccl" if gpus else "gloo", timeout=patience, device_id=device if gpus else None)
    yield Processes(rank, world, device)
    if world > 1:  # not after an error: nccl would wait for the others, who wait for us
        dist.destroy_process_group()
