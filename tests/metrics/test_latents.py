"""What a code carries, where it is known."""

import pytest
import torch
from scipy.stats import entropy
from torch import distributions

from tests.metrics.conftest import noise
from worker.metrics.latents import active_units, codebook_use, kl_per_dimension


def test_the_kl_of_each_dimension_is_that_of_torch_distributions() -> None:
    mean, log_variance = noise(50).normal(4).double(), noise(50, 1).normal(4).double()

    posterior = distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = distributions.kl_divergence(posterior, distributions.Normal(0.0, 1.0)).mean(0)
    assert torch.allclose(kl_per_dimension(mean, log_variance), expected)


def test_a_unit_is_active_where_its_mean_varies_by_a_hundredth() -> None:
    deviations = torch.tensor([0.0, 0.05, 0.2, 1.0])

    assert active_units(7 + noise(2000).normal(4) * deviations) == 2


def test_the_perplexity_is_the_exponential_of_scipy_s_entropy() -> None:
    codes = (noise(400).uniform(3) ** 2 * 12).long()

    found = codebook_use(codes, 20)

    assert found.perplexity == pytest.approx(entropy_perplexity(codes))
    assert found.usage == len(codes.unique()) / 20


def entropy_perplexity(codes: torch.Tensor) -> float:
    return torch.tensor(entropy(codes.flatten().bincount())).exp().item()


def test_codes_that_are_all_equally_frequent_use_the_whole_book() -> None:
    found = codebook_use(torch.arange(16).repeat(5), 16)

    assert (found.usage, found.perplexity) == (1, pytest.approx(16))
