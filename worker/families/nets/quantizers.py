"""Vectors to codes and back: finite scalar quantisation, and a codebook that follows the vectors.

Shape suffixes: N = vectors, D = dimensions of a vector, K = codes; ``...`` stands for any leading axes.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from worker.kernels.noise import Noise

FSQ_MARGIN: Final = 1e-3
"""The outermost levels are reached by a tanh that is a little longer than they need."""
LLOYD_ITERATIONS: Final = 10
"""Of the k-means that places the codes on the first batch."""
STARTING, RESTARTING = 100, 101
"""Streams of noise: which vectors the codes start at, and start again at."""


class Quantized(NamedTuple):
    """Vectors after quantisation."""

    vector: Tensor
    """Their codes' vectors, shape ``(..., D)``; the gradient passes as if nothing had happened (straight-through)."""
    code: Tensor
    """int64 ``(...)``."""
    commitment: Tensor
    """What keeps the vectors near their codes: a scalar to descend on."""


class Fsq(nn.Module):
    """Finite scalar quantisation (Mentzer et al., 2023, arXiv 2309.15505): each dimension is rounded to its levels.

    No codebook is learnt, so none can collapse.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.dim, self.num_codes = len(levels), prod(levels)
        self.levels_D: Tensor
        self.strides_D: Tensor
        self.register_buffer("levels_D", torch.tensor(levels), persistent=False)
        strides = [prod(levels[:place]) for place in range(len(levels))]
        self.register_buffer("strides_D", torch.tensor(strides), persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        bounded = self.bounded(z)
        level = bounded.detach().round()
        half_width = self.levels_D // 2
        code = ((level.long() + half_width) * self.strides_D).sum(-1)
        # Rounded alone, not shifted by what the difference loses: the decoder sees exactly what ``vectors`` gives.
        passed = level + (bounded - bounded.detach())
        return Quantized((passed / half_width).float(), code, z.new_zeros((), dtype=torch.float32))

    def bounded(self, z: Tensor) -> Tensor:
        """``f(z)`` of the paper: each dimension squeezed so that rounding gives as many integers as it has levels.

        In float64, as its last bits depend on a row's place in a batch in float32.
        """
        levels = self.levels_D.double()
        half_range = (levels - 1) * (1 + FSQ_MARGIN) / 2
        offset = torch.where(self.levels_D % 2 == 0, 0.5, 0.0).double()
        return (z.double() + (offset / half_range).atanh()).tanh() * half_range - offset

    def vectors(self, code: Tensor) -> Tensor:
        """The vectors of codes, shape ``(..., D)``: between -1 and 1, a whole number of steps from 0."""
        half_width = self.levels_D // 2
        level = code[..., None] // self.strides_D % self.levels_D - half_width
        return (level.double() / half_width).float()

    def learn(self, z_ND: Tensor, noise: Noise) -> None:
        """Nothing: the levels are given."""


class EmaCodebook(nn.Module):
    """The nearest of K vectors, each the moving average of those it stood for (van den Oord et al., 2017,
    arXiv 1711.00937, appendix A.1).

    The codes begin at the k-means of the first batch. One whose usage falls below ``dead_below`` of the average code's
    begins again at a random vector of the batch.
    """

    def __init__(self, num_codes: int, dim: int, *, decay: float, commitment: float, dead_below: float) -> None:
        super().__init__()
        self.dim, self.num_codes = dim, num_codes
        self.decay, self.weight, self.dead_below = decay, commitment, dead_below
        self.codebook_KD: Tensor
        self.count_K: Tensor
        self.sum_KD: Tensor
        self.has_begun: Tensor
        self.register_buffer("codebook_KD", nn.init.normal_(torch.empty(num_codes, dim)))
        self.register_buffer("count_K", torch.zeros(num_codes))
        self.register_buffer("sum_KD", torch.zeros(num_codes, dim))
        self.register_buffer("has_begun", torch.tensor(False))  # noqa: FBT003 (a tensor of it)

    def forward(self, z: Tensor) -> Quantized:
        z = z.float()
        code = nearest(z.detach().flatten(0, -2), self.codebook_KD).view(z.shape[:-1])
        vector = self.vectors(code)
        commitment = self.weight * (z - vector).square().mean()
        return Quantized(vector + (z - z.detach()), code, commitment)

    def vectors(self, code: Tensor) -> Tensor:
        """The vectors of codes, shape ``(..., D)``."""
        return self.codebook_KD[code]

    @torch.no_grad()
    def learn(self, z_ND: Tensor, noise: Noise) -> None:
        """Let the codes follow ``z``, a batch of vectors; ``noise`` chooses where they begin."""
        z_ND = z_ND.detach().float()
        if not self.has_begun:
            self._begin(z_ND, noise)
        else:
            count_K, sum_KD = assigned(z_ND, self.codebook_KD)
            self.count_K.lerp_(count_K, 1 - self.decay)
            self.sum_KD.lerp_(sum_KD, 1 - self.decay)
            self.codebook_KD.copy_(centres(count_K=self.count_K, sum_KD=self.sum_KD, otherwise_KD=self.codebook_KD))
        self._restart_the_dead(z_ND, noise)

    def _begin(self, z_ND: Tensor, noise: Noise) -> None:
        codebook_KD = any_of(z_ND, self.num_codes, noise, STARTING)
        for _ in range(LLOYD_ITERATIONS):
            count_K, sum_KD = assigned(z_ND, codebook_KD)
            codebook_KD = centres(count_K=count_K, sum_KD=sum_KD, otherwise_KD=codebook_KD)
        count_K, sum_KD = assigned(z_ND, codebook_KD)
        self.count_K.copy_(count_K)
        self.sum_KD.copy_(sum_KD)
        self.codebook_KD.copy_(codebook_KD)
        self.has_begun.fill_(True)  # noqa: FBT003 (torch's own signature)

    def _restart_the_dead(self, z_ND: Tensor, noise: Noise) -> None:
        average = len(z_ND) / self.num_codes
        dead_K = self.count_K < self.dead_below * average
        elsewhere_KD = any_of(z_ND, self.num_codes, noise, RESTARTING)
        self.codebook_KD.copy_(torch.where(dead_K[:, None], elsewhere_KD, self.codebook_KD))
        # As used as the average code, so that it has time to be found before it is judged again.
        self.count_K.copy_(torch.where(dead_K, average, self.count_K))
        self.sum_KD.copy_(torch.where(dead_K[:, None], elsewhere_KD * average, self.sum_KD))


def nearest(z_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """The code nearest to each vector; the first of several."""
    with torch.autocast(z_ND.device.type, enabled=False):
        distance_NK = codebook_KD.square().sum(1) - 2 * z_ND @ codebook_KD.T
    return distance_NK.argmin(1)


def assigned(z_ND: Tensor, codebook_KD: Tensor) -> tuple[Tensor, Tensor]:
    """For each code the number ``(K,)`` and the sum ``(K, D)`` of the vectors that it is nearest to."""
    code_N = nearest(z_ND, codebook_KD)
    ones_N = z_ND.new_ones(len(z_ND))
    count_K = z_ND.new_zeros(len(codebook_KD)).index_add_(0, code_N, ones_N)
    return count_K, torch.zeros_like(codebook_KD).index_add_(0, code_N, z_ND)


def centres(*, count_K: Tensor, sum_KD: Tensor, otherwise_KD: Tensor) -> Tensor:
    """The mean vector of each code, and ``otherwise`` for those that stand for next to nothing."""
    return torch.where(count_K[:, None] > 1e-6, sum_KD / count_K[:, None].clamp(min=1e-6), otherwise_KD)


def any_of(z_ND: Tensor, num: int, noise: Noise, stream: int) -> Tensor:
    """``num`` of the vectors, drawn with replacement by the noise of the batch's first row."""
    first = replace(noise, seed_B=noise.seed_B[:1], step_B=noise.step_B[:1], index_B=noise.index_B[:1])
    return z_ND[first.bits(num, stream=stream)[0] % len(z_ND)]


def usage(code: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """The perplexity of the codes' frequencies, and the share of the codes that occur at all."""
    frequency_K = torch.zeros(num_codes, device=code.device).index_add_(
        0, code.flatten(), torch.ones(code.numel(), device=code.device)
    ) / max(1, code.numel())
    return torch.special.entr(frequency_K).sum().exp(), (frequency_K > 0).float().mean()
