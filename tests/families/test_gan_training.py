"""The GAN's second derivatives in float64, and its training in the engine: turns, halves, precision, evaluation."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from tests.families.test_gan import CPU, NETWORKS, OBJECTIVES, SMALL, batch_of, net_of, spec_of
from worker.engine.checkpoint import detached_copy
from worker.engine.evaluation import evaluate
from worker.engine.numerics import Numerics
from worker.engine.share import Share
from worker.engine.training import Trainer
from worker.families.family import DataInfo
from worker.families.gan import FAMILY, Duel, Gan, squared_slope
from worker.families.nets.diffaugment import NUM_DRAWS, augment
from worker.families.nets.spectral import Spectral, power_iterate, spectrally_normalised
from worker.kernels.noise import Domain, Noise

TINY = DataInfo(shape=(2, 4, 4), num_classes=2)
PAIR = Noise.of_step(Domain.TRAINING, 3, 0, range(2), CPU)
LABELS = torch.tensor([0, 1])


def trainer_of(micro_batch: int | None = None, **fields: Any) -> Trainer[Any, Any]:
    spec = spec_of(**({"precision": "fp32"} | fields))
    numerics = replace(Numerics.choose(spec, CPU), micro_batch=micro_batch)
    return Trainer(FAMILY, spec, SMALL, CPU, numerics)


def critic_of(network: str, **fields: Any) -> nn.Module:
    return net_of(TINY, network=network, base_channels=4, hidden_dim=8, **fields).discriminator.double()


def scored(critic: nn.Module, x: Tensor) -> Tensor:
    return critic(augment(x, PAIR.uniform(NUM_DRAWS, stream=1), 0.7), LABELS)


@pytest.mark.parametrize("network", NETWORKS)
def test_logits_of_augmented_samples_have_two_right_derivatives(network: str) -> None:
    critic = critic_of(network, objective="r3gan")
    x = PAIR.normal(*TINY.shape).double().requires_grad_()

    assert gradcheck(lambda x: scored(critic, x), (x,), fast_mode=True)
    assert gradgradcheck(lambda x: scored(critic, x), (x,), fast_mode=True)


@pytest.mark.parametrize("network", [*NETWORKS, "spectral"])
def test_penalties_have_the_right_gradient_by_the_weights(network: str) -> None:
    """R1 and R2 are the mean of the squared slope; the Wasserstein penalty is a function of its root."""
    fields = {"network": "mlp", "objective": "hinge"} if network == "spectral" else {"network": network}
    critic = critic_of(**({"objective": "wgan_gp"} | fields))
    names, weights = zip(*critic.named_parameters(), strict=True)

    def penalties(*weights: Tensor) -> tuple[Tensor, Tensor]:
        x = PAIR.normal(*TINY.shape).double().requires_grad_()
        logits = functional_call(
            critic, dict(zip(names, weights, strict=True)), (augment(x, PAIR.uniform(NUM_DRAWS, stream=1), 0.7), LABELS)
        )
        steep = squared_slope(logits, x)
        return steep.mean(), (steep.sqrt() - 1).square().mean()

    assert gradcheck(penalties, weights, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("network", ["mlp", "r3gan"])
@pytest.mark.parametrize("objective", ["r3gan", "wgan_gp"])
def test_the_loss_that_is_descended_on_has_the_right_gradient_penalty_and_all(network: str, objective: str) -> None:
    """By the discriminator's weights, as central differences along a way through all of them show."""
    fields = {"network": network, "objective": objective, "base_channels": 4, "hidden_dim": 8}
    net = net_of(TINY, **fields).double()
    # Noise comes in float32.
    generator, critic = net.generator, net.discriminator
    pair = SimpleNamespace(
        generator=lambda z, label: generator(z.double(), label).double(),
        discriminator=lambda x, label: critic(x.double(), label),
    )
    weights = [*critic.parameters()]
    way = [torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).double() for weight in weights]

    def loss(far: float) -> Tensor:
        with torch.no_grad():
            for weight, part in zip(weights, way, strict=True):
                weight.add_(part, alpha=far)
        real = PAIR.normal(*TINY.shape, stream=9).double()
        duel = Duel(spec_of(**fields), cast("Gan", pair), real, LABELS, PAIR)
        return duel.discriminator_loss().loss

    gradient = torch.autograd.grad(loss(0.0), weights)
    slope = sum((one * part).sum() for one, part in zip(gradient, way, strict=True))

    step = 1e-6
    ahead, behind = loss(step).detach(), loss(-2 * step).detach()
    assert float(slope) == pytest.approx(float((ahead - behind) / (2 * step)), rel=1e-5)


def gradients(trainer: Trainer[Any, Any]) -> dict[str, Tensor]:
    """Of one step's losses by each part's weights, before any of them moves."""
    trainer.net.train()
    found: dict[str, Tensor] = {}
    for name, part in trainer.parts.items():
        part.forget()
        trainer._accumulate(name, part, Share(batch_of(num=7), range(7), 7))
        found |= {f"{name}.{key}": weight.grad.clone() for key, weight in part.parameters.items()}
    return found


