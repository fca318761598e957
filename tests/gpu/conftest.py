import pytest
import torch


@pytest.fixture
def device():
    """Where the kernels run. tests/test_kernels.py has another one, so that the same laws run without a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernels are for half types from compute capability 8.0 on")
    return torch.device("cuda:0")
