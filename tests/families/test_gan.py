"""The GAN's losses against closed forms, its networks at every size, and what its samples depend on."""

from itertools import product
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from shared.specs import GanSpec
from shared.specs.tasks import Generate, Interpolate
from worker.engine.numerics import exact
from worker.engine.sampling import Tile, sample
from worker.engine.training import build as seeded
from worker.families.family import DataInfo, Draw
from worker.families.gan import FAMILY, Gan, Stream, discriminator_loss, from_bytes, generator_loss
from worker.families.nets.batch_norm import BatchNorm
from worker.families.nets.diffaugment import NUM_DRAWS, augment
from worker.families.nets.resample import Resample, resolutions
from worker.kernels.noise import Domain, Noise

CPU = torch.device("cpu")
NETWORKS = ("mlp", "dcgan", "sngan", "r3gan")
OBJECTIVES = ("non_saturating", "hinge", "wgan_gp", "r3gan")
SMALL = DataInfo(shape=(1, 16, 16), num_classes=4)
KEYED = Noise.of_step(Domain.TRAINING, 5, 0, range(6), CPU)


def spec_of(**fields: Any) -> GanSpec:
    small: dict[str, Any] = {"base_channels": 8, "hidden_dim": 16, "latent_dim": 5, "steps": 100}
    return GanSpec(family="gan", dataset="ds_" + "0" * 32, model="m", **(small | fields))


def net_of(data: DataInfo = SMALL, **fields: Any) -> Gan:
    """A network as training leaves it: no weight is zero."""
    net = seeded(FAMILY, spec_of(**fields), data)
    for place, weight in enumerate(net.parameters()):
        if not weight.any():
            draws = Noise.of_step(Domain.SAMPLING, place, 0, range(1), CPU).normal(*weight.shape)
            weight.data.copy_(0.1 * draws[0])
    return net


def batch_of(data: DataInfo = SMALL, num: int = 6) -> dict[str, Tensor]:
    grey = Noise.of_step(Domain.SAMPLING, 1, 0, range(num), CPU).uniform(*data.shape)
    return {"image": (grey * 256).to(torch.uint8), "label": torch.arange(num) % 4}


class Bowl(nn.Module):
    """D(x) = sum of a x^2 / 2 + b x, whose slope is a x + b."""

    a, b = 0.03, -0.2

    def forward(self, x_BX: Tensor, label_B: Tensor | None) -> Tensor:  # noqa: N803
        return (self.a * x_BX**2 / 2 + self.b * x_BX).flatten(1).sum(1)


def duel_of_bowls(**fields: Any) -> tuple[GanSpec, Gan, Tensor, Tensor, Tensor]:
    """A critic with closed forms, and in float64 the real, the discriminator's and the generator's fake samples."""
    spec = spec_of(network="mlp", **fields)
    net = Gan(Bowl(), net_of(network="mlp").generator)
    batch = batch_of()
    fakes = [
        net.generator(KEYED.normal(5, stream=stream), batch["label"]).detach().double().flatten(1)
        for stream in (Stream.DISCRIMINATOR_LATENT, Stream.GENERATOR_LATENT)
    ]
    return spec, net, from_bytes(batch["image"]).double().flatten(1), *fakes


def bowl(x: Tensor) -> Tensor:
    return (Bowl.a * x**2 / 2 + Bowl.b * x).sum(1)


def steepness(x: Tensor) -> Tensor:
    return ((Bowl.a * x + Bowl.b) ** 2).sum(1)


