"""Ends every command with a sentence and an exit code instead of a traceback."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import click

from dnnlib.console import MemoryFull
from torch_utils.distributed import PeerLost, claim_report, is_first
from torch_utils.errors import explain

WAIT = 20  # seconds, in which a launcher ends this rank because another one has ended


@contextlib.contextmanager
def command(*, memory: str = "free some of it", interrupted: str = "nothing was written.") -> Iterator[None]:
    """End a process with a sentence on stderr instead of a traceback, from one rank alone.

    Mistakes, full memory and full disks exit with code 2, unexpected errors with 1. `memory` says how to need less of
    it. Ctrl-C exits with code 130, and `interrupted` says what is kept.
    """
    try:
        yield
        return
    except KeyboardInterrupt:
        sentence, code = f"Interrupted; {interrupted}" if is_first() else "", 130
    except (click.ClickException, click.Abort, click.exceptions.Exit):
        raise
    except Exception as error:
        # Every rank may meet this error, and one reports it. Why a peer was lost, that peer or its launcher reports.
        if isinstance(error, PeerLost) or not claim_report():
            time.sleep(WAIT)
        mistake = explain(error)
        more = f"; {memory}" if isinstance(mistake, MemoryFull) else ""
        sentence, code = f"Error: {mistake}{more}", mistake.exit_code
    # Outside of the handler: the exception no longer holds what its frames hold, such as files and readers.
    with contextlib.suppress(OSError):
        click.echo(sentence, err=True, nl=bool(sentence))
    try:
        sys.stdout.flush()
    except OSError:  # its reader is gone, or its disk is full: Python would try again at exit, and print a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
