"""A hierarchy of latents, top-down (after NVAE: Vahdat and Kautz, 2020, arXiv 2007.03898, and VDVAE: Child, 2020,
arXiv 2011.10650): from one vector to maps of growing resolution, each group given those above it.

A group's prior is ``N(mu, sigma)`` with what the groups above make of mu and sigma, and its posterior ``N(mu + sigma m,
sigma s)``. So in units of the prior, ``z = mu + sigma e``, the prior of ``e`` is N(0, 1) and its posterior N(m, s): the
flat vector of all ``e``, groups from the top, is the latent of a plain VAE, whose KL is the same.

Shape suffixes: B = batch, C = channels, H, W = height and width of any map, F = features, G = channels of a group's
latents, Z = latents of all groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.families.nets.halving import ResidualBlock, norm_silu

BLOCKS_PER_RESOLUTION: Final = 2
"""Groups of each resolution."""


def sizes(shape: tuple[int, ...], halvings: int) -> list[tuple[int, int]]:
    """Heights and widths of the maps that have latents, from the top: one cell, then the smallest map, then doubled."""
    maps = [(-(-shape[1] // 2**n), -(-shape[2] // 2**n)) for n in range(halvings, 0, -1)]
    smallest = maps[0]
    return [(1, 1)] + [(smallest[0] << place, smallest[1] << place) for place in range(halvings)]


def group_shapes(shape: tuple[int, ...], halvings: int, latent_dim: int) -> list[tuple[int, int, int]]:
    """Shapes ``(G, H, W)`` of the groups, from the top."""
    return [(latent_dim, *size) for size in sizes(shape, halvings) for _ in range(BLOCKS_PER_RESOLUTION)]


class BottomUp(nn.Module):
    """Images to features at each resolution that has latents, from the top."""

    def __init__(self, shape: tuple[int, ...], halvings: int, channels: int) -> None:
        super().__init__()
        self.sizes = sizes(shape, halvings)
        height, width = (2 * side for side in self.sizes[-1])
        self.padding = (0, width - shape[2], 0, height - shape[1])
        self.downs = nn.ModuleList(
            nn.Conv2d(shape[0] if place == 0 else channels, channels, 4, stride=2, padding=1)
            for place in range(halvings)
        )
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(halvings))
        self.to_top = nn.Linear(channels * prod(self.sizes[1]), channels)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        h_BFHW = F.pad(x_BCHW, self.padding, mode="replicate") if any(self.padding) else x_BCHW
        features: list[Tensor] = []
        for down, block in zip(self.downs, self.blocks, strict=True):
            h_BFHW = block(down(h_BFHW))
            features.append(h_BFHW)
        return [self.to_top(h_BFHW.flatten(1))[..., None, None], *reversed(features)]


def zero_conv(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 1x1 convolution that gives zeros before training."""
    conv = nn.Conv2d(channels_in, channels_out, 1)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


def cell_norm_silu(channels: int) -> nn.Module:
    """``norm_silu`` for maps of one cell, where a group of few channels would leave nothing of them."""
    return nn.Sequential(nn.GroupNorm(1, channels), nn.SiLU())


class CellBlock(nn.Module):
    """``ResidualBlock`` for maps of one cell."""

    is_repeated_block: Final = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            cell_norm_silu(channels), nn.Conv2d(channels, channels, 1), nn.SiLU(), zero_conv(channels, channels)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.body(x_BCHW)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What a group is made of."""

    norm_silu: Callable[[int], nn.Module]
    residual: Callable[[int], nn.Module]


CELL: Final = Layers(norm_silu=cell_norm_silu, residual=CellBlock)
MAP: Final = Layers(norm_silu=norm_silu, residual=ResidualBlock)


class TopDownBlock(nn.Module):
    """One group: its prior from what is above, its posterior from the image, too, and what it adds."""

    def __init__(self, channels: int, latent_dim: int, layers: Layers) -> None:
        super().__init__()
        # N(0, 1), both, so that the first KL is zero.
        self.prior = nn.Sequential(layers.norm_silu(channels), zero_conv(channels, 2 * latent_dim))
        self.posterior = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 1),
            layers.residual(channels),
            layers.norm_silu(channels),
            zero_conv(channels, 2 * latent_dim),
        )
        self.from_latent = nn.Conv2d(latent_dim, channels, 1)
        self.residual = layers.residual(channels)

    def infer(self, h_BFHW: Tensor, feature_BFHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior in units of the prior."""
        return self.posterior(torch.cat((h_BFHW, feature_BFHW), dim=1)).float().chunk(2, dim=1)

    def forward(self, h_BFHW: Tensor, e_BGHW: Tensor) -> Tensor:
        """``h`` with what the latents ``e``, in units of the prior, say."""
        mean_BGHW, log_sigma_BGHW = self.prior(h_BFHW).float().chunk(2, dim=1)
        z_BGHW = mean_BGHW + log_sigma_BGHW.exp() * e_BGHW
        return self.residual(h_BFHW + self.from_latent(z_BGHW))


