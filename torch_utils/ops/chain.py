"""A chain of linear layers over many positions, with branches that are summed: where rendering spends its time.

Legend: N images, I inputs, O outputs, P positions, K branches.
"""

import ctypes
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.build import Kernels, choose

IMPLS = ("auto", "reference", "cpp")
SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.float32,)
LARGEST = 60_000.0  # a sum with a term can exceed float16's largest number, 65504


class Folded(NamedTuple):
    """A linear layer with style, demodulation and gains multiplied in: y = clamp(leaky ReLU(weight @ x + bias)).

    y is the input of the next layer, after the chain's next term is added if `term`; or it is added to the sum of the
    branches if `branch`, and the next layer has the same input as this one.
    """

    weight: Tensor  # [O,I], or [N,O,I] with a weight per image (training alone)
    bias: Tensor  # [O], in the same dtype
    slope: float = 1.0  # of negative values
    clamp: float = math.inf
    branch: bool = False
    term: bool = False

    def to(self, *where: torch.device | torch.dtype) -> "Folded":
        """Move the tensors to a device, cast them to a dtype, or both."""
        return self._replace(weight=self.weight.to(*where), bias=self.bias.to(*where))

    def activate(self, y: Tensor) -> Tensor:
        """Apply leaky ReLU and clamp to y = weight @ x + bias, which may be overwritten."""
        if self.slope != 1:
            F.leaky_relu_(y, self.slope)
        return y.clamp(-self.clamp, self.clamp) if self.clamp < math.inf else y


class Chain:
    """chain(x [I,P], terms) -> the sums of branches, [K,O,P] after each of them, or [O,P] after the last.

    The terms [O,P] are consumed in order. Sums are at least float32.

    every: return the sum after each branch.
    impl: "reference" is PyTorch; "cpp" (chain.cpp) is for float32 on CPUs; "auto" as in `torch_utils.build.choose`.
    imap: maps a function over the layers to pack their weights for "cpp", for instance in threads.
    Raises UserError when "cpp" is requested and unavailable.
    """

    def __init__(
        self, layers: Sequence[Folded], *, every: bool = False, impl: str = "auto", imap: Callable[..., Iterable] = map
    ):
        kernels = choose(impl, IMPLS, SOURCE, layers[0].weight, DTYPES)
        self.run = Program(kernels, layers, every, imap) if kernels else Reference(layers, every)

    def __call__(self, x: Tensor, terms: Iterable[Tensor] = ()) -> Tensor:
        return self.run(x, iter(terms))


class Reference(NamedTuple):
    """Compute the layers one after the other, in PyTorch."""

    layers: Sequence[Folded]
    every: bool

    def __call__(self, x: Tensor, terms: Iterator[Tensor]) -> Tensor:
        dtype = self.layers[0].weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        sums = []
        for layer in self.layers:
            if x.dtype != dtype:
                x = (x.clamp(-LARGEST, LARGEST) if dtype == torch.float16 else x).to(dtype)
            y = layer.activate(torch.addmm(layer.bias[:, None], layer.weight, x))
            if not layer.branch:
                x = y.to(wide) + next(terms) if layer.term else y
            elif sums and not self.every:
                sums[0] += y
            else:
                sums.append(y.to(wide) if not sums else sums[-1] + y)
        return torch.stack(sums) if self.every else sums[0]


class CLayer(ctypes.Structure):
    """Folded in folded.h."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "per_image", "branch", "term")),
        ("slope", ctypes.c_float),
        ("clamp", ctypes.c_float),
    ]


def c_layers(layers: Sequence[Folded], tensors: Sequence[tuple[Tensor, Tensor]]) -> ctypes.Array:
    """Describe the layers to C++, with `tensors` as weights and biases, which the caller must keep."""
    made = []
    for layer, (weight, bias) in zip(layers, tensors, strict=True):
        outputs, inputs = layer.weight.shape[-2:]
        sizes = inputs, outputs, layer.weight.ndim == 3, layer.branch, layer.term
        made.append(CLayer(weight.data_ptr(), bias.data_ptr(), *sizes, layer.slope, layer.clamp))
    return (CLayer * len(made))(*made)


class Program:
    """Compute the layers by chain.cpp. Several threads may call one program at a time."""

    def __init__(self, kernels: Kernels, layers: Sequence[Folded], every: bool, imap: Callable[..., Iterable]):
        self.kernels, self.every = kernels, every
        rows, self.strip = (kernels.constant(name) for name in ("chain_rows", "chain_strip"))
        self.kept = list(imap(lambda layer: (pack(layer.weight, rows), layer.bias.contiguous()), layers))
        self.layers = c_layers(layers, self.kept)
        self.inputs, self.widest = layers[0].weight.shape[1], max(max(layer.weight.shape) for layer in layers)
        self.terms = [len(layer.bias) for layer in layers if layer.term]  # their outputs
        branches = [len(layer.bias) for layer in layers if layer.branch]
        self.outputs = branches[0]
        self.shape = (len(branches), self.outputs) if every else (self.outputs,)

    def __call__(self, x: Tensor, terms: Iterator[Tensor]) -> Tensor:
        positions = x.shape[1]
        x, terms = x.contiguous(), [term.contiguous() for term in terms]
        if len(x) != self.inputs or [t.shape for t in terms] != [(width, positions) for width in self.terms]:
            widths = ", ".join(f"[{width},P]" for width in self.terms)
            raise ValueError(f"the chain takes x [{self.inputs},P] and terms {widths or 'none'}")
        if any(t.dtype != torch.float32 for t in (x, *terms)):
            raise ValueError("the chain takes float32")
        sums = x.new_empty(*self.shape, positions)
        space = x.new_zeros(2 * (self.widest + self.outputs) * self.strip)
        pointers = (ctypes.c_void_p * len(terms))(*(term.data_ptr() for term in terms))
        sizes = int(self.every), positions, space, self.widest, self.outputs
        self.kernels.call("chain", self.layers, len(self.layers), x, pointers, sums, *sizes)
        return sums


def pack(weight: Tensor, rows: int) -> Tensor:
    """[O,I] -> [O·I]: groups of `rows` outputs, inputs first; the remaining outputs one by one."""
    full = len(weight) // rows * rows
    return torch.cat([weight[:full].unflatten(0, (-1, rows)).mT.flatten(), weight[full:].flatten()])
