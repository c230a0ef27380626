"""Linear measurements ``y = A x`` of an image, and how an estimate is made to agree with one.

An estimate ``x`` of an image of which ``y`` is known becomes ``A+ y + (I - A+ A) x``: what was measured comes from the
measurement, the rest from the estimate (DDNM, Wang et al., 2022, arXiv 2212.00490, equation 8). Put into each estimate
of a denoiser, this turns any trained diffusion model into one that fills, enlarges or colours. Each operator here is a
pair: what is known of the image in its own shape, ``A+ y``, and the projection ``A+ A``. Shape suffixes: S = slots,
C = channels, H, W = height and width of the model's images, h, w = of a smaller input.
"""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

Projection = Callable[[Tensor], Tensor]
"""``A+ A``: images ``(S, C, H, W)`` to what a measurement tells of them, in the same shape."""
NUM_HALVINGS: Final = 60
"""Of the interval that a shift lies in: to the last bits of float64."""


def agreeing(estimate_SCHW: Tensor, known_SCHW: Tensor, projection: Projection) -> Tensor:
    """The image nearest to the estimate of which ``known`` was measured."""
    return known_SCHW + (estimate_SCHW - projection(estimate_SCHW))


def in_range(image_SCHW: Tensor, known_SCHW: Tensor, projection: Projection) -> Tensor:
    """The nearest image in [-1, 1] of which the means ``known``, in that range themselves, were measured.

    All that make up a mean are shifted alike and clipped. Where nothing leaves the range, nothing changes.
    """
    low_SCHW = (-1 - image_SCHW.amax((1, 2, 3), keepdim=True)).expand_as(image_SCHW)
    high_SCHW = (1 - image_SCHW.amin((1, 2, 3), keepdim=True)).expand_as(image_SCHW)
    for _ in range(NUM_HALVINGS):
        shift_SCHW = (low_SCHW + high_SCHW) / 2
        is_low_SCHW = projection((image_SCHW + shift_SCHW).clamp(-1, 1)) < known_SCHW
        low_SCHW = torch.where(is_low_SCHW, shift_SCHW, low_SCHW)
        high_SCHW = torch.where(is_low_SCHW, high_SCHW, shift_SCHW)
    leaves_SCHW = projection((image_SCHW.abs() > 1).to(image_SCHW)) > 0
    return torch.where(leaves_SCHW, (image_SCHW + low_SCHW).clamp(-1, 1), image_SCHW)


def kept(mask_S1HW: Tensor) -> Projection:
    """All pixels but those where ``mask`` is one."""
    keeps_S1HW = mask_S1HW == 0
    return lambda image_SCHW: torch.where(keeps_S1HW, image_SCHW, 0)


def averaged(factor: int) -> Projection:
    """The mean of each square of ``factor`` pixels."""
    return lambda image_SCHW: enlarged(reduced(image_SCHW, factor), factor)


def reduced(image_SCHW: Tensor, factor: int) -> Tensor:
    """``(S, C, h, w)``: squares of ``factor`` pixels become their mean."""
    return F.avg_pool2d(image_SCHW, factor)


def enlarged(image_SChw: Tensor, factor: int) -> Tensor:
    """``(S, C, H, W)``: pixels become squares of ``factor``."""
    return image_SChw.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


def grey(image_SCHW: Tensor) -> Tensor:
    """The mean of the channels, in each of them: a projection."""
    return image_SCHW.mean(1, keepdim=True).expand_as(image_SCHW)
