"""The exponential moving average (EMA) of the generator's weights, which snapshots hold."""

import torch
from torch import nn


def decay(batch: int, images: int, kimg: float, rampup: float | None = 0.05) -> float:
    """Return the share of the old average that a step of `batch` images keeps: the half-life is `kimg` thousand images.

    The half-life is at most `rampup` of the `images` seen so far, so that an early average forgets the first weights.
    """
    half_life = kimg * 1000
    if rampup is not None:
        half_life = min(half_life, images * rampup)
    return 0.5 ** (batch / half_life) if half_life > 0 else 0.0


@torch.no_grad()
def track(average: nn.Module, model: nn.Module, keep: float) -> None:
    """Update average ← keep · average + (1 − keep) · model for parameters; copy buffers."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
    torch._foreach_copy_(list(average.buffers()), list(model.buffers()))
