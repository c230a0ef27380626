"""The network whose features define FID: Inception v3 (Szegedy et al., 2015, arXiv 1512.00567) as Heusel et al. (2017,
arXiv 1706.08500) used it, with weights from a safetensors file of one's own.

The file has the names of pytorch-fid's and torch-fidelity's ``pt_inception-2015-12-05``, which are torchvision's
(``Mixed_5b.branch5x5_1.conv.weight``). That network differs from torchvision's in four ways: images are resized as
TensorFlow 1 did, from corner to corner of the pixel grid; they lie in [-1, 1); average pooling leaves the padding out;
and the last block pools by maximum. Batch norm divides by ``sqrt(variance + 0.001)``.

Shape suffixes: B = batch, C = channels, H, W = height and width, h, w = of a map, D = features.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.metrics.networks import read_network

SIDE: Final = 299
"""Of the square that images are resized to."""
EPSILON: Final = 0.001


class Layer(NamedTuple):
    """A convolution: its name, its filters, its kernel (height, width); padded so as to keep the size at stride 1."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


class Convolution(nn.Module):
    """Convolution without bias, batch norm with its stored statistics, rectifier."""

    def __init__(self, num_in: int, layer: Layer) -> None:
        super().__init__()
        padding = (layer.kernel[0] // 2, layer.kernel[1] // 2) if layer.padded else (0, 0)
        self.conv = nn.Conv2d(num_in, layer.channels, layer.kernel, stride=layer.stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(layer.channels, eps=EPSILON)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)))


Branch = Sequence[Layer | tuple[Layer, ...]]
"""Layers one after another; several in a tuple stand side by side at the end, and their outputs together."""


class Mixed(nn.Module):
    """Branches side by side, the last of which pools; their outputs are one after another in the channels."""

    def __init__(self, num_in: int, branches: Sequence[Branch], *, pool: str) -> None:
        super().__init__()
        self.branches, self.pool = branches, pool
        self.num_out = num_in if pool == "halve" else 0
        for branch in branches:
            width = num_in
            for step in branch:
                beside = (step,) if isinstance(step, Layer) else step
                for layer in beside:
                    self.add_module(layer.name, Convolution(width, layer))
                width = sum(layer.channels for layer in beside)
            self.num_out += width

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # What halves the resolution pools without a convolution; elsewhere the last branch is one after the pooling.
        outputs = [self._through(branch, x_BCHW) for branch in self.branches[: None if self.pool == "halve" else -1]]
        pooled_BCHW = pooled(x_BCHW, self.pool)
        outputs.append(pooled_BCHW if self.pool == "halve" else self._through(self.branches[-1], pooled_BCHW))
        return torch.cat(outputs, dim=1)

    def _through(self, branch: Branch, x_BCHW: Tensor) -> Tensor:
        for step in branch:
            beside = (step,) if isinstance(step, Layer) else step
            x_BCHW = torch.cat([self.get_submodule(layer.name)(x_BCHW) for layer in beside], dim=1)
        return x_BCHW


def pooled(x_BCHW: Tensor, how: str) -> Tensor:
    """3x3 pooling: by ``mean`` or ``maximum`` at each place, or by maximum at every other one (``halve``)."""
    match how:
        case "mean":
            return F.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)
        case "maximum":
            return F.max_pool2d(x_BCHW, 3, stride=1, padding=1)
        case _:
            return F.max_pool2d(x_BCHW, 3, stride=2)


def block_a(pool_channels: int) -> list[Branch]:
    """Figure 5 of Szegedy et al."""
    return [
        [Layer("branch1x1", 64)],
        [Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5))],
        [Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, (3, 3)), Layer("branch3x3dbl_3", 96, (3, 3))],
        [Layer("branch_pool", pool_channels)],
    ]


def block_b() -> list[Branch]:
    """The first halving (figure 10)."""
    halving = Layer("branch3x3dbl_3", 96, (3, 3), stride=2, padded=False)
    return [
        [Layer("branch3x3", 384, (3, 3), stride=2, padded=False)],
        [Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, (3, 3)), halving],
    ]


def block_c(width: int) -> list[Branch]:
    """Figure 6, n = 7."""
    row, column = (1, 7), (7, 1)
    return [
        [Layer("branch1x1", 192)],
        [Layer("branch7x7_1", width), Layer("branch7x7_2", width, row), Layer("branch7x7_3", 192, column)],
        [
            Layer("branch7x7dbl_1", width),
            Layer("branch7x7dbl_2", width, column),
            Layer("branch7x7dbl_3", width, row),
            Layer("branch7x7dbl_4", width, column),
            Layer("branch7x7dbl_5", 192, row),
        ],
        [Layer("branch_pool", 192)],
    ]


