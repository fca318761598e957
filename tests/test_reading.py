"""Laws of reading ahead: the same items in the same order, an end whatever happens, and no process left."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dnnlib.console import UserError
from torch_utils.reading import read_ahead

LARGE = 2**20  # bytes, more than a socket holds


def read(indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    if 13 in indices:
        raise KeyError("thirteen")
    return torch.tensor(indices), torch.full([LARGE], indices[0], dtype=torch.uint8)


def readers() -> list[multiprocessing.Process]:
    """Return the readers among the children; tests run other processes of theirs."""
    return [child for child in multiprocessing.active_children() if child.daemon]


def lists(count: int) -> list[list[int]]:
    return [[i, i + 20] for i in range(count)]


@pytest.mark.parametrize("workers", [1, 3, 12])
def test_readers_give_what_one_process_reads_and_leave_none_behind(workers):
    for (a, b), (c, d) in zip(read_ahead(read, lists(10), workers), read_ahead(read, lists(10)), strict=True):
        assert a.equal(c)
        assert b.equal(d)
    assert not readers()


def test_an_exception_arrives_in_its_turn_with_its_traceback():
    stream = read_ahead(read, lists(20), 2)
    assert [next(stream)[0][0].item() for _ in range(13)] == list(range(13))
    with pytest.raises(KeyError) as caught:
        next(stream)
    assert "in read" in caught.value.__notes__[0]
    assert not readers()


def test_a_killed_reader_is_a_sentence():
    stream = read_ahead(read, lists(10), 2)
    next(stream)
    os.kill(readers()[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match="reading process has died"):
        list(stream)
    assert not readers()


def test_where_no_process_can_be_started_this_one_reads(capfd, monkeypatch):
    def refuse(self):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.Process, "start", refuse)
    assert len(list(read_ahead(read, lists(3), 2))) == 3
    assert "only 0 of 2 reading processes" in capfd.readouterr().err


ENDS = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
from test_reading import lists, read
from torch_utils.reading import read_ahead
stream = read_ahead(read, lists(10), 2)
next(stream)
print("ready", flush=True)
"""


@pytest.mark.parametrize("end", ["1 / 0", "os.kill(os.getpid(), signal.SIGKILL)", "os.killpg(0, signal.SIGTERM)"])
def test_readers_end_with_their_parent(end):
    """The pipe of its output ends when the last process has closed it."""
    folder = Path(__file__).parent
    command = [sys.executable, "-c", ENDS + end, folder, folder.parent]
    process = subprocess.run(command, capture_output=True, timeout=100, start_new_session=True)
    assert process.stdout == b"ready\n"
    assert process.returncode != 0
