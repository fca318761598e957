"""Where half precision does not reach."""

import contextlib

import torch


def full_precision(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """A block in which autocast leaves operations alone on the device of x (devices without autocast included)."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
