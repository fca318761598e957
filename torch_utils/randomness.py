"""Make random numbers a function of (seed, step, purpose), so that resuming a run needs no saved state."""

import zlib

import numpy as np
import torch


def make_rng(seed: int, step: int, purpose: str) -> torch.Generator:
    """Return a CPU rng that depends on the arguments alone. `purpose` separates the streams of one step."""
    # SeedSequence mixes its words well and NumPy guarantees its output across versions.
    words = np.random.SeedSequence([seed, step, zlib.crc32(purpose.encode())]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))  # manual_seed takes 63 bits
