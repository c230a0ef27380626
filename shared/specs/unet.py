"""How large the UNet of DDPM is (Ho et al., 2020, arXiv 2006.11239), by preset. Knows no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

NORM_EPS: Final = 1e-6


@dataclass(frozen=True, kw_only=True)
class UNetLayout:
    """The shape of a UNet; the resolution is halved between its levels."""

    block_out_channels: tuple[int, ...]
    """Channels of each level, finest first."""
    layers_per_block: int
    attention_level: int
    """The level whose blocks are followed by attention, 0 being the finest; at the turn there always is some."""
    norm_num_groups: int = 32
    patch_size: int = 1
    """Pixels of a square that the network sees as one, side by side in its channels."""

    @property
    def num_levels(self) -> int:
        return len(self.block_out_channels)

    @property
    def multiple(self) -> int:
        """Heights and widths are padded to a multiple of this."""
        return self.patch_size * 2 ** (self.num_levels - 1)


UNETS: Final[Mapping[str, UNetLayout]] = {
    "xs": UNetLayout(
        block_out_channels=(32, 64), layers_per_block=1, attention_level=1, norm_num_groups=8, patch_size=2
    ),
    "s": UNetLayout(block_out_channels=(64, 128, 128), layers_per_block=2, attention_level=1),
    "b": UNetLayout(block_out_channels=(128, 256, 256, 256), layers_per_block=2, attention_level=1),
}
"""``b`` is the network of DDPM on CIFAR-10 (google/ddpm-cifar10-32): 35.7 million parameters."""
