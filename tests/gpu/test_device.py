"""Laws that need a GPU: streams, several devices, tensors beyond 2³¹ elements, images by the Triton kernel."""

import copy
import math

import pytest
import torch

import rendering
from rendering.network import FoldedGenerator
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.modulated_linear import modulated_linear
from training.networks import Generator, GeneratorConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="there is no CUDA device of compute capability 8.0",
    ),
]


def layer(n, p, i, o, device="cuda"):
    torch.manual_seed(0)
    x = torch.randn(n, p, i, device=device, dtype=torch.bfloat16)
    return x, *(torch.randn(*shape, device=device) for shape in ((o, i), (n, i), (o,)))


def test_kernels_run_on_the_present_stream():
    """The input is made on a side stream by work of milliseconds; a kernel on another stream would see zeros."""
    side = torch.cuda.Stream()
    x = torch.zeros(1000, device="cuda")
    slow = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(10):
            slow = slow @ slow * 1e-2
        x += 1 + 0 * slow.nan_to_num(0, 0, 0)[0, :1000]
        y = bias_act(x, impl="cuda")
    side.synchronize()
    assert torch.equal(y, torch.ones_like(y))


def test_kernels_can_be_captured_in_a_graph():
    inputs = layer(2, 256, 64, 64)
    expected = modulated_linear(*inputs, impl="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = modulated_linear(*inputs, impl="cuda")
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
def test_kernels_run_where_the_tensors_are():
    results = [modulated_linear(*layer(2, 30, 64, 64, "cpu"), impl="reference")]
    for i in (0, 1):
        inputs = [t.to(f"cuda:{i}").requires_grad_() for t in layer(2, 30, 64, 64, "cpu")]
        y = modulated_linear(*inputs, impl="cuda")
        y.float().sum().backward()
        results.append(y.cpu())
        assert inputs[1].grad.device == inputs[1].device
    assert torch.equal(results[1], results[2])
    with pytest.raises(ValueError, match="all tensors must be on cuda:0; got one on cuda:1"):
        bias_act(torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1"), impl="cuda")


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 24 * 2**30, reason="it needs 24 GiB of GPU memory"
)
def test_tensors_may_have_more_than_two_to_the_31_elements():
    count, channels = 2**31 + 72, 8
    x = torch.zeros(count // channels, channels, dtype=torch.bfloat16, device="cuda")
    x[-5:] = -1
    bias = torch.arange(channels, device="cuda", dtype=torch.float32)
    y = bias_act(x, bias, act="lrelu", gain=1.0, impl="cuda")
    assert torch.equal(y[-6:], bias_act(x[-6:], bias, act="lrelu", gain=1.0, impl="reference"))
    assert torch.equal(y[2**27 : 2**27 + 5], bias.bfloat16().expand(5, channels))
    assert y.sum(0, dtype=torch.float64).tolist() == pytest.approx(
        [c * (len(x) - 5) + 5 * y[-1, c].item() for c in range(channels)]
    )
    del y
    weight = torch.eye(channels, device="cuda")
    z = modulated_linear(x[None], weight, weight[:1] * 0 + 1, bias, demodulate=False, act="linear", impl="cuda")[0]
    assert torch.equal(z[-6:], x[-6:] + bias.bfloat16())
    assert torch.equal(z[2**28 - 3 : 2**28], bias.bfloat16().expand(3, channels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"decoders": False}, {"biline_channels": 5, "img_channels": 1}, {"architecture": "orig"}], ids=str
)
def test_images_of_half_types_are_those_of_float64_to_45_db(dtype, changes):
    """With the paper's channels and odd ones; odd sizes; the Triton kernel, and not what serves in its place."""
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(img_resolution=64, channel_base=2048, **changes)).eval().requires_grad_(False)
    ws = G.mapping(torch.randn(2, G.config.z_dim))
    truth = rendering.render(copy.deepcopy(G).double(), ws.double(), rendering.Shot((83, 130)), dtype=torch.float64)
    G = G.cuda()
    got = rendering.render(G, ws.cuda(), rendering.Shot((83, 130)), dtype=dtype).cpu().double()
    error = (got.clamp(-1, 1) - truth.clamp(-1, 1)).square().mean()
    assert 10 * math.log10(4 / error) > 45

    folded = FoldedGenerator(G, ws[0].cuda(), dtype, impl="triton")  # which raises where it fails
    rows, cols = (folded.line(axis, torch.rand(9, dtype=torch.float64, device="cuda")) for axis in (0, 1))
    assert folded.pixels(rows, cols).shape == (G.config.img_channels, 81)


def test_torch_compile_fuses_the_reference():
    x, bias = torch.randn(64, 32, device="cuda"), torch.randn(32, device="cuda")
    compiled = torch.compile(lambda x, bias: bias_act(x, bias, act="lrelu", clamp=1.0), fullgraph=True)
    assert torch.allclose(compiled(x, bias), bias_act(x, bias, act="lrelu", clamp=1.0), rtol=1e-6, atol=1e-6)
