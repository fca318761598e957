"""Turn seeds, classes and mixtures into styles."""

import difflib
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnnlib.console import UserError, shorten
from rendering.camera import parse_number
from training.networks import Generator

MOST = 10**6  # seeds


def parse_seeds(text: str) -> list[int]:
    """Return [0, 1, 2, 7] for "0-2,7". Raises UserError."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})(?:-(\d{1,10}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < 2**32:
            raise UserError(
                f"seeds={text}: cannot read {part!r}; write numbers and ranges from 0 to {2**32 - 1}, for example 0-3,7"
            )
        if len(seeds) + last - first >= MOST:
            raise UserError(f"seeds={text}: more than {MOST:,} seeds; give fewer in one call")
        seeds += range(first, last + 1)
    return seeds


def sample_latent(G: Generator, seed: int) -> Tensor:
    """Return [1,z_dim], the latent of this seed in StyleGAN's tools."""
    return torch.from_numpy(np.random.RandomState(seed).randn(1, G.config.z_dim)).float()


def parse_classes(text: str) -> list[str]:
    """Split at commas, except in "[1,0]" and within double quotes, which are removed."""
    parts = re.split(r',(?![^\[]*\])(?=(?:[^"]*"[^"]*")*[^"]*$)', text)
    return [re.sub(r'^\s*"(.*)"\s*$', r"\1", part) for part in parts]


def parse_label(G: Generator, text: str | None) -> Tensor:
    """Return [1,c_dim], with the numbers as they are written. Raises UserError.

    "cat" or "2" is one class, "cat:0.3+5:0.7" a blend, "cat+5" one of equal parts whose sum is 1, and "[1,0,-1.5]" a
    vector. A name takes precedence over a number.
    """
    names, c_dim = G.class_names, G.config.c_dim
    c = torch.zeros(1, c_dim)
    if text is None:  # a network without classes
        return c
    if not c_dim:
        raise UserError(f"class={text}: the network has no classes; leave it out")
    text = unicodedata.normalize("NFC", text).strip()
    if text.startswith("[") and text not in names:
        numbers = [parse_number(number) for number in text[1:].removesuffix("]").split(",")]
        if None in numbers or len(numbers) != c_dim:
            raise UserError(f"class={text}: a vector for this network has {c_dim} numbers, such as [1,0,-1.5] for 3")
        return torch.tensor([numbers])
    parts = [parse_part(G, text, part.strip()) for part in ([text] if text in names else text.split("+"))]
    weights = [weight for _, weight in parts if weight is not None]
    if len(weights) not in (0, len(parts)):
        raise UserError(f"class={text}: give every part of the blend a weight, or none of them")
    if weights and not any(weights):
        raise UserError(f"class={text}: the parts of the blend are all 0; make one of them larger")
    for number, weight in parts:
        c[0, number] += 1 / len(parts) if weight is None else weight
    return c


def parse_part(G: Generator, text: str, part: str) -> tuple[int, float | None]:
    """Return (5, 0.7) for a part "5:0.7" of `text`, (5, None) for "5". Raises UserError."""
    names, c_dim = G.class_names, G.config.c_dim
    word, colon, number = (part, "", "") if part in names or ":" not in part else part.rpartition(":")
    weight = parse_number(number) if colon else None
    if not word or (colon and weight is None):
        raise UserError(f"class={text}: cannot read {part!r}; write a class, or a blend such as 2:0.3+5:0.7")
    if word in names:
        return names.index(word), weight
    if re.fullmatch(r"[0-9]{1,9}", word) and int(word) < c_dim:
        return int(word), weight
    known = f"the network has classes 0 to {c_dim - 1}" + (f": {shorten(names)}" if names else ", without names")
    close = difflib.get_close_matches(word.lower(), [name.lower() for name in names], cutoff=0.5)
    near = [name for name in names if name.lower() in close]
    advice = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f"class={text}: there is no class {word!r}; {known}{advice}")


def parse_mix(text: str, count: int) -> tuple[int, list[int]]:
    """Return (7, [4, 5, 6]) for "7:4-6": a seed and the styles to use of it, out of `count`. Raises UserError."""
    match = re.fullmatch(r"(\d{1,10}):([\d,\-]+)", text)
    if not match:
        raise UserError(f"mix={text}: write a seed and the styles to use of it, for example 7:4-8")
    layers = parse_seeds(match[2])
    if max(layers) >= count:
        raise UserError(f"mix={text}: the network has styles 0 to {count - 1}")
    return parse_seeds(match[1])[0], layers


class Styles(NamedTuple):
    """Settings that turn seeds into styles.

    trunc: truncation ψ. cutoff: how many styles it applies to, by default all. classes: assigned to the
    seeds in turn; by default seed i gets class i mod c_dim. mix: "SEED:STYLES" each.
    """

    trunc: float = 1
    cutoff: int | None = None
    classes: Sequence[str] = ()
    mix: Sequence[str] = ()

    def map(self, G: Generator, seeds: list[int]) -> Tensor:
        """Return ws [len(seeds),num_ws,w_dim]. Raises UserError."""
        images = Seeds(G, seeds, self)
        return torch.stack([images.ws(i) for i in range(len(seeds))])

    def choose_classes(self, G: Generator, seeds: list[int]) -> list[str | None]:
        """Return the class of each seed, None for an unconditional G."""
        if self.classes:
            return [self.classes[i % len(self.classes)] for i in range(len(seeds))]
        known = G.class_names or [str(number) for number in range(G.config.c_dim)] or [None]
        return [known[seed % len(known)] for seed in seeds]


class Seeds:
    """The images of seeds."""

    def __init__(self, G: Generator, seeds: list[int], styles: Styles = Styles()):
        """Raises UserError if `styles` do not fit G."""
        count = G.config.num_ws
        if styles.cutoff is not None and styles.cutoff > count:
            raise UserError(f"trunc_cutoff={styles.cutoff}: the network has {count} styles; choose 0 to {count}")
        self.G, self.seeds, self.styles = G, seeds, styles
        self.classes = styles.choose_classes(G, seeds)
        self._labels = {text: parse_label(G, text) for text in set(self.classes)}
        self._mixed = [parse_mix(text, count) for text in styles.mix]

    def __len__(self) -> int:
        return len(self.seeds)

    def name(self, i: int) -> str:
        """Return the name of the file of image i, without its ending."""
        return f"seed{self.seeds[i]:04d}"

    def settings(self, i: int | None = None) -> dict:
        """Return everything that image i, or all of them, depend on besides G, as JSON values."""
        shared = {"truncation": (self.styles.trunc, self.styles.cutoff), "mix": self.styles.mix}
        if i is None:
            return shared | {"seeds": self.seeds, "classes": self.classes}
        return shared | {"seed": self.seeds[i], "class": self.classes[i]}

    @torch.no_grad()
    def ws(self, i: int) -> Tensor:
        """Return [num_ws,w_dim] of image i."""
        device = self.G.mapping.w_avg.device
        c = self._labels[self.classes[i]].to(device)

        def styles(seed: int) -> Tensor:
            return self.G.mapping(sample_latent(self.G, seed).to(device), c, self.styles.trunc, self.styles.cutoff)[0]

        ws = styles(self.seeds[i])
        for other, layers in self._mixed:
            ws[layers] = styles(other)[layers]
        return ws
