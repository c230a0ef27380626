"""The VAE's numbers against torch.distributions, and its shapes for every image it may meet."""

from typing import Any

import pytest
import torch
from torch import Tensor, distributions

from shared.specs import VaeSpec
from shared.specs.tasks import Generate, Interpolate, Reconstruct
from worker.families.family import DataInfo, Draw
from worker.families.vae import (
    FAMILY,
    FINEST_VARIANCE,
    Vae,
    build,
    kl_divergence,
    loss,
    negative_log_likelihood,
    num_halvings,
    slerp,
)
from worker.kernels.noise import Domain, Noise

CPU = torch.device("cpu")
DATASET = "ds_" + "0" * 32
DIGITS = DataInfo(shape=(1, 28, 28))
KEYED = Noise.of_step(Domain.TRAINING, 5, 0, range(6), CPU)


def spec_of(**fields: Any) -> VaeSpec:
    small: dict[str, Any] = {"base_channels": 4, "hidden_dim": 16, "latent_dim": 3}
    return VaeSpec(family="vae", dataset=DATASET, model="m", **(small | fields))


def noise_of(*indices: int, seed: int = 0) -> Noise:
    index = torch.tensor(indices)
    keys = {"seed_B": torch.full_like(index, seed), "step_B": torch.zeros_like(index)}
    return Noise(domain=Domain.SAMPLING, index_B=index, **keys)


def images(data: DataInfo, num: int = 6) -> Tensor:
    return (Noise.of_step(Domain.SAMPLING, 1, 0, range(num), CPU).uniform(*data.shape) * 256).to(torch.uint8)


def test_the_kl_is_that_of_torch_distributions() -> None:
    mean, log_variance = KEYED.normal(8), KEYED.normal(8, stream=1)

    posterior = distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = distributions.kl_divergence(posterior, distributions.Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(kl_divergence(mean, log_variance), expected, rtol=1e-5)


def test_the_bernoulli_likelihood_is_the_cross_entropy_of_grey_levels() -> None:
    logits, grey = KEYED.normal(1, 5, 4), KEYED.uniform(1, 5, 4)

    p = logits.sigmoid()
    expected = -(grey * p.log() + (1 - grey) * (1 - p).log()).flatten(1).sum(1)
    net = build(spec_of(), DIGITS)
    assert torch.allclose(negative_log_likelihood(spec_of(), net, logits, grey), expected, rtol=1e-4)


def test_the_gaussian_likelihood_is_that_of_torch_distributions() -> None:
    spec = spec_of(likelihood="gaussian")
    net, mean, grey = build(spec, DIGITS), KEYED.normal(1, 5, 4), KEYED.uniform(1, 5, 4)

    deviation = (net.log_variance.exp() + FINEST_VARIANCE).sqrt()
    expected = -distributions.Normal(mean, deviation).log_prob(grey).flatten(1).sum(1)
    assert torch.allclose(negative_log_likelihood(spec, net, mean, grey), expected, rtol=1e-4)


def test_the_gaussian_learns_its_variance() -> None:
    spec = spec_of(likelihood="gaussian")
    net = build(spec, DIGITS)

    loss(spec, net, {"image": images(DIGITS)}, KEYED).loss.backward()

    assert net.log_variance.grad is not None
    assert net.log_variance.grad.abs() > 0


def test_the_loss_is_the_reconstruction_and_beta_times_the_kl() -> None:
    net = build(spec_of(), DIGITS)
    measured = {beta: loss(spec_of(beta=beta), net, {"image": images(DIGITS)}, KEYED) for beta in (0, 1, 4)}

    values = measured[1].values
    for beta, one in measured.items():
        assert one.loss.item() == pytest.approx((values["reconstruction"] + beta * values["kl"]).item(), rel=1e-5)
        assert one.values["elbo"].item() == pytest.approx(-(values["reconstruction"] + values["kl"]).item(), rel=1e-5)


def test_the_posterior_is_sampled_with_its_own_deviation() -> None:
    """With a decoder that shows its input, the pixels are the latents."""

    class Window(Vae):
        def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N803
            return torch.full((len(x_BCHW), 3), 2.0), torch.full((len(x_BCHW), 3), -3.0)

        def decode(self, z_BZ: Tensor) -> Tensor:  # noqa: N803
            self.latents = z_BZ
            return z_BZ.new_zeros(len(z_BZ), *DIGITS.shape)

    net = Window(spec_of(), DIGITS, torch.nn.Identity(), torch.nn.Identity())
    loss(spec_of(), net, {"image": images(DIGITS, 2000)}, Noise.of_step(Domain.TRAINING, 0, 0, range(2000), CPU))

    assert net.latents.mean().item() == pytest.approx(2, abs=0.02)
    assert net.latents.std().item() == pytest.approx(torch.tensor(-1.5).exp().item(), rel=0.05)


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (3, 9, 9), (1, 28, 28), (3, 17, 30), (3, 32, 32), (3, 64, 64), (1, 127, 128)]
)
def test_every_resolution_goes_in_and_comes_out(network: str, likelihood: str, shape: tuple[int, ...]) -> None:
    data, spec = DataInfo(shape=shape), spec_of(network=network, likelihood=likelihood)
    net = build(spec, data)

    measured = loss(spec, net, {"image": images(data)}, KEYED)

    assert net.decode(torch.zeros(2, 3)).shape == (2, *shape)
    assert measured.loss.isfinite()


