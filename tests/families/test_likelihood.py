"""Bits per dimension of a diffusion model whose denoiser is exact, against the density that it has."""

from collections.abc import Generator
from math import log

import pytest
import torch
from torch import Tensor, nn

from tests.families.test_diffusion import CPU, spec_of
from worker.families.nets.likelihood import STEPS, bits_per_dim, dequantised
from worker.families.nets.preconditioning import Edm, VariancePreserving
from worker.kernels.noise import Domain, Noise

NUM = 200
KEYED = Noise.of_step(Domain.EVALUATION, 3, 0, range(NUM), CPU)
MEAN = torch.tensor([-0.4, 0.1, 0.3, 0.0, 0.2, -0.1], dtype=torch.float64)
APART = torch.tensor([0.5, 0.2, 0.05, 0.01, 0.3, 0.1], dtype=torch.float64).square().diag()
TURNED = torch.linalg.qr(KEYED.normal(6, stream=9)[:6].double()).Q
TOGETHER = TURNED @ APART @ TURNED.T
"""Covariances: of pixels that know nothing of each other, and of some that do."""


class Gaussian(nn.Module):
    """The exact denoiser of normal data, in images of 1 x 2 x 3 pixels."""

    num_classes = 0
    objective: Edm | VariancePreserving

    def __init__(self, covariance: Tensor, objective: Edm | VariancePreserving) -> None:
        super().__init__()
        self.covariance, self.objective = covariance, objective

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        noisy = self.covariance + sigma[0] ** 2 * torch.eye(6, dtype=torch.float64)
        shrink = torch.linalg.solve(noisy, self.covariance)
        return (MEAN + (x.flatten(1) - MEAN) @ shrink).view_as(x)


def images(covariance: Tensor) -> Tensor:
    """Bytes of data of the distribution."""
    x = MEAN + KEYED.normal(6, stream=8).double() @ torch.linalg.cholesky(covariance).T
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).view(NUM, 1, 2, 3)


def finished(steps: Generator[None, None, Tensor]) -> tuple[int, Tensor]:
    """How often it yielded, and what it returned."""
    for num in range(10 * STEPS):
        try:
            next(steps)
        except StopIteration as done:
            return num, done.value
    raise AssertionError("it goes on for ever")


def measured(net: Gaussian, image: Tensor, noise: Noise = KEYED) -> Tensor:
    return finished(bits_per_dim(spec_of(), net, {"image": image}, noise))[1]


def closed_form(net: Gaussian, image: Tensor) -> Tensor:
    """Of the density that noise of ``sigma_max`` has where the exact way carries it, which is all but the data's."""
    low, high = net.objective.sigma_min, net.objective.sigma_max
    variances, axes = torch.linalg.eigh(net.covariance)
    shrink = axes @ ((variances + low**2) / (variances + high**2)).sqrt().diag() @ axes.T
    density = torch.distributions.MultivariateNormal(MEAN - shrink @ MEAN, high**2 * shrink @ shrink)
    nats = density.log_prob(dequantised(image, KEYED).flatten(1))
    return -nats / (6 * log(2)) + log(127.5) / log(2)


@pytest.mark.parametrize("objective", [Edm(0.5), VariancePreserving("eps")], ids=["edm", "eps"])
def test_of_independent_pixels_it_is_the_closed_form(objective: Edm | VariancePreserving) -> None:
    """Signs estimate the trace of a diagonal matrix without error, so what is left is the solver's."""
    net = Gaussian(APART, objective)
    image = images(APART)

    assert (measured(net, image) - closed_form(net, image)).abs().max() < 2e-3


def test_of_others_it_is_the_closed_form_on_average() -> None:
    """The estimator's variance is 2 sum M_ij^2 over i != j, M being the integral of the Jacobian, known here."""
    net = Gaussian(TOGETHER, Edm(0.5))
    image = images(TOGETHER)
    low, high = (torch.tensor(sigma, dtype=torch.float64) for sigma in (0.002, 80.0))
    of_axes = 0.5 * (((high**2) / (APART.diag() + high**2)).log() - ((low**2) / (APART.diag() + low**2)).log())
    integral = TURNED @ of_axes.diag() @ TURNED.T
    variance = 2 * (integral.square().sum() - integral.diag().square().sum())
    deviation = variance.sqrt().item() / (6 * log(2))

    error = measured(net, image) - closed_form(net, image)

    assert error.std().item() == pytest.approx(deviation, rel=0.2)
    assert abs(error.mean().item()) < 4 * deviation / NUM**0.5


def test_the_seed_decides_and_the_company_does_not() -> None:
    net = Gaussian(TOGETHER, Edm(0.5))
    image = images(TOGETHER)[:20]
    first, others = (Noise.of_step(Domain.EVALUATION, 3, 0, rows, CPU) for rows in (range(20), range(5, 9)))
    elsewhere = Noise.of_step(Domain.EVALUATION, 4, 0, range(20), CPU)

    bits = measured(net, image, first)

    assert torch.equal(bits, measured(net, image, first))
    assert not torch.allclose(bits, measured(net, image, elsewhere), atol=1e-3)
    assert torch.allclose(bits[5:9], measured(net, image[5:9], others), atol=1e-9)


def test_it_can_be_stopped_after_each_step() -> None:
    noise = Noise.of_step(Domain.EVALUATION, 3, 0, range(2), CPU)
    with torch.no_grad():
        steps = bits_per_dim(spec_of(), Gaussian(APART, Edm(0.5)), {"image": images(APART)[:2]}, noise)
        num, _ = finished(steps)

    assert num == STEPS


def test_grey_levels_are_covered_evenly() -> None:
    levels = torch.arange(NUM, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 3)

    within = (dequantised(levels, KEYED) + 1) * 127.5 - levels

    assert within.abs().max() < 0.5
    assert within.var().item() == pytest.approx(1 / 12, rel=0.1)