def expected_losses(objective: str) -> tuple[float, float]:
    spec, _, real, fake, fake_of_generator = duel_of_bowls(objective=objective)
    r, f, g = bowl(real), bowl(fake), bowl(fake_of_generator)
    match objective:
        case "non_saturating":
            losses = -(1 / (1 + (-r).exp())).log() - (1 - 1 / (1 + (-f).exp())).log(), (1 + (-g).exp()).log()
        case "hinge":
            losses = -torch.minimum(r - 1, 0 * r) - torch.minimum(-f - 1, 0 * f), -g
        case "wgan_gp":
            share = KEYED.uniform(stream=Stream.MIXTURE).double()[:, None]
            penalty = (steepness(share * real + (1 - share) * fake).sqrt() - 1) ** 2
            losses = f - r + spec.gradient_penalty * penalty, -g
        case _:
            penalty = spec.gamma / 2 * (steepness(real) + steepness(fake))
            losses = (1 + (f - r).exp()).log() + penalty, (1 + (r - g).exp()).log()
    return losses[0].mean().item(), losses[1].mean().item()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_losses_are_those_of_the_papers(objective: str, grad: bool) -> None:
    """With and without gradients: training and evaluation."""
    spec, net, *_ = duel_of_bowls(objective=objective)

    with torch.set_grad_enabled(grad):
        losses = [loss(spec, net, batch_of(), KEYED).loss.item() for loss in (discriminator_loss, generator_loss)]

    assert losses == pytest.approx(expected_losses(objective), rel=1e-4)


def test_r1_and_r2_are_told() -> None:
    spec, net, real, fake, _ = duel_of_bowls(objective="r3gan")

    values = discriminator_loss(spec, net, batch_of(), KEYED).values

    assert values["r1"].item() == pytest.approx(steepness(real).mean().item(), rel=1e-4)
    assert values["r2"].item() == pytest.approx(steepness(fake).mean().item(), rel=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 9, 17), (1, 28, 28), (3, 32, 32)])
def test_every_size_goes_in_and_comes_out(network: str, shape: tuple[int, ...]) -> None:
    data = DataInfo(shape=shape)
    net = net_of(data, network=network)

    for finest_blocks in (0, 1) if network == "r3gan" else (0,):
        net = net_of(data, network=network, finest_blocks=finest_blocks)
        fake = net.generator(torch.zeros(2, 5), None)
        assert fake.shape == (2, *shape)
        assert net.discriminator(fake, None).shape == (2,)


@pytest.mark.parametrize(("network", "objective"), list(product(NETWORKS, OBJECTIVES)))
def test_a_logit_depends_on_other_samples_under_batch_norm_only(network: str, objective: str) -> None:
    """A penalty on the gradient of one sample's logit has no meaning where others change it."""
    net = net_of(network=network, objective=objective).train()
    x = from_bytes(batch_of()["image"]).requires_grad_()

    net.discriminator(x, batch_of()["label"])[0].backward()

    assert bool(x.grad[1:].any()) == ((network, objective) == ("dcgan", "non_saturating"))
    has_batch_norm = any(isinstance(layer, BatchNorm) for layer in net.discriminator.modules())
    assert has_batch_norm == bool(x.grad[1:].any())


@pytest.mark.parametrize(("network", "objective"), list(product(NETWORKS, OBJECTIVES)))
def test_every_weight_gets_a_gradient_from_its_own_loss(network: str, objective: str) -> None:
    spec, net = spec_of(network=network, objective=objective), net_of(network=network, objective=objective).train()

    for part, loss in FAMILY.losses.items():
        weights = dict(net.get_submodule(part).named_parameters())
        loss(spec, net, batch_of(), KEYED).loss.backward(inputs=list(weights.values()))

        idle = [name for name, weight in weights.items() if weight.grad is None or not weight.grad.any()]
        # A constant before batch norm does nothing, nor one that is added to both logits of a difference.
        assert {name for name in idle if not name.endswith("bias")} == set()


def test_averaged_weights_are_normalised_with_their_own_statistics() -> None:
    """Half as large activations are normalised to the same image; stale statistics would halve them: grey mush."""
    net = net_of(network="dcgan").eval()
    z, label = KEYED.normal(5), torch.zeros(6, dtype=torch.int64)
    before = net.generator(z, label)

    for weight in net.generator.get_submodule("body.project").parameters():
        weight.data *= 0.5

    assert torch.allclose(net.generator(z, label), before, atol=1e-2)
    assert not torch.equal(net.generator(z, label), before)