@pytest.mark.parametrize(
    ("resolution", "halvings"), [(8, 1), (9, 1), (16, 1), (17, 2), (28, 2), (32, 2), (64, 3), (128, 4)]
)
def test_the_smallest_map_is_between_four_and_eight(resolution: int, halvings: int) -> None:
    assert num_halvings((1, resolution, resolution)) == halvings


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_every_weight_but_the_unused_variance_gets_a_gradient(network: str) -> None:
    spec = spec_of(network=network)
    net = build(spec, DIGITS)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    loss(spec, net, {"image": images(DIGITS)}, KEYED).loss.backward()

    idle = [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert idle == ["log_variance"]


def generate_state(temperature: float, *indices: int) -> Tensor:
    request = Generate(task="generate", model="m", temperature=temperature)
    draws = [Draw(request=request, index=index) for index in indices]
    return FAMILY.tasks["generate"](spec_of(), DIGITS).start(draws, noise_of(*indices))["z"]


def test_the_temperature_scales_the_latents() -> None:
    assert torch.equal(generate_state(0.5, 0, 1), 0.5 * generate_state(1, 0, 1))
    assert not generate_state(0, 0, 1).any()


def test_a_path_runs_between_two_samples_of_its_seed() -> None:
    request = Interpolate(task="interpolate", model="m", num_points=5)
    draws = [Draw(request=request, index=index) for index in range(10)]

    path = FAMILY.tasks["interpolate"](spec_of(), DIGITS).start(draws, noise_of(*range(10)))["z"]

    ends = path[[0, 4, 5, 9]]
    assert torch.allclose(ends, generate_state(1, 0, 1, 2, 3), atol=1e-6)


def test_slerp_stays_on_the_circle_at_even_angles() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])

    points = torch.cat([slerp(a, b, torch.tensor([[t]])) for t in (0, 1 / 3, 2 / 3, 1)])

    angles = torch.atan2(points[:, 1], points[:, 0]).rad2deg()
    assert angles.tolist() == pytest.approx([0, 30, 60, 90], abs=1e-4)
    assert points.norm(dim=1).tolist() == pytest.approx([1] * 4)


def test_slerp_between_equal_points_stays_there() -> None:
    a = torch.tensor([[0.3, -2.0]])

    assert torch.allclose(slerp(a, a, torch.tensor([[0.4]])), a)


def test_a_reconstruction_decodes_the_posterior_mean() -> None:
    spec = spec_of(likelihood="gaussian")
    net = build(spec, DIGITS)
    request = Reconstruct(task="reconstruct", model="m", dataset=DATASET)
    draws = [Draw(request=request, index=index, inputs={"image": image}) for index, image in enumerate(images(DIGITS))]
    sampler = FAMILY.tasks["reconstruct"](spec, DIGITS)

    state = sampler.step(net, sampler.start(draws, noise_of(*range(6))), noise_of(*range(6)))

    mean, _ = net.encode(images(DIGITS).float() / 255)
    assert torch.allclose(state["x"], net.decode(mean))


@pytest.mark.parametrize(("likelihood", "grey"), [("bernoulli", 128), ("gaussian", 0)])
def test_samples_are_the_mean_of_the_likelihood_as_bytes(likelihood: str, grey: int) -> None:
    """A network that answers zero says grey for a Bernoulli and black for a Gaussian."""
    spec = spec_of(likelihood=likelihood, network="mlp")
    net = build(spec, DIGITS)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    sampler = FAMILY.tasks["generate"](spec, DIGITS)
    draws = [Draw(request=Generate(task="generate", model="m"), index=0)]

    finished = sampler.finish(net, sampler.step(net, sampler.start(draws, noise_of(0)), noise_of(0)))

    assert finished.dtype == torch.uint8
    assert finished.unique().tolist() == [grey]


def test_every_task_of_the_spec_has_a_sampler() -> None:
    assert FAMILY.tasks.keys() == VaeSpec.tasks.keys()
