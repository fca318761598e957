"""Who is drawn: seeds, classes and mixtures become styles."""

import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnnlib.console import UserError
from rendering.camera import number
from training.networks import Generator


def parse_seeds(text: str) -> list[int]:
    """[0, 1, 2, 7] from "0-2,7". Raises UserError."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})(?:-(\d{1,10}))?\s*", part)
        if not match:
            raise UserError(f"--seeds={text}: cannot read {part!r}; write numbers and ranges, for example 0-3,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= 2**32:
            raise UserError(f"--seeds={text}: {part!r} is no range of seeds from 0 to {2**32 - 1}")
        seeds += range(first, last + 1)
    return seeds


def latent(G: Generator, seed: int) -> Tensor:
    """[1,z_dim]: the latent that StyleGAN's tools give this seed."""
    return torch.from_numpy(np.random.RandomState(seed).randn(1, G.config.z_dim)).float()


def label(G: Generator, text: str | None) -> Tensor:
    """[1,c_dim]: class "2", or the blend "2:0.3+5:0.7" of classes; equal parts without numbers. Raises UserError."""
    c_dim = G.config.c_dim
    c = torch.zeros(1, c_dim)
    if text is None:  # a network without classes
        return c
    for part in text.split("+"):
        match = re.fullmatch(r"\s*(\d{1,9})(?::([0-9.]{1,12}))?\s*", part)
        weight = number(match[2] or "1") if match else None
        if weight is None:
            raise UserError(f"--class={text}: cannot read {part!r}; write a class, or a blend such as 2:0.3+5:0.7")
        if int(match[1]) >= c_dim:
            known = f"it has classes 0 to {c_dim - 1}" if c_dim else "the network has no classes; leave it out"
            raise UserError(f"--class={text}: {known}")
        c[0, int(match[1])] += weight
    if not c.sum() > 0:
        raise UserError(f"--class={text}: the parts of the blend are all 0; make one of them larger")
    return c / c.sum()


class Styles(NamedTuple):
    """How seeds become styles: truncation, classes, mixing."""

    trunc: float
    cutoff: int | None
    classes: list[str]  # of the first seed, of the second, …; then again from the start
    mix: list[str]  # "SEED:LAYERS"

    def of(self, G: Generator, seeds: list[int], device: torch.device) -> Tensor:
        """[len(seeds),num_ws,w_dim]. Raises UserError."""
        count = G.config.num_ws
        if self.cutoff is not None and self.cutoff > count:
            raise UserError(f"--trunc-cutoff={self.cutoff}: the network has {count} styles; choose 0 to {count}")
        mixed = [self.parse_mix(text, count) for text in self.mix]

        def styles(seed: int, c: Tensor) -> Tensor:
            return G.mapping(latent(G, seed).to(device), c.to(device), self.trunc, self.cutoff)

        result = []
        with torch.no_grad():
            for i, seed in enumerate(seeds):
                c = label(G, self.class_of(G, i, seed))
                ws = styles(seed, c)
                for other, layers in mixed:
                    ws[:, layers] = styles(other, c)[:, layers]
                result.append(ws)
        return torch.cat(result)

    def class_of(self, G: Generator, i: int, seed: int) -> str | None:
        """Returns the class of the i-th seed: where none are given, seed mod c_dim, or None of an unconditional G."""
        if self.classes:
            return self.classes[i % len(self.classes)]
        return str(seed % G.config.c_dim) if G.config.c_dim else None

    @staticmethod
    def parse_mix(text: str, count: int) -> tuple[int, list[int]]:
        match = re.fullmatch(r"(\d{1,10}):([\d,\-]+)", text)
        if not match:
            raise UserError(f"--mix={text}: write a seed and the styles taken from it, for example 7:4-8")
        layers = parse_seeds(match[2])
        if max(layers) >= count:
            raise UserError(f"--mix={text}: the network has styles 0 to {count - 1}")
        return parse_seeds(match[1])[0], layers
