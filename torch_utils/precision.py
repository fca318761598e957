"""Where half precision pays, and where it does not reach."""

import contextlib

import torch


def multiplies_bfloat16_fast(device: torch.device) -> bool:
    """Tell whether mixing bfloat16 with float32 saves time: GPUs that have it, and CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # AMX only comes with AVX512-BF16. Names with an underscore may leave torch.
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def full_precision(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """A block in which autocast leaves operations alone on the device of x (devices without autocast included)."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
