"""Weights that are computed with in bfloat16, and learned in float32; and float32 products that a GPU may round."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from shared.specs import DiffusionSpec
from tests.engine.conftest import CPU, bars, small_spec
from worker.engine.evaluation import evaluate
from worker.engine.numerics import Numerics
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.families.family import Batch, DataInfo

DATA = DataInfo(shape=(1, 12, 12))
DIFFUSION = FAMILIES["diffusion"]
ENDS = {"unet": ("conv_in", "conv_out"), "dit": ("patch_in", "patch_out")}
"""The first and the last layer of each network that computes in the type of its weights."""

each_network = pytest.mark.parametrize("network", ENDS)


def spec_of(precision: str, **fields: Any) -> DiffusionSpec:
    common: dict[str, Any] = {"dataset": "ds_" + "0" * 32, "model": "m", "steps": 40, "batch_size": 8}
    common |= {"network": "unet", "preset": "xs", "warmup_steps": 0}
    return DiffusionSpec.model_validate({"family": "diffusion", **common, "precision": precision, **fields})


def trainer_of(precision: str, **fields: Any) -> Trainer[Any, Any]:
    return Trainer(DIFFUSION, spec_of(precision, **fields), DATA, CPU)


def batch_at(step: int) -> Batch:
    return {"image": bars().roll(-5 * step, 0)[:8]}


def losses(trainer: Trainer[Any, Any], steps: int) -> list[float]:
    return [trainer.advance(batch_at(trainer.step))["loss"] for _ in range(steps)]


@each_network
def test_pure_bf16_learns_as_fp32_does(network: str) -> None:
    exact, rounded = trainer_of("fp32", network=network), trainer_of("pure_bf16", network=network)

    pairs = list(zip(losses(exact, 30), losses(rounded, 30), strict=True))

    assert max(abs(one - other) / one for one, other in pairs) < 0.05
    assert sum(other for _, other in pairs[-5:]) < 0.6 * sum(other for _, other in pairs[:5])
    held = {"image": bars()[:16]}
    assert evaluate(rounded, [held])["loss"] == pytest.approx(evaluate(exact, [held])["loss"], rel=0.05)


@each_network
def test_steps_that_are_smaller_than_bfloat16_are_not_lost(network: str) -> None:
    trainer = trainer_of("pure_bf16", network=network, learning_rate=1e-7, schedule="constant")
    name = f"network.{ENDS[network][0]}.weight"
    weight, rounded = trainer.net.get_parameter(name), trainer.computing.get_parameter(name)
    before, seen = weight.detach().clone(), rounded.detach().clone()

    losses(trainer, 4)

    assert (weight.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert not torch.equal(weight, before)
    # Each step's own size is beneath what the copy can tell.
    assert (rounded != seen).float().mean() < 0.01


@each_network
def test_the_network_computes_with_what_was_learned(network: str) -> None:
    trainer = trainer_of("pure_bf16", network=network, learning_rate=1e-2)

    losses(trainer, 2)

    for name, weight in trainer.net.named_parameters():
        assert weight.grad is not None and weight.grad.dtype == torch.float32
        assert torch.equal(trainer.computing.get_parameter(name), weight.to(torch.bfloat16))
    for buffer, other in zip(trainer.net.buffers(), trainer.computing.buffers(), strict=True):
        assert buffer is other


@each_network
def test_a_pure_bf16_training_goes_on_to_the_same_bits(network: str) -> None:
    straight = trainer_of("pure_bf16", network=network)
    losses(straight, 2)
    checkpoint = straight.checkpoint()
    expected = losses(straight, 2)

    resumed = Trainer.resume(DIFFUSION, straight.spec, DATA, CPU, checkpoint)

    assert losses(resumed, 2) == expected
    ended = straight.checkpoint().tensors
    assert all(torch.equal(tensor, ended[name]) for name, tensor in resumed.checkpoint().tensors.items())
    assert {tensor.dtype for name, tensor in checkpoint.tensors.items() if ENDS[network][0] in name} == {torch.float32}


@each_network
def test_gradients_of_pieces_are_added_up_in_float32(network: str) -> None:
    """In bfloat16 the sum of eight would have lost what this one keeps."""
    trainer = trainer_of("pure_bf16", network=network)
    trainer.numerics = trainer.numerics.halved(2, 0)
    whole = trainer_of("fp32", network=network)

    losses(trainer, 1)
    losses(whole, 1)

    gradient, expected = (one.net.get_parameter(f"network.{ENDS[network][1]}.weight").grad for one in (trainer, whole))
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 0.03 * expected.norm()


def test_a_model_that_does_not_compute_in_the_type_of_its_weights_is_refused() -> None:
    with pytest.raises(ValidationError, match="use bf16"):
        small_spec(precision="pure_bf16")


def test_tf32_is_fp32_where_there_is_none() -> None:
    assert Numerics.choose(spec_of("tf32"), CPU).precision == "fp32"


@pytest.mark.parametrize(("precision", "allowed"), [("tf32", "high"), ("fp32", "highest"), ("bf16", "highest")])
def test_only_tf32_lets_products_be_rounded(precision: Any, allowed: str) -> None:
    numerics = Numerics(precision=precision, channels_last=False, num_threads=1)

    with numerics.products():
        assert torch.get_float32_matmul_precision() == allowed

    assert torch.get_float32_matmul_precision() == "highest"