@pytest.mark.parametrize("network", NETWORKS)
def test_classes_change_samples_and_logits(network: str) -> None:
    net = net_of(network=network).eval()
    z, x = KEYED.normal(5), from_bytes(batch_of()["image"])
    zeros = torch.zeros(6, dtype=torch.int64)

    assert not torch.allclose(net.generator(z, zeros), net.generator(z, zeros + 3), atol=1e-3)
    assert not torch.allclose(net.discriminator(x, zeros), net.discriminator(x, zeros + 3), atol=1e-4)


def test_a_model_without_classes_ignores_labels() -> None:
    net = net_of(class_conditional=False)
    zeros = torch.zeros(6, dtype=torch.int64)

    assert torch.equal(net.generator(KEYED.normal(5), zeros), net.generator(KEYED.normal(5), zeros + 3))


class Exposed:
    """A sampler whose output is the image before rounding to bytes could hide a bit."""

    def __init__(self, inner: Any) -> None:
        self.num_steps, self.start, self.step = inner.num_steps, inner.start, inner.step

    def finish(self, net: nn.Module, state: dict[str, Tensor]) -> Tensor:
        return state["x"]


def draws_of(*indices: int, seed: int = 9, **fields: Any) -> list[Draw[Any]]:
    return [Draw(request=Generate(task="generate", model="m", seed=seed, **fields), index=index) for index in indices]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_sample_is_the_same_alone_and_among_strangers(network: str) -> None:
    with exact(1):
        net = net_of(network=network).eval()
        sampler = Exposed(FAMILY.tasks["generate"](spec_of(network=network), SMALL))
        tile = Tile(net, sampler, draws_of(0)[0], CPU, width=8)
        strangers = [draw for index in range(11) for draw in (*draws_of(index), *draws_of(index + 50, seed=3))]

        together = {(draw.request.seed, draw.index): x for draw, x in sample(tile, strangers)}
        alone = {draw.index: x for index in range(11) for draw, x in sample(tile, draws_of(index))}

    assert all(torch.equal(together[9, index], x) for index, x in alone.items())
    assert not torch.equal(alone[0], alone[4])


def start(request: Any, num: int, data: DataInfo = SMALL) -> dict[str, Tensor]:
    noise = Noise.of_step(Domain.SAMPLING, request.seed, 0, range(num), CPU)
    draws = [Draw(request=request, index=index) for index in range(num)]
    return FAMILY.tasks[request.task](spec_of(), data).start(draws, noise)


def test_samples_go_through_the_classes_that_were_asked_for() -> None:
    assert start(Generate(task="generate", model="m"), 6)["label"].tolist() == [0, 1, 2, 3, 0, 1]
    assert start(Generate(task="generate", model="m", labels=[2, 0]), 5)["label"].tolist() == [2, 0, 2, 0, 2]
    assert start(Interpolate(task="interpolate", model="m", num_points=3), 9)["label"].tolist() == [
        0, 0, 0, 1, 1, 1, 2, 2, 2,
    ]  # fmt: skip


def test_the_temperature_scales_the_latents() -> None:
    one, half = (start(Generate(task="generate", model="m", temperature=t), 4)["z"] for t in (1, 0.5))

    assert torch.equal(half, 0.5 * one)


def test_a_path_runs_between_two_samples_of_its_seed() -> None:
    path = start(Interpolate(task="interpolate", model="m", num_points=5), 10)["z"]

    assert torch.allclose(path[[0, 4, 5, 9]], start(Generate(task="generate", model="m"), 4)["z"], atol=1e-6)


