"""The modulated 1×1 convolution: a linear layer whose weight each image scales by its own style.

Legend: N images, P positions, I inputs, O outputs. Channels are the last axis, so that a layer is one matrix product.
"""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import Function

from dnnlib.console import UserError
from torch_utils.build import CudaKernels, choose
from torch_utils.ops.bias_act import ACTIVATIONS, Gradient, aligned, bias_act, codes_for, wide
from torch_utils.ops.bias_act import SOURCE as ELEMENTS
from torch_utils.precision import full_precision, product_dtype

IMPLS = ("auto", "reference", "cuda", "cublas")
SOURCE = Path(__file__).with_suffix(".cu")
# Of a block of each kernel in modulated_linear.cu.
ROWS = 8
TILE, WARPS = (128, 64), 4  # positions × outputs
EPSILON = 1e-8  # added to the squared length by which demodulation divides
# "auto" uses our own kernel up to this many inputs. Beyond, the library's faster product gains more than another pass
# over the outputs costs: with 600 and 250 TFLOP/s and 3 TB/s, assumed for an H100, from 285 on. Not measured.
NARROW = 256


def modulated_linear(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    bias: Tensor,
    *,
    demodulate: bool = True,
    act: str = "lrelu",
    clamp: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute bias_act(w' x, bias) with w'[n,o,i] = weight[o,i] · style[n,i], of length 1 over i if demodulated.

    x [N,P,I], weight [O,I], style [N,I], bias [O] -> [N,P,O]. `act` and `clamp` as in `bias_act`. Differentiable twice.
    Source: StyleGAN2 (Karras et al., CVPR 2020, equations 1 and 3).

    impl: "reference" is PyTorch; "cublas" computes w' in one kernel, then PyTorch's product, then the kernel of
        `bias_act`; "cuda", for half types on devices from 8.0 with I and O multiples of 8, computes w' and then the
        rest in our own tensor-core kernel; "auto" chooses "cuda" up to NARROW inputs where it is available,
        "cublas" elsewhere on CUDA devices, and otherwise as in `torch_utils.build.choose`.
    Raises ValueError when shapes do not match, UserError when the requested implementation is unavailable.
    """
    (n, _, i), (o, _) = x.shape, weight.shape
    if weight.shape != (o, i) or style.shape != (n, i) or bias.shape != (o,):
        shapes = ", ".join(str(list(t.shape)) for t in (x, weight, style, bias))
        raise ValueError(f"x, weight, style and bias must be [N,P,I], [O,I], [N,I] and [O]; got {shapes}")
    kernels, elements = (choose(impl, IMPLS, source, x) for source in (SOURCE, ELEMENTS))
    if kernels is not None and elements is not None:
        return fused(kernels, elements, x, weight, style, bias, demodulate, act, clamp, impl)
    # At least float32 here: a sum of 512 equal float16 squares overflows once |w'| > 11.3 (65504 / 512 = 127.9).
    with full_precision(x):
        weight = modulated(weight, style.to(weight.dtype), demodulate)
    if elements is not None:  # on a CPU, which has no kernel for the weights
        x = x.to(product_dtype(x))
        return bias_act(x @ weight.mT.to(x.dtype), bias, act=act, clamp=clamp)
    y = torch.baddbmm(bias.to(x.dtype), x, weight.mT.to(x.dtype))
    return bias_act(y, act=act, clamp=clamp, impl="reference")


def modulated(weight: Tensor, style: Tensor, demodulate: bool = True, gain: float = 1.0) -> Tensor:
    """weight [O,I], style […,I] -> gain · w' […,O,I], as in `modulated_linear`."""
    product = weight * style[..., None, :]
    if demodulate:
        return product * (gain * (style.square() @ weight.square().mT + EPSILON).rsqrt())[..., None]
    return product * gain if gain != 1 else product


# --- the kernels ------------------------------------------------------------------------------------------------------


def fused(
    kernels: CudaKernels,
    elements: CudaKernels,
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    bias: Tensor,
    demodulate: bool,
    act: str,
    clamp: float | None,
    impl: str,
) -> Tensor:
    x = x.to(product_dtype(x))
    problem = why_not(kernels, x.dtype, *weight.shape)
    if impl == "cuda" and problem:
        raise UserError(f"impl='cuda' of modulated_linear {problem}; use impl='cublas'")
    dtype = wide(weight.dtype)
    modulated = Modulate.apply(aligned(weight.to(dtype)), aligned(style.to(dtype)), demodulate, x.dtype, kernels)
    if impl == "cublas" or problem or (impl == "auto" and weight.shape[1] > NARROW):
        return bias_act(torch.bmm(x, modulated.mT), bias, act=act, clamp=clamp, impl="cuda")
    slope, gain = ACTIVATIONS[act]
    formula = (slope, gain, math.inf if clamp is None else float(clamp))
    x, bias = aligned(x), aligned(bias.float())
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, modulated, bias)):
        return Product.apply(x, modulated, bias, kernels, elements, formula)
    return product(x, modulated, bias, None, kernels, formula)


