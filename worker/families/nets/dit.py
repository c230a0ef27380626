"""The diffusion transformer (DiT: Peebles and Xie, 2022, arXiv 2212.09748) with the blocks of today.

RMSNorm (Zhang and Sennrich, 2019), normalised queries and keys (Dehghani et al., 2023), rotary positions in
two dimensions (Su et al., 2021) and SwiGLU (Shazeer, 2020) around the paper's adaLN-Zero. Shape suffixes:
B = batch, C = channels, H, W = height and width, N = tokens, D = width of a token, K = heads, d = width of a
head, E = embedding of time and class.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.families.nets.attention import attend
from worker.families.nets.dropout import Dropout
from worker.families.nets.embeddings import Condition
from worker.families.nets.recompute import Recomputed
from worker.families.nets.rotary import rotate

WAVES_DIM: Final = 256
LONGEST_PERIOD: Final = 100
"""Of the slowest rotation, in patches over 2 pi: grids are small."""
NORM_EPS: Final = 1e-6


@dataclass(frozen=True, kw_only=True)
class DiTLayout:
    """The shape of a transformer."""

    width: int
    depth: int
    num_heads: int

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Of SwiGLU: three matrices of two thirds of the usual four widths, in multiples of 64."""
        return -(-8 * self.width // (3 * 64)) * 64


DITS: Final[Mapping[str, DiTLayout]] = {
    "xs": DiTLayout(width=128, depth=6, num_heads=2),
    "s": DiTLayout(width=384, depth=12, num_heads=6),
    "b": DiTLayout(width=768, depth=12, num_heads=12),
}
"""``s`` and ``b`` have the widths and depths of DiT-S and DiT-B."""


def rotations(rows: int, columns: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(N, d/2)`` for a grid: half of the pairs turn with the row, half with the column."""
    num_pairs = head_dim // 4
    frequencies = LONGEST_PERIOD ** -(torch.arange(num_pairs, dtype=torch.float64) / num_pairs)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.cat((row.reshape(-1, 1) * frequencies, column.reshape(-1, 1) * frequencies), dim=1)
    return angles.cos().float(), angles.sin().float()


def rms_normed(x: Tensor) -> Tensor:
    """The last axis at root mean square one.

    Not by ``F.rms_norm``: CPUs compute its reciprocal root in two ways, and a tile of samples would have to be narrow.
    """
    return x * ((x * x).mean(-1, keepdim=True) + NORM_EPS).sqrt().reciprocal()


class RMSNorm(nn.Module):
    """``rms_normed`` with a gain for each feature."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * rms_normed(x)


class SelfAttention(nn.Module):
    """Attention among all tokens, queries and keys normalised and rotated."""

    def __init__(self, layout: DiTLayout) -> None:
        super().__init__()
        self.num_heads = layout.num_heads
        self.to_qkv = nn.Linear(layout.width, 3 * layout.width, bias=False)
        self.norm_q, self.norm_k = (RMSNorm(layout.head_dim) for _ in range(2))
        self.to_out = nn.Linear(layout.width, layout.width, bias=False)

    def forward(self, x_BND: Tensor, cos_Nd: Tensor, sin_Nd: Tensor) -> Tensor:
        qkv_BNKd = self.to_qkv(x_BND).unflatten(-1, (3 * self.num_heads, -1))
        q_BKNd, k_BKNd, v_BKNd = qkv_BNKd.transpose(1, 2).chunk(3, dim=1)
        q_BKNd = rotate(self.norm_q(q_BKNd.float()), cos_Nd, sin_Nd).to(v_BKNd.dtype)
        k_BKNd = rotate(self.norm_k(k_BKNd.float()), cos_Nd, sin_Nd).to(v_BKNd.dtype)
        attended_BKNd = attend(q_BKNd, k_BKNd, v_BKNd)
        return self.to_out(attended_BKNd.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, layout: DiTLayout, dropout: Dropout) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(layout.width, layout.hidden_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(layout.hidden_dim, layout.width, bias=False)
        self.dropout = dropout

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.down(self.dropout(F.silu(self.gate(x_BND)) * self.up(x_BND)))


def modulated(x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """The normalised tokens, scaled and shifted by the condition."""
    return rms_normed(x_BND) * (1 + scale_B1D) + shift_B1D


class Block(Recomputed):
    """Attention and SwiGLU, each behind adaLN-Zero: the identity before training."""

    is_repeated_block: Final = True

    def __init__(self, layout: DiTLayout, dropout: Dropout) -> None:
        super().__init__()
        self.modulation = nn.Linear(layout.width, 6 * layout.width)
        self.attention = SelfAttention(layout)
        self.mlp = SwiGLU(layout, dropout)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_BND: Tensor, condition_BE: Tensor, cos_Nd: Tensor, sin_Nd: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition_BE)[:, None].chunk(6, dim=-1)
        dtype = self.modulation.weight.dtype
        x_BND = x_BND + gate1 * self.attention(modulated(x_BND, shift1, scale1).to(dtype), cos_Nd, sin_Nd)
        return x_BND + gate2 * self.mlp(modulated(x_BND, shift2, scale2).to(dtype))


class DiT(Condition):
    """An image in, an image out, given a time and a class; computes in the type that its weights have.

    Whatever that is, the sum of all blocks, the norms and the rotations are float32.
    """

    computes_in_type_of_weights: Final = True

    def __init__(
        self, layout: DiTLayout, patch_size: int, shape: tuple[int, ...], num_classes: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__(WAVES_DIM, layout.width, num_classes)
        num_channels, height, width = shape
        self.patch_size = patch_size
        self.grid = -(-height // patch_size), -(-width // patch_size)
        self.dropout = Dropout(dropout)
        self.patch_in = nn.Linear(num_channels * patch_size**2, layout.width)
        self.blocks = nn.ModuleList(Block(layout, self.dropout) for _ in range(layout.depth))
        self.modulation = nn.Linear(layout.width, 2 * layout.width)
        self.patch_out = nn.Linear(layout.width, num_channels * patch_size**2)
        for zeroed in (self.modulation, self.patch_out):
            nn.init.zeros_(zeroed.weight)
            nn.init.zeros_(zeroed.bias)
        cos_Nd, sin_Nd = rotations(*self.grid, layout.head_dim)
        self.cos_Nd: Tensor
        self.sin_Nd: Tensor
        self.register_buffer("cos_Nd", cos_Nd, persistent=False)
        self.register_buffer("sin_Nd", sin_Nd, persistent=False)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        """The raw output, float32 ``(B, C, H, W)``; ``label_B`` is unused without classes."""
        height, width = x_BCHW.shape[2:]
        condition_BE = F.silu(self.embed(t_B, label_B))
        dtype = self.patch_in.weight.dtype
        x_BND = self.patch_in(self._patches(x_BCHW).to(dtype)).float()
        for block in self.blocks:
            x_BND = block(x_BND, condition_BE, self.cos_Nd, self.sin_Nd)
        shift_B1D, scale_B1D = self.modulation(condition_BE)[:, None].chunk(2, dim=-1)
        patches_BND = self.patch_out(modulated(x_BND, shift_B1D, scale_B1D).to(dtype))
        rows, columns = self.grid
        padded_BCHW = (
            patches_BND.unflatten(1, (rows, columns))
            .unflatten(-1, (-1, self.patch_size, self.patch_size))
            .permute(0, 3, 1, 4, 2, 5)
            .flatten(4)
            .flatten(2, 3)
        )
        return padded_BCHW[:, :, :height, :width].float()

    def _patches(self, x_BCHW: Tensor) -> Tensor:
        """Pixels of each patch as ``(B, N, C p p)``, the image padded to whole patches."""
        height, width = x_BCHW.shape[2:]
        size = self.patch_size
        padded_BCHW = F.pad(x_BCHW, (0, -width % size, 0, -height % size))
        tiles = padded_BCHW.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, C, rows, p, columns, p)
        return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
