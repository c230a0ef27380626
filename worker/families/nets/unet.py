"""The UNet of DDPM (Ho et al., 2020, arXiv 2006.11239), for images of any size.

Modules are named as in diffusers' ``UNet2DModel``, so that weights of the same layout are exchanged
name by name. Shape suffixes: B = batch, C = channels, H, W = height and width, N = pixels,
E = embedding of time and class.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.specs.unet import NORM_EPS, UNetLayout
from worker.families.nets.attention import attend
from worker.families.nets.dropout import Dropout
from worker.families.nets.embeddings import Condition
from worker.families.nets.norm import normalised
from worker.families.nets.recompute import Recomputed


class ResidualBlock(Recomputed):
    """Two normalised 3x3 convolutions around a skip, the condition added in between."""

    is_repeated_block: Final = True

    def __init__(self, channels_in: int, channels: int, embedding_dim: int, num_groups: int, dropout: Dropout) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, channels_in, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding_dim, channels)
        self.norm2 = nn.GroupNorm(num_groups, channels, eps=NORM_EPS)
        self.dropout = dropout
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        same = channels_in == channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x_BCHW: Tensor, condition_BE: Tensor) -> Tensor:
        h_BCHW = self.conv1(normalised(self.norm1, x_BCHW, silu=True))
        h_BCHW = normalised(self.norm2, h_BCHW, self.time_emb_proj(condition_BE), silu=True)
        h_BCHW = self.conv2(self.dropout(h_BCHW))
        return self.conv_shortcut(x_BCHW) + h_BCHW


class Attention(Recomputed):
    """One head of attention over all pixels, around a skip."""

    is_repeated_block: Final = True

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(num_groups, channels, eps=NORM_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        out = nn.Linear(channels, channels)
        nn.init.zeros_(out.weight)
        self.to_out = nn.Sequential(out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        pixels_BNC = normalised(self.group_norm, x_BCHW, silu=False).flatten(2).transpose(1, 2)
        q_B1NC, k_B1NC, v_B1NC = (to(pixels_BNC)[:, None] for to in (self.to_q, self.to_k, self.to_v))
        attended_BNC = attend(q_B1NC, k_B1NC, v_B1NC)[:, 0]
        return x_BCHW + self.to_out(attended_BNC).transpose(1, 2).reshape(x_BCHW.shape)


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution, padded at the far edges as in DDPM."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution by repeating pixels, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """One level on the way down."""

    def __init__(self, layout: UNetLayout, level: int, embedding_dim: int, dropout: Dropout) -> None:
        super().__init__()
        channels_out, groups = layout.block_out_channels[level], layout.norm_num_groups
        channels = [layout.block_out_channels[max(level - 1, 0)]] + [channels_out] * (layout.layers_per_block - 1)
        self.resnets = nn.ModuleList(
            ResidualBlock(channels_in, channels_out, embedding_dim, groups, dropout) for channels_in in channels
        )
        num_attentions = layout.layers_per_block if level == layout.attention_level else 0
        self.attentions = nn.ModuleList(Attention(channels_out, groups) for _ in range(num_attentions))
        is_last = level == layout.num_levels - 1
        self.downsamplers = nn.ModuleList([] if is_last else [Downsample(channels_out)])

    def forward(self, x_BCHW: Tensor, condition_BE: Tensor, skips: list[Tensor]) -> Tensor:
        """The output; what the way up will see again is added to ``skips``."""
        for index, resnet in enumerate(self.resnets):
            x_BCHW = resnet(x_BCHW, condition_BE)
            if self.attentions:
                x_BCHW = self.attentions[index](x_BCHW)
            skips.append(x_BCHW)
        for downsample in self.downsamplers:
            x_BCHW = downsample(x_BCHW)
            skips.append(x_BCHW)
        return x_BCHW


class MidBlock(nn.Module):
    """Two residual blocks around attention at the coarsest resolution."""

    def __init__(self, layout: UNetLayout, embedding_dim: int, dropout: Dropout) -> None:
        super().__init__()
        channels, groups = layout.block_out_channels[-1], layout.norm_num_groups
        self.resnets = nn.ModuleList(
            ResidualBlock(channels, channels, embedding_dim, groups, dropout) for _ in range(2)
        )
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x_BCHW: Tensor, condition_BE: Tensor) -> Tensor:
        before, after = self.resnets
        return after(self.attentions[0](before(x_BCHW, condition_BE)), condition_BE)


class UpBlock(nn.Module):
    """One level on the way up, with one block more than on the way down."""

    def __init__(self, layout: UNetLayout, level: int, embedding_dim: int, dropout: Dropout) -> None:
        super().__init__()
        channels, depth, groups = layout.block_out_channels, layout.layers_per_block, layout.norm_num_groups
        channels_out = channels[level]
        skipped = [channels_out] * depth + [channels[max(level - 1, 0)]]
        arriving = [channels[min(level + 1, layout.num_levels - 1)]] + [channels_out] * depth
        self.resnets = nn.ModuleList(
            ResidualBlock(below + skip, channels_out, embedding_dim, groups, dropout)
            for below, skip in zip(arriving, skipped, strict=True)
        )
        num_attentions = depth + 1 if level == layout.attention_level else 0
        self.attentions = nn.ModuleList(Attention(channels_out, groups) for _ in range(num_attentions))
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(channels_out)])

    def forward(self, x_BCHW: Tensor, condition_BE: Tensor, skips: list[Tensor]) -> Tensor:
        """The output; takes its inputs from the end of ``skips``."""
        for index, resnet in enumerate(self.resnets):
            x_BCHW = resnet(torch.cat((x_BCHW, skips.pop()), dim=1), condition_BE)
            if self.attentions:
                x_BCHW = self.attentions[index](x_BCHW)
        for upsample in self.upsamplers:
            x_BCHW = upsample(x_BCHW)
        return x_BCHW


class UNet(Condition):
    """An image in, an image out, given a time and a class; computes in the type that its weights have."""

    computes_in_type_of_weights: Final = True

    def __init__(self, layout: UNetLayout, num_channels: int, num_classes: int = 0, dropout: float = 0.0) -> None:
        width = layout.block_out_channels[0]
        super().__init__(width, 4 * width, num_classes)
        self.layout = layout
        self.dropout = Dropout(dropout)
        num_channels *= layout.patch_size**2
        self.conv_in = nn.Conv2d(num_channels, width, 3, padding=1)
        levels, rest = range(layout.num_levels), (4 * width, self.dropout)
        self.down_blocks = nn.ModuleList(DownBlock(layout, level, *rest) for level in levels)
        self.mid_block = MidBlock(layout, *rest)
        self.up_blocks = nn.ModuleList(UpBlock(layout, level, *rest) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(layout.norm_num_groups, width, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(width, num_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        """The raw output, float32 ``(B, C, H, W)``; ``label_B`` is unused without classes."""
        height, width = x_BCHW.shape[2:]
        condition_BE = F.silu(self.embed(t_B, label_B))
        # Zeros, as convolutions see beyond an edge anyway.
        padded_BCHW = F.pad(x_BCHW, (0, -width % self.layout.multiple, 0, -height % self.layout.multiple))
        padded_BCHW = padded_BCHW.to(self.conv_in.weight.dtype)
        h_BCHW = self.conv_in(F.pixel_unshuffle(padded_BCHW, self.layout.patch_size))
        skips = [h_BCHW]
        for down in self.down_blocks:
            h_BCHW = down(h_BCHW, condition_BE, skips)
        h_BCHW = self.mid_block(h_BCHW, condition_BE)
        for up in self.up_blocks:
            h_BCHW = up(h_BCHW, condition_BE, skips)
        raw_BCHW = self.conv_out(normalised(self.conv_norm_out, h_BCHW, silu=True))
        out_BCHW = F.pixel_shuffle(raw_BCHW, self.layout.patch_size)
        return out_BCHW[:, :, :height, :width].float()