class TopDown(nn.Module):
    """Latents to images; with the features of an image it finds their posterior on the way."""

    def __init__(self, shape: tuple[int, ...], halvings: int, channels: int, latent_dim: int) -> None:
        super().__init__()
        self.image_shape_CHW, self.group_shapes = shape, group_shapes(shape, halvings, latent_dim)
        self.sizes = sizes(shape, halvings)
        self.blocks = nn.ModuleList(
            TopDownBlock(channels, latent_dim, MAP if place >= BLOCKS_PER_RESOLUTION else CELL)
            for place in range(len(self.group_shapes))
        )
        self.top = nn.Parameter(torch.zeros(channels, 1, 1))
        self.ups = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in pairwise(self.sizes))
        self.places = nn.ParameterList(torch.zeros(channels, *size) for size in self.sizes[1:])
        up = nn.ConvTranspose2d(channels, shape[0], 4, stride=2, padding=1)
        self.to_image = nn.Sequential(norm_silu(channels), up)

    def forward(self, z_BZ: Tensor) -> Tensor:
        """The parameters of p(x|z), ``(B, C, H, W)``, from latents in units of their priors."""
        groups = z_BZ.split([prod(shape) for shape in self.group_shapes], dim=1)
        h_BFHW = self._descend(len(z_BZ), lambda _h, place: groups[place].unflatten(1, self.group_shapes[place]))
        _, height, width = self.image_shape_CHW
        return self.to_image(h_BFHW)[:, :, :height, :width]

    def infer(self, features: list[Tensor], epsilon_BZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents drawn from the posterior, each group's given those above it, and its mean and log variance;
        each ``(B, Z)``, in units of the prior."""
        groups = epsilon_BZ.split([prod(shape) for shape in self.group_shapes], dim=1)
        found: list[tuple[Tensor, Tensor, Tensor]] = []

        def latents(h_BFHW: Tensor, place: int) -> Tensor:
            block: TopDownBlock = self.blocks[place]  # pyright: ignore[reportAssignmentType]
            mean_BGHW, log_variance_BGHW = block.infer(h_BFHW, features[place // BLOCKS_PER_RESOLUTION])
            epsilon_BGHW = groups[place].unflatten(1, self.group_shapes[place])
            e_BGHW = mean_BGHW + (0.5 * log_variance_BGHW).exp() * epsilon_BGHW
            found.append((e_BGHW.flatten(1), mean_BGHW.flatten(1), log_variance_BGHW.flatten(1)))
            return e_BGHW

        self._descend(len(epsilon_BZ), latents)
        z_BZ, mean_BZ, log_variance_BZ = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return z_BZ, mean_BZ, log_variance_BZ

    def _descend(self, num_rows: int, latents: Callable[[Tensor, int], Tensor]) -> Tensor:
        """The features above the image, when each group has the ``latents`` that a function of those above gives."""
        h_BFHW = self.top.expand(num_rows, -1, -1, -1)
        for place, block in enumerate(self.blocks):
            resolution, first = divmod(place, BLOCKS_PER_RESOLUTION)
            if resolution and not first:
                # Repeating pixels; from the top cell to a whole map, with a bias of its own for each place.
                h_BFHW = F.interpolate(h_BFHW, size=self.sizes[resolution], mode="nearest")
                h_BFHW = self.ups[resolution - 1](h_BFHW) + self.places[resolution - 1]
            h_BFHW = block(h_BFHW, latents(h_BFHW, place))
        return h_BFHW
