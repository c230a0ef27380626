"""The residual networks of SNGAN (Miyato et al., 2018, arXiv 1802.05957, appendix B).

Classes enter the generator beside its latent instead of by conditional batch normalisation, and bilinear resampling
stands for nearest neighbours and mean pooling, so that any size of image has exact maps.

Shape suffixes: B = batch, C = channels, H, W = height and width, Z = latent.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.families.nets.batch_norm import ReferenceBatchNorm
from worker.families.nets.conditioning import LabelledLatent, ProjectionHead
from worker.families.nets.resample import Resample, Size, resolutions
from worker.families.nets.widths import widths


class UpBlock(nn.Module):
    """Batch norm, rectifier and 3x3 convolution, twice, at the new resolution; a 1x1 convolution goes around."""

    def __init__(self, num_in: int, num_out: int, before: Size, after: Size) -> None:
        super().__init__()
        self.norm1, self.norm2 = ReferenceBatchNorm(num_in), ReferenceBatchNorm(num_out)
        self.conv1 = nn.Conv2d(num_in, num_out, 3, padding=1)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1)
        self.around = nn.Conv2d(num_in, num_out, 1)
        self.resample = Resample(before, after) if before != after else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        new_BCHW = self.conv1(self.resample(self.norm1(x_BCHW).relu()))
        return self.around(self.resample(x_BCHW)) + self.conv2(self.norm2(new_BCHW).relu())


class DownBlock(nn.Module):
    """Rectifier and 3x3 convolution, twice, then the new resolution; a 1x1 convolution goes around."""

    def __init__(self, num_in: int, num_out: int, before: Size, after: Size) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, padding=1)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1)
        self.around = nn.Conv2d(num_in, num_out, 1)
        self.resample = Resample(before, after) if before != after else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        new_BCHW = self.conv2(self.conv1(x_BCHW.relu()).relu())
        return self.resample(self.around(x_BCHW) + new_BCHW)


class Generator(nn.Module):
    """A latent to images before the tanh."""

    def __init__(
        self, shape: tuple[int, ...], *, latent_dim: int, num_classes: int, base_channels: int, num_blocks: int
    ) -> None:
        super().__init__()
        sizes, channels = resolutions(shape)[::-1], widths(base_channels, len(resolutions(shape)))[::-1]
        self.map_shape_CHW = (channels[0], *sizes[0])
        self.latent = LabelledLatent(latent_dim, num_classes)
        self.project = nn.Linear(self.latent.num_features, torch.Size(self.map_shape_CHW).numel())
        blocks: list[nn.Module] = []
        for (before, after), (num_in, num_out) in zip(pairwise(sizes), pairwise(channels), strict=True):
            blocks += [UpBlock(num_in, num_in, before, before) for _ in range(num_blocks - 1)]
            blocks.append(UpBlock(num_in, num_out, before, after))
        self.blocks = nn.Sequential(*blocks)
        self.norm = ReferenceBatchNorm(channels[-1])
        self.out = nn.Conv2d(channels[-1], shape[0], 3, padding=1)

    def forward(self, z_BZ: Tensor, label_B: Tensor | None) -> Tensor:
        map_BCHW = self.project(self.latent(z_BZ, label_B)).unflatten(1, self.map_shape_CHW)
        return self.out(self.norm(self.blocks(map_BCHW)).relu())


class Discriminator(nn.Module):
    """Images to a logit: residual blocks, and the sum of the last map's features."""

    def __init__(self, shape: tuple[int, ...], *, num_classes: int, base_channels: int, num_blocks: int) -> None:
        super().__init__()
        sizes, channels = resolutions(shape), widths(base_channels, len(resolutions(shape)))
        self.inward = nn.Conv2d(shape[0], channels[0], 3, padding=1)
        blocks: list[nn.Module] = []
        for (before, after), (num_in, num_out) in zip(pairwise(sizes), pairwise(channels), strict=True):
            blocks.append(DownBlock(num_in, num_out, before, after))
            blocks += [DownBlock(num_out, num_out, after, after) for _ in range(num_blocks)]
        self.blocks = nn.Sequential(*blocks)
        self.head = ProjectionHead(channels[-1], num_classes)

    def forward(self, x_BCHW: Tensor, label_B: Tensor | None) -> Tensor:
        features_BC = F.relu(self.blocks(self.inward(x_BCHW))).sum((2, 3))
        return self.head(features_BC, label_B)
