"""Collect the features of many images: their moments, or the features themselves.

Both take batches in any order, on any process. Legend: N images, F features.
"""

import torch
from torch import Tensor

from dnnlib.console import UserError
from torch_utils.distributed import Processes

GATHER_ROWS = 4096  # rows of a Table at once: 32 MiB for 2048 features


class Moments:
    """Count, mean and covariance of features, in float64.

    They are kept as deviations from the mean and merged pairwise (Chan, Golub & LeVeque 1979). Plain sums of x and xxᵀ
    would be shorter, but their difference Σxxᵀ - n·mmᵀ loses twice the digits by which the mean exceeds the spread.

    count    N
    mean     float64 [F]
    scatter  float64 [F,F], the sum over images of (x - mean)(x - mean)ᵀ
    """

    def __init__(self, num_features: int, device: str | torch.device = "cpu"):
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    @property
    def covariance(self) -> Tensor:
        """Return float64 [F,F], divided by N - 1. Raises UserError for fewer than two images."""
        if self.count < 2:
            raise UserError(f"a covariance needs 2 images or more, and there are {self.count}; give more")
        return self.scatter / (self.count - 1)

    @torch.no_grad()
    def update(self, features: Tensor, numbers: Tensor | None = None) -> None:
        """Add float [N,F]; the numbers of the images do not matter."""
        if not len(features):
            return
        x = features.to(self.mean)
        mean = x.mean(dim=0)
        total = self.count + len(x)
        gap = mean - self.mean
        rows = torch.cat([x - mean, gap[None] * (self.count * len(x) / total) ** 0.5])
        self.scatter.addmm_(rows.T, rows)
        self.mean += gap * (len(x) / total)
        self.count = total

    @torch.no_grad()
    def gather(self, procs: Processes) -> "Moments":
        """Return the moments of the images of all processes together, in each of them."""
        whole = Moments(len(self.mean), procs.device)
        count = torch.tensor(float(self.count), dtype=torch.float64, device=procs.device)
        whole.count = int(procs.sum_(count))
        if whole.count:
            mean = self.mean.to(whole.mean)
            whole.mean = procs.sum_(mean * self.count) / whole.count
            gap = mean - whole.mean
            whole.scatter = procs.sum_(self.scatter.to(whole.mean) + self.count * gap[:, None] * gap)
        return whole

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a file; `from_tensors` reads them back."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Moments":
        moments = cls(0)
        moments.count, moments.mean, moments.scatter = int(tensors["count"]), tensors["mean"], tensors["scatter"]
        return moments


class Table:
    """A row of F numbers for each of the images 0 … num - 1, on the CPU."""

    def __init__(self, num: int, num_features: int, dtype: torch.dtype = torch.float32):
        self.rows = torch.zeros(num, num_features, dtype=dtype)
        self.filled = torch.zeros(num, dtype=torch.float64)

    @torch.no_grad()
    def update(self, rows: Tensor, numbers: Tensor) -> None:
        """Store float [N,F] of the images `numbers`, int64 [N] on the CPU."""
        self.rows[numbers] = rows.cpu().to(self.rows)
        self.filled[numbers] += 1

    @torch.no_grad()
    def gather(self, procs: Processes) -> Tensor:
        """Return [num,F] of all processes. Raises ValueError unless each image was added exactly once."""
        filled = procs.sum_(self.filled.to(procs.device, copy=True))
        if not (filled == 1).all():
            raise ValueError(f"{int((filled != 1).sum())} of {len(filled)} images were not measured exactly once")
        parts = self.rows.split(GATHER_ROWS)
        return torch.cat([procs.sum_(part.to(procs.device, copy=True)).cpu() for part in parts])
