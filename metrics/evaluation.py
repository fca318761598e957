"""Metrics with all that they need besides the pictures measured, and the records that they leave."""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from metrics.pictures import Fakes, Files
from metrics.plan import Result, Settings
from metrics.registry import Metric
from metrics.runner import Stopped, estimate, measure
from torch_utils.distributed import Processes


def default_batch(device: torch.device) -> int:
    return 32 if device.type == "cuda" else 8


@dataclass(frozen=True)
class Evaluation:
    """Metrics and all that they need besides the pictures measured."""

    metrics: tuple[Metric, ...]
    reals: Files | None
    photos: Files | None
    tools: dict  # of metrics.runner.load_tools
    settings: Settings
    procs: Processes

    @torch.no_grad()
    def __call__(self, fakes: Fakes, stop: Callable[[], bool] = lambda: False) -> list[dict]:
        """The lines for metric-<name>.jsonl, in every process; none when `stop` became true in some process."""
        try:
            results = measure(*self._arguments(fakes), stop=stop)
        except Stopped:
            return []
        return [self.record(result) for result in results]

    @torch.no_grad()
    def estimate(self, fakes: Fakes) -> tuple[float, float]:
        """Seconds for the pictures, and for photographs unless they are known. Raises the UserErrors of measuring."""
        return estimate(*self._arguments(fakes))

    def _arguments(self, fakes: Fakes) -> tuple:
        return self.metrics, fakes, self.reals, self.photos, self.tools, self.settings, self.procs

    def record(self, result: Result) -> dict:
        figures = {result.named(ending): measured for ending, measured in result.measures.items()}
        return {
            "results": {name: measured.mean for name, measured in figures.items()},
            "metric": result.named(),
            "standard_error": {
                name: None if math.isnan(measured.standard_error) else measured.standard_error
                for name, measured in figures.items()
            },
            **result.facts,
            "total_time": result.seconds,
            "num_gpus": self.procs.world,
            "timestamp": time.time(),
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    own = re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1]
    return {"creps": own} | {name: version(name) for name in ("torch", "torchvision", "torch-fidelity")}
