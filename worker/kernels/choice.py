"""Which implementation of a kernel a tensor gets, Triton's on CUDA or else plain torch, and how Triton's are launched.

Triton is imported only once it is used, so that a machine without it, or without a GPU, needs nothing of it.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@cache
def is_triton_installed() -> bool:
    return find_spec("triton") is not None


def takes_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernel is launched for data that lie where ``tensor`` does."""
    return tensor.is_cuda and is_triton_installed()


def launch(kernel: Any, grid: tuple[int, ...], tensor: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch one of Triton's kernels where ``tensor``, its first argument, lies."""
    with torch.cuda.device_of(tensor):
        # Said, because what Triton does otherwise changes with its version, and with it the last bits.
        kernel[grid](tensor, *arguments, enable_fp_fusion=False, **constants)
