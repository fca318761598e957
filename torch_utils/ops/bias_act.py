"""Bias, activation, gain and clamp: what follows every linear map of the networks."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torch_utils.build import DTYPES, CudaKernels, Kernels, choose

IMPLS = ("auto", "reference", "cpp", "cuda")
SOURCE = Path(__file__).with_suffix(".cu")
THREADS = 256  # of a block, as in bias_act.cu


class Activation(NamedTuple):
    """A leaky ReLU. The slope is an argument of every kernel: another one only needs an entry in ACTIVATIONS.

    Any other function needs new kernels and a new `folded`.
    """

    slope: float  # of negative inputs
    gain: float  # the default: keeps the second moment of normal inputs about 1


ACTIVATIONS = {"linear": Activation(1.0, 1.0), "lrelu": Activation(0.2, math.sqrt(2))}


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    dim: int = -1,
    impl: str = "auto",
) -> Tensor:
    """Compute clamp(gain · act(x + bias), ±clamp) in the dtype of x, with `bias` [C] along axis `dim` of x.

    Return x itself where that is the identity.

    act: a key of ACTIVATIONS, which also has the default gain.
    impl: "reference" is PyTorch; "cuda" (bias_act.cu) and "cpp" (bias_act.cpp, float32 and bfloat16 on CPUs) round
        once, where the reference rounds after each step, and keep two bits (cpp: eight) per element for the gradient;
        "auto" as in `torch_utils.build.choose`.
    Differentiable twice. Raises ValueError when bias has another shape, UserError when the requested implementation is
    unavailable.
    """
    activation = ACTIVATIONS[act]
    gain = activation.gain if gain is None else gain
    if bias is not None and bias.shape != x.shape[dim : dim + 1 or None]:
        raise ValueError(f"bias must be [{x.shape[dim]}], as axis {dim} of x {list(x.shape)}; got {list(bias.shape)}")
    kernels = choose(impl, IMPLS, SOURCE, x)
    if bias is None and clamp is None and activation.slope == gain == 1:
        return x
    if kernels is not None:
        formula = (activation.slope, float(gain), math.inf if clamp is None else float(clamp))
        return fused(kernels, x, bias, formula, dim % max(x.ndim, 1))
    if bias is not None:
        x = x + bias.to(x.dtype).view([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
    if activation.slope != 1:
        x = F.leaky_relu(x, activation.slope)
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


# --- the kernels ------------------------------------------------------------------------------------------------------


def fused(
    kernels: Kernels | CudaKernels, x: Tensor, bias: Tensor | None, formula: tuple[float, float, float], dim: int
) -> Tensor:
    """Compute bias_act by a kernel. `formula`: slope, gain, clamp. The result has the memory layout of x."""
    if not x.is_contiguous():
        order = sorted(range(x.ndim), key=x.stride, reverse=True)
        y = fused(kernels, x.permute(order).contiguous(), bias, formula, order.index(dim))
        return y.permute([order.index(i) for i in range(x.ndim)])
    if bias is not None:
        bias = aligned(bias.to(wide(x.dtype)))
    x, arguments = aligned(x), (dim, kernels, formula)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return BiasAct.apply(x, bias, *arguments)
    return value(x, bias, None, *arguments)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which the kernels do arithmetic on numbers of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def aligned(x: Tensor) -> Tensor:
    """Return x, or a copy that is contiguous and starts at a multiple of 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def codes_for(x: Tensor, count: int, kernels: Kernels | CudaKernels) -> Tensor:
    """Allocate the codes of `count` elements in the dtype of x: on a GPU two bits per element, on a CPU a byte."""
    if not kernels.capability:
        return torch.empty(count, dtype=torch.int8)
    return torch.empty(-(-count * x.element_size() // 16), dtype=torch.int16, device=x.device)


def value(
    x: Tensor, bias: Tensor | None, codes: Tensor | None, dim: int, kernels: Kernels | CudaKernels, formula: tuple
) -> Tensor:
    y = torch.empty_like(x)
    channels, inner = (1, 1) if bias is None else (x.shape[dim], x.shape[dim + 1 :].numel())
    arguments = x, bias, y, codes, x.numel(), channels, inner
    if x.numel() and kernels.capability:
        blocks, step = passes(kernels, x)
        shift = step // inner % channels, step % inner  # in [channels,inner], from a step to the next
        kernels.launch("bias_act", x.dtype, blocks, THREADS, *arguments, *shift, *formula)
    elif x.numel():
        kernels.call("bias_act", DTYPES[x.dtype], *arguments, *formula)
    return y


def passes(kernels: CudaKernels, x: Tensor) -> tuple[int, int]:
    """Return the number of blocks that pass over x, no more than the device holds at once, and the size of a step."""
    elements = THREADS * 16 // x.element_size()  # of a block
    blocks = min(-(-x.numel() // elements), kernels.threads // THREADS)
    return blocks, blocks * elements


class BiasAct(Function):
    """The value, in one pass over x. The gradient needs neither x nor y."""

    @staticmethod
    def forward(ctx, x, bias, dim, kernels, formula):
        codes = codes_for(x, x.numel(), kernels)
        ctx.save_for_backward(codes)
        ctx.others = [i for i in range(x.ndim) if i != dim]
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.kernels, ctx.formula = kernels, formula
        return value(x, bias, codes, dim, kernels, formula)

    @staticmethod
    def backward(ctx, gy):
        gx = Gradient.apply(gy, *ctx.saved_tensors, ctx.kernels, ctx.formula)
        gb = None
        if ctx.needs_input_grad[1]:
            # On a CPU `dtype=` copies all of gx to float32 first; bfloat16 is summed in float32 without it too.
            dtype = None if gx.device.type == "cpu" else ctx.bias_dtype
            gb = (gx.sum(ctx.others, dtype=dtype) if ctx.others else gx).to(ctx.bias_dtype)
        return gx, gb, None, None, None


class Gradient(Function):
    """g times the derivative in the codes. It is linear in g and its own adjoint."""

    @staticmethod
    def forward(ctx, g, codes, kernels, formula):
        ctx.save_for_backward(codes)
        ctx.kernels, ctx.formula = kernels, formula
        g = aligned(g)
        y = torch.empty_like(g)
        arguments = g, codes, y, g.numel(), *formula[:2]
        if g.numel() and kernels.capability:
            kernels.launch("bias_act_gradient", g.dtype, passes(kernels, g)[0], THREADS, *arguments)
        elif g.numel():
            kernels.call("bias_act_gradient", DTYPES[g.dtype], *arguments)
        return y

    @staticmethod
    def backward(ctx, gg):
        return Gradient.apply(gg, *ctx.saved_tensors, ctx.kernels, ctx.formula), None, None, None
