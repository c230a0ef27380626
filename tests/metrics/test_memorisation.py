"""A model that repeats its training images is found out; one that draws afresh is not accused."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.metrics.conftest import strokes
from worker.metrics.memorisation import memorisation, nearest

TRAIN, HELD_OUT = strokes(300, seed=1), strokes(100, seed=2)


def test_neighbours_are_those_of_scikit_learn() -> None:
    samples = strokes(40)

    found = nearest(samples, TRAIN, batch_size=7)

    known = NearestNeighbors(n_neighbors=1).fit(TRAIN.flatten(1) / 255)
    distance, position = known.kneighbors(samples.flatten(1) / 255)
    assert found.position.tolist() == position[:, 0].tolist()
    assert np.allclose(found.distance, distance[:, 0], atol=1e-5)


def test_fresh_samples_are_as_near_to_held_out_images_as_to_as_many_training_images() -> None:
    found = memorisation(strokes(400), TRAIN, HELD_OUT)

    assert found.nearer_to_train.mean().item() == pytest.approx(0.5, abs=0.1)
    assert found.copying.mean().item() == pytest.approx(0.5, abs=0.1)


def test_copies_of_the_training_images_are_found_out_with_their_pairs() -> None:
    copies = TRAIN[torch.arange(50) * 6 % 300].clone()
    copies[:, :, 0, 0] ^= 1

    found = memorisation(copies, TRAIN, HELD_OUT)

    assert found.copying.mean() > 0.9
    assert [pair[1] for pair in found.closest(50)] == [pair[0] * 6 % 300 for pair in found.closest(50)]


def test_one_copy_among_fresh_samples_is_the_closest_pair() -> None:
    samples = strokes(60)
    samples[17] = TRAIN[123]

    (sample, image, distance), *others = memorisation(samples, TRAIN, HELD_OUT).closest(5)

    assert (sample, image, distance) == (17, 123, pytest.approx(0, abs=1e-4))
    assert sorted(pair[2] for pair in others) == [pair[2] for pair in others]


def test_copying_is_the_share_of_held_out_images_that_are_farther_and_half_of_those_as_far() -> None:
    """Among distances of a few grey levels there are many ties."""
    levels = torch.arange(240, dtype=torch.uint8)[:, None, None, None]
    samples, train, held_out = levels[:31] * 7 % 50, levels[40:60] * 3 % 100, levels * 5 % 90

    found = memorisation(samples, train, held_out)

    fresh = nearest(held_out, train).distance.tolist()
    wins = [sum((a < b) + 0.5 * (a == b) for b in fresh) for a in found.nearest.distance.tolist()]
    assert len(set(wins)) > 5 and any(win % 1 for win in wins)
    assert found.copying.tolist() == [win / len(fresh) for win in wins]


class Largest(TorchDispatchMode):
    """Notices how many numbers the largest tensor has."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.num = max([self.num, *(one.numel() for one in tree_leaves(made) if isinstance(one, Tensor))])
        return made


def test_however_many_images_there_are_no_two_sets_are_compared_at_once() -> None:
    sets = [torch.arange(num).remainder(251).byte()[:, None, None, None] for num in (1500, 2500, 3000)]

    with Largest() as seen:
        memorisation(*sets)

    assert seen.num == 1000 * 1000


def test_without_held_out_images_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(ValueError, match="held-out"):
        memorisation(TRAIN, TRAIN, HELD_OUT[:0])
