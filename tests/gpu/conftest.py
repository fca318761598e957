import pytest
import torch


@pytest.fixture
def device():
    """Where the kernels run. tests/test_kernels.py has another one, so that the same laws run without a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return torch.device("cuda:0")
