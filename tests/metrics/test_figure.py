"""Confidence intervals hold the truth about as often as they say."""

from collections.abc import Sequence

import pytest
import torch
from scipy.stats import binomtest

from tests.metrics.conftest import noise, vectors
from worker.metrics.distances import frechet_distance
from worker.metrics.figure import NUM_GROUPS, Figure, jackknifed, mean_of, share_of


def hits(truth: float, figures: Sequence[Figure]) -> float:
    return sum(figure.low <= truth <= figure.high for figure in figures) / len(figures)


def test_a_mean_s_interval_holds_the_truth_in_nineteen_of_twenty_cases() -> None:
    figures = [mean_of(noise(80, seed).uniform(1)[:, 0]) for seed in range(400)]

    assert hits(0.5, figures) == pytest.approx(0.95, abs=0.03)


def test_a_share_s_interval_is_wilson_s() -> None:
    wilson = binomtest(7, 60).proportion_ci(method="wilson")

    figure = share_of(torch.arange(60) < 7)

    assert (figure.value, figure.low, figure.high) == pytest.approx((7 / 60, wilson.low, wilson.high), rel=1e-3)


def test_the_jackknife_of_a_mean_is_as_wide_as_the_mean_s_own_interval() -> None:
    values = noise(4000).normal(1)[:, 0].double()

    widths = [
        one.high - one.low
        for one in (jackknifed(lambda rows: {"mean": values[rows].mean().item()}, 4000)["mean"], mean_of(values))
    ]

    assert widths[0] == pytest.approx(widths[1], rel=0.4)


def test_the_jackknife_knows_how_much_a_frechet_distance_varies() -> None:
    """The middle of many distances lies in nineteen of twenty intervals; their bias is no matter of chance."""
    reference = vectors(2000, 3, seed=1) * 1.5

    def figure(seed: int) -> Figure:
        samples = vectors(300, 3, seed=100 + seed)
        return jackknifed(lambda rows: {"fd": frechet_distance(samples[rows], reference)}, 300)["fd"]

    figures = [figure(seed) for seed in range(80)]
    middle = sum(one.value for one in figures) / len(figures)
    assert hits(middle, figures) == pytest.approx(0.95, abs=0.05)


def test_too_few_samples_for_groups_say_that_nothing_is_sure() -> None:
    figure = jackknifed(lambda rows: {"num": float(len(rows))}, 2 * NUM_GROUPS - 1)["num"]

    assert figure.as_json() == {"value": 39, "confidence_95": [None, None], "num_samples": 39}


def test_a_figure_says_what_it_was_measured_in_and_against() -> None:
    shown = mean_of(torch.ones(4), features="f", reference="r").as_json()

    assert shown == {"value": 1, "confidence_95": [1, 1], "num_samples": 4, "features": "f", "reference": "r"}
