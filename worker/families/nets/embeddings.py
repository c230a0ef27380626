"""Scalars and classes as vectors: what conditions a network besides its input.

Shape suffixes: B = batch, E = embedding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import log

import torch
from torch import Tensor, nn

LONGEST_PERIOD = 10_000
"""Of the slowest wave, in units of 2 pi."""


class Waves(nn.Module):
    """Sines, then cosines, of a scalar at geometrically spaced frequencies from 1 to 1/10000 (Ho et al., 2020)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        # In float32 and in this order, as the checkpoints were trained that the UNet may be loaded with.
        exponents = -log(LONGEST_PERIOD) * torch.arange(half, dtype=torch.float32) / (half - 1)
        self.frequencies: Tensor
        self.register_buffer("frequencies", exponents.exp(), persistent=False)

    def forward(self, t_B: Tensor) -> Tensor:
        phases_BE = t_B.float()[:, None] * self.frequencies
        return torch.cat((phases_BE.sin(), phases_BE.cos()), dim=1)


class TimeEmbedding(nn.Module):
    """Two linear layers over waves."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, waves_BE: Tensor) -> Tensor:
        waves_BE = waves_BE.to(self.linear_1.weight.dtype)
        return self.linear_2(nn.functional.silu(self.linear_1(waves_BE)))


class Condition(nn.Module):
    """The sum of a time's and a class's embedding; class ``num_classes`` stands for none.

    A network that has learnt to (``learn_augmentation``) also hears, inside of ``told``, how an image was augmented.
    """

    def __init__(self, dim_in: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.time_proj = Waves(dim_in)
        self.time_embedding = TimeEmbedding(dim_in, dim)
        # As large as the time's embedding from the start: with a deviation of 0.02 a short training never heard of it.
        self.class_embedding = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.time_scale = 1.0
        """Times the network's time, before waves are made of it."""
        self.augmentation_embedding: nn.Linear | None = None
        self._told_BA: Tensor | None = None

    def learn_augmentation(self, num_told: int) -> None:
        """Take heed of so many numbers from now on; zeros say nothing, and all of them say nothing before training."""
        self.augmentation_embedding = nn.Linear(num_told, self.time_embedding.linear_2.out_features, bias=False)
        nn.init.zeros_(self.augmentation_embedding.weight)

    @contextmanager
    def told(self, told_BA: Tensor | None) -> Iterator[None]:
        """Say in one forward pass how its images were augmented; nothing outside of it, as when samples are drawn."""
        self._told_BA = told_BA
        try:
            yield
        finally:
            self._told_BA = None

    def embed(self, t_B: Tensor, label_B: Tensor) -> Tensor:
        """The condition ``(B, E)``."""
        condition_BE = self.time_embedding(self.time_proj(self.time_scale * t_B))
        if self.augmentation_embedding is not None and self._told_BA is not None:
            told_BA = self._told_BA.to(self.augmentation_embedding.weight.dtype)
            condition_BE = condition_BE + self.augmentation_embedding(told_BA)
        return condition_BE if self.class_embedding is None else condition_BE + self.class_embedding(label_B)
