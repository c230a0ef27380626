"""What a device repeats is what it would have been told: the same bits, or plain steps and the reason."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.errors import NanLoss
from shared.specs import FAMILIES as SPECS
from tests.engine.conftest import CPU, DATA, batch_at, small_spec
from tests.engine.tape import TapeRecorder
from tests.engine.toy import TOY, ToySpec
from worker.engine.capture import Act, Repeats, Tensors
from worker.engine.captured_steps import CapturedSteps, captured_steps
from worker.engine.numerics import Numerics
from worker.engine.team import ALONE, Team
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.families.family import Batch, Family, Measured
from worker.kernels import native

VAE = FAMILIES["vae"]
PLAIN = {"precision": "fp32", "channels_last": False}
FP32 = Numerics(precision="fp32", channels_last=False, num_threads=1)


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape does not hear what our C++ kernels do; a GPU has none of them."""
    monkeypatch.setattr(native, "is_available", lambda: False)


class Toy(ToySpec):
    """The parts take turns; the step's number is asked for and decides."""

    def trains(self, part: str, step: int) -> bool:
        return part == "critic" or step % 2 == 1

    def decided_by(self, step: int) -> int:
        return step // 8


def toy(**fields: Any) -> Toy:
    common = {"dataset": "ds_" + "0" * 32, "model": "toy", "batch_size": 16, "steps": 16, "warmup_steps": 4}
    return Toy.model_validate(common | PLAIN | fields)


def told_the_step(spec: Any, net: Any, batch: Batch, noise: Any) -> Measured:
    """A loss that is another one in the second half."""
    made = TOY.losses["critic"](spec, net, batch, noise)
    return replace(made, loss=made.loss * (1 + noise.step // 8))


def answering(ask: Callable[[Any, Tensor], object]) -> Family[Any, Any]:
    """The family, its loss asking something."""

    def loss(spec: Any, net: Any, batch: Batch, noise: Any) -> Measured:
        made = VAE.losses["vae"](spec, net, batch, noise)
        ask(noise, made.loss)
        return made

    return replace(VAE, losses={"vae": loss})


def numerics_of(spec: Any) -> Numerics:
    pieces = spec.micro_batch if isinstance(spec.micro_batch, int) else None
    return replace(FP32, precision=spec.precision, micro_batch=pieces)


def trainer_of(family: Family[Any, Any], spec: Any, recorder: Any = None) -> Trainer[Any, Any]:
    trainer: Trainer[Any, Any] = Trainer(family, spec, DATA, CPU, numerics_of(spec))
    trainer.captured = CapturedSteps(Repeats(recorder))
    return trainer


def steps_of(trainer: Trainer[Any, Any], num: int = 8) -> list[Mapping[str, float]]:
    return [trainer.advance(batch_at(trainer.step)) for _ in range(num)]


def same_state(one: Trainer[Any, Any], other: Trainer[Any, Any]) -> bool:
    tensors, others = one.checkpoint().tensors, other.checkpoint().tensors
    return all(torch.equal(tensors[name], others[name]) for name in tensors.keys() | others.keys())


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        (VAE, small_spec(**PLAIN, network="mlp", weight_decay=0.1)),
        (VAE, small_spec(**PLAIN, network="conv", ema="power", augmentation={"flip": 0.5, "contrast": 0.2})),
        (VAE, small_spec(**PLAIN | {"precision": "bf16"}, network="mlp")),
        (VAE, small_spec(**PLAIN, micro_batch=6)),
        (VAE, small_spec(**PLAIN, micro_batch="auto")),
        (TOY, toy()),
        (replace(TOY, losses={**TOY.losses, "critic": told_the_step}), toy()),
    ],
    ids=["mlp", "altered", "bf16", "pieces", "fitted", "in turns", "told the step"],
)
def test_repeated_steps_come_to_the_bits_of_plain_ones(family: Family[Any, Any], spec: Any) -> None:
    recorder = TapeRecorder()
    plain, repeated = trainer_of(family, spec), trainer_of(family, spec, recorder)

    figures = [(plain.advance(batch), repeated.advance(batch)) for batch in map(batch_at, range(16))]

    assert [one for one, _ in figures] == [other for _, other in figures]
    assert same_state(plain, repeated)
    assert recorder.num_played >= 8 and repeated.captured.repeats.trouble is None


def test_of_each_kind_of_step_the_third_is_recorded_and_all_later_ones_are_repeated() -> None:
    recorder = TapeRecorder()
    trainer = trainer_of(TOY, toy(), recorder)

    steps_of(trainer, 16)

    assert trainer.captured.repeats.num_recorded == 4
    assert recorder.num_played == 8


