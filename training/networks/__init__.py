"""The networks: `Generator(GeneratorConfig(…))` and `Discriminator(DiscriminatorConfig(…))`."""

from training.networks.discriminator import Discriminator, DiscriminatorConfig
from training.networks.generator import Generator, GeneratorConfig, positions
from training.networks.lines import Lines

__all__ = ["Discriminator", "DiscriminatorConfig", "Generator", "GeneratorConfig", "Lines", "positions"]
