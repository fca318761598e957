"""The synthesis of CREPS: lines, then pixels."""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from training.networks.base import Synthesis, SynthesisConfig
from training.networks.lines import Lines, LineSynthesis
from training.networks.pixels import PixelSynthesis

INPUT = "synthesis.lines.input."  # prefix of the input's weights in the state_dict of a generator


class GeneratorConfig(SynthesisConfig):
    """The architecture of CREPS. The defaults are the paper's (supplement, section 1)."""

    kind: Literal["creps"] = "creps"
    depth: int | None = Field(None, ge=2, le=64, description="blocks; by default log2 of the longer side, less 1")
    channel_base: int = Field(65536, ge=1, description="block k = 4, 8, … is min(channel_base / k, channel_max) wide")
    channel_max: int = Field(1024, ge=2)
    biline_channels: int = Field(32, ge=1, description="channels of the summed lines and of the pixel features")
    thickness: int = Field(8, ge=1, description="D: numbers per channel at each position of a line")
    bandwidth: float = Field(10.0, gt=0, description="standard deviation of the input frequencies, cycles per image")
    architecture: Literal["skip", "orig"] = Field("skip", description="fuse after every block, or once at the end")
    decoders: bool = Field(True, description="decode the pixel features between fusions (paper, table 4)")

    @model_validator(mode="after")
    def _buildable(self):
        if self.depth is None and max(self.img_shape) < 8:
            raise ValueError(f"img_shape={self.img_shape} is too small for two blocks; set depth as well")
        odd = self.widths[0] % 2
        if odd or self.widths[-1] < 1:
            what = "an odd first block" if odd else "an empty last block"
            raise ValueError(
                f"channel_base={self.channel_base} and channel_max={self.channel_max} give {what} "
                f"(widths {self.widths}); use a larger channel_base and an even channel_max"
            )
        return self

    @property
    def num_blocks(self) -> int:
        return self.depth or int(math.log2(max(self.img_shape))) - 1

    @property
    def widths(self) -> list[int]:
        """Return the channels of blocks k = 4, 8, …"""
        return [self.channels(4 << i) for i in range(self.num_blocks)]

    @property
    def num_fusions(self) -> int:
        return self.num_blocks - 1 if self.architecture == "skip" else 1

    @property
    def num_ws(self) -> int:
        return 2 * self.num_blocks + 1


