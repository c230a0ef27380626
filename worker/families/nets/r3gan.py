"""The networks of R3GAN (Huang et al., 2024, arXiv 2501.05441, section 3): a plain ResNeXt without normalisation.

Residual blocks of 1x1, grouped 3x3 and 1x1 convolutions with leaky rectifiers between them; bilinear resampling;
Fixup-like initial weights (Zhang et al., 2019), of which the last of each block are zero.

Shape suffixes: B = batch, C = channels, H, W = height and width, Z = latent.
"""

from itertools import pairwise
from math import gcd
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.families.nets.conditioning import LabelledLatent, ProjectionHead
from worker.families.nets.resample import Resample, Size, resolutions
from worker.families.nets.widths import widths

SLOPE: Final = 0.2
"""Of the leaky rectifiers below zero."""
GAIN: Final = (2 / (1 + SLOPE**2)) ** 0.5
"""By which they change the scale of their input (He et al., 2015)."""
EXPANSION: Final = 2
"""Width of a block's inside, in units of its outside."""
GROUP_WIDTH: Final = 16
"""Channels of a group of the grouped convolution."""


def _conv(num_in: int, num_out: int, kernel: int = 1, *, gain: float = 1.0, groups: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(num_in, num_out, kernel, padding=kernel // 2, groups=groups, bias=False)
    nn.init.normal_(conv.weight, std=gain / (num_in // groups * kernel**2) ** 0.5)
    return conv


class Block(nn.Module):
    """A residual block; the identity before training. ``num_blocks`` of the network keep its scale (Fixup)."""

    def __init__(self, channels: int, num_blocks: int) -> None:
        super().__init__()
        inside = EXPANSION * channels
        gain = GAIN * num_blocks**-0.25
        self.conv1 = _conv(channels, inside, gain=gain)
        self.conv2 = _conv(inside, inside, 3, gain=gain, groups=inside // gcd(inside, GROUP_WIDTH))
        self.conv3 = _conv(inside, channels, gain=0.0)
        self.bias1_C, self.bias2_C = (nn.Parameter(torch.zeros(inside)) for _ in range(2))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        inner_BCHW = F.leaky_relu(self.conv1(x_BCHW) + self.bias1_C[:, None, None], SLOPE)
        inner_BCHW = F.leaky_relu(self.conv2(inner_BCHW) + self.bias2_C[:, None, None], SLOPE)
        return x_BCHW + self.conv3(inner_BCHW)


def _transition(before: Size, after: Size, num_in: int, num_out: int) -> nn.Sequential:
    """Another resolution and width. The convolution is done where the maps are small."""
    steps = [Resample(before, after), _conv(num_in, num_out) if num_in != num_out else nn.Identity()]
    return nn.Sequential(*(steps if after <= before else steps[::-1]))


class Plan:
    """Resolutions that have blocks, from the image's to the smallest, with their channels and numbers of blocks."""

    def __init__(self, shape: tuple[int, ...], base_channels: int, num_blocks: int, finest_blocks: int) -> None:
        self.in_patches = finest_blocks == 0
        """Whether the image is read and drawn in overlapping patches, because no block has its resolution."""
        self.sizes = resolutions(shape)[1 if self.in_patches else 0 :]
        self.channels = widths(base_channels, len(self.sizes))
        self.num_blocks = [finest_blocks or num_blocks, *[num_blocks] * (len(self.sizes) - 1)]

    def layers(self, *, upwards: bool) -> list[nn.Module]:
        """Blocks and transitions, in the order of a discriminator, or of a generator (``upwards``)."""
        stages = list(zip(self.sizes, self.channels, self.num_blocks, strict=True))[:: -1 if upwards else 1]
        layers: list[nn.Module] = [Block(stages[0][1], sum(self.num_blocks)) for _ in range(stages[0][2])]
        for (before, num_in, _), (after, num_out, num_blocks) in pairwise(stages):
            layers.append(_transition(before, after, num_in, num_out))
            layers += [Block(num_out, sum(self.num_blocks)) for _ in range(num_blocks)]
        return layers


class Generator(nn.Module):
    """A latent to images, unbounded."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        latent_dim: int,
        num_classes: int,
        base_channels: int,
        num_blocks: int,
        finest_blocks: int,
    ) -> None:
        super().__init__()
        plan = Plan(shape, base_channels, num_blocks, finest_blocks)
        self.image_shape_CHW = shape
        self.latent = LabelledLatent(latent_dim, num_classes)
        self.project = nn.Linear(self.latent.num_features, plan.channels[-1], bias=False)
        nn.init.normal_(self.project.weight, std=self.latent.num_features**-0.5)
        self.basis_CHW = nn.Parameter(nn.init.normal_(torch.empty(plan.channels[-1], *plan.sizes[-1])))
        """The smallest map: a learned picture per channel, which the latent mixes."""
        self.body = nn.Sequential(*plan.layers(upwards=True))
        self.out = _conv(plan.channels[0], shape[0])
        if plan.in_patches:
            # A 4x4 kernel with stride 2 covers every output pixel equally: no checkerboard.
            self.out = nn.ConvTranspose2d(plan.channels[0], shape[0], 4, stride=2, padding=1, bias=False)
            nn.init.normal_(self.out.weight, std=(4 * plan.channels[0]) ** -0.5)

    def forward(self, z_BZ: Tensor, label_B: Tensor | None) -> Tensor:
        _, height, width = self.image_shape_CHW
        mixed_BC = self.project(self.latent(z_BZ, label_B))
        x_BCHW = self.out(self.body(mixed_BC[:, :, None, None] * self.basis_CHW))
        return x_BCHW[:, :, :height, :width].float()


class Discriminator(nn.Module):
    """Images to a logit: the generator's mirror."""

    def __init__(
        self, shape: tuple[int, ...], *, num_classes: int, base_channels: int, num_blocks: int, finest_blocks: int
    ) -> None:
        super().__init__()
        plan = Plan(shape, base_channels, num_blocks, finest_blocks)
        self.inward, self.padding = _conv(shape[0], plan.channels[0]), (0, 0, 0, 0)
        if plan.in_patches:
            self.inward = nn.Conv2d(shape[0], plan.channels[0], 4, stride=2, padding=1, bias=False)
            nn.init.normal_(self.inward.weight, std=(16 * shape[0]) ** -0.5)
            self.padding = (0, shape[2] % 2, 0, shape[1] % 2)
        self.body = nn.Sequential(*plan.layers(upwards=False))
        h, w = plan.sizes[-1]
        self.basis_CHW = nn.Parameter(nn.init.normal_(torch.empty(plan.channels[-1], h, w), std=(h * w) ** -0.5))
        """A learned picture per channel, which the last map is compared with."""
        self.head = ProjectionHead(plan.channels[-1], num_classes)

    def forward(self, x_BCHW: Tensor, label_B: Tensor | None) -> Tensor:
        map_BCHW = self.body(self.inward(F.pad(x_BCHW, self.padding)))
        return self.head((map_BCHW * self.basis_CHW).sum((2, 3)), label_B)
