"""What is kept of the features of many pictures: their moments, or the features themselves of some.

Legend: N pictures, F features.
"""

import torch
from torch import Tensor

from dnnlib.console import UserError
from torch_utils.distributed import Processes

GATHER_ROWS = 4096  # of a FeatureTable at once: 32 MiB for 2048 features


def check(features: Tensor, num_features: int) -> None:
    """Raises ValueError for a shape other than [N,F], and UserError for values that are not finite."""
    if features.ndim != 2 or features.shape[1] != num_features:
        raise ValueError(f"features must be [N,{num_features}], not {list(features.shape)}")
    if not features.isfinite().all():
        raise UserError("a picture has features that are not finite; the network or its weights are broken")


class Moments:
    """Count, mean and covariance of features, in float64; any order, any batches, any split over processes.

    They are kept as deviations from the mean and merged pairwise (Chan, Golub & LeVeque 1979). Plain sums of x and xxᵀ
    would be shorter, but their difference Σxxᵀ - n·mmᵀ loses twice the digits by which the mean exceeds the spread.

    count    N
    mean     float64 [F]
    scatter  float64 [F,F], the sum over pictures of (x - mean)(x - mean)ᵀ
    """

    def __init__(self, num_features: int, device: str | torch.device = "cpu"):
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    @property
    def covariance(self) -> Tensor:
        """float64 [F,F], with N - 1 below. Raises UserError for fewer than two pictures."""
        if self.count < 2:
            raise UserError(f"a covariance takes 2 pictures or more, and there are {self.count}")
        return self.scatter / (self.count - 1)

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Counts in float [N,F]. Raises UserError for values that are not finite."""
        check(features, len(self.mean))
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
        """The moments of the pictures of all processes together, in each of them."""
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
        """For a file; `from_tensors` reads them back."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], num_features: int) -> "Moments":
        """Raises ValueError for anything but finite moments of `num_features` features."""
        expected = {
            "count": (torch.int64, ()),
            "mean": (torch.float64, (num_features,)),
            "scatter": (torch.float64, (num_features, num_features)),
        }
        found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        if found != expected or tensors["count"] < 1 or not all(t.isfinite().all() for t in tensors.values()):
            raise ValueError(f"not the moments of {num_features} features")
        moments = cls(num_features)
        moments.count, moments.mean, moments.scatter = int(tensors["count"]), tensors["mean"], tensors["scatter"]
        return moments


class FeatureTable:
    """The features of the pictures 0 … num - 1, float32 [num,F] on the CPU; any order, any process.

    `num` bounds the memory: pictures beyond it are left out. Number the pictures in random order, so that the first
    ones are a fair sample of all.
    """

    def __init__(self, num: int, num_features: int):
        self.table = torch.zeros(num, num_features)
        self.filled = torch.zeros(num, dtype=torch.float64)

    @torch.no_grad()
    def update(self, features: Tensor, numbers: Tensor) -> None:
        """float [N,F] and which pictures they are of, int64 [N]. Raises UserError for values that are not finite."""
        check(features, self.table.shape[1])
        numbers = numbers.cpu()
        kept = numbers < len(self.table)
        self.table[numbers[kept]] = features.detach().cpu().float()[kept]
        self.filled[numbers[kept]] = 1

    @torch.no_grad()
    def gather(self, procs: Processes) -> Tensor:
        """float32 [num,F] of all processes together. Raises ValueError when a picture was left out or is double."""
        filled = procs.sum_(self.filled.to(procs.device, copy=True))
        if not (filled == 1).all():
            raise ValueError(f"{int((filled != 1).sum())} of {len(filled)} pictures were not measured exactly once")
        rows = self.table.split(GATHER_ROWS)
        return torch.cat([procs.sum_(part.to(procs.device, copy=True)).cpu() for part in rows])
