"""Do samples lie among the real ones, and do they reach all of them? Two manifolds made of balls around each vector.

Precision and recall: Kynkäänniemi et al. (2019), arXiv 1904.06991. Density and coverage: Naeem et al. (2020),
arXiv 2002.09797. Shape suffixes: N = samples, M = real vectors, D = features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.specs.evaluate import NUM_NEIGHBOURS


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The four figures. A second set of real vectors has density 1, and somewhat less than 1 of the others."""

    precision: float
    """Share of samples inside at least one real ball."""
    recall: float
    """Share of real vectors inside at least one ball of a sample."""
    density: float
    """How many real balls a sample is in, over how many that would be by chance; may exceed 1."""
    coverage: float
    """Share of real balls that hold at least one sample."""


def coverage(samples_ND: Tensor, real_MD: Tensor, *, num_neighbours: int = NUM_NEIGHBOURS) -> Coverage:
    """Compare two sets; ValueError unless each has more vectors than ``num_neighbours``."""
    samples_ND, real_MD = samples_ND.double(), real_MD.double()
    real_radius_M = _radii(real_MD, num_neighbours)
    sample_radius_N = _radii(samples_ND, num_neighbours)
    apart_NM = torch.cdist(samples_ND, real_MD)
    in_real_NM = apart_NM < real_radius_M
    in_sample_NM = apart_NM < sample_radius_N[:, None]
    return Coverage(
        precision=in_real_NM.any(1).double().mean().item(),
        recall=in_sample_NM.any(0).double().mean().item(),
        density=in_real_NM.double().sum(1).mean().item() / num_neighbours,
        coverage=in_real_NM.any(0).double().mean().item(),
    )


def _radii(x_ND: Tensor, num_neighbours: int) -> Tensor:
    """Distance of each vector to its nearest neighbours' last."""
    if len(x_ND) <= num_neighbours:
        raise ValueError(f"{len(x_ND)} vectors have no {num_neighbours} neighbours each")
    # The nearest is the vector itself.
    return torch.cdist(x_ND, x_ND).kthvalue(num_neighbours + 1, dim=1).values
