"""Measured numbers: estimates from samples, and figures, which carry besides what it takes to compare them.

Metrics make estimates. Figures are made in one place, ``Report.tell``, so that none lacks anything.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite, sqrt
from typing import Any, Final

import torch
from torch import Tensor

NUM_GROUPS: Final = 20
"""Of the jackknife."""
T_19: Final = 2.093
"""The 97.5 % point of Student's t with ``NUM_GROUPS - 1`` degrees of freedom."""
Z_95: Final = 1.96
"""The 97.5 % point of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its 95 % confidence interval: how it would vary with other samples, against the same reference."""

    value: float
    low: float
    high: float
    num_samples: int
    """What the value was computed from, the reference not counted."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An estimate with what it was measured in and against."""

    estimate: Estimate
    features: str | None
    """Digest of the features it was measured in; None where images themselves are looked at."""
    reference: str
    """Digest of the images it was measured on or against."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON; a bound that is not known is null."""
        bounds = (self.estimate.low, self.estimate.high)
        return {
            "value": self.estimate.value,
            "confidence_95": [bound if isfinite(bound) else None for bound in bounds],
            "num_samples": self.estimate.num_samples,
            "features": self.features,
            "reference": self.reference,
        }


@dataclass(kw_only=True)
class Report:
    """What was measured."""

    figures: dict[str, Figure] = field(default_factory=dict[str, Figure])
    details: dict[str, Any] = field(default_factory=dict[str, Any])
    """What is no single number: shares of classes, information per dimension."""
    baselines: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """Figures of sets of images that no model has drawn, without intervals."""

    def tell(self, estimates: Mapping[str, Estimate], *, reference: str, features: str | None = None) -> None:
        """Add figures by name, with the digests of the reference and of the features that are used."""
        self.figures |= {
            name: Figure(estimate=estimate, features=features, reference=reference)
            for name, estimate in estimates.items()
        }


def jackknifed(statistics: Callable[[Tensor], Mapping[str, float]], num_samples: int) -> dict[str, Estimate]:
    """Statistics of a set, with the intervals of the delete-a-group jackknife (Kott, 2001).

    ``statistics`` takes the positions to look at, int64. Each of twenty groups (every twentieth sample) is left out
    once. No random numbers: equal sets give equal intervals. Too few samples for groups leave the bounds open.
    """
    everything = torch.arange(num_samples)
    values = statistics(everything)
    half = dict.fromkeys(values, inf)
    if num_samples >= 2 * NUM_GROUPS:
        without = [statistics(everything[everything % NUM_GROUPS != group]) for group in range(NUM_GROUPS)]
        half = {name: T_19 * _deviation([one[name] for one in without]) for name in values}
    return {
        name: Estimate(value=value, low=value - half[name], high=value + half[name], num_samples=num_samples)
        for name, value in values.items()
    }


def _deviation(without: list[float]) -> float:
    """Of a statistic, from its values without each group."""
    mean = sum(without) / NUM_GROUPS
    return sqrt((NUM_GROUPS - 1) / NUM_GROUPS * sum((one - mean) ** 2 for one in without))


def mean_of(values_N: Tensor) -> Estimate:
    """The mean of one number per sample, with the interval of the central limit theorem."""
    values_N = values_N.double()
    num_samples = len(values_N)
    mean = values_N.mean().item()
    half = Z_95 * values_N.std().item() / sqrt(num_samples) if num_samples > 1 else inf
    return Estimate(value=mean, low=mean - half, high=mean + half, num_samples=num_samples)


def share_of(hits_N: Tensor) -> Estimate:
    """The share of samples of which something is true, with Wilson's (1927) interval."""
    num_samples, share = len(hits_N), hits_N.double().mean().item()
    spread = Z_95**2 / num_samples
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * sqrt(share * (1 - share) / num_samples + spread / (4 * num_samples))
    # At 0 and 1 the interval ends there, and rounding must not leave them out.
    low, high = min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))
    return Estimate(value=share, low=low, high=high, num_samples=num_samples)
