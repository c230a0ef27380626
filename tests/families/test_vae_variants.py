"""The VAE's other likelihood, objective and network, where the answer is known."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic_core import PydanticCustomError
from torch import Tensor, distributions

from shared.specs.tasks import Encode, Generate, Interpolate, Reconstruct, Traverse
from tests.families.test_vae import CPU, DATASET, DIGITS, KEYED, images, noise_of, spec_of
from worker.families.family import DataInfo, Draw
from worker.families.vae import (
    FAMILY,
    Ladder,
    Vae,
    build,
    elbo,
    grey_levels,
    iwae,
    kl_divergence,
    latent_size,
    log_of_grey_level,
    loss,
    negative_log_likelihood,
)
from worker.kernels.noise import Domain, Noise

SMALL = DataInfo(shape=(1, 12, 12))


def ladder(spec: Any, data: DataInfo = SMALL) -> Ladder:
    """With weights that are not zero anywhere."""
    net = build(spec, data)
    assert isinstance(net, Ladder)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    return net


@pytest.mark.parametrize("mean", [-0.5, 0.0, 0.37, 1.2])
@pytest.mark.parametrize("scale", [0.002, 0.05, 1.0])
def test_the_grey_levels_of_the_logistic_sum_to_one(mean: float, scale: float) -> None:
    levels = torch.arange(256, dtype=torch.float64) / 255

    logs = log_of_grey_level(torch.full_like(levels, mean), levels, torch.tensor(scale, dtype=torch.float64))

    assert logs.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_a_grey_level_has_the_mass_of_the_logistic_around_it() -> None:
    levels, mean, scale = torch.arange(256, dtype=torch.float64) / 255, 0.4, 0.05
    edges = torch.arange(255, dtype=torch.float64) / 255 + 1 / 510
    below = torch.cat((torch.zeros(1), ((edges - mean) / scale).sigmoid(), torch.ones(1)))

    logs = log_of_grey_level(torch.full((256,), mean), levels.float(), torch.tensor(scale))

    assert torch.allclose(logs.exp().double(), below.diff(), atol=1e-6)


def test_the_logistic_has_the_variance_that_the_model_learns() -> None:
    spec, levels = spec_of(likelihood="logistic"), torch.arange(256) / 255
    net = build(spec, DIGITS)
    net.log_variance.data.fill_(np.log(0.05**2))

    nats = torch.stack([
        negative_log_likelihood(spec, net, torch.full((1, 1, 1, 1), 0.5), level.view(1, 1, 1, 1)) for level in levels
    ])[:, 0]  # fmt: skip

    assert ((-nats).exp() * (levels - 0.5) ** 2).sum().sqrt().item() == pytest.approx(0.05, rel=0.01)


def test_the_loss_of_bytes_is_told_in_bits_per_dimension() -> None:
    spec = spec_of(likelihood="logistic")
    values = loss(spec, build(spec, DIGITS), {"image": images(DIGITS)}, KEYED).values

    nats = (values["reconstruction"] + values["kl"]).item()
    assert values["bits_per_dim"].item() == pytest.approx(nats / np.log(2) / 784, rel=1e-5)
    assert values["kl_bits_per_dim"].item() == pytest.approx(values["kl"].item() / np.log(2) / 784, rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13), (1, 28, 28), (3, 40, 40)])
def test_a_ladder_takes_every_resolution(shape: tuple[int, ...]) -> None:
    spec, data = spec_of(network="ladder"), DataInfo(shape=shape)
    net = build(spec, data)

    measured = loss(spec, net, {"image": images(data)}, KEYED)

    assert net.decode(torch.zeros(2, latent_size(spec, shape))).shape == (2, *shape)
    assert measured.loss.isfinite()
    assert measured.values["kl"].item() == pytest.approx(0, abs=1e-6)


def test_a_ladder_s_kl_is_that_between_the_posteriors_and_priors_of_its_groups() -> None:
    """Not in units of the priors, as the network has it, but of the distributions themselves."""
    spec = spec_of(network="ladder")
    net, x = ladder(spec), grey_levels(images(SMALL))
    features, epsilon = net.encoder(x), KEYED.normal(latent_size(spec, SMALL.shape))
    _, mean, log_variance = net.infer(x, epsilon)
    expected, start = torch.zeros(len(x)), 0

    def latents(h: Tensor, place: int) -> Tensor:
        nonlocal expected, start
        block: Any = net.decoder.blocks[place]
        shape = net.decoder.group_shapes[place]
        m, log_s2 = block.infer(h, features[place // 2])
        mu, log_sigma = block.prior(h).chunk(2, dim=1)
        sigma, s = log_sigma.exp(), (0.5 * log_s2).exp()
        posterior, prior = distributions.Normal(mu + sigma * m, sigma * s), distributions.Normal(mu, sigma)
        expected = expected + distributions.kl_divergence(posterior, prior).flatten(1).sum(1)
        size = torch.Size(shape).numel()
        drawn = m + s * epsilon[:, start : start + size].unflatten(1, shape)
        start += size
        return drawn

    net.decoder._descend(len(x), latents)

    assert expected.min() > 0.1
    assert torch.allclose(kl_divergence(mean, log_variance), expected, rtol=1e-4)


def test_a_ladder_s_posterior_looks_at_the_latents_above_it() -> None:
    spec = spec_of(network="ladder")
    net, x = ladder(spec), grey_levels(images(SMALL))
    epsilon = KEYED.normal(latent_size(spec, SMALL.shape))
    _, before, _ = net.infer(x, epsilon)
    moved = epsilon.clone()
    moved[:, 3] += 1  # the first latent of the second group

    _, after, _ = net.infer(x, moved)

    assert torch.equal(after[:, :6], before[:, :6])
    assert (after[:, 6:] != before[:, 6:]).any()


def test_every_weight_of_a_ladder_gets_a_gradient() -> None:
    spec = spec_of(network="ladder", likelihood="logistic")
    net = ladder(spec)

    loss(spec, net, {"image": images(SMALL)}, KEYED).loss.backward()

    assert [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_a_ladder_s_bounds_agree() -> None:
    spec, batch = spec_of(network="ladder", likelihood="gaussian"), {"image": images(SMALL)}
    net = ladder(spec)

    draws = torch.stack([
        iwae(spec, net, batch, Noise.of_step(Domain.TRAINING, 5, step, range(6), CPU), num_latents=1).mean()
        for step in range(100)
    ])  # fmt: skip
    lower, upper = elbo(spec, net, batch, KEYED).mean(), iwae(spec, net, batch, KEYED, num_latents=32).mean()

    # One draw of log p(x, z) / q(z|x) has the ELBO as its mean, and many in one logarithm are above it.
    assert lower.item() == pytest.approx(draws.mean().item(), abs=4 * draws.std().item())
    assert upper > draws.mean()


def test_a_denoising_autoencoder_sees_the_noise_and_is_judged_by_the_image() -> None:
    """With a network that gives back its input, the loss is that of the noise alone."""

    class Window(Vae):
        def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N803
            return x_BCHW.flatten(1), torch.zeros(len(x_BCHW), 784)

        def decode(self, z_BZ: Tensor) -> Tensor:  # noqa: N803
            return z_BZ.view(-1, *DIGITS.shape)

    spec = spec_of(objective="denoising", corruption=0.3, likelihood="gaussian")
    net = Window(spec, DIGITS, torch.nn.Identity(), torch.nn.Identity())
    noise = Noise.of_step(Domain.TRAINING, 0, 0, range(64), CPU)

    nats = loss(spec, net, {"image": images(DIGITS, 64)}, noise).loss.item()

    variance = (net.log_variance.exp() + 1 / 255**2).item()
    assert nats == pytest.approx(784 * 0.5 * (0.3**2 / variance + np.log(2 * np.pi * variance)), rel=0.02)


@pytest.mark.parametrize("task", ["generate", "interpolate", "traverse"])
def test_a_denoising_autoencoder_is_not_drawn_from(task: str) -> None:
    request = {"generate": Generate, "interpolate": Interpolate, "traverse": Traverse}[task](task=task, model="m")

    spec_of(latent_dim=8).check_task(request, {"shape": [1, 28, 28]})
    with pytest.raises(PydanticCustomError):
        spec_of(latent_dim=8, objective="denoising").check_task(request, {"shape": [1, 28, 28]})


def test_dimensions_that_a_model_has_not_are_refused() -> None:
    request = Traverse(task="traverse", model="m", num_dimensions=4)

    spec_of(latent_dim=4).check_task(request, {})
    with pytest.raises(PydanticCustomError):
        spec_of(latent_dim=3).check_task(request, {})


@pytest.mark.parametrize("network", ["conv", "ladder"])
def test_a_traversal_moves_one_latent_from_end_to_end(network: str) -> None:
    spec = spec_of(network=network)
    request = Traverse(task="traverse", model="m", num_dimensions=3, num_points=5, reach=2)
    draws = [Draw(request=request, index=index) for index in range(15)]

    z = FAMILY.tasks["traverse"](spec, SMALL).start(draws, noise_of(*range(15)))["z"]

    assert z.shape == (15, latent_size(spec, SMALL.shape))
    rows = z.unflatten(0, (3, 5))
    for dimension, row in enumerate(rows):
        assert row[:, dimension].tolist() == [-2, -1, 0, 1, 2]
        assert not row[:, [other for other in range(z.shape[1]) if other != dimension]].any()


@pytest.mark.parametrize("network", ["mlp", "conv", "ladder"])
def test_what_is_encoded_decodes_to_the_reconstruction(network: str) -> None:
    spec = spec_of(network=network)
    net = build(spec, SMALL)
    noise, results = noise_of(*range(6)), {}
    for kind, task in ((Encode, "encode"), (Reconstruct, "reconstruct")):
        request = kind(task=task, model="m", dataset=DATASET)
        draws = [Draw(request=request, index=index, inputs={"image": x}) for index, x in enumerate(images(SMALL))]
        sampler = FAMILY.tasks[task](spec, SMALL)
        results[task] = sampler.finish(net, sampler.step(net, sampler.start(draws, noise), noise))

    decoded = (net.decode(results["encode"]).sigmoid() * 255).round().to(torch.uint8)

    assert results["encode"].shape == (6, latent_size(spec, SMALL.shape))
    assert results["encode"].dtype == torch.float32
    assert (decoded.int() - results["reconstruct"].int()).abs().max() <= 1
