"""Augmentation that does not leak into samples (Karras et al., 2022, "EDM", arXiv 2206.00364, appendix F.2).

A training image is flipped, scaled, turned, stretched and moved, and the network is told how by nine numbers. All of
them are zero for an image as it is, and when samples are drawn: so it learns of what it is shown, and draws what it is
shown untouched. As in the paper, two numbers tell of stretching, by its axis and its extent: along the opposite axis a
squeeze is told as a stretch is. Shape suffixes: B = batch, C = channels, H, W = height and width, A = the nine numbers.
"""

from math import log, pi
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.kernels.noise import Noise

NUM_TOLD: Final = 9
SCALE: Final = log(2) / 5
"""Standard deviation of the logarithm of a scale: 2^0.2 in the paper."""
SHIFT: Final = 1 / 8
"""Standard deviation of a shift, of the image's size."""
UNIFORMS, NORMALS = 4, 5
"""Streams of the numbers that are drawn, beside those of the loss."""


def augmented(x_BCHW: Tensor, noise: Noise, probability: float) -> tuple[Tensor, Tensor | None]:
    """Images, float64, each transformed in each of six ways with ``probability``; and what the network is told.

    Unlike in the paper, mirroring left to right is one of the six like the others. What comes in at an edge is the
    image mirrored; an image that nothing is told of stays as it is, to the bit.
    """
    if probability == 0:
        return x_BCHW, None
    u_BU, n_BN = noise.uniform(10, stream=UNIFORMS).double(), noise.normal(4, stream=NORMALS).double()
    mirrored_B, upset_B, scaled_B, turned_B, stretched_B, shifted_B = (u_BU[:, :6] < probability).double().unbind(1)
    coin_B, second_coin_B, turn_B, stretch_turn_B = u_BU[:, 6:].unbind(1)
    scale_B, stretch_B, right_B, down_B = n_BN.unbind(1)

    mirror_B, upside_down_B = mirrored_B * (coin_B < 0.5), upset_B * (second_coin_B < 0.5)
    scale_B, angle_B = scaled_B * scale_B, turned_B * pi * (2 * turn_B - 1)
    stretch_B, stretch_angle_B = stretched_B * stretch_B, pi * (2 * stretch_turn_B - 1)
    right_B, down_B = shifted_B * right_B, shifted_B * down_B

    told = (mirror_B, upside_down_B, scale_B, angle_B.cos() - 1, angle_B.sin())
    told += (stretch_B * stretch_angle_B.cos(), stretch_B * stretch_angle_B.sin(), right_B, down_B)
    told_BA = torch.stack(told, dim=1)

    height, width = x_BCHW.shape[2:]
    size_B, stretched_size_B = (SCALE * scale_B).exp(), (SCALE * stretch_B).exp()
    placed_B33 = (
        shift(SHIFT * width * right_B, SHIFT * height * down_B)
        @ rotation(stretch_angle_B)
        @ scaling(stretched_size_B, 1 / stretched_size_B)
        @ rotation(-stretch_angle_B)
        @ rotation(-angle_B)
        @ scaling(size_B, size_B)
        @ scaling(1 - 2 * mirror_B, 1 - 2 * upside_down_B)
    )
    is_changed_B = (told_BA != 0).any(1)
    changed_BCHW = warped(x_BCHW, placed_B33)
    return torch.where(is_changed_B[:, None, None, None], changed_BCHW, x_BCHW), told_BA.float()


def warped(x_BCHW: Tensor, placed_B33: Tensor) -> Tensor:
    """Images whose points ``(x, y, 1)``, in pixels from the centre, are moved to where a matrix says; bilinear."""
    height, width = x_BCHW.shape[2:]
    y_H, x_W = (torch.arange(size, device=x_BCHW.device) - (size - 1) / 2 for size in (height, width))
    y_HW, x_HW = torch.meshgrid(y_H.double(), x_W.double(), indexing="ij")
    to_HW3 = torch.stack((x_HW, y_HW, torch.ones_like(x_HW)), dim=-1)
    # Nothing here waits for the device: not a check of what is inverted, nor a copy of numbers that are known.
    from_BHW3 = torch.einsum("bij,hwj->bhwi", torch.linalg.inv_ex(placed_B33).inverse, to_HW3)
    half_2 = torch.stack([to_HW3.new_full((), size / 2) for size in (width, height)])
    grid_BHW2 = from_BHW3[..., :2] / half_2
    return F.grid_sample(x_BCHW, grid_BHW2, mode="bilinear", padding_mode="reflection", align_corners=False)


def shift(right_B: Tensor, down_B: Tensor) -> Tensor:
    """Moves points; like the others ``(B, 3, 3)``."""
    zero_B, one_B = torch.zeros_like(right_B), torch.ones_like(right_B)
    return matrix(((one_B, zero_B, right_B), (zero_B, one_B, down_B), (zero_B, zero_B, one_B)))


def scaling(x_B: Tensor, y_B: Tensor) -> Tensor:
    """Moves points away from the centre, or through it where negative."""
    zero_B, one_B = torch.zeros_like(x_B), torch.ones_like(x_B)
    return matrix(((x_B, zero_B, zero_B), (zero_B, y_B, zero_B), (zero_B, zero_B, one_B)))


def rotation(angle_B: Tensor) -> Tensor:
    """Turns points around the centre, from the x axis to the y axis, which points down."""
    cos_B, sin_B, zero_B = angle_B.cos(), angle_B.sin(), torch.zeros_like(angle_B)
    return matrix(((cos_B, -sin_B, zero_B), (sin_B, cos_B, zero_B), (zero_B, zero_B, torch.ones_like(angle_B))))


def matrix(rows: tuple[tuple[Tensor, ...], ...]) -> Tensor:
    """A matrix ``(B, 3, 3)`` of its elements."""
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
