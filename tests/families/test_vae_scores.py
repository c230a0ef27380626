"""What an evaluation asks of a VAE, where the answer is known."""

from math import log

import pytest
import torch
from torch import Tensor, distributions, nn

from tests.families.test_vae import DIGITS, KEYED, images, spec_of
from worker.families.vae import FAMILY, FINEST_VARIANCE, Vae, build, elbo, iwae, loss

WEIGHT, VARIANCE = 0.7, 0.05


class Linear(Vae):
    """``x = WEIGHT z + noise``: the posterior is known, and this network's is exactly it."""

    def __init__(self) -> None:
        super().__init__(spec_of(), DIGITS, nn.Identity(), nn.Identity())
        self.log_variance.data.fill_(log(VARIANCE - FINEST_VARIANCE))

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N803
        variance = 1 / (1 + WEIGHT**2 / VARIANCE)
        mean = variance * WEIGHT / VARIANCE * x_BCHW.flatten(1)
        return mean, torch.full_like(mean, log(variance))

    def decode(self, z_BZ: Tensor) -> Tensor:  # noqa: N803
        return WEIGHT * z_BZ[:, None, None]


def log_likelihood(batch: Tensor) -> Tensor:
    """Log p(x) of the linear model, z integrated out."""
    marginal = distributions.Normal(0.0, (WEIGHT**2 + VARIANCE) ** 0.5)
    return marginal.log_prob(batch.flatten(1).float() / 255).sum(1)


@pytest.mark.parametrize("num_latents", [1, 2, 64])
def test_with_the_true_posterior_every_latent_tells_the_likelihood(num_latents: int) -> None:
    batch = (KEYED.uniform(1, 1, 3) * 256).to(torch.uint8)

    found = iwae(spec_of(likelihood="gaussian"), Linear(), {"image": batch}, KEYED, num_latents=num_latents)

    assert torch.allclose(found, log_likelihood(batch), atol=1e-4)


def test_the_elbo_of_images_is_the_loss_s_on_average() -> None:
    net = build(spec_of(), DIGITS)

    scores = elbo(spec_of(), net, {"image": images(DIGITS)}, KEYED)

    measured = loss(spec_of(), net, {"image": images(DIGITS)}, KEYED)
    assert scores.shape == (6,)
    assert scores.mean().item() == pytest.approx(measured.values["elbo"].item(), rel=1e-5)


def test_more_latents_tighten_the_bound() -> None:
    """The decoder looks at its latents, so that bounds with the untrained posterior are loose."""
    net, batch = build(spec_of(network="mlp"), DIGITS), {"image": images(DIGITS)}
    with torch.no_grad():
        net.get_parameter("decoder.2.weight").mul_(8)

    bounds = [iwae(spec_of(network="mlp"), net, batch, KEYED, num_latents=num).mean().item() for num in (1, 8, 64)]

    assert bounds == sorted(bounds)
    assert bounds[2] > bounds[0] + 0.1


@pytest.mark.parametrize("network", ["mlp", "conv", "ladder"])
def test_information_per_dimension_adds_up_to_the_loss_s(network: str) -> None:
    spec = spec_of(network=network)
    net, batch = build(spec, DIGITS), {"image": images(DIGITS)}
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)

    of_dimensions = FAMILY.scores["kl"].values(spec, net, batch, KEYED)

    whole = loss(spec, net, batch, KEYED).values["kl"].item()
    assert of_dimensions.sum(1).mean().item() == pytest.approx(whole, rel=1e-4)


def test_the_bound_of_bytes_is_told_in_bits_per_dimension() -> None:
    spec, batch = spec_of(likelihood="logistic"), {"image": images(DIGITS)}
    net = build(spec, DIGITS)

    bits = FAMILY.scores["bits_per_dim"].values(spec, net, batch, KEYED)

    assert isinstance(bits, Tensor)
    assert torch.allclose(bits, -elbo(spec, net, batch, KEYED) / (log(2) * 784))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_likelihood_that_is_none_of_bytes_claims_no_bits_per_dimension(likelihood: str) -> None:
    spec = spec_of(likelihood=likelihood)

    told = loss(spec, build(spec, DIGITS), {"image": images(DIGITS)}, KEYED).values.keys()

    assert told == {"elbo", "reconstruction", "kl"}
    assert "bits_per_dim" not in spec.compared_by()
