"""DiffAugment (Zhao et al., 2020, arXiv 2006.10738): colour, translation and cutout of what a discriminator sees.

Every operation is linear in the image and built from products and sums, so it can be differentiated twice and is exact
on any device; where it is drawn depends on keyed numbers that the caller gives.

Shape suffixes: B = batch, C = channels, H, W = height and width, U = uniform numbers.
"""

from typing import Final

import torch
from torch import Tensor

NUM_DRAWS: Final = 10
"""Uniform numbers that the augmentation of one image takes."""
LARGEST_SHIFT: Final = 1 / 8
"""Of the image's size."""
CUTOUT: Final = 1 / 2
"""Side of the square that is cut out, of the image's size."""


def augment(x_BCHW: Tensor, u_BU: Tensor, probability: float) -> Tensor:
    """Images in [-1, 1], each augmented in each way with ``probability``, as ``NUM_DRAWS`` numbers in (0, 1) say."""
    if probability == 0:
        return x_BCHW
    with torch.autocast(x_BCHW.device.type, enabled=False):
        u_UB = u_BU.to(x_BCHW.dtype).T
        x_BCHW = recoloured(x_BCHW, u_UB[1:4], u_UB[0] < probability)
        x_BCHW = translated(x_BCHW, u_UB[5:7], u_UB[4] < probability)
        return with_cutout(x_BCHW, u_UB[8:10], u_UB[7] < probability)


def recoloured(x_BCHW: Tensor, u_UB: Tensor, where_B: Tensor) -> Tensor:
    """Brightness moved by up to half a unit, saturation up to doubled, contrast by up to half."""
    brightness, saturation, contrast = u_UB[..., None, None, None]
    new_BCHW = x_BCHW + (brightness - 0.5)
    grey_B1HW = new_BCHW.mean(1, keepdim=True)
    new_BCHW = grey_B1HW + (new_BCHW - grey_B1HW) * (2 * saturation)
    mean_B111 = new_BCHW.mean((1, 2, 3), keepdim=True)
    new_BCHW = mean_B111 + (new_BCHW - mean_B111) * (contrast + 0.5)
    return torch.where(where_B[:, None, None, None], new_BCHW, x_BCHW)


def translated(x_BCHW: Tensor, u_UB: Tensor, where_B: Tensor) -> Tensor:
    """Moved by whole pixels up to an eighth of the size; what comes in is zero."""
    rows_B1HH, columns_B1WW = (
        shift_matrix(size, torch.where(where_B, shift(size, u_B), 0))
        for size, u_B in zip(x_BCHW.shape[2:], u_UB, strict=True)
    )
    return rows_B1HH @ x_BCHW @ columns_B1WW.mT


def shift(size: int, u_B: Tensor) -> Tensor:
    """A whole number of pixels, each between minus and plus the largest shift equally likely."""
    most = round(size * LARGEST_SHIFT)
    return (u_B * (2 * most + 1)).floor() - most


def shift_matrix(size: int, shift_B: Tensor) -> Tensor:
    """``(B, 1, size, size)`` matrices whose product with an image moves its rows down by ``shift``."""
    place = torch.arange(size, device=shift_B.device, dtype=shift_B.dtype)
    return (place[:, None] - shift_B[:, None, None, None] == place).to(shift_B.dtype)


def with_cutout(x_BCHW: Tensor, u_UB: Tensor, where_B: Tensor) -> Tensor:
    """A square set to zero, half as high and wide as the image, its centre anywhere in it."""
    inside_B1HW = where_B[:, None, None, None]
    for axis, u_B in zip((2, 3), u_UB, strict=True):
        size = x_BCHW.shape[axis]
        place = torch.arange(size, device=u_B.device, dtype=u_B.dtype) + 0.5
        near_BS = (place - u_B[:, None] * size).abs() < size * CUTOUT / 2
        inside_B1HW = inside_B1HW & near_BS.view(-1, 1, *(size if one == axis else 1 for one in (2, 3)))
    return x_BCHW * (~inside_B1HW).to(x_BCHW.dtype)
