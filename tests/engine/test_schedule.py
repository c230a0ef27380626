"""Learning rate and averaging are pure functions of the step."""

from functools import partial

import pytest

from worker.engine.schedule import ema_decay, learning_rate

cosine = partial(learning_rate, peak=2.0, steps=110, warmup_steps=10, schedule="cosine")
constant = partial(learning_rate, peak=2.0, steps=110, warmup_steps=10, schedule="constant")


def test_warm_up_is_linear_up_to_the_peak() -> None:
    assert [cosine(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])


def test_the_cosine_ends_at_zero_with_half_the_peak_half_way() -> None:
    assert [cosine(step) for step in (10, 60, 110)] == pytest.approx([2, 1, 0])


def test_the_constant_schedule_stays_at_its_peak() -> None:
    assert [constant(step) for step in (10, 60, 109)] == [2, 2, 2]


def test_a_training_without_warm_up_begins_at_the_peak() -> None:
    assert learning_rate(0, peak=2.0, steps=10, warmup_steps=0, schedule="cosine") == 2


def test_averaging_begins_short_and_never_exceeds_what_was_asked() -> None:
    assert ema_decay(0, longest=0.999) == 0.1
    assert ema_decay(10**6, longest=0.999) == 0.999
    assert ema_decay(5, longest=0) == 0
