"""Networks of image-to-image translation: the residual translator (Johnson et al., 2016, arXiv 1603.08155, as used by
Zhu et al., 2017, arXiv 1703.10593) and the discriminator of patches (Isola et al., 2016, arXiv 1611.07004).

Instance normalisation throughout: no statistic crosses the batch. Bilinear resampling and a convolution stand for
transposed convolutions, so that images of any size come out as they went in, and without checkerboards.

Shape suffixes: B = batch, C = channels, H, W = height and width, h, w = of a map, F = features, N = places.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import DatasetInvalid
from shared.specs.translation import SMALLEST_SIDE
from worker.families.nets.resample import Resample

MOST_HALVINGS = 2
"""Of a translator, as in the paper."""


def num_halvings(shape: tuple[int, ...], most: int) -> int:
    """How often images of ``shape`` can be halved, at most so often, without a side below ``SMALLEST_SIDE``.

    Raises:
        DatasetInvalid: they are smaller than that themselves.
    """
    if (side := min(shape[1:])) < SMALLEST_SIDE:
        raise DatasetInvalid(f"images have sides of at least {SMALLEST_SIDE} pixels, not {side}")
    return next((num for num in range(most) if side >> (num + 1) < SMALLEST_SIDE), most)


def reflected(x_BCHW: Tensor, by: int) -> Tensor:
    """Padded by its own mirror image; built of copies, since torch's own kernel adds up in any order on GPUs."""
    x_BCHW = torch.cat([x_BCHW[..., 1 : by + 1].flip(-1), x_BCHW, x_BCHW[..., -by - 1 : -1].flip(-1)], dim=-1)
    above_BCHW, below_BCHW = x_BCHW[..., 1 : by + 1, :].flip(-2), x_BCHW[..., -by - 1 : -1, :].flip(-2)
    return torch.cat([above_BCHW, x_BCHW, below_BCHW], dim=-2)


class Convolution(nn.Module):
    """Reflection, convolution, instance norm, rectifier."""

    def __init__(self, num_in: int, num_out: int, kernel_size: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, kernel_size, stride=stride)
        self.norm = nn.InstanceNorm2d(num_out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(reflected(x_BCHW, self.conv.kernel_size[0] // 2))))


class Residual(nn.Module):
    """Two 3x3 convolutions around a skip, the second without rectifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Convolution(channels, channels, 3)
        self.second = nn.Conv2d(channels, channels, 3)
        self.norm = nn.InstanceNorm2d(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.norm(self.second(reflected(self.first(x_BCHW), 1)))


class Translator(nn.Module):
    """Images in [-1, 1] to images in [-1, 1]: halvings, residual blocks, doublings."""

    def __init__(self, shape: tuple[int, ...], *, base_channels: int, num_blocks: int) -> None:
        super().__init__()
        halvings = num_halvings(shape, MOST_HALVINGS)
        widths = [base_channels << place for place in range(halvings + 1)]
        sizes = [(shape[1], shape[2])]
        for _ in range(halvings):
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        self.read = Convolution(shape[0], base_channels, 7)
        self.down = nn.ModuleList(Convolution(width, 2 * width, 3, stride=2) for width in widths[:-1])
        self.blocks = nn.ModuleList(Residual(widths[-1]) for _ in range(num_blocks))
        self.up = nn.Sequential()
        for place in reversed(range(halvings)):
            self.up.append(Resample(sizes[place + 1], sizes[place]))
            self.up.append(Convolution(widths[place + 1], widths[place], 3))
        self.draw = nn.Conv2d(base_channels, shape[0], 7)
        self.map_widths = [shape[0], *widths[1:], widths[-1], widths[-1]]
        """Channels of each of ``encode``'s maps."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def encode(self, x_BCHW: Tensor) -> list[Tensor]:
        """Maps ``(B, F, h, w)`` on the way: the image, each halving, the first block, the middle one (Park et al.)."""
        maps = [self.read(x_BCHW)]
        for layer in (*self.down, *self.blocks[: self.middle + 1]):
            maps.append(layer(maps[-1]))
        return [x_BCHW, *maps[1 : len(self.down) + 2], maps[-1]]

    @property
    def middle(self) -> int:
        """The block that ``encode`` ends with."""
        return len(self.blocks) // 2

    def decode(self, h_BFhw: Tensor) -> Tensor:
        """The last of ``encode``'s maps to images ``(B, C, H, W)``."""
        for block in self.blocks[self.middle + 1 :]:
            h_BFhw = block(h_BFhw)
        return self.draw(reflected(self.up(h_BFhw), 3)).tanh()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.decode(self.encode(x_BCHW)[-1])


class PatchDiscriminator(nn.Module):
    """Images to one logit for each overlapping patch ``(B, 1, h, w)``: strided 4x4 convolutions, leaky rectifiers."""

    def __init__(self, shape: tuple[int, ...], *, base_channels: int, num_layers: int) -> None:
        super().__init__()
        strides = [2] * num_halvings(shape, num_layers) + [1]
        widths = [base_channels << min(place, 3) for place in range(len(strides))]
        layers: list[nn.Module] = []
        channels = shape[0]
        for place, (width, stride) in enumerate(zip(widths, strides, strict=True)):
            layers += [nn.Conv2d(channels, width, 4, stride=stride, padding=1)]
            layers += [nn.InstanceNorm2d(width)] if place else []
            layers += [nn.LeakyReLU(0.2)]
            channels = width
        self.body = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, padding=1))
        for layer in self.body:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.body(x_BCHW)


class PlaceHead(nn.Module):
    """Features of places ``(B, N, F)`` to directions of unit length (Park et al., 2020, section 3.2)."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(num_in, num_out), nn.ReLU(), nn.Linear(num_out, num_out))

    def forward(self, x_BNF: Tensor) -> Tensor:
        return F.normalize(self.body(x_BNF).float(), dim=-1)
