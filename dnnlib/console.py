"""What the user reads: mistakes as sentences, progress as a bar with the time left."""

from tqdm import tqdm


class UserError(ValueError):
    """A mistake that the user can fix, as one sentence: what is wrong, where, and how to fix it.

    Commands end with `Error: <sentence>` and exit code 2 (torch_utils.command).
    """


def brief(problem: Exception) -> str:
    """The first line of what an exception says, or its name: compilers and drivers say pages."""
    return next(iter(str(problem).splitlines()), type(problem).__name__)


def progress(iterable, *, desc: str, total: int | None = None, unit: str = "img", scale: bool = False) -> tqdm:
    """`iterable` behind a bar with rate and ETA on stderr; silent when stderr is no terminal. `scale`: 3M for 3e6."""
    return tqdm(iterable, desc=desc, total=total, unit=unit, unit_scale=scale, dynamic_ncols=True, disable=None)
