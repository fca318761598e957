"""How much memory a run will need, before it needs it."""

import torch

from training import losses
from training.config import RunConfig
from training.networks import Discriminator, Generator

GIB = 2**30


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def saved_bytes(function) -> int:
    """How many bytes of distinct storage autograd keeps for the backward pass of `function`."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage  # held, so that no other storage takes the same id
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    del result
    return sum(storage.nbytes() for storage in kept.values())


def expected_bytes(config: RunConfig, micro: int) -> int:
    """Memory of one process in float32: parameters with gradients, Adam and average, and the hungrier phase of G.

    Counted on tensors without data. Half precision needs less, and libraries' workspaces come on top.
    """
    with torch.device("meta"):
        G, D = Generator(config.G), Discriminator(config.D)
        z, c = torch.empty(micro, config.G.z_dim), torch.empty(micro, config.G.c_dim)
        half = (micro + 1) // 2
        noise = torch.empty(half, config.G.img_channels, *config.G.img_shape)
        phases = [saved_bytes(lambda: D(G(z, c), c))]
        if config.loss.pl_weight:
            phases.append(
                saved_bytes(lambda: losses.path_lengths(G.synthesis, G.mapping(z[:half], c[:half]), noise).sum())
            )
    # G has weights, gradients, two moments and the average; D all but the average. The parameters saved for the
    # backward pass are counted twice, and the temporaries of a pass are not: the two are of one size.
    return 4 * (5 * parameters(G) + 4 * parameters(D)) + max(phases)
