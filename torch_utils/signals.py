"""Note the signals that ask a process to end, so that it can save its work first."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator

# kill and schedulers, Ctrl-C, a closed terminal, and Slurm's warning.
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


@contextlib.contextmanager
def note_signals() -> Iterator[list[tuple[int, float]]]:
    """Yield a list to which STOPS are added with their times; a later one ends the process at once.

    Signals within a second count as one: Ctrl-C reaches every process of a terminal, and a launcher forwards it too.
    """
    noted: list[tuple[int, float]] = []

    def note(number, frame):
        if noted and time.monotonic() - noted[0][1] > 1:
            sys.exit(128 + number)
        noted.append((number, time.monotonic()))

    before = {number: signal.signal(number, note) for number in heeded()}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Terminated(KeyboardInterrupt):
    """SIGTERM: a process ends as after Ctrl-C, but with exit code 143."""


@contextlib.contextmanager
def end_on_sigterm() -> Iterator[None]:
    """Raise Terminated on SIGTERM, so that unfinished files are removed, unless something else handles it."""

    def end(number, frame):
        raise Terminated

    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def heeded() -> list[signal.Signals]:
    """Return STOPS without SIGHUP where it is ignored, as nohup wants."""
    return [number for number in STOPS if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN]