@pytest.mark.parametrize(
    ("network", "objective"),
    [("mlp", objective) for objective in OBJECTIVES] + [("r3gan", "r3gan"), ("r3gan", "hinge"), ("r3gan", "wgan_gp")],
)
def test_gradients_of_pieces_add_up_to_the_batch_s(network: str, objective: str) -> None:
    """Real and fake samples stay paired by their place in the batch, and weights are normalised once a step."""
    fields = {"network": network, "objective": objective, "augment": 0.5, "burn_in_steps": 0}
    whole, pieces = gradients(trainer_of(**fields)), gradients(trainer_of(micro_batch=3, **fields))

    for name, gradient in whole.items():
        assert torch.allclose(pieces[name], gradient, rtol=1e-3, atol=1e-5), name


def test_the_generator_is_updated_in_each_nth_step() -> None:
    trainer = trainer_of(network="mlp", objective="wgan_gp", critic_steps=3)
    moved: list[bool] = []
    told: list[bool] = []

    for _ in range(6):
        before = {name: detached_copy(tensor) for name, tensor in trainer.net.named_parameters()}
        values = trainer.advance(batch_of())
        changed = {name for name, tensor in trainer.net.named_parameters() if not torch.equal(tensor, before[name])}
        assert any(name.startswith("discriminator") for name in changed)
        moved.append(any(name.startswith("generator") for name in changed))
        told.append("generator_loss" in values)

    assert moved == told == [False, False, True] * 2


def test_a_part_that_waits_keeps_its_moments() -> None:
    trainer = trainer_of(network="mlp", objective="wgan_gp", critic_steps=2)
    for _ in range(2):
        trainer.advance(batch_of())
    before = {name: detached_copy(tensor) for name, tensor in trainer.parts["generator"].tensors()}

    trainer.advance(batch_of())

    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.parts["generator"].tensors())


@pytest.mark.parametrize(("objective", "penalty"), [("r3gan", "r1"), ("wgan_gp", "gradient_penalty")])
def test_a_penalty_that_comes_seldom_counts_as_much_more(objective: str, penalty: str) -> None:
    fields = {"network": "mlp", "objective": objective, "precision": "fp32", "gamma": 2.0, "gamma_end": 2.0}
    always, seldom = (trainer_of(penalty_every=every, **fields) for every in (1, 3))

    one, other = (trainer.advance(batch_of()) for trainer in (always, seldom))
    told = [penalty in seldom.advance(batch_of()) for _ in range(3)]

    paid = one[penalty] + one.get("r2", 0.0) if objective == "r3gan" else 10 * one[penalty]
    assert other["discriminator_loss"] - one["discriminator_loss"] == pytest.approx(2 * paid, rel=1e-3)
    assert told == [False, False, True]


def test_beta2_follows_its_schedule() -> None:
    trainer = trainer_of(network="mlp", burn_in_steps=2)
    used: list[float] = []

    for _ in range(3):
        trainer.advance(batch_of())
        used.append(trainer.parts["discriminator"].optimizer.param_groups[0]["betas"][1])

    assert used == pytest.approx([0.9, 0.945, 0.99])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_penalties_are_computed_in_full_precision(precision: str) -> None:
    full, half = (gradients(trainer_of(network="mlp", precision=one)) for one in ("fp32", precision))
    figures = [
        trainer_of(network="r3gan", objective="r3gan", precision=one).advance(batch_of())["r1"]
        for one in ("fp32", precision)
    ]

    assert figures[0] == figures[1]
    assert full.keys() == half.keys()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_evaluation_needs_no_gradients_and_changes_nothing(objective: str) -> None:
    trainer = trainer_of(network="dcgan", objective=objective, critic_steps=1)
    trainer.advance(batch_of())
    before = trainer.checkpoint().tensors

    with torch.no_grad():
        figures = evaluate(trainer, [batch_of()])

    assert {"discriminator_loss", "generator_loss"} <= figures.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.checkpoint().tensors.items())


def test_a_spectral_norm_is_one() -> None:
    layer = spectrally_normalised(nn.Linear(6, 4))
    for _ in range(200):
        power_iterate(layer, torch.tensor([True])[0])

    assert torch.linalg.matrix_norm(layer.weight, ord=2).item() == pytest.approx(1, abs=1e-4)


def test_a_spectral_norm_moves_once_a_step_and_never_in_a_forward_pass() -> None:
    trainer = trainer_of(network="mlp", objective="hinge", critic_steps=1)
    (norm, *_) = [layer for layer in trainer.net.modules() if isinstance(layer, Spectral)]
    before = norm.left_O.clone()

    trainer.net.train()
    trainer.net.discriminator(torch.zeros(2, *SMALL.shape), torch.zeros(2, dtype=torch.int64))
    assert torch.equal(norm.left_O, before)

    trainer.advance(batch_of())
    assert not torch.equal(norm.left_O, before)


@pytest.mark.parametrize(("network", "objective"), [("mlp", "wgan_gp"), ("dcgan", "hinge"), ("r3gan", "r3gan")])
def test_a_resumed_training_is_the_training_left_alone(network: str, objective: str) -> None:
    """With the turns of the critic and the vectors of the spectral norm."""
    straight = trainer_of(network=network, objective=objective, critic_steps=2, augment=0.5)
    for _ in range(3):
        straight.advance(batch_of())
    resumed = Trainer.resume(FAMILY, straight.spec, SMALL, CPU, straight.checkpoint())

    for _ in range(3):
        assert straight.advance(batch_of()) == resumed.advance(batch_of())

    ours = resumed.checkpoint().tensors
    assert all(torch.equal(tensor, ours[name]) for name, tensor in straight.checkpoint().tensors.items())
