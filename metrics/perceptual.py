"""LPIPS, the learned perceptual distance of two pictures (Zhang et al., 2018, https://arxiv.org/abs/1801.03924).

    d(a, b) = Σ over layers l, mean over pixels of Σ over channels c:  head[l][c] · (â[l][c] − b̂[l][c])²

where â[l] are the layer's features of a, scaled to length 1 at each pixel. The layers are those of torchvision's VGG16
or AlexNet; the heads, version 0.1, are read from the package `lpips` (0.1.4), none of whose code is run.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import alexnet, vgg16

from dnnlib.config import nearest
from dnnlib.console import UserError
from dnnlib.files import RemoteFile, sha256
from torch_utils.precision import full_precision


class Net(NamedTuple):
    build: Callable[[], nn.Module]
    taps: tuple[int, ...]  # the layers of its `features` that are compared
    least: int  # pixels per side that reach the last of them
    weights: RemoteFile  # as torchvision publishes them
    heads: str  # SHA-256 of their file


NETS = {
    "vgg": Net(
        vgg16,
        (3, 8, 15, 22, 29),
        16,
        RemoteFile("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    ),
    "alex": Net(
        alexnet,
        (1, 4, 7, 9, 11),
        31,
        RemoteFile(
            "alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"
        ),
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    ),
}


class LPIPS(nn.Module):
    """Pictures a and b, [N,3,H,W] or [N,1,H,W] in [-1,1] -> [N], 0 for equal ones and larger for others.

    net: "vgg" (as in path lengths) or "alex" (which its authors recommend for comparing pictures).
    weights: the file of the backbone's weights, `NETS[net].weights`. It is read, never run.

    name      "lpips-vgg" with the standard weights, else "lpips-vgg-custom-" and 8 digits of the digest
    digest    SHA-256 of the file of weights, hexadecimal
    standard  whether it begins like the standard one

    Raises UserError for other nets and for files that do not hold such weights.
    """

    def __init__(self, net: str, weights: str | Path):
        super().__init__()
        if net not in NETS:
            raise UserError(f"there is no LPIPS of {net!r}; {nearest(net, NETS)}")
        self.net = NETS[net]
        self.layers, self.digest = read_backbone(self.net, weights)
        self.standard = self.digest.startswith(self.net.weights.digest)
        self.name = f"lpips-{net}" if self.standard else f"lpips-{net}-custom-{self.digest[:8]}"
        for tap, head in zip(self.net.taps, read_heads(net), strict=True):
            self.register_buffer(f"head{tap}", head)
        # The mean and the deviation of ImageNet's colours, in [-1,1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Raises ValueError for other shapes, and for less than 16 (vgg) or 31 (alex) pixels per side."""
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] not in (1, 3) or min(a.shape[-2:]) < self.net.least:
            raise ValueError(
                f"LPIPS compares [N,3,H,W] or [N,1,H,W] of one shape and at least {self.net.least} pixels per side; "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
        # float32 in earnest: TF32 keeps 10 bits, which would hide the steps of 1e-4 that path lengths consist of.
        with full_precision(a), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = (torch.cat([a, b]) - self.shift) / self.scale
            distance = 0
            for number, layer in enumerate(self.layers):
                x = layer(x)
                if number in self.net.taps:
                    unit_a, unit_b = (x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)).chunk(2)
                    squares = (unit_a - unit_b).square() * self.get_buffer(f"head{number}")
                    distance = distance + squares.sum(1).mean((1, 2))
        return distance


def read_backbone(net: Net, path: str | Path) -> tuple[nn.Sequential, str]:
    """The layers that are needed, and the SHA-256 of their file."""
    # On "meta", parameters have no values: what the file lacks cannot stay random.
    with torch.device("meta"):
        layers = net.build().features[: net.taps[-1] + 1]
    try:
        digest = sha256(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        layers.load_state_dict({name: state[f"features.{name}"].float() for name in layers.state_dict()}, assign=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; take it from {net.weights.url}") from error
    # Broken bytes make zipfile, torch and its unpickler raise a dozen kinds of exception; all mean the same.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} does not hold the weights of {net.weights.url} ({reason})") from error
    return layers, digest


def read_heads(net: str) -> list[Tensor]:
    """float32 [C,1,1] for each tap. Raises UserError when they are not installed."""
    try:
        path = distribution("lpips").locate_file(f"lpips/weights/v0.1/{net}.pth")
        intact = sha256(path) == NETS[net].heads
    except (PackageNotFoundError, OSError):
        intact = False
    if not intact:
        raise UserError("LPIPS needs its heads, which the package lpips holds; run: pip install --no-deps lpips==0.1.4")
    state = torch.load(path, map_location="cpu", weights_only=True)  # they were saved on a GPU
    return [state[f"lin{i}.model.1.weight"][0] for i in range(len(NETS[net].taps))]
