"""Decide where bfloat16 is used."""

import contextlib

import torch


def multiplies_bfloat16_fast(device: torch.device) -> bool:
    """Tell whether mixing bfloat16 with float32 saves time: GPUs that support it, and CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # AMX only comes with AVX512-BF16. Names with an underscore may leave torch.
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def disable_tf32() -> None:
    """Compute float32 products in float32, also where the environment asks for TF32: speed comes from bfloat16."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def full_precision(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return a context that disables autocast on the device of x, if that device has autocast."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which x is multiplied: that of autocast if it is enabled."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
