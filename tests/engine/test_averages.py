"""The average of any length, made after a training of copies of two, is the one that was never kept."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from shared.errors import ModelLoadFailed
from tests.engine.conftest import CPU, DATA, batch_at, small_spec
from worker.engine.averages import LENGTHS, PowerAverages, averaged, exponent, fit, power_decay, products
from worker.engine.checkpoint import Checkpoint, write_tensors
from worker.engine.training import Trainer
from worker.families import FAMILIES

STEPS = 400
VAE = FAMILIES["vae"]


def profile(length: float, steps: int) -> NDArray[np.float64]:
    """How much the weights after each step count in a power-function average, by their definition."""
    edges = (np.arange(steps + 1) / steps) ** (exponent(length) + 1)
    return np.diff(edges)


def wandering(num_weights: int = 200) -> NDArray[np.float64]:
    """Weights after each step ``(T, N)``: a drift that slows down, and a random walk."""
    chance = np.random.default_rng(0)
    drift = np.exp(-3 * np.arange(1, STEPS + 1) / STEPS)[:, None] * chance.normal(size=num_weights)
    return drift + 0.02 * chance.normal(size=(STEPS, num_weights)).cumsum(0)


def written(path: Path, weights: NDArray[np.float64], num_snapshots: int) -> PowerAverages:
    """A training whose weights are known, and the file that it leaves."""
    net, average = nn.Linear(weights.shape[1], 1, bias=False), nn.Linear(weights.shape[1], 1, bias=False)
    averages = PowerAverages(net, average, steps=STEPS, num_snapshots=num_snapshots)
    with torch.no_grad():
        for step, now in enumerate(torch.from_numpy(weights).float()):
            net.weight.copy_(now)
            average.weight.lerp_(net.weight, 1 - power_decay(step, LENGTHS[0]))
            averages.follow(step)
    averages.write(path, average, {})
    return averages


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94), (12**-0.5, 0.0)])
def test_the_exponent_is_that_of_the_paper(length: float, gamma: float) -> None:
    assert exponent(length) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2, 0.25])
def test_the_length_is_the_standard_deviation_of_the_profile(length: float) -> None:
    share, steps = profile(length, 100_000), (np.arange(100_000) + 0.5) / 100_000

    mean = share @ steps
    assert np.sqrt(share @ (steps - mean) ** 2) == pytest.approx(length, rel=1e-4)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_recurrence_weighs_each_step_as_the_profile_says(length: float) -> None:
    share = np.zeros(50)
    for step in range(50):
        share *= power_decay(step, length)
        share[step] = 1 - power_decay(step, length)

    np.testing.assert_allclose(share, profile(length, 50), atol=1e-12)


def test_inner_products_are_the_integrals() -> None:
    ends, lengths = [0.25, 0.7, 1.0, 1.0], [0.05, 0.1, 0.05, 0.2]
    middles = (np.arange(200_000) + 0.5) / 200_000

    def density(end: float, length: float) -> NDArray[np.float64]:
        gamma = exponent(length)
        return np.where(middles < end, (gamma + 1) * middles**gamma / end ** (gamma + 1), 0)

    for end, length in [(0.7, 0.07), (1.0, 0.1), (0.25, 0.2)]:
        expected = [(density(*one) * density(end, length)).mean() for one in zip(ends, lengths, strict=True)]
        assert products(ends, lengths, end, length) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("length", "tolerance"), [(0.05, 1e-6), (0.06, 0.015), (0.08, 0.015), (0.1, 1e-6), (0.13, 0.025), (0.2, 0.08)]
)
def test_an_average_made_afterwards_is_the_one_kept_from_the_start(
    tmp_path: Path, length: float, tolerance: float
) -> None:
    """Against the sum in float64. The tolerance is a share of how far the average is from the last weights."""
    weights = wandering()
    written(tmp_path / "averages.safetensors", weights, num_snapshots=8)

    state, found = averaged(tmp_path / "averages.safetensors", length=length)

    direct = profile(length, STEPS) @ weights
    distance = np.linalg.norm(state["weight"].double().numpy()[0] - direct)
    assert distance <= tolerance * np.linalg.norm(direct - weights[-1])
    assert found.error <= tolerance


def test_more_copies_come_closer() -> None:
    errors = []
    for num in (2, 4, 8, 16, 32):
        ends = np.repeat(np.arange(1, num + 1) * 1000, 2)
        errors.append(fit(ends.tolist(), LENGTHS * num, length=0.15).error)

    assert all(later < earlier / 2 for earlier, later in pairwise(errors))


def test_the_error_that_is_told_is_that_of_the_profile() -> None:
    ends, lengths = [100, 100, 200, 200], LENGTHS * 2
    found = fit(ends, lengths, length=0.15)

    made = np.zeros(20_000)
    for share, end, length in zip(found.coefficients, ends, lengths, strict=True):
        made[: end * 100] += share * profile(length, end * 100)
    wanted = profile(0.15, 20_000)
    assert found.error == pytest.approx(np.linalg.norm(made - wanted) / np.linalg.norm(wanted), rel=1e-3)


def test_what_stood_still_is_kept_to_the_bit(tmp_path: Path) -> None:
    still = np.repeat(wandering()[:1], STEPS, axis=0)
    written(tmp_path / "averages.safetensors", still, num_snapshots=8)

    state, _ = averaged(tmp_path / "averages.safetensors", length=0.13)

    assert torch.equal(state["weight"][0], torch.from_numpy(still[0]).float())


@pytest.mark.parametrize(("steps", "num", "due"), [(12, 4, [3, 6, 9, 12]), (10, 4, [3, 5, 8, 10]), (2, 8, [1, 2])])
def test_copies_are_made_at_equal_intervals_and_at_the_end(steps: int, num: int, due: list[int]) -> None:
    net = nn.Linear(1, 1)

    assert PowerAverages(net, net, steps=steps, num_snapshots=num).due == due


def trainer_of(**fields: Any) -> Trainer[Any, Any]:
    return Trainer(VAE, small_spec(ema="power", ema_snapshots=4, **fields), DATA, CPU)


def advanced(trainer: Trainer[Any, Any], to: int) -> Trainer[Any, Any]:
    while trainer.step < to:
        trainer.advance(batch_at(trainer.step))
    return trainer


def test_the_trainer_averages_by_the_profile() -> None:
    trainer, seen = trainer_of(), []
    for step in range(5):
        trainer.advance(batch_at(step))
        seen.append(trainer.net.encoder.head.weight.detach().clone())

    expected = sum(float(share) * weight for share, weight in zip(profile(LENGTHS[0], 5), seen, strict=True))
    assert torch.allclose(trainer.average.encoder.head.weight, expected, atol=1e-6)


@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_resumed_training_leaves_the_same_copies(tmp_path: Path, at: int) -> None:
    straight = advanced(trainer_of(), to=8)
    advanced(trainer_of(), to=at).checkpoint().write(tmp_path / "checkpoint")

    checkpoint = Checkpoint.read(tmp_path / "checkpoint")
    resumed = advanced(Trainer.resume(VAE, straight.spec, DATA, CPU, checkpoint), to=8)

    for name, trainer in (("straight", straight), ("resumed", resumed)):
        trainer.averages.write(tmp_path / name, trainer.average, {})
    assert (tmp_path / "straight").read_bytes() == (tmp_path / "resumed").read_bytes()


def test_averaged_weights_fit_the_network(tmp_path: Path) -> None:
    trainer = advanced(trainer_of(), to=8)
    trainer.averages.write(tmp_path / "averages", trainer.average, {})

    state, _ = averaged(tmp_path / "averages", length=LENGTHS[0])

    expected = trainer.average.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.allclose(state[name], expected[name], atol=1e-6) for name in state)


def test_a_checkpoint_that_lacks_a_copy_is_refused() -> None:
    checkpoint = advanced(trainer_of(), to=5).checkpoint()
    tensors = {name: one for name, one in checkpoint.tensors.items() if not name.startswith("averages.2.1.encoder")}

    with pytest.raises(ModelLoadFailed, match="averages do not fit"):
        Trainer.resume(
            VAE,
            small_spec(ema="power", ema_snapshots=4),
            DATA,
            CPU,
            Checkpoint(**{**vars(checkpoint), "tensors": tensors}),
        )


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "weights", {"encoder.head.weight": torch.zeros(1)}, {})

    with pytest.raises(ModelLoadFailed, match="no averages"):
        averaged(tmp_path / "weights", length=0.1)
