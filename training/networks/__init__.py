"""The networks: a generator and a discriminator, each of the kind that its config says."""

from typing import Union

from torch import nn

from training.networks.cips import CIPSConfig
from training.networks.coords import COORDS
from training.networks.creps import GeneratorConfig
from training.networks.discriminator import Discriminator, DiscriminatorConfig
from training.networks.generator import AnyGeneratorConfig, Generator
from training.networks.inr_gan import INRGANConfig
from training.networks.projected import ProjectedConfig, ProjectedDiscriminator
from training.networks.stylegan2 import StyleGAN2Config

# Another kind is another file and an entry. Its config extends DiscriminatorConfig by another `kind`. Its module has
# `config`, `forward(images, c, batches)` -> logits [N,…], and `regularised(images, c)`, the logits that R1 penalises.
DISCRIMINATORS = {DiscriminatorConfig: Discriminator, ProjectedConfig: ProjectedDiscriminator}
AnyDiscriminatorConfig = Union[tuple(DISCRIMINATORS)]  # noqa: UP007 (made from the table)


def build_discriminator(config: AnyDiscriminatorConfig) -> nn.Module:
    return DISCRIMINATORS[type(config)](config)


__all__ = [
    "COORDS", "AnyDiscriminatorConfig", "AnyGeneratorConfig", "CIPSConfig", "Discriminator", "DiscriminatorConfig",
    "Generator", "GeneratorConfig", "INRGANConfig", "StyleGAN2Config", "build_discriminator",
]  # fmt: skip
