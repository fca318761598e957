"""Settings as frozen values that refuse nonsense."""

import difflib

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """The base of every settings class: immutable, typed, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def nearest(word: str, known) -> str:
    """A clause that names the known word closest to `word`, or lists the known ones."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