def test_augmentation_leaves_as_many_images_alone_as_it_should() -> None:
    noise = Noise.of_step(Domain.TRAINING, 0, 0, range(2000), CPU)
    x = noise.normal(1, 8, 8)

    changed = (augment(x, noise.uniform(NUM_DRAWS, stream=1), 0.3) != x).flatten(1).any(1)

    assert changed.float().mean().item() == pytest.approx(1 - 0.7**3, abs=0.04)
    assert torch.equal(augment(x, noise.uniform(NUM_DRAWS, stream=1), 0.0), x)


def test_a_translation_moves_whole_pixels_and_brings_in_zeros() -> None:
    x = torch.arange(1.0, 65.0).view(1, 1, 8, 8)
    # Only the gate of the translation is open: one row down, one column to the left.
    u = torch.tensor([[0.9, 0.5, 0.5, 0.5, 0.1, 0.99, 0.01, 0.9, 0.5, 0.5]])

    moved = augment(x, u, 0.5)

    assert torch.equal(moved[..., 1:, :-1], x[..., :-1, 1:])
    assert not moved[..., 0, :].any() and not moved[..., -1].any()


def test_a_cutout_is_half_as_high_and_wide_as_the_image() -> None:
    u = torch.tensor([[0.9, 0.5, 0.5, 0.5, 0.9, 0.5, 0.5, 0.1, 0.5, 0.5]])

    cut = augment(torch.ones(1, 1, 8, 12), u, 0.5)

    assert (cut == 0).sum() == 4 * 6
    assert not cut[..., 2:6, 3:9].any()


@pytest.mark.parametrize(("before", "after"), [((14, 14), (28, 28)), ((9, 17), (5, 9)), ((28, 28), (14, 14))])
def test_resampling_is_the_antialiased_bilinear_one(before: tuple[int, int], after: tuple[int, int]) -> None:
    x = KEYED.normal(2, *before)

    expected = nn.functional.interpolate(x, after, mode="bilinear", antialias=True)
    assert torch.allclose(Resample(before, after)(x), expected, atol=1e-5)


def test_resolutions_are_halved_down_to_seven() -> None:
    assert resolutions((1, 28, 28)) == [(28, 28), (14, 14), (7, 7)]
    assert resolutions((3, 32, 32))[-1] == (4, 4)


def test_what_is_left_out_follows_from_what_is_given() -> None:
    assert (spec_of(network="dcgan").objective, spec_of(network="dcgan").betas) == ("non_saturating", (0.5, 0.999))
    assert (spec_of(objective="wgan_gp").critic_steps, spec_of(network="sngan").critic_steps) == (5, 5)
    assert spec_of(network="dcgan", learning_rate=0.1).learning_rate == 0.1
    large = GanSpec(family="gan", dataset="ds_" + "0" * 32, model="m", preset="b", num_blocks=1)
    assert (large.base_channels, large.num_blocks) == (192, 1)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("critic_steps", {"objective": "wgan_gp", "steps": 4}),
        ("gamma_end", {"gamma": 0.1, "gamma_end": 1.0}),
        ("objective", {"objective": "least_squares"}),
        ("critic_norm", {"objective": "wgan_gp", "critic_norm": "batch"}),
        ("augment", {"augment": 1.5}),
    ],
)
def test_what_cannot_work_is_refused(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        spec_of(**fields)

    (error,) = refused.value.errors()
    assert field in (*error["loc"], error.get("ctx", {}).get("field"))


def test_schedules_go_from_start_to_end_in_the_burn_in() -> None:
    spec = spec_of(gamma=2.0, gamma_end=0.2, augment=0.4, burn_in_steps=50)

    assert [spec.gamma_at(step) for step in (0, 25, 50, 99)] == pytest.approx([2.0, 1.1, 0.2, 0.2])
    assert [spec.augment_at(step) for step in (0, 25, 50)] == pytest.approx([0, 0.2, 0.4])
    assert [spec.betas_at(step)[1] for step in (0, 25, 50)] == pytest.approx([0.9, 0.945, 0.99])


def test_every_task_of_the_spec_has_a_sampler() -> None:
    assert FAMILY.tasks.keys() == GanSpec.tasks.keys()