def block_d() -> list[Branch]:
    """The second halving."""
    return [
        [Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, (3, 3), stride=2, padded=False)],
        [
            Layer("branch7x7x3_1", 192),
            Layer("branch7x7x3_2", 192, (1, 7)),
            Layer("branch7x7x3_3", 192, (7, 1)),
            Layer("branch7x7x3_4", 192, (3, 3), stride=2, padded=False),
        ],
    ]


def block_e() -> list[Branch]:
    """Figure 7."""
    row, column = (1, 3), (3, 1)
    return [
        [Layer("branch1x1", 320)],
        [Layer("branch3x3_1", 384), (Layer("branch3x3_2a", 384, row), Layer("branch3x3_2b", 384, column))],
        [
            Layer("branch3x3dbl_1", 448),
            Layer("branch3x3dbl_2", 384, (3, 3)),
            (Layer("branch3x3dbl_3a", 384, row), Layer("branch3x3dbl_3b", 384, column)),
        ],
        [Layer("branch_pool", 192)],
    ]


BLOCKS: Final[Mapping[str, tuple[list[Branch], str]]] = {
    "Mixed_5b": (block_a(32), "mean"),
    "Mixed_5c": (block_a(64), "mean"),
    "Mixed_5d": (block_a(64), "mean"),
    "Mixed_6a": (block_b(), "halve"),
    "Mixed_6b": (block_c(128), "mean"),
    "Mixed_6c": (block_c(160), "mean"),
    "Mixed_6d": (block_c(160), "mean"),
    "Mixed_6e": (block_c(192), "mean"),
    "Mixed_7a": (block_d(), "halve"),
    "Mixed_7b": (block_e(), "mean"),
    "Mixed_7c": (block_e(), "maximum"),
}
"""The blocks in their order, each with how its last branch pools."""

STEM: Final[Sequence[Layer | None]] = (
    Layer("Conv2d_1a_3x3", 32, (3, 3), stride=2, padded=False),
    Layer("Conv2d_2a_3x3", 32, (3, 3), padded=False),
    Layer("Conv2d_2b_3x3", 64, (3, 3)),
    None,
    Layer("Conv2d_3b_1x1", 80),
    Layer("Conv2d_4a_3x3", 192, (3, 3), padded=False),
    None,
)
"""What comes before the blocks; None halves by maximum."""


class Inception(nn.Module):
    """Bytes of any size, grey or in colours, to float32 features ``(B, 2048)``."""

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for layer in STEM:
            if layer is not None:
                self.add_module(layer.name, Convolution(width, layer))
                width = layer.channels
        for name, (branches, pool) in BLOCKS.items():
            block = Mixed(width, branches, pool=pool)
            self.add_module(name, block)
            width = block.num_out

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = (resized(image_BCHW.float(), SIDE) - 128) / 128
        x_BCHW = x_BCHW.expand(-1, 3, -1, -1)
        for layer in STEM:
            x_BCHW = pooled(x_BCHW, "halve") if layer is None else self.get_submodule(layer.name)(x_BCHW)
        for name in BLOCKS:
            x_BCHW = self.get_submodule(name)(x_BCHW)
        return x_BCHW.mean((2, 3))

    @classmethod
    def read(cls, path: Path) -> "Inception":
        """The network of a file; the classifier that may be in it is left out.

        Raises:
            ModelLoadFailed: it is no safetensors file, or lacks a tensor, or has one of another shape.
        """
        return read_network(path, cls)


def resized(x_BCHW: Tensor, side: int) -> Tensor:
    """Bilinear as in TensorFlow 1: pixel i of the result lies at ``i * H / side``, without antialiasing."""
    rows_hH, columns_Ww = (corner_weights(size, side).to(x_BCHW.device) for size in x_BCHW.shape[2:])
    return rows_hH @ x_BCHW @ columns_Ww.T


def corner_weights(num_in: int, num_out: int) -> Tensor:
    """Weights ``(num_out, num_in)`` of that interpolation along one axis."""
    place = torch.arange(num_out, dtype=torch.float64) * num_in / num_out
    low = place.floor().long()
    share = (place - low).float()
    weight = torch.zeros(num_out, num_in)
    row = torch.arange(num_out)
    weight[row, low] += 1 - share
    weight[row, (low + 1).clamp(max=num_in - 1)] += share
    return weight
