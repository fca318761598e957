"""Average what the training loop reports over steps and processes."""

import torch

from torch_utils.distributed import Processes


class Stats:
    """Accumulates count, sum and sum of squares per name, as float64 on the device, so reporting never waits."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        self.moments: dict[str, torch.Tensor] = {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.moments

    def load_state_dict(self, moments: dict[str, torch.Tensor]) -> None:
        self.moments = {name: values.to(self.device) for name, values in moments.items()}

    @torch.no_grad()
    def report(self, name: str, values: torch.Tensor) -> None:
        """Add all elements of `values`."""
        x = values.detach().double().flatten()
        moments = torch.stack([x.new_full((), x.numel()), x.sum(), x.square().sum()])
        self.moments[name] = self.moments[name] + moments if name in self.moments else moments

    def collect(self, procs: Processes) -> dict[str, dict[str, float]]:
        """Return {name: {num, mean, std}} over all ranks, which must all call this, and reset."""
        names = sorted(self.moments)
        if not names:
            return {}
        table = procs.sum_(torch.stack([self.moments[name] for name in names]))
        self.moments = {}
        summary = {}
        for name, (count, total, squares) in zip(names, table.tolist(), strict=True):
            mean = total / count
            summary[name] = {"num": int(count), "mean": mean, "std": max(squares / count - mean**2, 0.0) ** 0.5}
        return summary
