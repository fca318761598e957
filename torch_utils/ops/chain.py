"""A chain of linear layers over many positions, with branches that are summed: what rendering spends its time on.

Legend: I inputs, O outputs, P positions, K branches.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dnnlib.console import UserError
from torch_utils.build import library, say_once

IMPLS = ("auto", "reference", "cpp")
LARGEST = 60_000.0  # terms can pass the end of float16, 65504


class Layer(NamedTuple):
    """y = clamp(leaky ReLU(weight @ x + bias)); then terms are added to y, or y joins the sum of the branches."""

    weight: Tensor  # [O,I]; its dtype is that of the product
    bias: Tensor  # [O], in the same dtype
    slope: float = 1.0  # of negative values
    clamp: float = math.inf
    branch: bool = False  # y joins the sum, and the next layer has the same input as this one
    terms: int = 0  # how many of the chain's terms are added to y; none for branches


class Chain:
    """chain(x [I,P], terms) -> the sums of branches, [K,O,P] after each of them, or [O,P] after the last.

    The terms [O,P] are used one after the other, as the layers ask for them. Sums are float32 at least.

    every: return the sum after each branch
    imap: what brings the weights into the order of "cpp", layer by layer, for instance in threads
    impl: "reference" is PyTorch; "cpp", for float32 on CPUs, is built on first use (chain.cpp); "auto" chooses "cpp"
        where it can be built, and says once why it cannot. Raises UserError when "cpp" is asked for and is unavailable.
    """

    def __init__(
        self, layers: Sequence[Layer], *, every: bool = False, impl: str = "auto", imap: Callable[..., Iterable] = map
    ):
        if impl not in IMPLS:
            raise UserError(f"impl={impl!r} is unknown; use one of {', '.join(IMPLS)}")
        weight = layers[0].weight
        serves = weight.dtype == torch.float32 and weight.device.type == "cpu"
        if impl == "cpp" and not serves:
            raise UserError(f"impl='cpp' is for float32 on CPUs, not {weight.dtype} on {weight.device.type}")
        native, reason = build() if serves and impl != "reference" else (None, "")
        if native is None and impl == "cpp":
            raise UserError(reason)
        self.run = Program(native, layers, every, imap) if native else Reference(layers, every)

    def __call__(self, x: Tensor, terms: Iterable[Tensor] = ()) -> Tensor:
        return self.run(x, terms)


class Reference(NamedTuple):
    """The layers, one after the other, in PyTorch."""

    layers: Sequence[Layer]
    every: bool

    def __call__(self, x: Tensor, terms: Iterable[Tensor]) -> Tensor:
        dtype = self.layers[0].weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        terms, sums = iter(terms), []
        for layer in self.layers:
            if x.dtype != dtype:
                x = (x.clamp(-LARGEST, LARGEST) if dtype == torch.float16 else x).to(dtype)
            y = torch.addmm(layer.bias[:, None], layer.weight, x)
            if layer.slope != 1:
                F.leaky_relu_(y, layer.slope)
            if layer.clamp < math.inf:
                y.clamp_(-layer.clamp, layer.clamp)
            if not layer.branch:
                x = y.to(wide) if layer.terms else y
                for _ in range(layer.terms):
                    x += next(terms)
            elif sums and not self.every:
                sums[0] += y
            else:
                sums.append(y.to(wide) if not sums else sums[-1] + y)
        return torch.stack(sums) if self.every else sums[0]


class Native(NamedTuple):
    run: ctypes._CFuncPtr
    rows: int  # outputs whose weights lie together
    strip: int  # positions


@functools.lru_cache
def build() -> tuple[Native | None, str]:
    """The functions of chain.cpp, or None and the reason."""
    try:
        lib = library(Path(__file__).with_suffix(".cpp"))
    except UserError as error:
        say_once(f"Rendering goes on without its C++ code, some 1.3 times slower: {error}")
        return None, str(error)
    lib.chain.restype = None
    rows, strip = (ctypes.c_int64.in_dll(lib, name).value for name in ("chain_rows", "chain_strip"))
    return Native(lib.chain, rows, strip), ""


class CLayer(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("branch", ctypes.c_int64),
        ("terms", ctypes.c_int64),
        ("slope", ctypes.c_float),
        ("clamp", ctypes.c_float),
    ]


class Program:
    """The layers as chain.cpp wants them. Several threads may call it at once."""

    def __init__(self, native: Native, layers: Sequence[Layer], every: bool, imap: Callable[..., Iterable]):
        self.native, self.every = native, every
        self.kept = list(imap(lambda layer: (pack(layer.weight, native.rows), layer.bias.contiguous()), layers))
        self.layers = (CLayer * len(layers))(
            *(
                CLayer(weight.data_ptr(), bias.data_ptr(), *reversed(layer.weight.shape), layer.branch, layer.terms)
                for layer, (weight, bias) in zip(layers, self.kept, strict=True)
            )
        )
        for c, layer in zip(self.layers, layers, strict=True):
            c.slope, c.clamp = layer.slope, layer.clamp
        self.widest = max(max(layer.weight.shape) for layer in layers)
        branches = [layer for layer in layers if layer.branch]
        self.outputs = len(branches[0].bias)
        self.shape = (len(branches), self.outputs) if every else (self.outputs,)

    def __call__(self, x: Tensor, terms: Iterable[Tensor]) -> Tensor:
        positions = x.shape[1]
        x, terms = x.contiguous(), [term.contiguous() for term in terms]
        wanted = [layer.outputs for layer in self.layers for _ in range(layer.terms)]
        if len(x) != self.layers[0].inputs or [t.shape for t in terms] != [(width, positions) for width in wanted]:
            widths = ", ".join(f"[{width},P]" for width in wanted)
            raise ValueError(f"the chain takes [{self.layers[0].inputs},P] and terms {widths or 'none'}")
        if any(t.dtype != torch.float32 for t in (x, *terms)):
            raise ValueError("the chain takes float32")
        sums = x.new_empty(*self.shape, positions)
        space = x.new_zeros(2 * (self.widest + self.outputs) * self.native.strip)
        self.native.run(
            self.layers,
            ctypes.c_int64(len(self.layers)),
            ctypes.c_void_p(x.data_ptr()),
            (ctypes.c_void_p * len(terms))(*(term.data_ptr() for term in terms)),
            ctypes.c_void_p(sums.data_ptr()),
            ctypes.c_int64(self.every),
            ctypes.c_int64(positions),
            ctypes.c_void_p(space.data_ptr()),
            ctypes.c_int64(self.widest),
            ctypes.c_int64(self.outputs),
        )
        return sums


def pack(weight: Tensor, rows: int) -> Tensor:
    """[O,I] -> [O·I]: groups of `rows` outputs, inputs first; the outputs that are left one by one."""
    full = len(weight) // rows * rows
    return torch.cat([weight[:full].unflatten(0, (-1, rows)).mT.flatten(), weight[full:].flatten()])
