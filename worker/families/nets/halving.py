"""Convolutions from an image to a small map of features, and back.

Shape suffixes: B = batch, C = channels, H, W = height and width of an image, h, w = of the map, F = its channels.
"""

from math import gcd
from typing import Final

import torch.nn.functional as F
from torch import Tensor, nn

from worker.families.nets.doubling import DoublingConv
from worker.families.nets.layout import laid_out_as
from worker.families.nets.norm import normalised


class NormSilu(nn.Sequential):
    """A group norm and SiLU, by one kernel where there is one."""

    def __init__(self, num_groups: int, channels: int) -> None:
        norm = nn.GroupNorm(num_groups, channels)
        super().__init__(norm, nn.SiLU())

    def forward(self, input: Tensor) -> Tensor:
        norm: nn.GroupNorm = self[0]  # pyright: ignore[reportAssignmentType]
        return normalised(norm, input, silu=True)


def norm_silu(channels: int) -> nn.Module:
    """Group norm and SiLU: no statistic crosses the batch, so a sample never depends on its neighbours."""
    return NormSilu(gcd(8, channels), channels)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions around a skip; the identity before training."""

    is_repeated_block: Final = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm_silu(channels), norm_silu(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.conv2(self.norm2(self.conv1(self.norm1(x_BCHW))))


def map_shape(shape: tuple[int, ...], halvings: int, base_channels: int) -> tuple[int, int, int]:
    """Shape ``(F, h, w)`` of the map of images ``(C, H, W)``, padded up to a size that halves evenly."""
    h, w = (-(-size // 2**halvings) for size in shape[1:])
    return base_channels * 2 ** (halvings - 1), h, w


class Halving(nn.Module):
    """Images to their map: strided 4x4 convolutions with a residual block at each resolution, normalised at last."""

    def __init__(self, shape: tuple[int, ...], halvings: int, base_channels: int) -> None:
        super().__init__()
        channels_in, height, width = shape
        _, h, w = map_shape(shape, halvings, base_channels)
        self.padding = (0, (w << halvings) - width, 0, (h << halvings) - height)
        layers: list[nn.Module] = []
        channels = base_channels
        for _ in range(halvings):
            layers += [nn.Conv2d(channels_in, channels, 4, stride=2, padding=1), ResidualBlock(channels)]
            channels_in, channels = channels, 2 * channels
        self.body = nn.Sequential(*layers, norm_silu(channels_in))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        padded_BCHW = F.pad(x_BCHW, self.padding, mode="replicate") if any(self.padding) else x_BCHW
        return self.body(padded_BCHW)


class Doubling(nn.Module):
    """The mirror: a map to images, by residual blocks and transposed convolutions."""

    def __init__(self, shape: tuple[int, ...], halvings: int, base_channels: int) -> None:
        super().__init__()
        self.image_shape_CHW = shape
        layers: list[nn.Module] = []
        channels, _, _ = map_shape(shape, halvings, base_channels)
        for halving in reversed(range(halvings)):
            channels_out = channels // 2 if halving else shape[0]
            layers += [ResidualBlock(channels), norm_silu(channels), DoublingConv(channels, channels_out)]
            channels = channels_out
        self.body = nn.Sequential(*layers)

    def forward(self, map_BFhw: Tensor) -> Tensor:
        _, height, width = self.image_shape_CHW
        block: ResidualBlock = self.body[0]  # pyright: ignore[reportAssignmentType]
        return self.body(laid_out_as(block.conv1.weight, map_BFhw))[:, :, :height, :width]
