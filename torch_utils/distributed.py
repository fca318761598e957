"""Wrap torch.distributed: rank, world size, device and collectives as one value."""

import atexit
import contextlib
import datetime
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists, which its functions would keep alive as their default

from dnnlib.console import UserError, brief
from torch_utils.errors import memory_full
from torch_utils.precision import disable_tf32

JOIN = datetime.timedelta(minutes=10)  # within which all processes start


class PeerLost(UserError):
    """A collective failed, as it does when another process of the run has ended."""


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """Turn the failure of a collective into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if memory_full(error):
            raise
        raise PeerLost(f"another process of this run has ended ({brief(error)}); resume the run") from error


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `world`, computing on `device`. World size 1 communicates nothing.

    All ranks must call the same collectives in the same order.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """All-reduce x in place to its sum; return it."""
        if self.world > 1:
            with _peers():
                dist.all_reduce(x)
        return x

    def mean_(self, x: torch.Tensor) -> torch.Tensor:
        """All-reduce x in place to its mean; return it."""
        return self.sum_(x).div_(self.world)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Stack the x of all ranks, of one shape, on each of them: [world,…]. Differentiable any number of times."""
        if self.world == 1:
            return x[None]
        own = torch.arange(self.world, device=x.device).view(-1, *[1] * x.ndim) == self.rank
        return _Sum.apply(torch.where(own, x, 0))

    def any(self, flag: bool) -> bool:
        """Tell whether `flag` is set on any rank. With world 1, does not wait for the device."""
        return flag if self.world == 1 else bool(self.sum_(torch.tensor(float(flag), device=self.device)))

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        self.any(False)

    def broadcast(self, value: object) -> object:
        """Return rank 0's value on every rank."""
        box = [value]
        if self.world > 1:
            with _peers():
                dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, value: object) -> list:
        """Return the values of all ranks, by rank, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            with _peers():
                dist.all_gather_object(values, value)
        return values


class _Sum(torch.autograd.Function):
    """The sum over all ranks, which is its own adjoint."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        with _peers():
            dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return _Sum.apply(g)


def launched() -> bool:
    """Tell whether torchrun, or train.py through its launcher, started this process."""
    return all(os.environ.get(name, "").isdecimal() for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def launch_name() -> str:
    """Return the name of this launch, which restarted processes share: torchrun's --rdzv-id, if it has one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name == "none":  # then only the log folder of a torchrun is unique: …/<unique>/attempt_<n>/<rank>/error.json
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        name = Path(error_file).parents[2].name if error_file else uuid.uuid4().hex
    return name


def is_first() -> bool:
    """Tell whether this process has rank 0, or was not launched with others."""
    return not launched() or os.environ["RANK"] == "0"


def claim_report() -> bool:
    """Return True on the first rank that calls this, which then reports the error that the run ends with."""
    if not dist.is_initialized():
        return is_first()
    try:
        return dist.distributed_c10d._get_default_store().add("reported", 1) == 1
    except RuntimeError:  # the store is gone, with the launcher
        return True


def count_gpus() -> int:
    """Count the GPUs. Raises UserError when this PyTorch cannot use them."""
    count = torch.cuda.device_count()  # includes GPUs whose driver is too old for this PyTorch
    if count and not torch.cuda.is_available():
        raise UserError(
            f"PyTorch for CUDA {torch.version.cuda} cannot use the {count} GPUs of this machine, probably because the "
            "driver is too old; update it, install a PyTorch for it, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    return count


def check_capability(capability: tuple[int, int], built: list[str]) -> None:
    """Raise UserError unless a PyTorch `built` for sm_90, compute_120, … has code for a GPU of this capability."""
    found = re.findall(r"(sm|compute)_(\d+)([af]?)", " ".join(built))  # none on AMD's GPUs
    for kind, number, letter in found:
        least = divmod(int(number), 10)
        # PTX (compute) is for all later GPUs, a binary (sm) for those of its major version.
        newer = kind == "compute" or least[0] == capability[0]
        if capability == least or (newer and capability >= least and not letter):
            return
    if found:
        raise UserError(
            f"this GPU has compute capability {capability[0]}.{capability[1]}, and this PyTorch is built for "
            f"{', '.join(built)}; install a PyTorch for it, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )


def _meet(rank: int, world: int) -> dist.Store:
    """Return a store for these processes alone, once all have joined. Raises UserError when some are missing.

    A torchrun that restarts processes keeps its store, with the keys of the processes that ended. So every other rank
    posts a token, and waits for rank 0 to answer it with the prefix of a new store.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=JOIN))
    if rank:
        token = uuid.uuid4().hex
        store.set(f"token {rank}", token)
        try:
            prefix = store.get(f"prefix for {token}").decode()
        except dist.DistStoreError as error:
            raise UserError(f"process 0 of {world} did not start within {JOIN}; see its log") from error
        store.set(f"{prefix} {rank}", "")
        return dist.PrefixStore(prefix, store)
    prefix, missing, until = uuid.uuid4().hex, set(range(1, world)), time.monotonic() + JOIN.total_seconds()
    while missing:
        if time.monotonic() > until:
            raise UserError(f"process {min(missing)} of {world} did not start within {JOIN}; see its log")
        for other in missing:
            if store.check([f"token {other}"]):
                store.set(f"prefix for {store.get(f'token {other}').decode()}", prefix)
        time.sleep(0.1)
        missing = {other for other in missing if not store.check([f"{prefix} {other}"])}
    return dist.PrefixStore(prefix, store)


