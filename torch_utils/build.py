"""C++ sources made into libraries, on first use, by the compiler of the machine they run on."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from dnnlib.console import UserError
from dnnlib.files import atomic_write, cache_dir

FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")


def library(source: Path) -> ctypes.CDLL:
    """The library made of `source`, which includes nothing but the standard library, for this very processor.

    It is kept in the cache directory under a hash of the source, the flags, the compiler and the processor's features,
    and appears there whole: processes that build at once, or die, do not disturb each other.
    Raises UserError, with the reason and the mend, when there is no compiler or it fails.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, COMPILERS), COMPILERS[0])]
    # The macros that a compiler predefines tell its version and what the processor can do.
    macros = _run([*compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    digest = hashlib.sha256(repr((compiler, FLAGS, macros)).encode() + source.read_bytes()).hexdigest()
    path = cache_dir() / "libraries" / f"{source.stem}-{digest[:16]}.so"
    if not path.exists():
        with atomic_write(path) as temporary:
            _run([*compiler, *FLAGS, str(source), "-o", str(temporary)])
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be loaded ({error}); remove it, and it is built again") from error


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise UserError(
            f"there is no C++ compiler {command[0]}; install g++ or clang, or name one by the variable CXX"
        ) from error
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else str(error))
        raise UserError(f"{shlex.join(command)} failed ({first}); name another compiler by the variable CXX") from error
