"""Group normalisation (Wu and He, 2018, arXiv 1803.08494), a scale and shift, and SiLU as one function.

    y = silu(z (1 + s) + t)    with    z = (x - mean) / sqrt(variance + eps) w + b

where mean and variance are those of a group of channels in one image, w and b belong to a channel, and s and t, which
may be left out, to a channel of one image. Shape suffixes: B = batch, C = channels, H, W = height and width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


def plain(x_BCHW: Tensor, norm: Norm, modulation: Modulation | None = None) -> Tensor:
    """The function above in torch's own operations, of the shape and dtype of ``x``.

    Computed in float32 at least and rounded once, so that an image's result does not depend on the others in the batch.
    """
    wide = torch.promote_types(x_BCHW.dtype, torch.float32)
    z_BCHW = F.group_norm(x_BCHW.to(wide), norm.num_groups, norm.weight_C.to(wide), norm.bias_C.to(wide), norm.eps)
    if modulation is not None:
        scale_BC11, shift_BC11 = (each.to(wide)[:, :, None, None] for each in modulation)
        z_BCHW = z_BCHW * (1 + scale_BC11) + shift_BC11
    return F.silu(z_BCHW).to(x_BCHW.dtype)
