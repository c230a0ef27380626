"""A measured number with what it takes to compare it: how many samples, how sure, in which features, against what."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
class Figure:
    """A value and its 95 % confidence interval: how it would vary with other samples, against the same reference."""

    value: float
    low: float
    high: float
    num_samples: int
    """What the value was computed from, the reference not counted."""
    features: str | None = None
    """Digest of the features it was measured in."""
    reference: str | None = None
    """Digest of the images it was measured against."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON; a bound that is not known is null."""
        interval = [bound if isfinite(bound) else None for bound in (self.low, self.high)]
        return {"value": self.value, "confidence_95": interval, "num_samples": self.num_samples} | {
            name: digest for name in ("features", "reference") if (digest := getattr(self, name)) is not None
        }


def jackknifed(
    statistics: Callable[[Tensor], Mapping[str, float]],
    num_samples: int,
    *,
    features: str | None = None,
    reference: str | None = None,
) -> dict[str, Figure]:
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
        name: Figure(
            value=value,
            low=value - half[name],
            high=value + half[name],
            num_samples=num_samples,
            features=features,
            reference=reference,
        )
        for name, value in values.items()
    }


def _deviation(without: list[float]) -> float:
    """Of a statistic, from its values without each group."""
    mean = sum(without) / NUM_GROUPS
    return sqrt((NUM_GROUPS - 1) / NUM_GROUPS * sum((one - mean) ** 2 for one in without))


def mean_of(values_N: Tensor, *, features: str | None = None, reference: str | None = None) -> Figure:
    """The mean of one number per sample, with the interval of the central limit theorem."""
    values_N = values_N.double()
    num_samples = len(values_N)
    mean = values_N.mean().item()
    error = values_N.std().item() / sqrt(num_samples) if num_samples > 1 else float("inf")
    return Figure(
        value=mean,
        low=mean - Z_95 * error,
        high=mean + Z_95 * error,
        num_samples=num_samples,
        features=features,
        reference=reference,
    )


def share_of(hits_N: Tensor, *, features: str | None = None, reference: str | None = None) -> Figure:
    """The share of samples of which something is true, with Wilson's (1927) interval."""
    num_samples, share = len(hits_N), hits_N.double().mean().item()
    spread = Z_95**2 / num_samples
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * sqrt(share * (1 - share) / num_samples + spread / (4 * num_samples))
    return Figure(
        value=share,
        low=max(0.0, centre - half),
        high=min(1.0, centre + half),
        num_samples=num_samples,
        features=features,
        reference=reference,
    )
