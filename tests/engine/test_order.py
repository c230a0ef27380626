"""Batches are a function of the step, and no sample comes again before all have come."""

import numpy as np

from worker.engine.order import BatchOrder


def test_no_sample_comes_again_before_all_have_come() -> None:
    order = BatchOrder(100, 16, seed=3)

    seen = np.concatenate([order.at(step) for step in range(25)]).reshape(4, 100)
    assert all(sorted(epoch) == list(range(100)) for epoch in seen.tolist())


def test_a_batch_depends_on_the_step_alone() -> None:
    used, fresh = BatchOrder(100, 16, seed=3), BatchOrder(100, 16, seed=3)
    for step in range(40):
        used.at(step)

    assert np.array_equal(used.at(6), fresh.at(6))


def test_another_seed_is_another_order() -> None:
    assert not np.array_equal(BatchOrder(100, 16, seed=3).at(0), BatchOrder(100, 16, seed=4).at(0))


def test_a_batch_may_be_larger_than_the_data() -> None:
    batch = BatchOrder(5, 12, seed=0).at(0)

    assert sorted(batch.tolist()).count(0) in (2, 3)
    assert len(batch) == 12


def test_an_epoch_has_at_least_one_step() -> None:
    assert BatchOrder(5, 128, seed=0).steps_per_epoch == 1
    assert BatchOrder(4500, 64, seed=0).steps_per_epoch == 70


def test_every_epoch_has_an_order_of_its_own() -> None:
    order = BatchOrder(100, 100, seed=3)

    assert not np.array_equal(order.at(0), order.at(1))
