"""Convolutions whose derivatives of every order are convolutions with kernels of the same size.

PyTorch computes the gradient by a kernel of a gradient as a convolution with a kernel as large as the image, which
takes cuDNN seconds. But a convolution is linear in the image and in the kernel, so its gradient has the form of its
gradient's gradient.

Legend: N images, I inputs, O outputs. x [N,I,H,W], y [N,O,H',W'], weight [O,I,h,w]; strides and paddings (down, right).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torch_utils.precision import full_precision, product_dtype

Pair = tuple[int, int]


def conv2d(x: Tensor, weight: Tensor, stride: Pair = (1, 1), padding: Pair = (0, 0)) -> Tensor:
    """Convolve x -> y as torch does, in the dtype of autocast. Differentiable any number of times."""
    dtype = product_dtype(x)
    return Convolve.apply(x.to(dtype), weight.to(dtype), stride, padding)


def conv_transpose2d(y: Tensor, weight: Tensor, size: Pair, stride: Pair = (1, 1), padding: Pair = (0, 0)) -> Tensor:
    """Map y -> x, with size = (H, W), by the transpose of the convolution; otherwise as `conv2d`."""
    dtype = product_dtype(y)
    shape = y.new_empty(len(y), weight.shape[1], *size, dtype=dtype)
    return Gradient.apply(y.to(dtype), shape, weight.to(dtype), stride, padding, (True, False))[0]


class Convolve(Function):
    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.how = stride, padding
        with full_precision(x):  # backward passes may be under autocast too
            return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx, g):
        used = tuple(map(is_used, ctx.needs_input_grad[:2], ctx.next_functions))
        return *Gradient.apply(g, *ctx.saved_tensors, *ctx.how, used), None, None


class Gradient(Function):
    """y, x, weight -> the gradients of ⟨y, conv2d(x, weight)⟩ by x and by the weight, those that are `used`.

    The former is linear in y and the weight, the latter in y and x.
    """

    @staticmethod
    def forward(ctx, y, x, weight, stride, padding, used):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, x, weight)
        ctx.how = stride, padding
        rest = (1, 1), False, (0, 0), 1  # dilation, transposed, output padding, groups
        made = torch.ops.aten.convolution_backward(y, x, weight, None, stride, padding, *rest, (*used, False))
        return made[0], made[1]

    @staticmethod
    def backward(ctx, gx, gw):
        y, x, weight = ctx.saved_tensors
        by_y, *by_others = map(is_used, ctx.needs_input_grad[:3], ctx.next_functions)
        gy = Convolve.apply(gx, weight, *ctx.how) if by_y and gx is not None else None
        if by_y and gw is not None:
            more = Convolve.apply(x, gw, *ctx.how)
            gy = more if gy is None else gy + more
        used = by_others[0] and gw is not None, by_others[1] and gx is not None
        others = Gradient.apply(y, x if gx is None else gx, weight if gw is None else gw, *ctx.how, used)
        return gy, *others, None, None, None


def is_used(needed: bool, source: tuple) -> bool:
    """Tell whether the present backward pass uses a gradient, where autograd can tell.

    A weight needs one, but R1's gradient by images does not use it.
    """
    node = source[0]
    return needed and (hasattr(node, "variable") or torch._C._will_engine_execute_node(node))
