"""Randomness as a function of (seed, step, purpose): nothing to save, nothing that a resume could forget."""

import zlib

import numpy as np
import torch


def generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on its arguments alone. `purpose` keeps streams of one step apart."""
    # SeedSequence mixes its words well and NumPy guarantees its output across versions.
    words = np.random.SeedSequence([seed, step, zlib.crc32(purpose.encode())]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))  # manual_seed takes 63 bits
