"""Distances between two sets of feature vectors; zero, but for chance, if both are drawn from one distribution.

All in float64. Shape suffixes: N, M = vectors of each set, D = features, P = projections, m = vectors of a subset.
"""

from typing import Final

import torch
from torch import Tensor

from worker.kernels.noise import Domain, Noise

NUM_SUBSETS: Final = 20
SUBSET_SIZE: Final = 500
"""Of KID; fewer where a set is smaller."""
NUM_PROJECTIONS: Final = 512
"""Of MIND."""
_SEED: Final = 0
"""Of subsets and projections, which are the same for everybody."""


def frechet_distance(x_ND: Tensor, y_MD: Tensor) -> float:
    """FID's formula (Heusel et al., 2017): between normal distributions with the sets' means and covariances.

    ``|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2))``. Biased upwards by few samples: compare equal numbers.
    """
    mean_x, cov_x = _moments(x_ND)
    mean_y, cov_y = _moments(y_MD)
    root_x = _symmetric_root(cov_x)
    # The eigenvalues of S_x S_y are those of the symmetric S_x^(1/2) S_y S_x^(1/2).
    eigenvalues = torch.linalg.eigvalsh(root_x @ cov_y @ root_x)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    return ((mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross).item()


def _moments(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    x_ND = x_ND.double()
    mean_D = x_ND.mean(0)
    centred_ND = x_ND - mean_D
    return mean_D, centred_ND.T @ centred_ND / (len(x_ND) - 1)


def _symmetric_root(matrix_DD: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(matrix_DD)
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T


def kernel_distance(x_ND: Tensor, y_MD: Tensor) -> float:
    """KID (Binkowski et al., 2018): the unbiased squared MMD with the kernel ``(x.y / D + 1)^3``, mean over subsets."""
    size = min(SUBSET_SIZE, len(x_ND), len(y_MD))
    x_ND, y_MD = x_ND.double(), y_MD.double()
    rows_x, rows_y = (_subsets(len(one), size, stream) for stream, one in enumerate((x_ND, y_MD)))
    return sum(_squared_mmd(x_ND[i], y_MD[j]) for i, j in zip(rows_x, rows_y, strict=True)) / NUM_SUBSETS


def _subsets(num_vectors: int, size: int, stream: int) -> Tensor:
    """Positions of ``NUM_SUBSETS`` random subsets, each without repetition, int64 ``(NUM_SUBSETS, size)``."""
    noise = Noise.of_step(Domain.EVALUATION, _SEED, 0, range(NUM_SUBSETS), torch.device("cpu"))
    return noise.bits(num_vectors, stream=stream).argsort(dim=1, stable=True)[:, :size]


def _squared_mmd(x_mD: Tensor, y_mD: Tensor) -> float:
    (size, num_features) = x_mD.shape

    def kernel(a_mD: Tensor, b_mD: Tensor) -> Tensor:
        return (a_mD @ b_mD.T / num_features + 1) ** 3

    within = [(k.sum() - k.trace()) / (size * (size - 1)) for k in (kernel(x_mD, x_mD), kernel(y_mD, y_mD))]
    return (within[0] + within[1] - 2 * kernel(x_mD, y_mD).mean()).item()


def sliced_wasserstein(x_ND: Tensor, y_MD: Tensor) -> float:
    """MIND: the squared 2-Wasserstein distance along a line, mean over ``NUM_PROJECTIONS`` fixed directions."""
    directions_PD = _directions(x_ND.shape[1])
    projected = (one.double() @ directions_PD.T for one in (x_ND, y_MD))
    x_NP, y_MP = (one.sort(0).values for one in projected)
    # Both quantile functions are steps; between two steps of either, both are constant.
    num_x, num_y = len(x_NP), len(y_MP)
    ends = torch.cat([torch.arange(1, num_x + 1) * num_y, torch.arange(1, num_y + 1) * num_x]).unique()
    widths = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype)).double() / (num_x * num_y)
    apart = x_NP[(ends - 1) // num_y] - y_MP[(ends - 1) // num_x]
    return (widths @ apart.square()).mean().item()


def _directions(num_features: int) -> Tensor:
    noise = Noise.of_step(Domain.EVALUATION, _SEED, 1, range(NUM_PROJECTIONS), torch.device("cpu"))
    directions_PD = noise.normal(num_features).double()
    return directions_PD / directions_PD.norm(dim=1, keepdim=True)


def diversity(x_ND: Tensor) -> float:
    """The mean Euclidean distance of two different vectors."""
    return torch.pdist(x_ND.double()).mean().item()
