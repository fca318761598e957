"""Report to the user: mistakes as sentences, progress as a bar."""

from tqdm import tqdm


class UserError(ValueError):
    """A mistake that the user can fix, as one sentence: what is wrong, where, and how to fix it.

    Commands end with `Error: <sentence>` and exit code 2 (torch_utils.command).
    """

    exit_code = 2


class MemoryFull(UserError):
    """The memory of a GPU or of the machine is full. Commands add how to need less of it."""


class Unexpected(UserError):
    """An error that nobody foresaw, as a sentence that names the file with its traceback."""

    exit_code = 1


def brief(problem: Exception) -> str:
    """Return the first line of an exception's message, or its name: compilers and drivers write pages."""
    return next(iter(str(problem).splitlines()), type(problem).__name__)


def progress(iterable, *, desc: str, total: int | None = None, unit: str = "img", scale: bool = False) -> tqdm:
    """Wrap `iterable` in a bar on stderr with rate and ETA; silent unless stderr is a terminal. `scale`: 3M for 3e6."""
    return tqdm(iterable, desc=desc, total=total, unit=unit, unit_scale=scale, dynamic_ncols=True, disable=None)


def shorten(parts: list[str], shown: int = 30) -> str:
    """List the first `shown` parts, and say how many more there are."""
    return ", ".join(parts[:shown]) + (f", and {len(parts) - shown:,} more" if len(parts) > shown else "")


def count(number: int, one: str, many: str | None = None) -> str:
    """Format as `1 image`, `2,000 images`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
