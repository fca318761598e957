"""A training step on a GPU."""

import pytest
import torch
from conftest import RECIPE
from helpers import distance

from dnnlib.config import merge
from torch_utils.distributed import Processes
from training.config import resolve
from training.data import Batch, ImageArchive
from training.state import new_state
from training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def parameters_after_a_step(tiny, device, **changes):
    """Take the first step, in which all phases are due, with augmentation."""
    images = ImageArchive(tiny.archive)
    augmented = {"augment": {"mode": "fixed", "p": 0.5}, "data": {"path": str(tiny.archive)}, "train": changes}
    config = resolve(merge(RECIPE, augmented), images, "test")
    state = new_state(config, device)
    real = torch.stack([images[i][0] for i in range(config.train.batch)])
    Trainer(config, state, images, Processes(0, 1, device)).step(Batch(real, torch.zeros(len(real), 0)))
    return torch.cat([p.detach().flatten().cpu() for network in (state.G, state.D) for p in network.parameters()])


@pytest.mark.parametrize("recompute", ["none", "pixels", "all"])
def test_a_step_is_that_of_a_cpu(tiny, recompute):
    devices = torch.device("cpu"), torch.device("cuda", 0)
    expected, got = (parameters_after_a_step(tiny, d, precision="float64", recompute=recompute) for d in devices)
    assert distance(got, expected) < 1e-7


def test_a_step_in_bfloat16_is_finite(tiny):
    assert parameters_after_a_step(tiny, torch.device("cuda", 0), precision="bfloat16").isfinite().all()
