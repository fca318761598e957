"""Ends every command with a sentence and an exit code instead of a traceback."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import click
import torch

from dnnlib.console import UserError


@contextlib.contextmanager
def command(*, memory: str = "free some of it", interrupted: str = "nothing was written.") -> Iterator[None]:
    """End a process with a sentence on stderr instead of a traceback, from rank 0 alone.

    A UserError exits with code 2. So does a GPU whose memory is full, and `memory` says how to need less of it. Ctrl-C
    exits with code 130, and `interrupted` says what is kept.
    """
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        yield
        return
    except UserError as error:
        mistake = str(error)
    except torch.OutOfMemoryError:
        mistake = f"the GPU's memory is full; {memory}"
    except KeyboardInterrupt:
        if first:
            click.echo(f"Interrupted; {interrupted}", err=True)
        sys.exit(130)
    if not first:
        time.sleep(20)  # every rank may hit this error; the launcher ends the others once rank 0 has printed it
    click.echo(f"Error: {mistake}", err=True)
    sys.exit(2)
