"""What codes are made of: information per dimension, and how much of a codebook is used.

Shape suffixes: N = samples, Z = latent dimensions, K = codes.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

ACTIVE_VARIANCE: Final = 0.01
"""Burda et al. (2015), arXiv 1509.00519, section 5: from here on a unit is active."""


def active_units(mean_NZ: Tensor) -> int:
    """Latent dimensions whose posterior mean varies over the data: ``Var_x(E[z|x]) > 0.01``."""
    return int((mean_NZ.double().var(0) > ACTIVE_VARIANCE).sum())


def kl_per_dimension(mean_NZ: Tensor, log_variance_NZ: Tensor) -> Tensor:
    """``KL(N(mean, variance) || N(0, 1))`` in nats of each dimension, mean over samples, float64 ``(Z,)``."""
    mean_NZ, log_variance_NZ = mean_NZ.double(), log_variance_NZ.double()
    return (0.5 * (mean_NZ**2 + log_variance_NZ.exp() - 1 - log_variance_NZ)).mean(0)


@dataclass(frozen=True, kw_only=True)
class CodebookUse:
    """Which codes appear."""

    usage: float
    """Share of codes that appear at all."""
    perplexity: float
    """``exp`` of the codes' entropy: how many would carry as much if all were equally frequent."""


def codebook_use(codes: Tensor, num_codes: int) -> CodebookUse:
    """Of codes in ``range(num_codes)``, int64 of any shape."""
    count_K = codes.flatten().bincount(minlength=num_codes).double()
    share_K = count_K[count_K > 0] / count_K.sum()
    entropy = -(share_K * share_K.log()).sum()
    return CodebookUse(usage=len(share_K) / num_codes, perplexity=torch.exp(entropy).item())
