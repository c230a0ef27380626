"""A step is a function of (state, step number, batch): training that was killed goes on bit for bit."""

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import ModelLoadFailed, NanLoss
from tests.engine.conftest import CPU, DATA, bars, batch_at, small_spec
from tests.engine.toy import TOY, ToySpec
from worker.engine.checkpoint import Checkpoint
from worker.engine.evaluation import evaluate
from worker.engine.numerics import Numerics
from worker.engine.training import Trainer, build
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.kernels import native

VAE = FAMILIES["vae"]


def trainer_of(**fields: Any) -> Trainer[Any, Any]:
    return Trainer(VAE, small_spec(**fields), DATA, CPU)


def advanced(trainer: Trainer[Any, Any], to: int) -> Trainer[Any, Any]:
    while trainer.step < to:
        trainer.advance(batch_at(trainer.step))
    return trainer


def same_state(one: Checkpoint, other: Checkpoint) -> bool:
    names = one.tensors.keys() == other.tensors.keys()
    return names and all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


@pytest.fixture(scope="module")
def resumed_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of several trainings at step 3 of 8, and what another process made of them."""
    folder = tmp_path_factory.mktemp("resumed")
    torch.set_num_threads(1)
    for network, precision, channels_last in VARIANTS:
        trainer = trainer_of(network=network, precision=precision, channels_last=channels_last)
        path = folder / f"{network}-{precision}-{channels_last}.half"
        advanced(trainer, to=3).checkpoint().write(path)
    subprocess.run([sys.executable, "-m", "tests.engine.elsewhere", "resume", str(folder)], check=True, timeout=60)
    return folder


VARIANTS = [
    *product(("mlp", "conv"), ("fp32", "bf16", "fp16"), (False,)),
    ("conv", "fp32", True),
    ("conv", "bf16", True),
]


@pytest.mark.parametrize(("network", "precision", "channels_last"), VARIANTS)
def test_a_training_resumed_in_another_process_ends_in_the_same_bits(
    resumed_elsewhere: Path, network: str, precision: str, channels_last: bool
) -> None:
    straight = advanced(trainer_of(network=network, precision=precision, channels_last=channels_last), to=8)

    resumed = Checkpoint.read(resumed_elsewhere / f"{network}-{precision}-{channels_last}.resumed")
    assert resumed.step == 8
    assert same_state(straight.checkpoint(), resumed)


def test_the_state_is_weights_average_moments_steps_and_nothing_else() -> None:
    state = advanced(trainer_of(network="mlp"), to=1).checkpoint().tensors

    weight = "encoder.1.weight"
    moments = [f"part.vae.{weight}.{moment}" for moment in ("exp_avg", "exp_avg_sq", "step")]
    assert sorted(name for name in state if weight in name) == sorted([f"net.{weight}", f"average.{weight}", *moments])


def test_a_checkpoint_is_a_copy_that_later_steps_leave_alone() -> None:
    trainer = advanced(trainer_of(), to=2)
    checkpoint = trainer.checkpoint()
    before = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}

    advanced(trainer, to=4)

    assert all(torch.equal(before[name], tensor) for name, tensor in checkpoint.tensors.items())


def test_equal_states_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        advanced(trainer_of(), to=2).checkpoint().write(tmp_path / name)

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_seed_gives_other_initial_weights() -> None:
    first, second = (build(VAE, small_spec(seed=seed), DATA).state_dict() for seed in (0, 1))

    assert not torch.equal(first["encoder.head.weight"], second["encoder.head.weight"])


def test_building_a_network_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()

    build(VAE, small_spec(), DATA)

    assert torch.equal(torch.get_rng_state(), before)


def test_every_step_draws_noise_of_its_own() -> None:
    """With weights that stand still, only the noise can tell two steps on one batch apart."""
    trainer = trainer_of(learning_rate=1e-30)

    losses = {trainer.advance(batch_at(0))["reconstruction"] for _ in range(3)}

    assert len(losses) == 3


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_a_vae_learns(network: str) -> None:
    trainer = trainer_of(network=network, steps=60, learning_rate=5e-3)
    before = evaluate(trainer, [{"image": bars()}])

    advanced(trainer, to=60)

    after = evaluate(trainer, [{"image": bars()}])
    assert after["elbo"] > before["elbo"] + 20


def test_an_evaluation_does_not_depend_on_how_it_is_cut_into_batches() -> None:
    trainer = advanced(trainer_of(precision="fp32"), to=2)

    whole = evaluate(trainer, [{"image": bars()}])
    pieces = evaluate(trainer, ({"image": piece} for piece in bars().split([40, 20, 4])))
    assert pieces == pytest.approx(whole, rel=1e-5)


def test_without_averaging_the_average_is_the_network() -> None:
    trainer = advanced(trainer_of(ema_decay=0), to=3)

    for averaged, weight in zip(trainer.average.parameters(), trainer.net.parameters(), strict=True):
        assert torch.equal(averaged, weight)


def test_the_average_follows_the_recurrence() -> None:
    trainer = trainer_of(ema_decay=0.15)
    expected = trainer.net.encoder.head.weight.detach().clone()

    for step in range(4):
        trainer.advance(batch_at(step))
        decay = min(0.15, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * trainer.net.encoder.head.weight.detach()

    assert torch.allclose(trainer.average.encoder.head.weight, expected, atol=1e-6)


def test_a_gradient_is_clipped_to_the_norm_that_was_asked_for() -> None:
    trainer = trainer_of(grad_clip=1e-3)

    norm = trainer.advance(batch_at(0))["grad_norm"]

    clipped = torch.stack([weight.grad.norm() for weight in trainer.net.parameters() if weight.grad is not None]).norm()
    assert norm > 1
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_no_number_ends_the_training() -> None:
    trainer = trainer_of()
    with torch.no_grad():
        trainer.net.decoder.head.weight.fill_(torch.nan)

    with pytest.raises(NanLoss, match="loss is nan at step 1"):
        trainer.advance(batch_at(0))


def test_a_gradient_that_is_no_number_ends_the_training() -> None:
    trainer = trainer_of(precision="fp32")
    trainer.net.decoder.head.weight.register_hook(lambda gradient: gradient * torch.inf)

    with pytest.raises(NanLoss, match="grad_norm"):
        trainer.advance(batch_at(0))


def test_fp16_leaves_out_a_step_whose_scaled_gradient_overflows() -> None:
    trainer = trainer_of(precision="fp16")
    scaler = trainer.parts["vae"].scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**40})
    before = trainer.net.decoder.head.weight.detach().clone()

    values = trainer.advance(batch_at(0))

    assert torch.equal(trainer.net.decoder.head.weight, before)
    assert scaler.get_scale() == 2.0**39
    assert "grad_norm" not in values


def test_a_loss_scale_that_is_about_to_grow_grows_after_a_resume() -> None:
    trainer = trainer_of(precision="fp16")
    scaler = trainer.parts["vae"].scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 8.0, "_growth_tracker": 1999})

    resumed = Trainer.resume(VAE, trainer.spec, DATA, CPU, trainer.checkpoint())
    resumed.advance(batch_at(0))

    assert resumed.parts["vae"].scaler.get_scale() == 16


def test_fp16_learns() -> None:
    trainer = trainer_of(precision="fp16", steps=60, learning_rate=5e-3)

    losses = [trainer.advance(batch_at(trainer.step))["loss"] for _ in range(30)]

    assert losses[-1] < losses[0] - 10


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_layout_is_the_one_asked_for(channels_last: bool) -> None:
    trainer = trainer_of(channels_last=channels_last)

    # A kernel with one input channel looks alike in both layouts.
    weight = trainer.net.get_parameter("encoder.map.body.1.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_what_a_spec_leaves_open_is_chosen_for_the_device() -> None:
    numerics = Numerics.choose(small_spec(), CPU)

    assert numerics.precision in ("bf16", "fp32")
    assert numerics.channels_last == native.is_available()
    assert not Numerics.choose(small_spec(network="ladder"), CPU).channels_last


def test_a_family_the_engine_has_never_heard_of_trains_part_by_part() -> None:
    trainer = Trainer(TOY, ToySpec(dataset="ds_" + "0" * 32, model="toy"), DATA, CPU)

    values = trainer.advance(batch_at(0))

    assert values.keys() == {"critic_loss", "critic_grad_norm", "margin", "generator_loss", "generator_grad_norm"}
    assert list(trainer.parts) == ["critic", "generator"]


@pytest.mark.parametrize("part", ["critic", "generator"])
def test_a_loss_changes_its_own_part_only(part: str) -> None:
    trainer = Trainer(TOY, ToySpec(dataset="ds_" + "0" * 32, model="toy"), DATA, CPU)
    trainer.parts = {part: trainer.parts[part]}
    before = {name: tensor.clone() for name, tensor in trainer.net.state_dict().items()}

    trainer.advance(batch_at(0))

    changed = {name for name, tensor in trainer.net.state_dict().items() if not torch.equal(before[name], tensor)}
    assert {name.split(".")[0] for name in changed} == {part}


def test_a_checkpoint_of_another_spec_is_refused() -> None:
    checkpoint = advanced(trainer_of(), to=1).checkpoint()

    with pytest.raises(ModelLoadFailed, match="another spec"):
        Trainer.resume(VAE, small_spec(beta=2), DATA, CPU, checkpoint)


def test_a_checkpoint_from_before_a_field_existed_is_taken() -> None:
    checkpoint = advanced(trainer_of(), to=1).checkpoint()
    spec = {name: value for name, value in checkpoint.spec.items() if name != "schedule"}

    older = Checkpoint(**{**vars(checkpoint), "spec": spec})
    assert Trainer.resume(VAE, small_spec(), DATA, CPU, older).step == 1


def test_a_checkpoint_of_other_data_is_refused() -> None:
    checkpoint = advanced(trainer_of(), to=1).checkpoint()

    with pytest.raises(ModelLoadFailed, match="other data"):
        Trainer.resume(VAE, small_spec(), DataInfo(shape=(1, 12, 13)), CPU, checkpoint)


def test_a_checkpoint_that_lacks_a_moment_is_refused() -> None:
    checkpoint = advanced(trainer_of(), to=1).checkpoint()
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.endswith("head.bias.exp_avg")}

    with pytest.raises(ModelLoadFailed, match="exp_avg"):
        Trainer.resume(VAE, small_spec(), DATA, CPU, Checkpoint(**{**vars(checkpoint), "tensors": tensors}))


def test_a_checkpoint_that_lacks_a_weight_is_refused() -> None:
    checkpoint = advanced(trainer_of(), to=1).checkpoint()
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "net.decoder.head.bias"}

    with pytest.raises(ModelLoadFailed, match=r"decoder\.head\.bias"):
        Trainer.resume(VAE, small_spec(), DATA, CPU, Checkpoint(**{**vars(checkpoint), "tensors": tensors}))


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    advanced(trainer_of(), to=1).checkpoint().write(path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "foreign": b"\x80\x04pickle" * 20, "empty": b""}[damage])

    with pytest.raises(ModelLoadFailed, match=r"checkpoint\.safetensors"):
        Checkpoint.read(path)
