"""A causal transformer over tokens, for whatever the tokens stand for: all at once to train, one by one to sample.

RMSNorm (Zhang and Sennrich, 2019), normalised queries and keys (Dehghani et al., 2023), rotary (Su et al., 2021) and
learned positions, SwiGLU (Shazeer, 2020); residual branches and output begin at zero. Shape suffixes: B = batch,
S = slots, T = tokens, V = kinds of tokens, D = width, L = layers, K = heads, d = width of a head, 2 = keys and values.
"""

from dataclasses import dataclass
from typing import Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.families.nets.rotary import rotate

LONGEST_PERIOD: Final = 10_000
"""Of the slowest rotation, in tokens over 2 pi."""
NORM_EPS: Final = 1e-6
DEVIATION: Final = 0.02
"""Of the initial weights."""


@dataclass(frozen=True, kw_only=True)
class TransformerLayout:
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

    def empty_cache(self, num_slots: int, num_tokens: int, device: torch.device) -> Tensor:
        """Keys and values of no token yet, for ``CausalTransformer.step``: ``(S, L, 2, K, T, d)``."""
        return torch.zeros(num_slots, self.depth, 2, self.num_heads, num_tokens, self.head_dim, device=device)


class RmsNorm(nn.Module):
    """``x / rms(x)`` with a gain, of operations that round the same way in every slot of a tile."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain_D = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * ((x * x).mean(-1, keepdim=True) + NORM_EPS).sqrt().reciprocal() * self.gain_D


def rotations(num_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(T, d/2)``."""
    num_pairs = head_dim // 2
    frequencies = LONGEST_PERIOD ** -(torch.arange(num_pairs, dtype=torch.float64) / num_pairs)
    angles = torch.arange(num_tokens)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


class CausalAttention(nn.Module):
    """Attention of each token to itself and those before it."""

    def __init__(self, layout: TransformerLayout) -> None:
        super().__init__()
        self.num_heads = layout.num_heads
        self.to_qkv = nn.Linear(layout.width, 3 * layout.width, bias=False)
        self.norm_q, self.norm_k = RmsNorm(layout.head_dim), RmsNorm(layout.head_dim)
        self.to_out = nn.Linear(layout.width, layout.width, bias=False)

    def _qkv(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv_BKTd = self.to_qkv(x_BTD).unflatten(-1, (3 * self.num_heads, -1)).transpose(1, 2)
        q_BKTd, k_BKTd, v_BKTd = qkv_BKTd.chunk(3, dim=1)
        q_BKTd, k_BKTd = (rotate(norm(x), cos, sin) for norm, x in ((self.norm_q, q_BKTd), (self.norm_k, k_BKTd)))
        return q_BKTd.to(v_BKTd.dtype), k_BKTd.to(v_BKTd.dtype), v_BKTd

    def forward(self, x_BTD: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
        attended_BKTd = F.scaled_dot_product_attention(*self._qkv(x_BTD, cos_Td, sin_Td), is_causal=True)
        return self.to_out(attended_BKTd.transpose(1, 2).flatten(2))

    def step(self, x_S1D: Tensor, place_S: Tensor, turn: tuple[Tensor, Tensor], cache_S2KTd: Tensor) -> Tensor:
        """The output for one token per slot, whose key and value are put into ``cache`` at its place."""
        q_SK1d, k_SK1d, v_SK1d = self._qkv(x_S1D, *(angle_Sd[:, None, None] for angle_Sd in turn))
        slot_S = torch.arange(len(place_S), device=place_S.device)
        cache_S2KTd[slot_S, 0, :, place_S] = k_SK1d[:, :, 0]
        cache_S2KTd[slot_S, 1, :, place_S] = v_SK1d[:, :, 0]
        token_T = torch.arange(cache_S2KTd.shape[3], device=place_S.device)
        seen_S11T = (token_T <= place_S[:, None])[:, None, None]
        attended_SK1d = F.scaled_dot_product_attention(q_SK1d, *cache_S2KTd.unbind(1), attn_mask=seen_S11T)
        return self.to_out(attended_SK1d.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, layout: TransformerLayout) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(layout.width, layout.hidden_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(layout.hidden_dim, layout.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """Attention, then SwiGLU, each normalised and around a skip."""

    is_repeated_block: Final = True

    def __init__(self, layout: TransformerLayout) -> None:
        super().__init__()
        self.norm1, self.norm2 = RmsNorm(layout.width), RmsNorm(layout.width)
        self.attention, self.feed_forward = CausalAttention(layout), SwiGLU(layout)
        nn.init.zeros_(self.attention.to_out.weight)
        nn.init.zeros_(self.feed_forward.down.weight)

    def forward(self, x_BTD: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD), cos_Td, sin_Td)
        return x_BTD + self.feed_forward(self.norm2(x_BTD))

    def step(self, x_S1D: Tensor, place_S: Tensor, turn: tuple[Tensor, Tensor], cache_S2KTd: Tensor) -> Tensor:
        x_S1D = x_S1D + self.attention.step(self.norm1(x_S1D), place_S, turn, cache_S2KTd)
        return x_S1D + self.feed_forward(self.norm2(x_S1D))


class CausalTransformer(nn.Module):
    """Tokens to what comes after each: ``num_inputs`` kinds of tokens go in, the first ``num_outputs`` may come out.

    Kinds that only go in begin a sequence and say what it is about.
    """

    def __init__(self, layout: TransformerLayout, *, num_inputs: int, num_outputs: int, num_tokens: int) -> None:
        super().__init__()
        self.layout, self.num_tokens = layout, num_tokens
        self.tokens = nn.Embedding(num_inputs, layout.width)
        self.places = nn.Embedding(num_tokens, layout.width)
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=DEVIATION)
        self.blocks = nn.ModuleList(Block(layout) for _ in range(layout.depth))
        self.norm = RmsNorm(layout.width)
        self.to_logits = nn.Linear(layout.width, num_outputs, bias=False)
        nn.init.zeros_(self.to_logits.weight)
        self.cos_Td: Tensor
        self.sin_Td: Tensor
        for name, table_Td in zip(("cos_Td", "sin_Td"), rotations(num_tokens, layout.head_dim), strict=True):
            self.register_buffer(name, table_Td, persistent=False)

    def forward(self, token_BT: Tensor) -> Tensor:
        """Logits of the token after each, float32 ``(B, T, V)``; those at t depend on the tokens up to t alone."""
        num_tokens = token_BT.shape[1]
        x_BTD = self.tokens(token_BT) + self.places.weight[:num_tokens]
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos_Td[:num_tokens], self.sin_Td[:num_tokens])
        return self.to_logits(self.norm(x_BTD)).float()

    def step(self, token_S: Tensor, place_S: Tensor, cache_SL2KTd: Tensor) -> Tensor:
        """Logits ``(S, V)`` of what comes after ``token``, which stands at ``place`` of its slot's sequence.

        ``cache`` holds what the tokens before it left there, and then what it leaves.
        """
        x_S1D = (self.tokens(token_S) + self.places(place_S))[:, None]
        turn = self.cos_Td[place_S], self.sin_Td[place_S]
        for block, cache_S2KTd in zip(self.blocks, cache_SL2KTd.unbind(1), strict=True):
            x_S1D = cast("Block", block).step(x_S1D, place_S, turn, cache_S2KTd)
        return self.to_logits(self.norm(x_S1D))[:, 0].float()
