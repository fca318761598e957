"""Read lists of items in order, some ahead of their use in other processes.

Results return through sockets: shared memory is 64 MB in a container, and does not tell when the other end has died.
"""

import contextlib
import copyreg
import itertools
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.util import Finalize
from typing import BinaryIO, TypeVar

import torch

from dnnlib.console import UserError
from torch_utils.signals import STOPS

T = TypeVar("T")
GONE = (EOFError, ConnectionError, pickle.UnpicklingError)  # the other end, before or within a message


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_ahead(read: Callable[[list[int]], T], lists: Iterable[list[int]], workers: int = 0) -> Iterator[T]:
    """Yield read(indices) for each of `lists`, in order. Each of `workers` processes reads one list ahead.

    Raises what `read` raises, and UserError when a reading process was killed. If none can be started, this one reads.
    """
    readers = list(start_readers(read, workers))
    if not readers:
        yield from map(read, lists)
        return
    lists, waiting = iter(lists), deque()
    try:
        for reader, indices in zip(readers, lists):  # noqa: B905 (lists may be endless, or few)
            reader.ask(indices)
            waiting.append(reader)
        while waiting:
            reader = waiting.popleft()
            result = reader.answer()
            for indices in itertools.islice(lists, 1):
                reader.ask(indices)
                waiting.append(reader)
            yield result
    finally:
        for reader in readers:
            reader.end()


def start_readers(read: Callable[[list[int]], T], count: int) -> Iterator["Reader"]:
    """Start up to `count` readers, as many as the system allows."""
    for number in range(count):
        try:
            yield Reader(read)
        except OSError as error:
            print(f"only {number} of {count} reading processes could be started ({error.strerror})", file=sys.stderr)
            return


class Reader:
    """A process that reads the lists that it is asked for."""

    def __init__(self, read: Callable[[list[int]], T]):
        """Raises OSError when no process can be started."""
        own, other = socket.socketpair()
        with own, other:
            self.process = multiprocessing.Process(target=_serve, args=(read, other, own), daemon=True)
            self.process.start()
            self.file = own.makefile("rwb")
        # At exit, Python sends SIGTERM, which readers ignore, and waits for ever; finalizers run before that.
        self.end = Finalize(self, _end, (self.process, self.file), exitpriority=1)

    def ask(self, indices: list[int]) -> None:
        with self._alive():
            _send(self.file, indices)

    def answer(self) -> T:
        with self._alive():
            succeeded, value = pickle.load(self.file)
        if not succeeded:
            raise value
        return value

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except GONE as error:
            self.process.join()
            raise UserError(
                f"a reading process has died (exit code {self.process.exitcode}), as the system kills processes when "
                "memory runs out; use fewer reading processes, or free some memory"
            ) from error


def _end(process: multiprocessing.Process, file: BinaryIO) -> None:
    process.kill()
    process.join()
    with contextlib.suppress(ConnectionError):  # a request that was not received
        file.close()


def _serve(read: Callable[[list[int]], T], own: socket.socket, other: socket.socket) -> None:
    """Answer requests on `own` until the parent closes `other`, its end of the pair."""
    other.close()  # the copy that this process inherited
    # Ctrl-C and a scheduler's signals reach the whole process group, and the training process saves its state first.
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)  # threads do not survive a fork
    file = own.makefile("rwb")
    with contextlib.suppress(*GONE):
        while True:
            indices = pickle.load(file)
            try:
                answer = True, read(indices)
            except Exception as error:
                error.add_note(traceback.format_exc())  # the traceback itself stays here
                answer = False, error
            _send(file, answer)


def _send(file: BinaryIO, value: object) -> None:
    pickler = pickle.Pickler(file, protocol=5)
    # Tensors as NumPy arrays, which are written in place; torch would copy them several times.
    pickler.dispatch_table = copyreg.dispatch_table | {torch.Tensor: lambda x: (torch.from_numpy, (x.numpy(),))}
    pickler.dump(value)
    file.flush()
