"""Precision, recall, density and coverage against their definitions, written out, and on sets that are known."""

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from tests.metrics.conftest import vectors
from worker.metrics.coverage import coverage


def by_definition(samples: Tensor, real: Tensor, k: int) -> dict[str, float]:
    """Equations 2 to 5 of Naeem et al. (2020), one ball at a time; the radii are scikit-learn's."""

    def radii(x: Tensor) -> list[float]:
        return NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, -1].tolist()

    def inside(x: Tensor, centres: Tensor, radius: list[float]) -> list[bool]:
        return [(x - centre).norm().item() < r for centre, r in zip(centres, radius, strict=True)]

    in_real = [inside(x, real, radii(real)) for x in samples]
    in_samples = [inside(x, samples, radii(samples)) for x in real]
    return {
        "precision": sum(map(any, in_real)) / len(samples),
        "recall": sum(map(any, in_samples)) / len(real),
        "density": sum(map(sum, in_real)) / (k * len(samples)),
        "coverage": sum(map(any, zip(*in_real, strict=True))) / len(real),
    }


def test_the_four_are_what_the_papers_define() -> None:
    samples, real = vectors(40, 3, seed=1) * 1.2, vectors(50, 3)

    found = coverage(samples, real, num_neighbours=4)

    assert vars(found) == pytest.approx(by_definition(samples, real, 4))


def test_a_second_set_of_real_vectors_has_a_density_of_one() -> None:
    found = coverage(vectors(600, 8), vectors(600, 8, seed=1))

    assert found.density == pytest.approx(1, abs=0.1)
    assert min(found.precision, found.recall, found.coverage) > 0.75


def test_samples_of_one_kind_only_are_precise_but_cover_little() -> None:
    real = torch.cat([vectors(200, 4), vectors(200, 4, seed=1) + 50])

    found = coverage(vectors(200, 4, seed=2), real)

    assert found.precision > 0.75
    assert max(found.recall, found.coverage) < 0.5


def test_samples_far_from_everything_have_none_of_it() -> None:
    found = coverage(vectors(50, 4) + 1000, vectors(50, 4, seed=1))

    assert vars(found) == dict.fromkeys(vars(found), 0)


def test_too_few_vectors_for_a_ball_are_refused() -> None:
    with pytest.raises(ValueError, match="neighbours"):
        coverage(vectors(5, 3), vectors(50, 3))
