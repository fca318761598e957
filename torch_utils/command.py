"""How every command ends: with a sentence and an exit code."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import click
import torch

from dnnlib.console import UserError


@contextlib.contextmanager
def command(*, memory: str, interrupted: str) -> Iterator[None]:
    """Ends a process of a command with a sentence on stderr instead of a traceback.

    Exit code 2 after a UserError, and when the GPU's memory is full: then `memory` says how to need less. Exit code 130
    after Ctrl-C, when `interrupted` says what is kept.
    """
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        yield
        return
    except UserError as error:
        mistake = error
    except torch.OutOfMemoryError:
        mistake = UserError(f"the GPU's memory is full; {memory}")
    except KeyboardInterrupt:
        if first:
            click.echo(f"Interrupted; {interrupted}", err=True)
        sys.exit(130)
    if not first:
        time.sleep(5)  # all ranks may meet the same error: the launcher ends the others once rank 0 has ended
    mistake.show()
    sys.exit(mistake.exit_code)
