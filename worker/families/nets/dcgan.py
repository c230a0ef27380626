"""DCGAN (Radford et al., 2015, arXiv 1511.06434): strided 4x4 convolutions and batch normalisation.

Shape suffixes: B = batch, C = channels, H, W = height and width, Z = latent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.families.nets.batch_norm import BatchNorm, ReferenceBatchNorm
from worker.families.nets.conditioning import LabelledLatent, ProjectionHead
from worker.families.nets.doubling import DoublingConv
from worker.families.nets.layout import flat, laid_out_as
from worker.families.nets.resample import resolutions
from worker.families.nets.widths import widths

DEVIATION = 0.02
"""Of the initial weights."""


def _initialised(net: nn.Module) -> None:
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, std=DEVIATION)


class Generator(nn.Module):
    """A latent to images before the tanh; they are drawn at the next size that halves evenly, and cut."""

    def __init__(self, shape: tuple[int, ...], *, latent_dim: int, num_classes: int, base_channels: int) -> None:
        super().__init__()
        self.image_shape_CHW = shape
        sizes, channels = resolutions(shape), widths(base_channels, len(resolutions(shape)) - 1)[::-1]
        self.map_shape_CHW = (channels[0], *sizes[-1])
        self.latent = LabelledLatent(latent_dim, num_classes)
        self.project = nn.Linear(self.latent.num_features, torch.Size(self.map_shape_CHW).numel())
        layers: list[nn.Module] = []
        for num_in, num_out in zip(channels, [*channels[1:], shape[0]], strict=True):
            layers += [ReferenceBatchNorm(num_in), nn.ReLU(), DoublingConv(num_in, num_out)]
        self.body = nn.Sequential(*layers)
        _initialised(self)

    def forward(self, z_BZ: Tensor, label_B: Tensor | None) -> Tensor:
        _, height, width = self.image_shape_CHW
        map_BCHW = self.project(self.latent(z_BZ, label_B)).unflatten(1, self.map_shape_CHW)
        up: DoublingConv = self.body[2]  # pyright: ignore[reportAssignmentType]
        return self.body(laid_out_as(up.weight, map_BCHW))[:, :, :height, :width].contiguous()


class Discriminator(nn.Module):
    """Images, padded with zeros to a size that halves evenly, to a logit."""

    def __init__(self, shape: tuple[int, ...], *, num_classes: int, base_channels: int, batch_norm: bool) -> None:
        super().__init__()
        sizes = resolutions(shape)
        channels = widths(base_channels, len(sizes) - 1)
        factor = 2 ** len(channels)
        h, w = sizes[-1]
        self.padding = (0, w * factor - shape[2], 0, h * factor - shape[1])
        layers: list[nn.Module] = []
        for place, (num_in, num_out) in enumerate(zip([shape[0], *channels], channels, strict=False)):
            norm = [BatchNorm(num_out)] if batch_norm and place else []
            layers += [nn.Conv2d(num_in, num_out, 4, stride=2, padding=1), *norm, nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers)
        self.head = ProjectionHead(channels[-1] * h * w, num_classes)
        _initialised(self)

    def forward(self, x_BCHW: Tensor, label_B: Tensor | None) -> Tensor:
        return self.head(flat(self.body(F.pad(x_BCHW, self.padding))), label_B)
