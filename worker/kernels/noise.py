"""Random numbers that are a function of where they are used: Philox-4x32-10 (Salmon et al., SC 2011).

A number is named by (seed, domain, stream, step, index, element) and by nothing else, so it does
not depend on batch size, device, order or on how many numbers were drawn before. There is no state
to save: a training resumed at step n draws what it would have drawn. Counter words, low to high:
element block, index, step, domain and stream; the key is the seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from math import prod, tau
from typing import Final

import torch
from torch import Tensor

MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
WEYL: Final = (0x9E3779B9, 0xBB67AE85)
ROUNDS: Final = 10
WORD: Final = 0xFFFFFFFF
WORDS_PER_BLOCK: Final = 4
STREAM_BITS: Final = 16


class Domain(IntEnum):
    """What the numbers are for; equal keys in different domains are unrelated."""

    TRAINING = 0
    EVALUATION = 1
    SAMPLING = 2
    ORDER = 3
    AUGMENTATION = 4


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for each counter of four words and key of two, all in int64 tensors."""
    c0, c1, c2, c3 = counter
    rounds = torch.arange(ROUNDS, device=c0.device)
    k0, k1 = ((word[..., None] + rounds * weyl & WORD).unbind(-1) for word, weyl in zip(key, WEYL, strict=True))
    for round_number in range(ROUNDS):
        # The 64-bit product wraps around in int64, which keeps every one of its bits.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & WORD) ^ c1 ^ k0[round_number],
            product1 & WORD,
            (product0 >> 32 & WORD) ^ c3 ^ k1[round_number],
            product0 & WORD,
        )
    return c0, c1, c2, c3


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The random numbers of the rows of one batch; row ``i`` has the key ``(seed, step, index)[i]``.

    ``stream`` tells apart what a row draws in one step; the caller counts streams from 0.
    """

    domain: Domain
    seed_B: Tensor
    step_B: Tensor
    index_B: Tensor
    first_row: int = 0
    """The index of the first row that this process computes in the step."""
    known_step: int | None = None
    """The step of all rows, where whoever made this had them of one."""

    @classmethod
    def of_step(
        cls, domain: Domain, seed: int, step: int, rows: range, device: torch.device, first_row: int = 0
    ) -> "Noise":
        """Noise of the batch ``rows`` of one step: equal seeds and steps, consecutive indices."""
        index_B = torch.arange(rows.start, rows.stop, device=device)
        return cls(
            domain=domain,
            seed_B=torch.full_like(index_B, seed),
            step_B=torch.full_like(index_B, step),
            index_B=index_B,
            first_row=first_row,
            known_step=step,
        )

    @property
    def device(self) -> torch.device:
        return self.index_B.device

    @property
    def step(self) -> int:
        """The step that all rows are of; the device is asked only where nobody said it."""
        return int(self.step_B[0]) if self.known_step is None else self.known_step

    @property
    def begins_step(self) -> Tensor:
        """Whether these are the first rows that this process computes in the step: a boolean on the device."""
        return self.index_B[0] == self.first_row

    def at(self, index: Sequence[int]) -> "Noise":
        """The same rows with other indices."""
        return replace(self, index_B=torch.tensor(index, device=self.device))

    def bits(self, num_elements: int, *, stream: int = 0) -> Tensor:
        """Uniform 32-bit words, int64 of shape ``(B, num_elements)``."""
        num_blocks = -(-num_elements // WORDS_PER_BLOCK)
        block = torch.arange(num_blocks, device=self.device)
        # Not torch.tensor, whose copy to a device is waited for.
        purpose = torch.full((), self.domain << STREAM_BITS | stream, dtype=torch.int64, device=self.device)
        counter = (block, self.index_B[:, None] & WORD, self.step_B[:, None] & WORD, purpose)
        seed_B1 = self.seed_B[:, None]
        words = philox(torch.broadcast_tensors(*counter), (seed_B1 & WORD, seed_B1 >> 32))
        return torch.stack(words, dim=-1).flatten(1)[:, :num_elements]

    def uniform(self, *shape: int, stream: int = 0) -> Tensor:
        """Numbers in (0, 1), both ends excluded, float32 of shape ``(B, *shape)``; exact on any device."""
        bits = self.bits(prod(shape), stream=stream)
        return ((bits >> 9).float() + 0.5).mul(2.0**-23).reshape(-1, *shape)

    def normal(self, *shape: int, stream: int = 0) -> Tensor:
        """Standard normals by Box and Muller (1958), float32 of shape ``(B, *shape)``.

        Computed in float64, so that devices whose logarithms differ in the last bit still round
        to the same float32 in all but about one of 10^8 numbers.
        """
        num_elements = prod(shape)
        words = self.bits(num_elements + num_elements % 2, stream=stream).unflatten(1, (-1, 2))
        u, v = ((words.double() + 0.5) * 2.0**-32).unbind(-1)
        radius = (-2 * u.log()).sqrt()
        pairs = torch.stack((radius * (tau * v).cos(), radius * (tau * v).sin()), dim=-1)
        return pairs.flatten(1)[:, :num_elements].float().reshape(-1, *shape)


def permutation(num_elements: int, *, seed: int, epoch: int, series: int = 0) -> Tensor:
    """The order of ``num_elements`` things in one epoch of a series: argsort of their keyed random words."""
    everything = Noise.of_step(Domain.ORDER, seed, epoch, range(series, series + 1), torch.device("cpu"))
    words = everything.bits(2 * num_elements).view(num_elements, 2)
    # 63 bits are enough to make a tie a curiosity, and the stable sort settles it all the same.
    return ((words[:, 0] >> 1) << 32 | words[:, 1]).argsort(stable=True)
