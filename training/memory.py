"""How much memory a run will need, before it needs it."""

from collections import Counter

import torch

from training import losses
from training.config import RunConfig
from training.networks.pixels import part_size
from training.trainer import new_networks

GIB = 2**30


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def saved_bytes(function) -> int:
    """How many bytes of distinct storage autograd keeps at most for backward passes while `function` runs."""
    holders: Counter = Counter()  # of each storage
    now = most = 0

    class Holder:
        def __init__(self, tensor):
            nonlocal now, most
            self.tensor, self.storage = tensor, tensor.untyped_storage()  # held, so that no other takes the same id
            now += 0 if holders[id(self.storage)] else self.storage.nbytes()
            most = max(most, now)
            holders[id(self.storage)] += 1

        def __del__(self):
            nonlocal now
            holders[id(self.storage)] -= 1
            now -= 0 if holders[id(self.storage)] else self.storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Holder, lambda holder: holder.tensor):
        function()
    return most


def expected_bytes(config: RunConfig, micro: int, device: str) -> int:
    """Memory of one process on a `device` ("cpu" or "cuda"), in float32.

    Parameters with gradients, Adam and average, and the hungriest phase, counted on tensors without data. Half
    precision needs less, and libraries' workspaces come on top.
    """
    with torch.device("meta"):
        G, D = new_networks(config)
        z, c = torch.empty(micro, config.G.z_dim), torch.empty(micro, config.G.c_dim)
        half = (micro + 1) // 2
        height, width = config.G.img_shape
        noise = torch.empty(half, config.G.img_channels, height, width)
        rows, cols = torch.empty(height), torch.empty(width)
        judged = slice(1 if config.train.recompute == "all" else None)
        real = torch.empty(micro, *noise.shape[1:])[judged]
        count = max(1, part_size(device) // width) if config.train.recompute != "none" else height

        def synthesis(ws: torch.Tensor) -> torch.Tensor:
            """With one part of each image for all, as one at a time is held: hundreds would take minutes."""
            lines = G.synthesis.lines(ws, rows, cols)
            part = G.synthesis.pixels(lines.window(slice(count), slice(None)), ws[:, -1])
            return part.repeat(1, 1, -(-height // count), 1)[:, :, :height]

        def adversarial():
            D(synthesis(G.mapping(z, c))[judged], c[judged]).sum().backward()

        def path_length():
            losses.path_lengths(synthesis, G.mapping(z[:half], c[:half]), noise).sum().backward()

        def critic():
            (D(real, c[judged]) + D(real, c[judged])).sum().backward()

        def r1():
            losses.r1(lambda x: D.regularised(x, c[judged]), real).sum().backward()

        phases = [adversarial, critic]
        phases += [path_length] if config.loss.pl_weight else []
        phases += [r1] if config.loss.r1_gamma else []
        most = max(saved_bytes(phase) for phase in phases)
    # G has weights, gradients, two moments and the average; D all but the average. The parameters saved for the
    # backward pass are counted twice, and the temporaries of a pass are not: the two are of one size.
    return 4 * (5 * parameters(G) + 4 * parameters(D)) + most
