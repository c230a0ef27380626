"""NHWC where torch leaves it: maps made of vectors, and gradients of vectors made of maps.

A network's layout is that of its convolutions' weights, which give what they make the same. What stands before the
first of them, or after the last, is slow where two layouts meet.

Shape suffixes: B = batch, C = channels, H, W = height and width.
"""

import torch
from torch import Tensor


def is_nhwc(x_BCHW: Tensor) -> bool:
    """Whether images, or the weights of a convolution, are laid out as NHWC; those of a single channel do not say."""
    return x_BCHW.is_contiguous(memory_format=torch.channels_last) and not x_BCHW.is_contiguous()


def laid_out_as(weight: Tensor, x_BCHW: Tensor) -> Tensor:
    """``x`` in the layout of a network with this convolution."""
    return x_BCHW.to(memory_format=torch.channels_last) if is_nhwc(weight) else x_BCHW


def flat(x_BCHW: Tensor) -> Tensor:
    """``x.flatten(1)``, whose gradient comes back in the layout of ``x``."""
    if x_BCHW.requires_grad and is_nhwc(x_BCHW):
        x_BCHW.register_hook(lambda slope_BCHW: slope_BCHW.contiguous(memory_format=torch.channels_last))
    return x_BCHW.flatten(1)
