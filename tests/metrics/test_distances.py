"""Distances between sets against other ways to compute them, and against what they must find out."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import wasserstein_distance
from sklearn.metrics.pairwise import polynomial_kernel
from torch import Tensor

from tests.metrics.conftest import noise, strokes, vectors
from worker.metrics import features
from worker.metrics.distances import (
    NUM_PROJECTIONS,
    _directions,
    _squared_mmd,
    diversity,
    frechet_distance,
    kernel_distance,
    sliced_wasserstein,
)

DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "frechet": frechet_distance,
    "kernel": kernel_distance,
    "sliced": sliced_wasserstein,
}


def test_the_frechet_distance_is_that_of_scipy_s_matrix_root() -> None:
    x, y = vectors(300, 6), 1.3 * vectors(200, 6, seed=1) + 0.5

    root = sqrtm(np.cov(x.numpy().T) @ np.cov(y.numpy().T)).real
    gap = x.mean(0).numpy() - y.mean(0).numpy()
    expected = gap @ gap + np.trace(np.cov(x.numpy().T) + np.cov(y.numpy().T) - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_of_two_normal_distributions_is_known() -> None:
    """Of independent coordinates it is the squared distance of means plus that of deviations."""
    scale, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 1.0, -2.0])
    x = noise(40_000).normal(3).double()
    y = noise(40_000, seed=1).normal(3).double() * scale + shift

    assert frechet_distance(x, y) == pytest.approx((1 + 0.25) + (1 + 4), rel=0.02)


def test_features_that_never_vary_do_not_break_the_frechet_distance() -> None:
    x = torch.cat([vectors(50, 3), torch.zeros(50, 4, dtype=torch.float64)], dim=1)

    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_the_squared_mmd_is_the_u_statistic_of_scikit_learn_s_kernel() -> None:
    x, y = vectors(40, 5).numpy(), vectors(40, 5, seed=1).numpy() + 0.3

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return polynomial_kernel(a, b, degree=3, gamma=1 / 5, coef0=1)

    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    within = sum(kernel(x, x)[i, j] + kernel(y, y)[i, j] for i, j in pairs) / len(pairs)
    expected = within - 2 * kernel(x, y).mean()
    assert _squared_mmd(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-9)


def test_the_kernel_distance_is_unbiased() -> None:
    """Between sets of one distribution it is zero on average, however small they are."""
    estimates = [kernel_distance(vectors(30, 4, seed=seed), vectors(30, 4, seed=1000 + seed)) for seed in range(200)]

    error = np.std(estimates) / len(estimates) ** 0.5
    assert abs(np.mean(estimates)) < 3 * error


def test_the_sliced_distance_is_the_mean_over_directions_of_the_line_s() -> None:
    """With as many vectors on both sides, sorted values are matched; scipy knows the first power of it."""
    x, y = vectors(60, 4), vectors(60, 4, seed=1) * 2
    directions = _directions(4)

    expected = [np.mean((np.sort(x @ one) - np.sort(y @ one)) ** 2) for one in directions]
    assert sliced_wasserstein(x, y) == pytest.approx(np.mean(expected), rel=1e-9)
    along = directions[0]
    apart = (np.sort(x @ along) - np.sort(y @ along)).__abs__().mean()
    assert wasserstein_distance(x @ along, y @ along) == pytest.approx(apart)


def test_the_sliced_distance_knows_sets_of_different_sizes() -> None:
    """A set and the same set with every vector three times are the same distribution."""
    x, y = vectors(20, 4), vectors(33, 4, seed=1)

    assert sliced_wasserstein(x, x.repeat(3, 1)) == pytest.approx(0, abs=1e-12)
    assert sliced_wasserstein(x, y) == pytest.approx(sliced_wasserstein(x.repeat(33, 1), y.repeat(20, 1)), rel=1e-9)


def test_directions_are_unit_vectors_all_around() -> None:
    directions = _directions(5)

    assert directions.shape == (NUM_PROJECTIONS, 5)
    assert torch.allclose(directions.norm(dim=1), torch.ones(NUM_PROJECTIONS, dtype=torch.float64))
    assert torch.allclose(directions.T @ directions / NUM_PROJECTIONS, torch.eye(5).double() / 5, atol=0.03)


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    x = vectors(30, 4)

    pairs = [(x[i] - x[j]).norm().item() for i in range(30) for j in range(i)]
    assert diversity(x) == pytest.approx(np.mean(pairs), rel=1e-9)
    assert diversity(x[:1].repeat(8, 1)) == 0


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("known", ["digits", "pixels", "dct"])
def test_real_images_are_five_times_nearer_than_noise_with_their_pixels_moments(name: str, known: str) -> None:
    of = features.FEATURES[known]().of
    reference, real = of(strokes(400)), of(strokes(400, seed=1))
    values = strokes(400, seed=2).float()
    trivial = values.mean(0) + values.std(0) * noise(400, 3).normal(1, 28, 28)

    to_real = DISTANCES[name](real, reference)
    to_noise = DISTANCES[name](of(trivial.clamp(0, 255).to(torch.uint8)), reference)
    assert to_noise > 5 * abs(to_real)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_distance_is_the_same_each_time(name: str) -> None:
    x, y = vectors(70, 4), vectors(50, 4, seed=1)

    assert DISTANCES[name](x, y) == DISTANCES[name](x.clone(), y.clone())
