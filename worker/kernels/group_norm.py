"""Group normalisation (Wu and He, 2018, arXiv 1803.08494), a scale and shift, and SiLU as one function.

    y = silu(z (1 + s) + t)    with    z = (x - mean) / sqrt(variance + eps) w + b

where mean and variance are those of a group of channels in one image, w and b belong to a channel, and s and t, which
may be left out, to a channel of one image. Shape suffixes: B = batch, C = channels, H, W = height and width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.kernels.choice import takes_triton


class Modulation(NamedTuple):
    """What a condition does to normalised channels: ``z (1 + scale) + shift``."""

    scale_BC: Tensor
    shift_BC: Tensor


class Norm(NamedTuple):
    """What a group normalisation has learnt, and how it is done."""

    weight_C: Tensor
    bias_C: Tensor
    num_groups: int
    eps: float


def group_norm_silu(x_BCHW: Tensor, norm: Norm, modulation: Modulation | None = None) -> Tensor:
    """The function above, of the shape and dtype of ``x``; computed in float32 at least and rounded once.

    An image's result does not depend on the others in the batch, and is the same to the bit each time. On CUDA, images
    in channels-last layout go through Triton's kernels, which can be differentiated once.
    """
    if takes_triton(x_BCHW) and x_BCHW.is_contiguous(memory_format=torch.channels_last):
        from worker.kernels.group_norm_launch import fused  # noqa: PLC0415 - Triton may not be installed

        return fused(x_BCHW, norm, modulation)
    return plain(x_BCHW, norm, modulation)


def plain(x_BCHW: Tensor, norm: Norm, modulation: Modulation | None = None) -> Tensor:
    """``group_norm_silu`` in torch's own operations."""
    wide = torch.promote_types(x_BCHW.dtype, torch.float32)
    z_BCHW = F.group_norm(x_BCHW.to(wide), norm.num_groups, norm.weight_C.to(wide), norm.bias_C.to(wide), norm.eps)
    if modulation is not None:
        scale_BC11, shift_BC11 = (each.to(wide)[:, :, None, None] for each in modulation)
        z_BCHW = z_BCHW * (1 + scale_BC11) + shift_BC11
    return F.silu(z_BCHW).to(x_BCHW.dtype)
