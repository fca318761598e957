"""Copy to a GPU without waiting for it."""

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy x from the CPU to `device`, converted to `dtype` before. A GPU receives it from pinned memory.

    A copy of more than 64 KiB from pageable memory would wait for everything that is queued on the GPU.
    """
    x = x.to(dtype)
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
