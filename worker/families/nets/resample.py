"""Changes of resolution between any two sizes, as two small matrices: linear, exact on any device, and as often
differentiable as one likes, which strided and interpolating kernels are not everywhere.

Shape suffixes: B = batch, C = channels, H, W = height and width before, h, w = after.
"""

from typing import Final

import torch
from torch import Tensor, nn

SMALLEST_MAP: Final = 7
"""The resolution is halved until the feature map is no larger than this (and at least once)."""

Size = tuple[int, int]


def resolutions(shape: tuple[int, ...]) -> list[Size]:
    """Height and width of the maps of images ``(C, H, W)``, from the image's own to the smallest."""
    sizes = [(shape[1], shape[2])]
    while len(sizes) == 1 or max(sizes[-1]) > SMALLEST_MAP:
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    return sizes


def triangle(num_in: int, num_out: int) -> Tensor:
    """Weights ``(num_out, num_in)`` of linear interpolation, widened where it shrinks so that nothing is passed over.

    Doubling weighs neighbours by 3:1, halving by 1:3:3:1.
    """
    scale = num_in / num_out
    centre_o1 = (torch.arange(num_out, dtype=torch.float64)[:, None] + 0.5) * scale - 0.5
    distance_oi = (torch.arange(num_in, dtype=torch.float64) - centre_o1).abs()
    weight_oi = (1 - distance_oi / max(scale, 1.0)).clamp(min=0)
    return (weight_oi / weight_oi.sum(1, keepdim=True)).float()


class Resample(nn.Module):
    """Bilinear resampling from one size to another."""

    def __init__(self, before: Size, after: Size) -> None:
        super().__init__()
        self.rows_hH: Tensor
        self.columns_Ww: Tensor
        self.register_buffer("rows_hH", triangle(before[0], after[0]), persistent=False)
        self.register_buffer("columns_Ww", triangle(before[1], after[1]).T.contiguous(), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.rows_hH @ (x_BCHW @ self.columns_Ww)
