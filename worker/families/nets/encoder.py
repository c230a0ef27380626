"""Networks of style transfer: the frozen encoder in whose features style is compared, and the decoder that goes back
from its last map to an image (Huang and Belongie, 2017, arXiv 1703.06868, section 6).

Shape suffixes: B = batch, C = channels, H, W = height and width, h, w = of a map, F = features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import DatasetInvalid


@dataclass(frozen=True, kw_only=True)
class Layout:
    """3x3 convolutions with rectifiers, and halvings by maximum between stages."""

    name: str
    """What the names of its tensors begin with in the file that it comes from."""
    num_in: int
    """Colours that it looks at."""
    stages: Sequence[Sequence[int]]
    """Channels of each convolution, by resolution."""
    mean: Sequence[float] = (0.0,)
    """Of each colour in [0, 1], taken off what it sees."""
    deviation: Sequence[float] = (1.0,)
    """Of each colour, by which that is divided."""


LAYOUTS: Final[Mapping[str, Layout]] = {
    "digits": Layout(name="body", num_in=1, stages=((16,), (32,))),
    "vgg19": Layout(
        name="features",
        num_in=3,
        stages=((64, 64), (128, 128), (256, 256, 256, 256), (512,)),
        mean=(0.485, 0.456, 0.406),
        deviation=(0.229, 0.224, 0.225),
    ),
}
"""The shipped classifier of digits up to relu2_1, after which too little of the image is left to draw it; and VGG-19
(Simonyan and Zisserman, 2014, arXiv 1409.1556) up to relu4_1, as torchvision has it."""


class Halving(nn.Module):
    """The largest of each two by two; a last odd row or column is left out.

    torch's own kernel adds up its gradient in any order on GPUs.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = (size // 2 * 2 for size in x_BCHW.shape[2:])
        x_BChW = torch.maximum(x_BCHW[:, :, 0:height:2], x_BCHW[:, :, 1:height:2])
        return torch.maximum(x_BChW[..., 0:width:2], x_BChW[..., 1:width:2])


class Encoder(nn.Module):
    """Images ``(B, C, H, W)`` in [0, 1] to maps ``(B, F, h, w)``: the first rectifier of each resolution (relu1_1,
    relu2_1, ...), where it ends.

    One that looks at colours sees grey images as such; one that looks at grey sees each colour by itself.

    Raises:
        DatasetInvalid: images of ``shape`` are too small, or have a number of channels that it cannot look at.
    """

    def __init__(self, layout: Layout, shape: tuple[int, ...]) -> None:
        super().__init__()
        num_halvings, channels = len(layout.stages) - 1, shape[0]
        if min(shape[1:]) >> num_halvings == 0:
            raise DatasetInvalid(f"images have sides of at least {1 << num_halvings} pixels, not {min(shape[1:])}")
        if layout.num_in > 1 and channels not in (1, layout.num_in):
            raise DatasetInvalid(f"the encoder looks at 1 or {layout.num_in} channels; the images have {channels}")
        self.layout = layout
        self.num_planes = channels if layout.num_in == 1 else 1
        self.sizes = [(shape[1] >> place, shape[2] >> place) for place in range(num_halvings + 1)]
        """Height and width of each map."""
        self.widths = [self.num_planes * stage[0] for stage in layout.stages]
        """Features of each map."""
        self.ends: list[int] = []
        layers = nn.Sequential()
        num_in = layout.num_in
        for place, stage in enumerate(layout.stages):
            layers.extend([Halving()] if place else [])
            self.ends.append(len(layers) + 1)
            for width in stage:
                layers.extend([nn.Conv2d(num_in, width, 3, padding=1), nn.ReLU()])
                num_in = width
        self.add_module(layout.name, layers)
        self.mean: Tensor
        self.deviation: Tensor
        for name, numbers in (("mean", layout.mean), ("deviation", layout.deviation)):
            self.register_buffer(name, torch.tensor(numbers)[:, None, None], persistent=False)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        height, width = x_BCHW.shape[2:]
        # Each plane is an image of its own: (B C, 1, H, W) for an encoder of grey.
        x_BCHW = x_BCHW.reshape(-1, x_BCHW.shape[1] // self.num_planes, height, width)
        x_BCHW = (x_BCHW - self.mean) / self.deviation
        maps: list[Tensor] = []
        for place, layer in enumerate(self.get_submodule(self.layout.name).children()):
            x_BCHW = layer(x_BCHW)
            if place in self.ends:
                maps.append(x_BCHW.unflatten(0, (-1, self.num_planes)).flatten(1, 2))
        return maps


class Convolution(nn.Module):
    """Repeated edges, so that no border is darker than it should be, and a 3x3 convolution."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(with_edges(x_BCHW))


def with_edges(x_BCHW: Tensor) -> Tensor:
    """One pixel larger on each side; built of copies, since torch's own kernel adds up in any order on GPUs."""
    x_BCHW = torch.cat([x_BCHW[..., :1], x_BCHW, x_BCHW[..., -1:]], dim=-1)
    return torch.cat([x_BCHW[..., :1, :], x_BCHW, x_BCHW[..., -1:, :]], dim=-2)


class Decoder(nn.Module):
    """The last map of an encoder to images ``(B, C, H, W)`` about [0, 1]; no normalisation, which would undo the style
    (section 6 of the paper)."""

    def __init__(self, encoder: Encoder, num_out: int, *, base_channels: int) -> None:
        super().__init__()
        self.sizes = encoder.sizes[::-1]
        widths = [base_channels << place for place in range(len(self.sizes))][::-1]
        self.first = nn.ModuleList(
            Convolution(num_in, width) for num_in, width in zip([encoder.widths[-1], *widths], widths, strict=False)
        )
        self.second = nn.ModuleList(Convolution(width, width) for width in widths)
        self.draw = Convolution(base_channels, num_out)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, h_BFhw: Tensor) -> Tensor:
        for size, first, second in zip(self.sizes, self.first, self.second, strict=True):
            h_BFhw = F.interpolate(h_BFhw, size=size, mode="nearest")
            h_BFhw = F.relu(second(F.relu(first(h_BFhw))))
        return self.draw(h_BFhw)
