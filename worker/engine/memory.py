"""What to do when memory runs out: tell it from other errors, and keep or give back what can be."""

import gc
from typing import Final

import torch
from torch import nn

_SIGNS: Final = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
"""How torch's allocators, CUDA's libraries and the C++ runtime say it where they raise a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at once might succeed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def recompute(net: nn.Module) -> None:
    """Let the blocks of a network that can compute their inner results again not keep them."""
    for module in net.modules():
        if hasattr(module, "recompute"):
            module.recompute = True


def release(device: torch.device) -> None:
    """Give back what nobody refers to; call it when the error, which refers to its frames, is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
