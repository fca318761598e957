"""Compute LPIPS, the learned perceptual distance of two images (Zhang et al., 2018, https://arxiv.org/abs/1801.03924).

The package `lpips` computes it (version 0.1, with its heads); the weights of the backbone, VGG16 or AlexNet, are the
files that torchvision publishes.
"""

import functools
import os
import warnings

import lpips
import torch
from torch import Tensor

from dnnlib.files import RemoteFile, locate
from metrics.weights import PublishedNetwork, State
from torch_utils.precision import full_precision

BACKBONES = {
    "vgg": RemoteFile("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "alex": RemoteFile(
        "alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"
    ),
}


class LPIPS(PublishedNetwork):
    """Images a and b, [N,3,H,W] or [N,1,H,W] in [-1,1] -> [N], 0 for equal images and larger for others.

    net: "vgg" (as in path lengths) or "alex" (which its authors recommend for comparing images). Their last layers need
        16 and 31 pixels per side.
    """

    def __init__(self, net: str, weights_dir: str | os.PathLike | None = None, device: str | torch.device = "cpu"):
        """Find the backbone's weights in the cache or in `weights_dir`, or download them. Raises UserError."""
        source, kind = BACKBONES[net], f"lpips-{net}"
        super().__init__(locate(source, weights_dir), source, kind, kind, functools.partial(build, net), device)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        # float32, not TF32: its 10 bits would hide the steps of 1e-4 that path lengths consist of.
        with full_precision(a), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.module(a, b).flatten()


def build(net: str, state: State) -> lpips.LPIPS:
    """Build the package's network with the tensors `state` of torchvision's backbone. Raises for other tensors."""
    # On "meta", parameters have no values: nothing is downloaded or random, even if `state` lacks tensors.
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, about the arguments that the package gives
        module = lpips.LPIPS(net=net, pnet_rand=True, pretrained=False, verbose=False)
    # Layers are in slices, with the numbers of torchvision: slice2.3.weight is features.3.weight.
    names = {name: f"features.{name.split('.', 1)[1]}" for name in module.net.state_dict()}
    module.net.load_state_dict({name: state[there].float() for name, there in names.items()}, assign=True)
    heads = os.path.join(os.path.dirname(lpips.__file__), "weights", "v0.1", f"{net}.pth")
    module.load_state_dict(torch.load(heads, map_location="cpu", weights_only=True), strict=False, assign=True)
    return module
