"""Kernels are checked under Triton's interpreter, or compiled where there is a GPU."""

import pytest
import torch

from worker.kernels.choice import is_triton_installed


@pytest.fixture
def device() -> torch.device:
    """Where Triton's kernels run here: the GPU, or the interpreter's CPU."""
    if not is_triton_installed():
        pytest.skip("Triton has no wheel for this system")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
