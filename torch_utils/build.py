"""Compile C++ and CUDA sources on first use: C++ with the compiler of this machine, CUDA with PyTorch's own.

C++ sources export C functions, which are called through ctypes: PyTorch's headers would take minutes to compile. CUDA
sources are compiled by NVRTC, a library that comes with PyTorch for GPUs, and launched through the driver, so a GPU
needs no compiler on the machine.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
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
COMPILERS = ("c++", "g++", "clang++")
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # the TYPE of sources


# --- C++ --------------------------------------------------------------------------------------------------------------


def cpp_compiler() -> list[str]:
    """Return the command of the C++ compiler: the variable CXX, or the first of COMPILERS on the PATH.

    Raises UserError when CXX is no command.
    """
    given = os.environ.get("CXX", "")
    try:
        return shlex.split(given) or [next(filter(shutil.which, COMPILERS), COMPILERS[0])]
    except ValueError as error:
        raise UserError(f"CXX={given} is no command ({error}); set CXX to a compiler, for example g++") from error


def version(compiler: list[str]) -> str:
    """Return what the compiler prints about its version. Raises UserError when it cannot be run."""
    return _run([*compiler, "--version"], "set CXX to another compiler")


def library(source: Path) -> ctypes.CDLL:
    """Build and load the library of a C++ `source`, optimised for this processor.

    It is kept in the cache directory under a hash of the source, its headers, the flags, the compiler, the processor's
    features and the host. It is written atomically, so several processes may build at once, or die while building.
    Raises UserError, with the reason and the fix, when there is no compiler or it fails.
    """
    command = [*cpp_compiler(), *FLAGS]
    fix = "set CXX to another compiler"
    # The predefined macros hold the compiler's version and the processor's features.
    identity = _run([*command, "-dM", "-E", "-x", "c++", os.devnull], fix)
    # The host too: replacing a library that another host has mapped over NFS would crash that host's processes.
    path = _cached(source, ".so", command, identity, platform.node())
    if not path.exists():
        with atomic_write(path) as temporary:
            _run([*command, str(source), "-o", str(temporary)], fix)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be loaded ({error}); remove it, and it is built again") from error


def _cached(source: Path, suffix: str, *identity: object) -> Path:
    """Return the path of a build in the cache, named by a hash of `source`, its headers and `identity`."""
    key = repr(identity).encode() + b"".join(_code(source))
    return cache_dir() / "libraries" / f"{source.stem}-{hashlib.sha256(key).hexdigest()[:16]}{suffix}"


def _code(path: Path) -> Iterator[bytes]:
    """Yield the content of a source and of the headers that it includes in quotes, directly or not."""
    code = path.read_bytes()
    yield code
    for name in re.findall(rb'^#include "(.+)"', code, re.MULTILINE):
        yield from _code(path.parent / name.decode())


def _run(command: list[str], fix: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace").stdout
    except FileNotFoundError as error:
        raise UserError(f"there is no C++ compiler {command[0]}; install g++ or clang, or {fix}") from error
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).splitlines()
        raise UserError(f"{shlex.join(command)} failed ({_first_error(lines) or error}); {fix}") from error


def _first_error(lines: list[str]) -> str:
    return next((line for line in lines if re.search("error|fatal", line)), lines[0] if lines else "")


# --- CUDA -------------------------------------------------------------------------------------------------------------


@functools.lru_cache
def nvrtc() -> ctypes.CDLL:
    """Load NVRTC, the CUDA compiler that comes with PyTorch. Raises UserError when there is none."""
    folder, major = Path(torch.__file__).parent / "lib", (torch.version.cuda or "").split(".")[0]
    wheels = folder.parents[1] / "nvidia"
    names = [*wheels.glob(f"*/lib/libnvrtc.so.{major}*"), folder / "libcaffe2_nvrtc.so", f"libnvrtc.so.{major}"]
    for builtins in wheels.glob(f"*/lib/libnvrtc-builtins.so.{major}*"):  # NVRTC opens it by its name alone
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(builtins))
    for name in names if major else ():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(name))
    raise UserError("there is no NVRTC, the CUDA compiler of PyTorch for GPUs; install that PyTorch again")


def nvrtc_version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def cubin(source: Path, dtype: torch.dtype, capability: int) -> bytes:
    """Compile a CUDA `source` for numbers of `dtype` and a compute capability (90 is 9.0), cached like `library`.

    Raises UserError, with the reason and the fix.
    """
    options = f"--gpu-architecture=sm_{capability}", "--std=c++17", f"-DTYPE={DTYPES[dtype]}"
    path = _cached(source, ".cubin", options, nvrtc_version())
    if not path.exists():
        made, _ = compile_cuda(source, *options)
        with atomic_write(path) as temporary:
            temporary.write_bytes(made)
    return path.read_bytes()


def compile_cuda(source: Path, *options: str) -> tuple[bytes, str]:
    """Return the machine code of a CUDA `source`, and the compiler's warnings. Raises UserError when it fails."""
    compiler, program = nvrtc(), ctypes.c_void_p()
    options = [os.fsencode(option) for option in (*options, f"-I{source.parent}")]
    compiler.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), os.fsencode(source), 0, None, None)
    failed = compiler.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))

    def read(what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(compiler, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        getattr(compiler, f"nvrtcGet{what}")(program, data)
        return data.raw

    log, made = read("ProgramLog").rstrip(b"\0").decode(errors="replace"), b"" if failed else read("CUBIN")
    compiler.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        reason = _first_error(log.splitlines()) or f"error {failed}"
        raise UserError(f"NVRTC {nvrtc_version()} failed on {source} ({reason}); install a PyTorch for this GPU")
    return made, log


# --- kernels ----------------------------------------------------------------------------------------------------------

Argument = Tensor | ctypes.Array | int | float | None


class Kernels(NamedTuple):
    """The functions of a C++ source."""

    functions: ctypes.CDLL
    device: torch.device
    capability: int = 0  # on a CPU

    def constant(self, name: str) -> int:
        """Return a global int64_t of the source."""
        return ctypes.c_int64.in_dll(self.functions, name).value

    def call(self, name: str, *arguments: Argument) -> None:
        """Call name(threads, nullptr, …), which takes int64_t, double, and pointers for tensors, arrays and None."""
        function = getattr(self.functions, name)
        function.restype = ctypes.c_char_p
        given = [_in_c(a, self.device, ctypes.c_double) for a in arguments]
        if problem := function(ctypes.c_int64(torch.get_num_threads()), None, *given):
            raise RuntimeError(f"the function {name} failed: {problem.decode()}")


def driver() -> ctypes.CDLL:
    """Load NVIDIA's driver. Raises UserError when there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UserError(f"the NVIDIA driver cannot be loaded ({error}); install it") from error


class CudaKernels:
    """The kernels of a CUDA source on one device, compiled for each dtype when it is first used.

    Raises UserError or RuntimeError where the device cannot run them.
    """

    def __init__(self, source: Path, device: torch.device):
        card = torch.cuda.get_device_properties(device)
        self.source, self.device, self.capability = source, device, 10 * card.major + card.minor
        self.threads = card.multi_processor_count * card.max_threads_per_multi_processor  # resident at once
        self.modules: dict[torch.dtype, ctypes.c_void_p] = {}
        self.functions: dict[tuple[str, torch.dtype], ctypes.c_void_p] = {}
        self.driver = driver()
        number, self.context = ctypes.c_int(), ctypes.c_void_p()
        self.drive("cuDeviceGet", ctypes.byref(number), device.index)
        self.drive("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), number)  # the context of PyTorch

    def drive(self, name: str, *arguments: object) -> None:
        """Call a function of the driver. Raises RuntimeError when it fails."""
        if code := getattr(self.driver, name)(*arguments):
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"CUDA's {name} failed: {(text.value or b'an unknown error').decode()}")

    def module(self, dtype: torch.dtype) -> ctypes.c_void_p:
        """Load the kernels for numbers of `dtype`."""
        if dtype not in self.modules:
            module = ctypes.c_void_p()
            self.drive("cuModuleLoadData", ctypes.byref(module), cubin(self.source, dtype, self.capability))
            self.modules[dtype] = module
        return self.modules[dtype]

    def function(self, name: str, dtype: torch.dtype) -> ctypes.c_void_p:
        if (name, dtype) not in self.functions:
            function = ctypes.c_void_p()
            self.drive("cuModuleGetFunction", ctypes.byref(function), self.module(dtype), name.encode())
            self.functions[name, dtype] = function
        return self.functions[name, dtype]

    def launch(self, name: str, dtype: torch.dtype, blocks: int, threads: int, *arguments: Argument) -> None:
        """Start a kernel on PyTorch's current stream, in `blocks` of `threads`.

        It takes int64_t, pointers for tensors and None, and for floats double if its numbers are, else float. Raises
        ValueError when a tensor is on another device.
        """
        with torch.cuda.device(self.device):
            self.start(torch.cuda.current_stream().cuda_stream, name, dtype, blocks, threads, arguments)

    def start(self, stream: int, name: str, dtype: torch.dtype, blocks: int, threads: int, arguments: Sequence) -> None:
        if blocks >= 2**31:
            raise RuntimeError(f"the tensors are too large for one launch of {name}")
        real = ctypes.c_double if dtype == torch.float64 else ctypes.c_float
        given = [_in_c(a, self.device, real) for a in arguments]
        pointers = (ctypes.c_void_p * len(given))(*map(ctypes.addressof, given))
        self.drive("cuCtxSetCurrent", self.context)  # threads of autograd may not have one yet
        size = blocks, 1, 1, threads, 1, 1
        self.drive("cuLaunchKernel", self.function(name, dtype), *size, 0, ctypes.c_void_p(stream), pointers, None)


def _in_c(value: Argument, device: torch.device, real: type):
    """Return an argument of a C function or a kernel, with floats as `real`."""
    if isinstance(value, Tensor) and value.device != device:
        raise ValueError(f"all tensors must be on {device}; got one on {value.device}")
    if isinstance(value, ctypes.Array):
        return value
    if isinstance(value, float):
        return real(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())


@functools.lru_cache
def kernels(source: Path, device: torch.device, impl: str = "auto") -> tuple[Kernels | CudaKernels | None, str]:
    """Build the kernels of `source`, a .cu file, for `device`; return None and the reason if they are unavailable.

    The reason is empty where "auto" expects no kernels. On a CPU, impl "auto" and "cpp" build the .cpp file next to
    `source`, which has the same functions.
    """
    native = source.with_suffix(".cpp")
    if device.type == "cpu" and impl in ("auto", "cpp") and native.exists():
        try:
            return Kernels(library(native), device), ""
        except UserError as error:
            return None, str(error)
    if device.type != "cuda" or source == native or impl == "cpp":
        needed = "CPU" if impl == "cpp" else "CUDA device"
        return None, "" if impl == "auto" else f"it needs a {needed}, and the tensors are on {device.type}"
    if torch.version.hip:
        return None, "" if impl == "auto" else "it is for NVIDIA GPUs"
    try:
        with torch.cuda.device(device):
            found = CudaKernels(source, device)
            found.drive("cuCtxSetCurrent", found.context)
            found.module(torch.float32)
    except UserError as error:
        return None, str(error)
    except RuntimeError as error:
        return None, f"{error}; update the NVIDIA driver"
    return found, ""


def choose(
    impl: str,
    impls: tuple[str, ...],
    source: Path,
    x: Tensor,
    cpu_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> Kernels | CudaKernels | None:
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


@functools.lru_cache
def say_once(line: str) -> None:
    """Print a line on stderr the first time that it is given, from one process of each machine."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(line, file=sys.stderr, flush=True)
