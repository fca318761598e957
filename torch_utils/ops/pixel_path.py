"""Lines to picture, for rendering: fusions, decoders and refinement of the pixels of a window.

Legend: K fusions, C channels, D thickness, H×W pixels, P positions.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dnnlib.console import UserError, brief
from torch_utils.build import say_once
from torch_utils.ops.chain import Chain, Layer

IMPLS = ("auto", "reference", "cpp", "triton")
TRITON_DTYPES = (torch.float16, torch.bfloat16)
failed: set[tuple] = set()  # devices, types and channels for which the kernel did not compile or run in this process


class PixelPath:
    """path(rows [K,C,D,H], cols [K,C,D,W]) -> colours [img_channels,H·W], about [-1,1]; all float32 at least.

    layers: those of a Chain from features to colours, in the dtype of the products: decoders of four, each but the last
        with a term, then the six of the refinement with its heads
    summed: how many fusions are added to the first one before the first decoder
    impl: "reference" and "cpp" are those of Chain; "triton", for half types on CUDA devices, is one kernel in which a
        pixel's features never leave the processor (pixel_kernel.py); "auto" chooses it there, says once why it cannot,
        and otherwise chooses as Chain does. Raises UserError when the one that is asked for is unavailable.
    imap: as in Chain
    """

    def __init__(
        self, layers: Sequence[Layer], summed: int, *, impl: str = "auto", imap: Callable[..., Iterable] = map
    ):
        if impl not in IMPLS:
            raise UserError(f"impl={impl!r} is unknown; use one of {', '.join(IMPLS)}")
        weight = layers[0].weight
        serves = weight.device.type == "cuda" and weight.dtype in TRITON_DTYPES
        if impl == "triton" and not serves:
            raise UserError(
                f"impl='triton' is for float16 and bfloat16 on CUDA devices, not {weight.dtype} on {weight.device.type}"
            )
        self.summed, self.named = summed, impl == "triton"
        self.chain = Chain(layers, impl="auto" if self.named else impl, imap=imap)
        self.kernel, self.key = None, (weight.device, weight.dtype, weight.shape[1])
        if serves and (self.named or (impl == "auto" and self.key not in failed)):
            try:
                from torch_utils.ops.pixel_kernel import PixelKernel  # Triton comes with PyTorch for GPUs only

                self.kernel = PixelKernel(layers, summed)
            except ImportError as problem:
                if self.named:
                    raise UserError(
                        f"impl='triton' of pixel_path is unavailable: {problem}; install triton"
                    ) from problem
                self._without(problem)

    def __call__(self, rows: Tensor, cols: Tensor) -> Tensor:
        if self.kernel:
            try:
                return self.kernel(rows, cols)
            except Exception as problem:  # Triton's compiler and the driver fail in many ways
                if self.named or isinstance(problem, torch.OutOfMemoryError):
                    raise
                self._without(problem)
        return self.decode(fuse(rows, cols))

    def decode(self, fusions: Iterable[Tensor]) -> Tensor:
        """K features [C,P], as `fuse` and `fuse_points` make them -> colours [img_channels,P], about [-1,1]."""
        fusions = iter(fusions)
        x = next(fusions)
        for _ in range(self.summed):
            x = x + next(fusions)
        return self.chain(x, fusions)

    def _without(self, problem: Exception) -> None:
        say_once(f"pixel_path goes on without its Triton kernel, which is slower: {brief(problem)}")
        failed.add(self.key)
        self.kernel = None


def fuse(rows: Tensor, cols: Tensor) -> Iterator[Tensor]:
    """[K,C,D,H] and [K,C,D,W] -> K times [C,H·W]: half the dot product over the thickness (paper section 3.2)."""
    for row, col in zip(rows, cols, strict=True):
        yield torch.bmm((row * 0.5).mT, col).flatten(1)


def fuse_points(rows: Tensor, cols: Tensor) -> Iterator[Tensor]:
    """[P,K,D,C] and [P,K,D,C] -> K times [C,P]: as `fuse`, for points with a row and a column each."""
    yield from (rows * cols).sum(2).mul_(0.5).permute(1, 2, 0).contiguous()
