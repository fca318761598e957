"""Reads lists of items in order, some ahead of their use in other processes."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch.utils.data import DataLoader

from dnnlib.console import UserError
from torch_utils.signals import STOPS

T = TypeVar("T")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_ahead(
    read: Callable[[list[int]], T], lists: Iterable[list[int]], workers: int = 0, pin_memory: bool = False
) -> Iterator[T]:
    """Yield read(indices) for each of `lists`, in order; `workers` processes read ahead. Raises read's UserErrors."""
    loader = DataLoader(
        _Lists(read),
        sampler=lists,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    return _unwrap(loader)


class _Lists:
    """Maps indices to what is read. A UserError returns as its sentence: DataLoader would wrap it in a traceback."""

    def __init__(self, read: Callable[[list[int]], T]):
        self.read = read

    def __getitem__(self, indices: list[int]) -> T | str:
        try:
            return self.read(indices)
        except UserError as error:
            return str(error)


def _unwrap(loader: DataLoader) -> Iterator:
    for item in loader:
        if isinstance(item, str):
            raise UserError(item)
        yield item


def _leave_signals_to_the_parent(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group. A worker that died of them would end the training
    # process in the middle of a step; a worker whose parent is gone ends by itself.
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
