"""The path from lines to picture: its kernel, run by Triton's interpreter, is the chain that it replaces."""

import importlib
import sys

import pytest
import torch

from dnnlib.console import UserError
from rendering.network import Painter
from torch_utils.ops import pixel_path
from torch_utils.ops.chain import Layer
from torch_utils.ops.pixel_path import PixelPath
from training.networks import Generator, GeneratorConfig

TINY = {"img_resolution": 16, "channel_base": 128, "channel_max": 16, "z_dim": 8, "w_dim": 8, "mapping_layers": 1}


@pytest.fixture
def kernel(monkeypatch):
    """The module, made for the interpreter: it runs the same code with NumPy."""
    pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs only")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop("torch_utils.ops.pixel_kernel", None)
    yield importlib.import_module("torch_utils.ops.pixel_kernel")
    sys.modules.pop("torch_utils.ops.pixel_kernel")


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
    rows, cols = (painter.line(axis, torch.rand(n, dtype=torch.float64)) for axis, n in enumerate((10, 20)))
    rows, cols = rows[..., 1:], cols[..., :-1]  # windows of longer lines: full tiles and bits
    layers = [
        part._replace(weight=part.weight.to(dtype), bias=part.bias.to(dtype))
        for part in painter.pixels.chain.run.layers
    ]
    expected = painter.pixels(rows, cols)
    assert expected.shape == (G.config.img_channels, 9 * 19)
    for tile in ((8, 8), (4, 16)):
        image = kernel.PixelKernel(layers, painter.pixels.summed, tile=tile)(rows, cols)
        assert image.shape == expected.shape
        error = (image - expected).abs().max() / expected.abs().max()
        assert error <= {torch.float32: 1e-5, torch.float16: 1e-2}[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_with_the_papers_channels(capability):
    pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs only")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torch_utils.ops.pixel_kernel import LEAST, TILE, WARPS, _paint

    constants = {"C": 32, "P": 32, "D": 8, "OUT": LEAST, "DOWN": TILE[0], "ACROSS": TILE[1], "CHUNK": 32}
    types = dict.fromkeys(_paint.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    types |= {"rows": "*fp32", "cols": "*fp32", "weights": "*bf16", "biases": "*fp32", "image": "*fp32"}
    types |= {"clamp": "fp32", "largest": "fp32"}
    where = {(_paint.arg_names.index(name),): value for name, value in constants.items()}
    made = compile(ASTSource(_paint, types, where), GPUTarget("cuda", capability, 32), {"num_warps": WARPS})
    ptx = made.asm["ptx"]
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in ptx  # on tensor cores
    assert "cp.async" in ptx  # weights are on their way while earlier ones are used


def test_a_named_one_raises_where_it_cannot_be_had():
    layers = [Layer(torch.eye(4), torch.zeros(4))] * 11
    with pytest.raises(UserError, match=r"impl='triton' is for .* on CUDA devices, not .*32 on cpu"):
        PixelPath(layers, 0, impl="triton")
    with pytest.raises(UserError, match="impl='cuda' is unknown; use one of auto, reference, cpp, triton"):
        PixelPath(layers, 0, impl="cuda")


def test_a_kernel_that_fails_is_told_once_and_not_tried_again(capsys):
    def kernel(rows, cols):
        raise RuntimeError("out of resource: shared memory\nand more")

    layers = [Layer(torch.eye(4), torch.zeros(4))] * 4 + [Layer(torch.ones(3, 4), torch.zeros(3), branch=True)]
    lines = torch.ones(1, 4, 2, 3), torch.ones(1, 4, 2, 5)
    expected = PixelPath(layers, 0)(*lines)
    paths = [PixelPath(layers, 0) for _ in range(2)]
    for path in paths:
        path.kernel = kernel
        assert torch.equal(path(*lines), expected)
        assert path.kernel is None
        assert path.key in pixel_path.failed
    pixel_path.failed.clear()
    said = "pixel_path goes on without its Triton kernel, which is slower: out of resource: shared memory\n"
    assert capsys.readouterr().err == said
    paths[0].kernel, paths[0].named = kernel, True
    with pytest.raises(RuntimeError, match="out of resource"):
        paths[0](*lines)
