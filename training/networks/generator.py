"""The generator: a mapping from latents to styles, then the synthesis of its kind."""

from typing import Union

from torch import Tensor, nn

from training.networks.base import StyleMapping
from training.networks.cips import CIPSConfig, CIPSSynthesis
from training.networks.creps import CrepsSynthesis, GeneratorConfig
from training.networks.inr_gan import INRGANConfig, INRGANSynthesis
from training.networks.stylegan2 import StyleGAN2Config, StyleGAN2Synthesis

# Another kind is another file and an entry. Its config extends SynthesisConfig, its module Synthesis.
GENERATORS = {
    GeneratorConfig: CrepsSynthesis,
    StyleGAN2Config: StyleGAN2Synthesis,
    CIPSConfig: CIPSSynthesis,
    INRGANConfig: INRGANSynthesis,
}
AnyGeneratorConfig = Union[tuple(GENERATORS)]  # noqa: UP007 (made from the table)


class Generator(nn.Module):
    """z [N,z_dim], c [N,c_dim] or None -> [N,C,H,W], on the training grid or at any rows × cols (see Synthesis).

    class_names: what the numbers of c stand for, or []. Snapshots keep it, and nothing computed depends on it.
    """

    def __init__(self, config: AnyGeneratorConfig):
        super().__init__()
        self.config = config
        self.class_names: list[str] = []
        self.mapping = StyleMapping(config)
        self.synthesis = GENERATORS[type(config)](config)

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        rows: Tensor | None = None,
        cols: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        return self.synthesis(ws, rows, cols, noise)