class CrepsSynthesis(Synthesis):
    """From styles and positions to an image, in two stages that can be called separately: `lines`, then `pixels`.

    `G.synthesis.lines(ws, rows, cols)` -> Lines, and `G.synthesis.pixels(lines.window(…), ws[:, -1])` -> [N,C,h,w].
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__(config)
        self.lines: LineSynthesis = LineSynthesis(
            config.widths,
            config.biline_channels,
            config.thickness,
            config.w_dim,
            config.bandwidth,
            every_block=config.architecture == "skip",
        )
        self.pixels: PixelSynthesis = PixelSynthesis(
            config.num_fusions,
            config.biline_channels,
            config.img_channels,
            config.w_dim,
            decoders=config.decoders,
        )

    def compute(self, ws: Tensor, rows: Tensor, cols: Tensor, noise: Tensor | None) -> Tensor:
        lines: Lines = self.lines(ws, rows, cols)
        return self.pixels(lines, ws[:, -1])


def thicken(weights: dict[str, Tensor], thickness: int, noise: float = 0.5) -> dict[str, Tensor]:
    """Return the weights of a generator of that thickness, which renders the same images if `noise` is 0.

    `weights`: the state_dict of a generator of kind creps whose thickness divides `thickness`. Each slot of the
    thickness is copied, as Net2WiderNet copies units (Chen et al., Net2Net, ICLR 2016). The dot product then has as
    many times the terms as there are copies, so the heads are divided by the root of that. In all copies but the first,
    amplitudes are multiplied by 1 + noise·N(0,1), and frequencies moved by noise/2·N(0,1) cycles, always the same
    numbers: equal copies would stay equal in training. With 0.5, images of twice the thickness are 17 to 19 dB from the
    old ones (the networks in models/), which training has to mend.
    """
    amplitudes, freqs = weights[INPUT + "weight"], weights[INPUT + "freqs"]
    copies = thickness // len(freqs)
    generator = torch.Generator().manual_seed(0)

    def draw(like: Tensor) -> list[Tensor]:
        """Draw the noise of each copy; the first has none."""
        draws = [torch.randn(like.shape, generator=generator).to(like) for _ in range(copies - 1)]
        return [torch.zeros_like(like), *draws]

    result = {
        name: t / math.sqrt(copies) if name.startswith("synthesis.lines.") and name.split(".")[-2] == "head" else t
        for name, t in weights.items()
    }
    result[INPUT + "weight"] = torch.cat([amplitudes * (1 + noise * x) for x in draw(amplitudes)], 1)
    result[INPUT + "freqs"] = torch.cat([freqs + noise / 2 * x for x in draw(freqs)])
    for name in ("affine.weight", "affine.bias"):
        factors = weights[INPUT + name].unflatten(0, amplitudes.shape)
        result[INPUT + name] = torch.cat([factors] * copies, 1).flatten(0, 2)
    return result


def widen(weights: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a generator with more channels in its blocks or pixels, which renders the same images.

    `weights`, `fresh`: the state_dicts of the old generator and of a new one, of kind creps, which differ in those
    channels alone. New channels have the weights in `fresh`. What read the old channels reads the new ones times zero:
    a style of zero in modulated layers, weights of zero in others.
    """
    result = dict(weights)
    for name, new in fresh.items():
        layer, _, part = name.rpartition(".")
        old = weights[name]
        if part != "weight" or layer.endswith("affine") or old.shape == new.shape:
            continue
        outputs, inputs = old.shape
        gain = math.sqrt(new.shape[1] / inputs)  # undoes that of layers without demodulation, 1/√inputs
        modulated = f"{layer}.affine.weight" in weights
        result[name] = new.clone()
        result[name][:outputs, :inputs] = old if modulated else old * gain
        result[f"{layer}.bias"] = torch.zeros_like(fresh[f"{layer}.bias"])
        result[f"{layer}.bias"][:outputs] = weights[f"{layer}.bias"]
        if not modulated:
            result[name][:outputs, inputs:] = 0
            continue
        for affine in (f"{layer}.affine.weight", f"{layer}.affine.bias"):
            result[affine] = torch.zeros_like(fresh[affine])
            result[affine][:inputs] = weights[affine] * gain if layer.endswith("head") else weights[affine]
    return result


def grow(
    weights: dict[str, Tensor], fresh: dict[str, Tensor], noise: float = 0.5
) -> tuple[dict[str, Tensor], list[str]]:
    """Return `weights` in the sizes of `fresh` where they can grow to them (thicken, widen), and how they grew."""
    old, new = (len(tensors.get(INPUT + "freqs", ())) for tensors in (weights, fresh))
    grown = []
    if 0 < old < new and new % old == 0:
        weights = thicken(weights, new, noise)
        grown.append(f"thickness {old} copied to {new}")
    if old and weights.keys() == fresh.keys():
        shapes = {n: (weights[n].shape, t.shape) for n, t in fresh.items() if weights[n].shape != t.shape}
        if shapes and all(
            name.startswith(("synthesis.lines.blocks.", "synthesis.pixels."))
            and name != "synthesis.pixels.decoder_img.bias"  # other colours
            and len(a) == len(b)
            and all(x <= y for x, y in zip(a, b, strict=True))
            for name, (a, b) in shapes.items()
        ):
            weights = widen(weights, fresh)
            grown.append(f"{len(shapes)} tensors widened")
    return weights, grown
