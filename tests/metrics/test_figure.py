"""Confidence intervals hold the truth about as often as they say."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

from tests.metrics.conftest import noise, vectors
from worker.metrics.distances import frechet_distance
from worker.metrics.figure import NUM_GROUPS, Estimate, Report, jackknifed, mean_of, share_of


def hits(truth: float, figures: Sequence[Estimate]) -> float:
    return sum(figure.low <= truth <= figure.high for figure in figures) / len(figures)


def test_a_mean_s_interval_holds_the_truth_in_nineteen_of_twenty_cases() -> None:
    figures = [mean_of(noise(80, seed).uniform(1)[:, 0]) for seed in range(400)]

    assert hits(0.5, figures) == pytest.approx(0.95, abs=0.03)


def test_a_share_s_interval_is_wilson_s() -> None:
    wilson = binomtest(7, 60).proportion_ci(method="wilson")

    figure = share_of(torch.arange(60) < 7)

    assert (figure.value, figure.low, figure.high) == pytest.approx((7 / 60, wilson.low, wilson.high), rel=1e-3)


@pytest.mark.parametrize("num", range(1, 300))
def test_a_share_of_none_or_all_lies_in_its_interval(num: int) -> None:
    none, every = share_of(torch.zeros(num)), share_of(torch.ones(num))

    assert none.low == 0 < none.high and every.low < every.high == 1


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

    def figure(seed: int) -> Estimate:
        samples = vectors(300, 3, seed=100 + seed)
        return jackknifed(lambda rows: {"fd": frechet_distance(samples[rows], reference)}, 300)["fd"]

    figures = [figure(seed) for seed in range(80)]
    middle = sum(one.value for one in figures) / len(figures)
    assert hits(middle, figures) == pytest.approx(0.95, abs=0.05)


def shown(**estimates: Estimate) -> dict[str, Any]:
    report = Report()
    report.tell(estimates, reference="r", features="f")
    return {name: figure.as_json() for name, figure in report.figures.items()}


def test_too_few_samples_for_groups_say_that_nothing_is_sure() -> None:
    told = shown(**jackknifed(lambda rows: {"num": float(len(rows))}, 2 * NUM_GROUPS - 1))["num"]

    assert (told["value"], told["confidence_95"], told["num_samples"]) == (39, [None, None], 39)


def test_a_figure_says_what_it_was_measured_in_and_against() -> None:
    assert shown(one=mean_of(torch.ones(4))) == {
        "one": {"value": 1, "confidence_95": [1, 1], "num_samples": 4, "features": "f", "reference": "r"}
    }
