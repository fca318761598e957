"""What a training step takes of a GPU's memory."""

import pytest
import torch
from conftest import RECIPE

from dnnlib.config import merge
from torch_utils.distributed import Processes
from training import memory
from training.config import resolve
from training.data import ImageArchive

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_the_largest_micro_batch_that_fits_is_found_by_trying(tiny, monkeypatch):
    data = tiny.images("large", size=(64, 64))
    changes = {"data": {"path": str(data)}, "train": {"batch": 64, "batch_gpu": "auto"}}
    images, procs = ImageArchive(data), Processes(0, 1, torch.device("cuda", 0))
    config = resolve(merge(RECIPE, changes), images, "test")
    assert memory.largest_micro_batch(config, images, procs) == 64
    memory.try_step(config, images, procs.device, 64)
    total = torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(memory, "USABLE", 0.6 * torch.cuda.max_memory_allocated() / total)
    torch.cuda.empty_cache()
    assert memory.largest_micro_batch(config, images, procs) < 64