def _notice_lost_machines() -> None:
    """Make Linux close the connections of this process to a machine that has been silent for 20 seconds.

    A machine without power or network closes none itself, and gloo would wait for it until the timeout.
    """
    keep = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
    sockets = [path for path in Path("/proc/self/fd").glob("*") if path.is_socket()]
    for path in sockets:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(path.name))) as connection:
            for option, value in keep.items():
                level = socket.SOL_SOCKET if option == "SO_KEEPALIVE" else socket.IPPROTO_TCP
                connection.setsockopt(level, getattr(socket, option), value)


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Join the process group given by torchrun's environment (none: a single process); leave it in the end.

    Uses nccl with one GPU per process where there are GPUs, else gloo. Raises UserError when there are too few GPUs, or
    when this PyTorch cannot use them.
    """
    rank, world, local_rank = (
        (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) if launched() else (0, 1, 0)
    )
    if rank >= world:  # the others would wait for it
        raise UserError(f"RANK={rank} is not one of {world} processes; set it from 0 to WORLD_SIZE - 1")
    gpus = count_gpus()
    alone = gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ  # each process may see another GPU, as cuda:0
    if gpus and local_rank >= gpus and not alone:
        raise UserError(f"there are more processes than the {gpus} GPUs of this machine; use --nproc-per-node={gpus}")
    device = torch.device("cuda", local_rank % gpus) if gpus else torch.device("cpu")
    if gpus:
        check_capability(torch.cuda.get_device_capability(device), torch.cuda.get_arch_list())
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        disable_tf32()
    elif "OMP_NUM_THREADS" not in os.environ:
        # Divide the cores evenly: more threads than cores would wait for each other.
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, torch.get_num_threads() // local_world))
    if world > 1:
        options = {
            "timeout": datetime.timedelta(hours=6),  # the other ranks wait while rank 0 measures a snapshot
            "device_id": device if gpus else None,
        }
        try:
            store = _meet(rank, world)
            dist.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=world, **options)
        except dist.DistBackendError as error:
            raise UserError(
                f"NCCL cannot connect the processes, each of which needs its own GPU: {brief(error)}"
            ) from error
        except (RuntimeError, ValueError) as error:  # the latter: MASTER_ADDR is not set
            raise UserError(
                f"the processes cannot reach each other ({brief(error)}); check "
                "MASTER_ADDR, MASTER_PORT and the network"
            ) from error
        _notice_lost_machines()
        if not gpus:  # after errors too: a thread of gloo that still holds a tensor makes a finalizing Python abort
            atexit.register(dist.destroy_process_group)
    yield Processes(rank, world, device)
    if world > 1 and gpus:  # not after an error: nccl would wait for the other ranks, which wait for this one
        dist.destroy_process_group()
