"""Compiles C++ and CUDA sources into libraries on first use, with the compilers of this machine.

The libraries export C functions, which are called through ctypes: a CUDA source compiles in seconds where an extension
of PyTorch takes a minute, and needs no headers but CUDA's own.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dnnlib.console import UserError
from dnnlib.files import atomic_write, cache_dir

FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
CUDA_FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC")
COMPILERS = ("c++", "g++", "clang++")


# --- compilers --------------------------------------------------------------------------------------------------------


def cpp_compiler() -> list[str]:
    """Return the command of the C++ compiler: the variable CXX, or the first of COMPILERS on the PATH."""
    return shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, COMPILERS), COMPILERS[0])]


def cuda_compiler() -> list[str]:
    """Return the command of nvcc: from CUDA_HOME, the PATH, pip's wheels, or /usr/local/cuda, in this order.

    Wheels come after the PATH because some contain an nvcc without the headers. Raises UserError when there is none.
    """
    places = [Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"] if os.environ.get("CUDA_HOME") else []
    places += [Path(found) for found in [shutil.which("nvcc")] if found]
    wheels = importlib.util.find_spec("nvidia")
    for folder in wheels.submodule_search_locations or () if wheels else ():
        places += sorted(Path(folder).glob("*/bin/nvcc"), reverse=True)
    for nvcc in (*places, Path("/usr/local/cuda/bin/nvcc")):
        if os.access(nvcc, os.X_OK):
            # nvcc looks for its runtime in lib64; wheels have it in lib.
            libs = nvcc.parents[1] / "lib"
            return [str(nvcc), *([f"-L{libs}"] if (libs / "libcudart_static.a").exists() else [])]
    raise UserError(
        "there is no CUDA compiler nvcc in CUDA_HOME, on the PATH or in pip's wheels; install a CUDA toolkit and set "
        "CUDA_HOME to it, or: pip install 'cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]'"
    )


def version(compiler: list[str]) -> str:
    """Return what the compiler prints about its version. Raises UserError when it cannot be run."""
    return _run([*compiler, "--version"], "set CXX or CUDA_HOME to another compiler")


# --- libraries --------------------------------------------------------------------------------------------------------


def library(source: Path) -> ctypes.CDLL:
    """Build and load the library of a C++ `source`, optimised for this processor.

    It is kept in the cache directory under a hash of the source, its own headers, the flags, the compiler and the
    processor's features. It is written atomically, so processes may build at once, or die while they build.
    Raises UserError, with the reason and the fix, when there is no compiler or it fails.
    """
    command = [*cpp_compiler(), *FLAGS]
    fix = "set CXX to another compiler"
    # The predefined macros hold the compiler's version and the processor's features.
    return _library(source, command, _run([*command, "-dM", "-E", "-x", "c++", os.devnull], fix), fix)


def cuda_library(source: Path, capability: int) -> ctypes.CDLL:
    """Build and load the library of a CUDA `source` for a compute capability (90 is 9.0); otherwise as `library`."""
    compiler = cuda_compiler()
    fix = "set CUDA_HOME to another CUDA toolkit"
    return _library(source, [*compiler, *CUDA_FLAGS, f"-arch=sm_{capability}"], version(compiler), fix)


def _library(source: Path, command: list[str], identity: str, fix: str) -> ctypes.CDLL:
    key = repr((command, identity)).encode() + b"".join(_code(source))
    path = cache_dir() / "libraries" / f"{source.stem}-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not path.exists():
        with atomic_write(path) as temporary:
            _run([*command, str(source), "-o", str(temporary)], fix)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be loaded ({error}); remove it, and it is built again") from error


def _code(path: Path) -> Iterator[bytes]:
    """Yield the content of a source and of the headers that it includes in quotes, directly or not."""
    code = path.read_bytes()
    yield code
    for name in re.findall(rb'^#include "(.+)"', code, re.MULTILINE):
        yield from _code(path.parent / name.decode())


def _run(command: list[str], fix: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise UserError(f"there is no C++ compiler {command[0]}; install g++ or clang, or {fix}") from error
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).splitlines()
        first = next((line for line in lines if re.search("error|fatal", line)), lines[0] if lines else str(error))
        raise UserError(f"{shlex.join(command)} failed ({first}); {fix}") from error


# --- kernels ----------------------------------------------------------------------------------------------------------


class Kernels(NamedTuple):
    """The functions of a source, built for one device."""

    functions: ctypes.CDLL
    device: torch.device
    capability: int  # 90 is 9.0; 0 on a CPU

    def constant(self, name: str) -> int:
        """Return a global int64_t of the source."""
        return ctypes.c_int64.in_dll(self.functions, name).value

    def call(self, name: str, *arguments: Tensor | ctypes.Array | int | float | None) -> None:
        """Call name(device, stream, …) on PyTorch's current stream; on a CPU, name(threads, nullptr, …).

        The C function takes int64_t, double and pointers; tensors, arrays and None become pointers. It returns nullptr
        or an error message, which becomes a RuntimeError. Raises ValueError when a tensor is on another device.
        """
        if self.device.type == "cpu":
            self.invoke(name, torch.get_num_threads(), None, arguments)
            return
        with torch.cuda.device(self.device):
            self.invoke(name, self.device.index, torch.cuda.current_stream().cuda_stream, arguments)

    def invoke(
        self,
        name: str,
        device: int,
        stream: int | None,
        arguments: Sequence[Tensor | ctypes.Array | int | float | None],
    ) -> None:
        for a in arguments:
            if isinstance(a, Tensor) and a.device != self.device:
                raise ValueError(f"all tensors must be on {self.device}; got one on {a.device}")
        function = getattr(self.functions, name)
        function.restype = ctypes.c_char_p
        if problem := function(ctypes.c_int64(device), ctypes.c_void_p(stream), *map(_in_c, arguments)):
            raise RuntimeError(f"the CUDA function {name} failed: {problem.decode()}")


def _in_c(value: Tensor | ctypes.Array | int | float | None):
    if isinstance(value, ctypes.Array):
        return value
    if isinstance(value, float):
        return ctypes.c_double(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())


@functools.lru_cache
def kernels(source: Path, device: torch.device, impl: str = "auto") -> tuple[Kernels | None, str]:
    """Build the kernels of `source`, a .cu file with a function `probe`, for `device`; return None and the reason if
    they are unavailable. The reason is empty where "auto" expects no kernels.

    On a CPU, impl "auto" and "cpp" build the .cpp file next to it, which has the same functions.
    """
    native = source.with_suffix(".cpp")
    if device.type == "cpu" and impl in ("auto", "cpp") and native.exists():
        try:
            return Kernels(library(native), device, 0), ""
        except UserError as error:
            return None, str(error)
    if device.type != "cuda" or source == native or impl == "cpp":
        needed = "CPU" if impl == "cpp" else "CUDA device"
        return None, "" if impl == "auto" else f"it needs a {needed}, and the tensors are on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    try:
        found = Kernels(cuda_library(source, 10 * major + minor), device, 10 * major + minor)
        found.call("probe")
    except UserError as error:
        return None, str(error)
    except RuntimeError as error:
        return None, f"{error}; update the NVIDIA driver, or set CUDA_HOME to an older CUDA toolkit"
    return found, ""


def choose(
    impl: str,
    impls: tuple[str, ...],
    source: Path,
    x: Tensor,
    cpu_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> Kernels | None:
    """Return the kernels of `source` for x, or None where the reference in PyTorch is to be used.

    impl: "reference"; "auto": kernels where there are any for x, except under torch.compile, which fuses the reference
    itself; when they cannot be built, one line on stderr says so, once. Any other of `impls` raises UserError where
    kernels are unavailable, as does a name that is not in `impls`.
    """
    if impl not in impls:
        raise UserError(f"impl={impl!r} is unknown; use one of {', '.join(impls)}")
    if impl == "reference" or (impl == "auto" and torch.compiler.is_compiling()):
        return None
    found, reason = kernels(source, x.device, impl)
    dtypes = cpu_dtypes if found and not found.capability else tuple(DTYPES)
    if found and x.dtype not in dtypes:
        problem = f"it is for {', '.join(map(str, dtypes))}, not {x.dtype}"
        found, reason = None, "" if impl == "auto" and x.device.type == "cpu" else problem
    if found is None and impl != "auto":
        raise UserError(f"impl={impl!r} of {source.stem} is unavailable: {reason}")
    if reason:
        say_once(f"{source.stem} continues in plain PyTorch, which is slower: {reason}")
    return found


DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # numbered as in bias_act.h


@functools.lru_cache
def say_once(line: str) -> None:
    """Print a line on stderr the first time that it is given, from one process of each machine."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(line, file=sys.stderr, flush=True)
