"""Distances between two sets of images, given their features or moments. All are computed in float64 on their device.

Legend: N images, F features, K classes. `fake` are the generated images, `real` the reference.
"""

import numpy as np
import torch
from torch import Tensor

from dnnlib.console import progress
from metrics.estimate import Estimate, mean
from metrics.moments import Moments

SEED = 2020  # as in torch-fidelity, so that equal features give equal numbers


def frechet_distance(fake: Moments, real: Moments) -> Estimate:
    """Return |m_f - m_r|² + tr(C_f + C_r - 2·(C_f·C_r)^½), 0 and above; 0 for equal moments. It has no standard error.

    With C = F·Fᵀ, the trace of the root is the sum of the singular values of F_fᵀ·F_r. This needs symmetric
    eigenproblems only, drops the directions without variance (fewer images than features), and never squares the
    covariances: eigenvalues of their product lose half of the digits, and scipy's sqrtm fails if it is singular.
    Raises UserError for fewer than two images. Source: Heusel et al. 2017 (https://arxiv.org/abs/1706.08500).
    """
    covariances = [m.covariance.cpu() for m in (fake, real)]  # first, because it may raise
    gap = (fake.mean.cpu() - real.mean.cpu()).square().sum()
    roots = [_root(covariance) for covariance in covariances]
    traces = sum(root.square().sum() for root in roots)
    distance = gap + traces - 2 * torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    return Estimate(max(distance.item(), 0.0))


def _root(covariance: Tensor) -> Tensor:
    """Return F [F,rank] with F·Fᵀ = covariance, without the directions whose variance is rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def kernel_distance(
    fake: Tensor, real: Tensor, *, subset_size: int = 1000, subsets: int = 100, seed: int = SEED
) -> Estimate:
    """Return the unbiased squared maximum mean discrepancy of float [N,F] and [M,F] under the kernel (x·y/F + 1)³.

    It is the mean over `subsets` pairs of random subsets of `subset_size` images, or as many as the smaller set has.
    The standard error is the uncertainty due to the choice of subsets (torch-fidelity reports the deviation of a single
    subset, √subsets times as large). The value may be negative, because the true value is 0 for equal distributions.
    The subsets depend on `seed` and the counts alone, as in torch-fidelity.
    Source: Bińkowski et al. 2018 (https://arxiv.org/abs/1801.01401).
    """
    size = min(subset_size, len(fake), len(real))
    random = np.random.RandomState(seed)  # NumPy has frozen the streams of RandomState, not those of its newer class
    values = []
    for _ in progress(range(subsets), desc="kernel distance", unit="subset"):
        x, y = (z[torch.from_numpy(random.choice(len(z), size, replace=False))].double() for z in (fake, real))
        within = sum(k.sum() - k.diagonal().sum() for k in (_kernel(x, x), _kernel(y, y)))
        values.append(within / (size * (size - 1)) - 2 * _kernel(x, y).mean())
    return mean(torch.stack(values))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def inception_score(logits: Tensor, *, splits: int = 10) -> dict[str, Estimate]:
    """Return exp(mean KL(p(class | image) ‖ p(class))) of float [N,K] logits, N ≥ splits, from 1 to K.

    `_mean` is the mean over `splits` parts, `_std` their deviation, which torch-fidelity and StyleGAN report instead
    of the standard error of the mean. Images are shuffled by SEED first, as torch-fidelity does.
    Source: Salimans et al. 2016 (https://arxiv.org/abs/1606.03498).
    """
    num = len(logits)
    order = torch.from_numpy(np.random.RandomState(SEED).permutation(num))
    scores = []
    for i in range(splits):
        log_p = logits[order[i * num // splits : (i + 1) * num // splits]].double().log_softmax(dim=1)
        p = log_p.exp()
        q = p.mean(dim=0)
        # The divergence as a difference of entropies: log q alone is infinite for a class without any image.
        scores.append(((p * log_p).sum(dim=1).mean() - torch.xlogy(q, q).sum()).exp())
    scores = torch.stack(scores)
    return {"_mean": mean(scores), "_std": Estimate(scores.std(correction=0).item())}


def precision_recall(fake: Tensor, real: Tensor, *, k: int = 3, chunk: int = 4096) -> dict[str, Estimate]:
    """Return the improved `_precision` and `_recall` of float [N,F] against [M,F], each from 0 to 1; N, M > k.

    Precision is the part of `fake` inside the ball about some real image that reaches to its k-th nearest real
    neighbour; recall, the same with the sets exchanged. The standard errors are those of a proportion, with the balls
    held fixed. Memory is bounded by chunk² distances, about 0.5 GB; time grows with (N + M)².
    Source: Kynkäänniemi et al. 2019 (https://arxiv.org/abs/1904.06991).
    """
    return {
        "_precision": mean(_covered(fake, real, _radii(real, k, chunk), chunk)),
        "_recall": mean(_covered(real, fake, _radii(fake, k, chunk), chunk)),
    }


def _radii(x: Tensor, k: int, chunk: int) -> Tensor:
    """[N,F] -> float64 [N]: the distance to the k-th nearest of the others."""
    radii = []
    for rows in progress(x.split(chunk), desc="neighbours", unit="chunk"):
        nearest = torch.full((len(rows), k + 1), torch.inf, dtype=torch.float64, device=x.device)
        for columns in x.split(chunk):
            distances = torch.cat([nearest, torch.cdist(rows.double(), columns.double())], dim=1)
            nearest = distances.topk(k + 1, largest=False).values
        radii.append(nearest[:, k])  # the first is the image itself
    return torch.cat(radii)


def _covered(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> Tensor:
    """Return float64 [N]: 1 for points [N,F] within the radius [M] of a centre [M,F], else 0."""
    covered = []
    for rows in progress(points.split(chunk), desc="coverage", unit="chunk"):
        inside = torch.zeros(len(rows), dtype=torch.bool, device=points.device)
        for columns, reach in zip(centres.split(chunk), radii.split(chunk), strict=True):
            inside |= (torch.cdist(rows.double(), columns.double()) <= reach).any(dim=1)
        covered.append(inside)
    return torch.cat(covered).double()
