"""Which process writes into a run directory: the one that began or resumed the run last. Earlier ones end."""

import os
import socket
from pathlib import Path

from dnnlib.console import UserError
from dnnlib.files import atomic_write
from torch_utils.distributed import launch_name


class TakenOver(UserError):
    """Another process writes into the run directory."""


class Writer:
    """This process, as the writer of a run directory. Host, number and launch of the last writer are in process.txt."""

    def __init__(self, folder: Path):
        self.path = folder / "process.txt"
        self.name = f"{socket.gethostname()} {os.getpid()} {launch_name()}"

    def claim(self) -> None:
        """Become the writer. Raises TakenOver if a launcher only repeats what another launch took over."""
        other = self.other()
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if other and restarted and other[2] != self.name.split()[2]:
            raise TakenOver(f"process {other[1]} on {other[0]} has taken over {self.path.parent}; this launch ends")
        with atomic_write(self.path) as temporary:
            temporary.write_text(self.name)

    def check(self) -> None:
        """Raise TakenOver if another process has resumed the run since: two machines cut off from each other, say."""
        if other := self.other():
            raise TakenOver(
                f"process {other[1]} on {other[0]} has taken over {self.path.parent}; this one ends without saving"
            )

    def other(self) -> list[str] | None:
        """Return host, number and launch of the writer, unless it is this process."""
        name = self.path.read_text() if self.path.is_file() else self.name
        return None if name == self.name else name.split()
