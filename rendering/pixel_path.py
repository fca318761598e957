"""Compute colours from lines, for rendering: fusions, decoders and refinement of the pixels of a window.

Legend: K fusions, C channels, D thickness, H×W pixels, P positions.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dnnlib.console import UserError, brief
from torch_utils.build import say_once
from torch_utils.errors import memory_full
from torch_utils.ops.chain import Chain, Folded

IMPLS = ("auto", "reference", "cpp", "triton")
TRITON_DTYPES = (torch.float16, torch.bfloat16)
TRITON_CHANNELS = 32  # more would not fit into the registers
failed: set[tuple] = set()  # devices, types and channels for which the kernel did not compile or run in this process


class PixelPath:
    """path(rows [K,C,D,H], cols [K,C,D,W]) -> colours [img_channels,H·W], about [-1,1]; all at least float32.

    layers: from PixelSynthesis.folded, in the dtype of the products.
    impl: "reference" and "cpp" as in Chain; "triton", for half types on CUDA devices from 8.0 and up to
        TRITON_CHANNELS channels, is one kernel that keeps a pixel's features on the chip (pixel_kernel.py); "auto"
        chooses it there, prints one line if it fails, and otherwise chooses as Chain does. Raises UserError if the
        requested one is unavailable.
    imap: as in Chain.
    """

    def __init__(self, layers: Sequence[Folded], *, impl: str = "auto", imap: Callable[..., Iterable] = map):
        if impl not in IMPLS:
            raise UserError(f"impl={impl!r} is unknown; use one of {', '.join(IMPLS)}")
        weight = layers[0].weight
        problem = why_not(weight)
        self.required = impl == "triton"
        if self.required and problem:
            raise UserError(f"impl='triton' is for {problem}")
        self.chain = Chain(layers, impl="auto" if self.required else impl, imap=imap)
        self.terms = sum(layer.term for layer in layers)
        self.kernel, self.key = None, (weight.device, weight.dtype, weight.shape[1])
        if not problem and (self.required or (impl == "auto" and self.key not in failed)):
            try:
                from rendering.pixel_kernel import PixelKernel  # Triton comes with PyTorch for GPUs only

                self.kernel = PixelKernel(layers)
            except ImportError as problem:
                if self.required:
                    raise UserError(f"impl='triton' is unavailable: {problem}; install triton") from problem
                self._continue_without(problem)

    def __call__(self, rows: Tensor, cols: Tensor) -> Tensor:
        if self.kernel:
            try:
                return self.kernel(rows, cols)
            except Exception as problem:  # Triton's compiler and the driver fail in many ways
                if self.required or memory_full(problem):
                    raise
                self._continue_without(problem)
        return self.decode(fuse(rows, cols), len(rows))

    def decode(self, fusions: Iterator[Tensor], count: int) -> Tensor:
        """Map `count` fusions [C,P] -> colours [img_channels,P], about [-1,1]."""
        x = next(fusions)
        for _ in range(count - self.terms - 1):  # fusions with no decoder in between
            x = x + next(fusions)
        return self.chain(x, fusions)

    def _continue_without(self, problem: Exception) -> None:
        say_once(f"pixel_path continues without its Triton kernel, which is slower: {brief(problem)}")
        failed.add(self.key)
        self.kernel = None


def why_not(weight: Tensor) -> str:
    """Return what the Triton kernel is for and the first layer's weight is not, or an empty string."""
    if weight.device.type != "cuda" or weight.dtype not in TRITON_DTYPES:
        return f"float16 and bfloat16 on CUDA devices, not {weight.dtype} on {weight.device.type}"
    capability = torch.cuda.get_device_capability(weight.device)
    if torch.version.hip or capability < (8, 0):
        return f"NVIDIA GPUs of compute capability 8.0 and later, not {capability[0]}.{capability[1]}"
    if weight.shape[1] > TRITON_CHANNELS:
        return f"up to {TRITON_CHANNELS} channels, not {weight.shape[1]}"
    return ""


def fuse(rows: Tensor, cols: Tensor) -> Iterator[Tensor]:
    """Yield the K dot products over the thickness [C,H·W] of rows [K,C,D,H] and columns [K,C,D,W]."""
    for row, col in zip(rows, cols, strict=True):
        yield torch.bmm(row.mT, col).flatten(1)
