"""From lines to colours: the Triton kernel, in Triton's interpreter, is the chain; how it is chosen and given up."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import error, noise

from dnnlib.console import UserError
from rendering import pixel_path
from rendering.network import FoldedGenerator
from rendering.pixel_path import PixelPath
from torch_utils.ops.chain import Folded
from training.networks import Generator, GeneratorConfig

TINY = {"img_resolution": 16, "channel_base": 128, "channel_max": 16, "z_dim": 8, "w_dim": 8, "mapping_layers": 1}


@pytest.fixture
def kernel(monkeypatch):
    """Returns rendering.pixel_kernel for Triton's interpreter, which runs the same code with NumPy."""
    pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs only")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop("rendering.pixel_kernel", None)
    yield importlib.import_module("rendering.pixel_kernel")
    sys.modules.pop("rendering.pixel_kernel")


@pytest.mark.parametrize(
    ("changes", "dtype", "tile"),
    [
        ({"biline_channels": 16, "thickness": 3}, torch.float32, (8, 8)),
        ({"biline_channels": 5, "thickness": 1}, torch.float16, (4, 16)),
        ({"decoders": False, "biline_channels": 8}, torch.float32, (4, 16)),
        ({"architecture": "orig", "biline_channels": 8, "img_channels": 1}, torch.float16, (8, 8)),
    ],
    ids=str,
)
def test_the_kernel_is_the_chain(kernel, changes, dtype, tile):
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(**TINY | changes)).eval().requires_grad_(False)
    w = G.mapping(torch.randn(1, 8))[0]
    folded = FoldedGenerator(G, w, torch.float32, impl="reference")
    rows, cols = (folded.line(axis, torch.rand(n, dtype=torch.float64)) for axis, n in enumerate((10, 20)))
    rows, cols = rows[..., 1:], cols[..., :-1]  # windows of longer lines: full tiles and bits
    expected = folded.pixels(rows, cols)
    image = kernel.PixelKernel([m.to(dtype) for m in G.synthesis.pixels.folded(w[-1])], tile=tile)(rows, cols)
    assert image.shape == expected.shape == (G.config.img_channels, 9 * 19)
    assert error(image, expected) <= {torch.float32: 1e-5, torch.float16: 1e-2}[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_with_the_papers_channels(capability):
    pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs only")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rendering.pixel_kernel import LEAST, TILE, WARPS, _render

    constants = {"C": 32, "P": 32, "D": 8, "OUT": LEAST, "DOWN": TILE[0], "ACROSS": TILE[1]}
    types = dict.fromkeys(_render.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    types |= {"rows": "*fp32", "cols": "*fp32", "weights": "*bf16", "biases": "*fp32", "image": "*fp32"}
    types |= dict.fromkeys(("slope", "clamp", "largest"), "fp32")
    where = {(_render.arg_names.index(name),): value for name, value in constants.items()}
    made = compile(ASTSource(_render, types, where), GPUTarget("cuda", capability, 32), {"num_warps": WARPS})
    ptx = made.asm["ptx"]
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in ptx  # on tensor cores
    assert "cp.async" in ptx  # weights are on their way while earlier ones are used


def test_a_requested_kernel_raises_where_it_is_unavailable():
    layers = [Folded(torch.eye(4), torch.zeros(4))] * 11
    with pytest.raises(UserError, match=r"impl='triton' is for .* on CUDA devices, not .*32 on cpu"):
        PixelPath(layers, impl="triton")
    with pytest.raises(UserError, match="impl='cuda' is unknown; use one of auto, reference, cpp, triton"):
        PixelPath(layers, impl="cuda")


@pytest.mark.parametrize(
    ("capability", "channels", "problem"),
    [((7, 5), 32, "8.0 and later"), ((9, 0), 33, "32 channels"), ((9, 0), 32, "")],
)
def test_the_kernel_is_for_tensor_cores_of_bfloat16_and_for_few_channels(monkeypatch, capability, channels, problem):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    weight = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(64, channels))
    found = pixel_path.why_not(weight)
    assert problem in found
    assert bool(found) == bool(problem)


def test_a_failing_kernel_is_reported_once_and_not_tried_again(fresh_cache, monkeypatch, capsys):
    def kernel(rows, cols):
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(pixel_path, "failed", set())
    layers = [Folded(noise(4, 4), noise(4))] * 4 + [Folded(noise(3, 4), noise(3), branch=True)]
    lines = noise(1, 4, 2, 3), noise(1, 4, 2, 5)
    expected = PixelPath(layers)(*lines)
    paths = [PixelPath(layers) for _ in range(2)]
    for path in paths:
        path.kernel = kernel
        assert torch.equal(path(*lines), expected)
        assert path.kernel is None
        assert path.key in pixel_path.failed
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("without its Triton kernel, which is slower: out of resource: shared memory")
    paths[0].kernel, paths[0].required = kernel, True
    with pytest.raises(RuntimeError, match="out of resource"):
        paths[0](*lines)
