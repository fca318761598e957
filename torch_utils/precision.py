"""Where half precision pays, and where it does not reach."""

import contextlib

import torch


def multiplies_bfloat16_fast(device: torch.device) -> bool:
    """Tell whether mixing bfloat16 with float32 saves time: GPUs that have it, and CPUs with AMX.

    What AVX512's bfloat16 gains in training has not been measured, so it does not count.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def full_precision(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """A block in which autocast leaves operations alone on the device of x (devices without autocast included)."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
