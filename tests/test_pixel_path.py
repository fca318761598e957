"""The kernel from lines to picture, run by Triton's interpreter, is the chain that it replaces."""

import importlib
import sys

import pytest
import torch

from rendering.network import Painter, fuse
from training.networks import Generator, GeneratorConfig

pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs only")
TINY = {"img_resolution": 16, "channel_base": 128, "channel_max": 16, "z_dim": 8, "w_dim": 8, "mapping_layers": 1}


@pytest.fixture
def kernel(monkeypatch):
    """The module, made for the interpreter: it runs the same code with NumPy."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop("torch_utils.ops.pixel_path", None)
    yield importlib.import_module("torch_utils.ops.pixel_path")
    sys.modules.pop("torch_utils.ops.pixel_path")


@pytest.mark.parametrize(
    "changes",
    [
        {"biline_channels": 16, "thickness": 3},
        {"biline_channels": 5, "thickness": 1},
        {"decoders": False, "biline_channels": 8},
        {"architecture": "orig", "biline_channels": 8, "img_channels": 1},
    ],
    ids=lambda changes: ", ".join(f"{name}={value}" for name, value in changes.items()),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_is_the_chain(kernel, changes, dtype):
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(**TINY | changes)).eval().requires_grad_(False)
    w = G.mapping(torch.randn(1, 8))[0]
    painter = Painter(G, w, torch.float32, impl="reference")
    rows, cols = (painter.line(axis, torch.rand(n, dtype=torch.float64)) for axis, n in enumerate((3, 70)))
    rows, cols = rows[..., 1:], cols[..., :-1]  # windows of longer lines: two rows, a full block and a bit
    layers = [
        part._replace(weight=part.weight.to(dtype), bias=part.bias.to(dtype)) for part in painter.colours.run.layers
    ]
    image = kernel.PixelPath(layers, painter.summed)(rows, cols)
    expected = painter.pixels(fuse(rows, cols))
    assert image.shape == expected.shape == (G.config.img_channels, 2 * 69)
    assert (image - expected).abs().max() <= {torch.float32: 1e-5, torch.float16: 1e-2}[dtype] * expected.abs().max()
