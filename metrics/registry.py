"""The names of the metrics: what is measured, of how many pictures, against which photographs.

(metric,) = parse("fid50k_full")
metric.family, metric.num, metric.full  # "fid", 50000, True
metric.of(1000).name  # "fid1k_full"
"""

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from dnnlib.config import nearest
from dnnlib.console import UserError


class Family(NamedTuple):
    """Metrics that differ in their numbers alone."""

    pattern: str  # of the name; # is the number, [_#] is left out where it is the default, _? is _ unless after a k
    what: str
    tool: str | None = None  # the network that looks at the pictures, see metrics.runner.TOOLS
    reals: bool = False  # against photographs: all of them when the name ends in _full, else as many as the number
    drawn: bool = False  # takes a generator; files of its pictures are not enough
    least: int = 2  # pictures
    side: int = 1  # pixels, at least
    default: int = 50_000  # pictures, where the name has no number


FAMILIES = {
    "fid": Family("fid#", "Fréchet distance of Inception's features", "inception", reals=True),
    "kid": Family("kid#", "kernel distance of Inception's features", "inception", reals=True),
    "pr": Family("pr#_?3", "improved precision and recall, k = 3", "inception", reals=True, least=4),
    "is": Family("is#", "Inception score", "inception", least=10),
    "fd_dinov2": Family("fd_dinov2_#", "Fréchet distance of DINOv2's features", "dinov2", reals=True),
    "fd_lite0": Family("fd_lite0_#", "Fréchet distance of EfficientNet-Lite0's features", "lite0", reals=True),
    "lines": Family("lines#", "line artefacts", "lines", reals=True, default=1000, side=16),
    "pfid": Family("pfid#", "patch FID: windows of large pictures", "inception", reals=True, drawn=True),
    "ppl2_wend": Family("ppl2_wend[_#]", "path length in W", "lpips-vgg", drawn=True, side=16),
    "eqt_int": Family("eqt#_int", "equivariance to whole pixels of translation, dB", drawn=True, side=32),
    "eqt_frac": Family("eqt#_frac", "equivariance to any translation, dB", drawn=True, side=32),
    "eqr": Family("eqr#", "equivariance to rotation, dB", drawn=True, side=32),
    "scale_psnr": Family("scale_psnr[_#]", "scale consistency, dB", drawn=True, default=1000),
    "scale_ssim": Family("scale_ssim[_#]", "scale consistency, SSIM", drawn=True, default=1000, side=11),
    "scale_lpips": Family(
        "scale_lpips[_#]", "scale consistency, LPIPS", "lpips-alex", drawn=True, default=1000, side=31
    ),
}


@dataclass(frozen=True)
class Metric:
    family: str
    num: int  # pictures to generate
    full: bool = False  # against all photographs

    @property
    def name(self) -> str:
        """As people of StyleGAN write it, with thousands as k."""
        family = FAMILIES[self.family]
        number = str(self.num) if self.num % 1000 else f"{self.num // 1000}k"
        optional = "" if self.num == family.default else f"_{number}"
        name = family.pattern.replace("[_#]", optional).replace("#", number)
        return name.replace("_?", "" if number.endswith("k") else "_") + "_full" * self.full

    def of(self, num: int) -> "Metric":
        """The same, of `num` pictures. Raises UserError when that is too few."""
        least = FAMILIES[self.family].least
        if num < least:
            raise UserError(f"{self.name} takes {least} pictures or more, not {num}")
        return replace(self, num=num)


def parse(text: str) -> tuple[Metric, ...]:
    """The metrics in "a,b,c", each once; () for "none". Raises UserError for unknown names and too few pictures."""
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    return tuple(dict.fromkeys(map(_parse, names)))


def _parse(name: str) -> Metric:
    for key, family in FAMILIES.items():
        pattern = family.pattern.replace("[_#]", "(?:_#)?").replace("#", r"(\d{1,9})(k?)") + "(_full)?" * family.reals
        if match := re.fullmatch(pattern, name):
            number, thousands, *full = match.groups()
            num = int(number) * (1000 if thousands else 1) if number else family.default
            return Metric(key, family.default, any(full)).of(num)
    raise UserError(f"there is no metric {name!r}; {nearest(name, KNOWN)}")


# The usual names; the numbers in them may be others.
KNOWN = tuple(Metric(key, family.default, family.reals).name for key, family in FAMILIES.items())
