"""Kernels by the way that suits where their data lie: Triton's on CUDA where it is installed, else plain torch.

Noise has its own such functions in ``worker.kernels.philox``.
"""

import torch
from torch import Tensor

from worker.kernels import adamw, group_norm
from worker.kernels.adamw import Flat
from worker.kernels.choice import takes_triton
from worker.kernels.group_norm import Modulation, Norm


def group_norm_silu(x_BCHW: Tensor, norm: Norm, modulation: Modulation | None = None) -> Tensor:
    """What ``worker.kernels.group_norm.plain`` computes, the same bits each time.

    On CUDA, images in channels-last layout go through Triton's kernels, which can be differentiated once.
    """
    if takes_triton(x_BCHW) and x_BCHW.is_contiguous(memory_format=torch.channels_last):
        from worker.kernels.group_norm_launch import fits, fused  # noqa: PLC0415 - Triton may not be installed

        if fits(x_BCHW):
            return fused(x_BCHW, norm, modulation)
    return group_norm.plain(x_BCHW, norm, modulation)


def descend(flat: Flat, rates: Tensor) -> Tensor:
    """What ``worker.kernels.adamw.plain`` does, the same bits each time; nothing is waited for."""
    if takes_triton(flat.weight_P):
        from worker.kernels.adamw_triton import fused  # noqa: PLC0415 - Triton may not be installed

        return fused(flat, rates)
    return adamw.plain(flat, rates)
