"""End every command with a sentence and an exit code instead of a traceback."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator

import click

from dnnlib.console import MemoryFull, UserError
from torch_utils.distributed import PeerLost, claim_report, is_first, launched
from torch_utils.errors import explain
from torch_utils.signals import Terminated, end_on_sigterm

# Seconds for the launcher to end this rank before it prints an error as well: while another rank reports the error, and
# after another rank has ended. A launcher on another machine cannot end this rank.
WAIT, WAIT_LOST = 20, 5


@contextlib.contextmanager
def command(*, memory: str = "free some of it", interrupted: str = "nothing was written.") -> Iterator[None]:
    """End a process with a sentence on stderr instead of a traceback, from one rank alone.

    Mistakes, full memory and full disks exit with code 2, unexpected errors with 1. `memory` says how to need less of
    it. Ctrl-C exits with code 130 and SIGTERM with 143, and `interrupted` says what is kept. SIGTERM from a launcher
    ends a rank at once: the launcher reports.
    """
    print_anything()
    try:
        with contextlib.nullcontext() if launched() else end_on_sigterm():
            yield
        return
    except KeyboardInterrupt as stop:
        sentence = f"Interrupted; {interrupted}" if is_first() else ""
        code = 143 if isinstance(stop, Terminated) else 130
    except (click.ClickException, click.Abort, click.exceptions.Exit):
        raise
    except Exception as error:
        # Every rank may meet this error, and one reports it. Why a peer was lost, that peer or its launcher reports.
        if isinstance(error, PeerLost):
            time.sleep(WAIT_LOST)
        elif not claim_report():
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


def print_anything() -> None:
    """Print what a console lacks, such as ψ or names that are not UTF-8, as escapes, and nothing where it is closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the end)
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


class _Arguments:
    """Parses the arguments of a command: a leading ~ is the home directory, also after `--flag=`."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        print_anything()  # --help prints while arguments are parsed
        pieces = [re.fullmatch(r"((?:--)?[\w.-]+=)?(~.*)", argument, re.DOTALL) for argument in arguments]
        arguments = [
            f"{piece[1] or ''}{os.path.expanduser(piece[2])}" if piece else argument
            for piece, argument in zip(pieces, arguments, strict=True)
        ]
        with command():  # --help may meet a full disk
            return super().parse_args(context, arguments)


class Command(_Arguments, click.Command):
    pass


class Group(_Arguments, click.Group):
    """A command with subcommands, which take none of its options."""

    command_class = Command

    def resolve_command(self, context: click.Context, arguments: list[str]) -> tuple:
        found = super().resolve_command(context, arguments)
        for option in self.params:
            if is_given(context, option.name):
                raise click.UsageError(f"{option.opts[0]} does not go with {arguments[0]}; leave it out", context)
        return found


def is_given(context: click.Context, name: str) -> bool:
    """Tell whether an option is on the command line with a value that is not empty."""
    on_line = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    return on_line and context.params[name] not in (None, "", ())


def refuse_unused(context: click.Context, uses: dict[str, tuple[str, ...]]) -> None:
    """Raise UserError for an option that has no effect: none of those that use it is given."""
    flags = {option.name: option.opts[0] for option in context.command.params}
    for name, users in uses.items():
        if is_given(context, name) and not any(is_given(context, user) for user in users):
            users = " or ".join(flags[user] for user in users)
            raise UserError(f"{flags[name]} belongs to {users}; add that, or leave {flags[name]} out")