def why_not(kernels: CudaKernels, dtype: torch.dtype, outputs: int, inputs: int) -> str:
    """Return why our own kernel is unavailable, or an empty string."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"is for half types, not {dtype}"
    if inputs % 8 or outputs % 8 or not inputs:
        return f"is for multiples of 8 inputs and outputs, not {inputs} and {outputs}"
    if kernels.capability < 80:
        return f"needs a device of compute capability 8.0, not {kernels.capability / 10}"
    return ""


class Modulate(Function):
    """weight [O,I], style [N,I], both float32 or float64 -> w' [N,O,I] in `dtype`."""

    @staticmethod
    def forward(ctx, weight, style, demodulate, dtype, kernels):
        ctx.save_for_backward(weight, style)
        ctx.demodulate = demodulate
        made = dtype if wide(dtype) == weight.dtype else weight.dtype
        out = weight.new_empty(len(style), *weight.shape, dtype=made)
        if out.numel():
            count, arguments = len(style) * len(weight), (*weight.shape, int(demodulate), EPSILON)
            kernels.launch("modulate", made, -(-count // ROWS), 32 * ROWS, weight, style, out, count, *arguments)
        return out.to(dtype)

    @staticmethod
    def backward(ctx, g):
        """Compute the gradients in PyTorch, which differentiates them again.

        With m = weight · style and d = (Σ_i m² + ε)^-½, w' = d m and ∂w'/∂m = d (1 − w' w'ᵀ). So with h = d g and
        q = d² Σ_i h m, the gradient by m is h − q m, and q m needs no tensor of N·O·I.
        """
        weight, style = ctx.saved_tensors
        by_weight, by_style = ctx.needs_input_grad[:2]
        with full_precision(g):
            h = g.to(weight.dtype)
            if not ctx.demodulate:
                g_weight = (h * style[:, None]).sum(0) if by_weight else None
                g_style = (h * weight).sum(1) if by_style else None
                return g_weight, g_style, None, None, None
            weight2, style2 = weight.square(), style.square()
            d2 = (style2 @ weight2.mT + EPSILON).reciprocal()  # [N,O]
            h = h * d2.sqrt()[..., None]
            hw = h * weight
            q = d2 * (hw @ style[..., None]).squeeze(-1)  # [N,O]
            g_weight = (h * style[:, None]).sum(0) - weight * (q.mT @ style2) if by_weight else None
            g_style = hw.sum(1) - style * (q @ weight2) if by_style else None
        return g_weight, g_style, None, None, None


def product(
    x: Tensor, weight: Tensor, bias: Tensor, codes: Tensor | None, kernels: CudaKernels, formula: tuple
) -> Tensor:
    """x [N,P,I], weight [N,O,I], bias [O] in float32 -> [N,P,O]; `formula`: slope, gain, clamp."""
    (n, p, i), o = x.shape, len(bias)
    y = x.new_empty(n, p, o)
    if y.numel():
        blocks = n * -(-p // TILE[0]) * -(-o // TILE[1])
        arguments = x, weight, bias, y, codes, p, i, o
        kernels.launch("modulated_product", x.dtype, blocks, 32 * WARPS, *arguments, *formula)
    return y


class Product(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, kernels, elements, formula):
        codes = codes_for(x, x.shape[:2].numel() * len(bias), elements)
        ctx.save_for_backward(x, weight, codes)
        ctx.elements, ctx.formula = elements, formula
        return product(x, weight, bias, codes, kernels, formula)

    @staticmethod
    def backward(ctx, gy):
        x, weight, codes = ctx.saved_tensors
        g = Gradient.apply(gy, codes, ctx.elements, ctx.formula)
        gx, gw, gb = ctx.needs_input_grad[:3]
        return (
            g @ weight if gx else None,
            g.mT @ x if gw else None,
            g.sum((0, 1), dtype=torch.float32) if gb else None,
            None,
            None,
            None,
        )