def test_kinds_that_never_come_again_are_forgotten() -> None:
    """Each step of a burn-in is another: none is recorded, and none is remembered for long."""
    spec = SPECS["gan"].model_validate(
        {"family": "gan", "dataset": "ds_" + "0" * 32, "model": "m", "network": "mlp", "hidden_dim": 8, "steps": 20}
        | {"objective": "r3gan", "burn_in_steps": 8, "batch_size": 16, **PLAIN}
    )
    trainer = trainer_of(FAMILIES["gan"], spec, TapeRecorder())

    steps_of(trainer, 8)
    during = trainer.captured.repeats.num_recorded
    steps_of(trainer, 4)

    assert (during, trainer.captured.repeats.num_recorded) == (0, 1)
    assert len(trainer.captured.repeats._kinds) <= 4


class Breaking(TapeRecorder):
    """A device that says at the end of a recording that it cannot be."""

    def record(self, act: Act) -> tuple[Callable[[], object], Tensors]:
        super().record(act)
        raise RuntimeError("operation failed due to a previous error during capture\nwith a long explanation")


@pytest.mark.parametrize(
    ("family", "recorder", "reason"),
    [
        (VAE, Breaking(), "RuntimeError: operation failed due to a previous error during capture"),
        (answering(lambda noise, loss: loss.item()), TapeRecorder(), "main memory waits"),
        (answering(lambda noise, loss: noise.step), TapeRecorder(), "main memory waits"),
    ],
    ids=["fails", "asks for a number", "asks for the step"],
)
def test_what_cannot_be_recorded_goes_on_plainly_as_if_nobody_had_tried(
    family: Family[Any, Any], recorder: TapeRecorder, reason: str
) -> None:
    plain, tried = trainer_of(family, small_spec(**PLAIN)), trainer_of(family, small_spec(**PLAIN), recorder)

    steps_of(plain)
    steps_of(tried)

    assert same_state(plain, tried)
    assert tried.captured.repeats.trouble == reason
    assert recorder.num_played == 0


def test_memory_that_runs_out_beside_what_was_recorded_is_taken_from_that_first() -> None:
    """Smaller pieces would be other bits."""
    fails: list[bool] = []

    def fail(noise: Any, loss: Tensor) -> None:
        if fails and fails.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")

    def odd_one_out(trainer: Trainer[Any, Any]) -> None:
        steps_of(trainer, 4)
        trainer.advance({"image": batch_at(4)["image"][:12]})
        steps_of(trainer, 3)

    plain, repeated = (trainer_of(answering(fail), small_spec(**PLAIN), one) for one in (None, TapeRecorder()))
    odd_one_out(plain)
    steps_of(repeated, 4)
    fails.append(True)
    repeated.advance({"image": batch_at(4)["image"][:12]})
    steps_of(repeated, 3)

    assert repeated.captured.repeats.trouble == "memory ran out beside what was recorded"
    assert repeated.numerics.halved_at == ()
    assert same_state(plain, repeated)


def test_a_training_resumes_from_among_repeated_steps() -> None:
    spec = small_spec(**PLAIN)
    plain, repeated = trainer_of(VAE, spec), trainer_of(VAE, spec, TapeRecorder())
    steps_of(plain)
    steps_of(repeated, 5)

    resumed = Trainer.resume(VAE, spec, DATA, CPU, repeated.checkpoint())
    resumed.captured = CapturedSteps(Repeats(TapeRecorder()))
    steps_of(resumed, 3)

    assert same_state(plain, resumed)


def test_a_repeated_step_that_comes_to_no_number_is_noticed() -> None:
    trainer = trainer_of(VAE, small_spec(**PLAIN), TapeRecorder())
    steps_of(trainer, 4)

    with torch.no_grad():
        trainer.net.get_parameter("encoder.map.body.0.weight").fill_(torch.nan)

    with pytest.raises(NanLoss, match="loss is nan at step 5"):
        steps_of(trainer, 1)


@pytest.mark.parametrize(
    ("device", "team", "numerics", "fields", "trouble"),
    [
        ("cpu", ALONE, FP32, {"captured": True}, "the device is no GPU"),
        ("cuda", Team(0, 2), FP32, {"captured": True}, "it has several devices"),
        ("cuda", ALONE, replace(FP32, precision="fp16"), {"captured": True}, "in fp16"),
        ("cuda", ALONE, FP32, {"captured": True, "network": "conv", "compiled_from": 3}, "to be compiled"),
        ("cuda", Team(0, 2), FP32, {}, None),
    ],
)
def test_who_asks_for_what_cannot_be_is_told_why(
    device: str, team: Team, numerics: Numerics, fields: dict[str, Any], trouble: str | None
) -> None:
    repeats = captured_steps(small_spec(**fields), numerics, torch.device(device), team).repeats

    assert not repeats.is_on
    assert repeats.trouble is None if trouble is None else trouble in str(repeats.trouble)
