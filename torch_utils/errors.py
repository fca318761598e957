"""Turn exceptions into sentences."""

import contextlib
import errno
import os
import re
import tempfile
import traceback
from pathlib import Path

import torch

from dnnlib.console import MemoryFull, Unexpected, UserError, brief

# Failed allocations in CUDA's libraries and on the CPU are RuntimeErrors.
ALLOCATION = re.compile(r"out of memory|ALLOC_FAILED|can.?t allocate memory|bad_alloc|Failed to CUDA [cm]alloc", re.I)
ON_GPU = re.compile(r"CUDA|CUDNN|CUBLAS|CUSOLVER|CUFFT|NCCL|HIP", re.I)
REMEDIES = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some space, or choose another disk",
    errno.EFBIG: "raise the limit (ulimit -f), or choose a disk that holds larger files",
    errno.EACCES: "give yourself permission, or choose another folder",
    errno.EPERM: "give yourself permission, or choose another folder",
    errno.EROFS: "choose a folder that you may write to",
    errno.EIO: "check the disk",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EAGAIN: "allow more processes (ulimit -u)",
    errno.EPIPE: "keep what reads the output open, or write it to a file",
}


def memory_full(error: BaseException) -> bool:
    """Tell whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    found = isinstance(error, RuntimeError) and ALLOCATION.search(str(error))
    return bool(found) or isinstance(error, MemoryError | torch.OutOfMemoryError)


def explain(error: Exception, log: Path | None = None) -> UserError:
    """Return an exception as a sentence.

    The traceback of an unexpected one is added to the file `log`, by default one in the folder of temporary files.
    """
    if isinstance(error, UserError):
        return error
    if memory_full(error):
        on_gpu = isinstance(error, torch.OutOfMemoryError) or ON_GPU.search(str(error))
        return MemoryFull("the GPU's memory is full" if on_gpu else "the memory of this machine is full")
    if isinstance(error, UnicodeEncodeError) and "surrogate" in error.reason:  # as Python decodes other names
        return UserError(f"{error.object!r:.200} holds a name that is not UTF-8; rename that file or folder")
    if isinstance(error, UnicodeEncodeError):
        return UserError(
            f"the encoding {error.encoding} of this locale lacks letters of {error.object!r:.200}; set PYTHONUTF8=1"
        )
    in_rust = re.search(r"\(os error (\d+)\)", str(error))
    number = int(in_rust[1]) if in_rust else getattr(error, "errno", None)
    if number in REMEDIES:
        unnamed = "standard output" if number == errno.EPIPE else log.parent if log else "the system"
        what = getattr(error, "filename", None) or unnamed
        return UserError(f"{what}: {os.strerror(number)}; {REMEDIES[number]}")
    return Unexpected(f"an unexpected error, {type(error).__name__}: {brief(error)}{_keep_traceback(error, log)}")


def _keep_traceback(error: Exception, log: Path | None) -> str:
    """Write the traceback of an error to a file. Return where it is, as the end of a sentence."""
    text = "".join(traceback.format_exception(error))
    for path in (log, Path(tempfile.gettempdir()) / f"creps-traceback-{os.getpid()}.txt"):
        with contextlib.suppress(OSError, TypeError):
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return f"; its traceback is in {path}"
    return f"\n{text}"
