"""Where memory runs out, less is computed at once: what comes out, and what cannot be helped."""

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from shared.errors import OutOfMemory
from shared.specs import FAMILIES as SPECS
from shared.specs.augmentation import Augmentation
from shared.specs.tasks import Generate
from tests.engine.conftest import CPU, DATA, bars, batch_at, small_spec
from tests.engine.toy import TOY, ToySpec
from worker.engine import training
from worker.engine.augmentation import augmented
from worker.engine.evaluation import evaluate
from worker.engine.memory import is_out_of_memory
from worker.engine.sampling import Tile, sample
from worker.engine.share import num_rows
from worker.engine.tile_width import widest
from worker.engine.training import Trainer, build
from worker.families import FAMILIES
from worker.families.family import Batch, Draw, Family, Measured
from worker.kernels.noise import Domain, Noise

VAE = FAMILIES["vae"]


def cramped(family: Family[Any, Any], room: Callable[[int], bool]) -> Family[Any, Any]:
    """The family on a device that runs out of memory when its loss is given more samples than there is room for."""

    def confined(loss: Any) -> Any:
        def measure(spec: Any, net: Any, batch: Any, noise: Any) -> Measured:
            measured = loss(spec, net, batch, noise)
            if not room(len(noise.index_B)):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return measured

        return measure

    return replace(family, losses={name: confined(loss) for name, loss in family.losses.items()})


def trained(family: Family[Any, Any], spec: Any, steps: int = 3) -> Trainer[Any, Any]:
    trainer = Trainer(family, spec, DATA, CPU)
    while trainer.step < steps:
        trainer.advance(batch_at(trainer.step))
    return trainer


@pytest.mark.parametrize(("room", "micro_batch"), [(16, None), (15, 8), (7, 4), (3, 2), (1, 1)])
def test_gradients_of_pieces_add_up_to_that_of_the_batch(room: int, micro_batch: int | None) -> None:
    spec = small_spec(precision="fp32", network="mlp")
    whole, cut = trained(VAE, spec), trained(cramped(VAE, lambda rows: rows <= room), spec)

    assert cut.numerics.micro_batch == micro_batch
    for one, other in zip(whole.net.parameters(), cut.net.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("room", [16, 7])
def test_a_step_descends_the_gradient_of_its_own_batch(room: int) -> None:
    """Computed beside the engine: nothing is left of the step before, and pieces count by their share."""
    spec = small_spec(precision="fp32", network="mlp", grad_clip=1e6)
    trainer = trained(cramped(VAE, lambda rows: rows <= room), spec, steps=1)
    before = deepcopy(trainer.net)

    figures = trainer.advance(batch_at(1))

    noise = Noise.of_step(Domain.TRAINING, spec.seed, 1, range(16), CPU)
    expected = VAE.losses["vae"](spec, before, batch_at(1), noise).loss
    expected.backward()
    assert figures["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(before.parameters(), trainer.net.parameters(), strict=True):
        assert one.grad is other.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("room", "found"), [(64, 16), (16, 16), (15, 8), (5, 4), (1, 1)])
def test_what_fits_is_found_before_the_first_step(room: int, found: int) -> None:
    """By a search that leaves no trace: the step is the one of who was told how many fit."""
    spec = ToySpec(dataset="ds_" + "0" * 32, model="toy", batch_size=16, micro_batch="auto", steps=8)
    searched = trained(cramped(TOY, lambda rows: rows <= room), spec)

    told = trained(TOY, spec.model_copy(update={"micro_batch": found}))

    assert (searched.numerics.micro_batch, searched.numerics.halved_at) == (found, ())
    assert same_state(searched, told)


def test_what_was_found_is_not_searched_for_again() -> None:
    spec = small_spec(micro_batch="auto")
    checkpoint = trained(cramped(VAE, lambda rows: rows <= 5), spec).checkpoint()

    # There is more room by now.
    resumed = Trainer.resume(VAE, spec, DATA, CPU, checkpoint)
    resumed.advance(batch_at(3))

    assert resumed.numerics.micro_batch == 4


def test_a_search_that_finds_no_room_at_all() -> None:
    with pytest.raises(OutOfMemory, match="not even one sample"):
        trained(cramped(VAE, lambda rows: False), small_spec(micro_batch="auto"))


def test_as_many_samples_as_asked_for_go_through_the_network_at_once() -> None:
    calls: list[int] = []

    trained(cramped(VAE, lambda rows: calls.append(rows) is None), small_spec(micro_batch=6), steps=1)

    assert calls == [6, 6, 4]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"family": "vae", "batch_size": 4, "micro_batch": 5}, "must not exceed"),
        ({"family": "gan", "network": "dcgan", "micro_batch": 2}, "depend on one another"),
    ],
)
def test_pieces_that_make_no_sense_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        SPECS[fields["family"]].model_validate({"dataset": "ds_" + "0" * 32, "model": "m", **fields})


def same_state(one: Trainer[Any, Any], other: Trainer[Any, Any]) -> bool:
    tensors, others = one.checkpoint().tensors, other.checkpoint().tensors
    return tensors.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )


def test_what_fits_at_once_is_not_touched() -> None:
    """A batch that is one piece has the bits it always had: no sum and no factor of one comes in between."""
    spec = small_spec()
    one, other = trained(VAE, spec), trained(cramped(VAE, lambda rows: True), spec)

    assert all(torch.equal(a, b) for a, b in zip(one.net.parameters(), other.net.parameters(), strict=True))


def test_each_part_is_updated_once_in_a_step_that_runs_out_of_memory() -> None:
    spec = ToySpec(dataset="ds_" + "0" * 32, model="toy")
    calls: list[int] = []
    # The first part fits whole, then the second does not.
    room = cramped(TOY, lambda rows: bool(calls.append(rows)) or len(calls) != 2)

    trainer = trained(room, spec, steps=1)

    assert calls == [16, 16, 8, 8]
    states = [state for part in trainer.parts.values() for state in part.optimizer.state.values()]
    assert {int(state["step"]) for state in states} == {1}


ALTERED: dict[str, Any] = {"flip": 0.5, "shift": 2, "contrast": 0.3}


def cramped_augmentation(monkeypatch: pytest.MonkeyPatch, room: int) -> list[int]:
    """Let memory run out where more images are altered at once than there is room for; the sizes that were tried."""
    calls: list[int] = []

    def confined(batch: Batch, asked: Augmentation, noise: Noise) -> Batch:
        calls.append(num_rows(batch))
        if num_rows(batch) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return augmented(batch, asked, noise)

    monkeypatch.setattr(training, "augmented", confined)
    return calls


@pytest.mark.parametrize("micro_batch", [None, "auto"])
def test_what_does_not_fit_because_it_is_altered_is_cut_too(micro_batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ToySpec(dataset="ds_" + "0" * 32, model="toy", augmentation=ALTERED, micro_batch=micro_batch)  # pyright: ignore[reportArgumentType]
    told = trained(TOY, spec.model_copy(update={"micro_batch": 4}))
    cramped_augmentation(monkeypatch, room=5)

    found = trained(TOY, spec)

    assert found.numerics.micro_batch == 4
    assert same_state(found, told)


def test_images_are_altered_once_though_memory_runs_out_for_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = cramped_augmentation(monkeypatch, room=16)
    spec = ToySpec(dataset="ds_" + "0" * 32, model="toy", augmentation=ALTERED)  # pyright: ignore[reportArgumentType]

    trained(cramped(TOY, lambda rows: rows <= 5), spec, steps=2)

    assert calls == [16, 4, 4, 4, 4]


def test_not_even_one_sample() -> None:
    with pytest.raises(OutOfMemory, match="not even one sample"):
        trained(cramped(VAE, lambda rows: False), small_spec())


def test_an_evaluation_is_cut_too() -> None:
    trainer = trained(VAE, small_spec(precision="fp32"))
    expected = evaluate(trainer, [{"image": bars()}])

    trainer.family = cramped(VAE, lambda rows: rows <= 5)

    assert evaluate(trainer, [{"image": bars()}]) == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_tells_the_loss() -> None:
    trainer = trained(VAE, small_spec(precision="fp32", beta=3))

    values = evaluate(trainer, [{"image": bars()}])

    assert values["loss"] == pytest.approx(values["reconstruction"] + 3 * values["kl"], rel=1e-5)


def test_the_losses_of_parts_are_told_apart() -> None:
    trainer = trained(TOY, ToySpec(dataset="ds_" + "0" * 32, model="toy"))

    assert evaluate(trainer, [batch_at(0)]).keys() == {"critic_loss", "generator_loss", "margin"}


class Cramped(nn.Module):
    """A VAE that runs out of memory when it shall decode too many latents."""

    def __init__(self, net: Any, room: Callable[[int], bool]) -> None:
        super().__init__()
        self.net, self.room = net, room

    def decode(self, latents: Tensor) -> Tensor:
        decoded = self.net.decode(latents)
        if not self.room(len(latents)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decoded


def drawn(net: nn.Module, width: int | None = None) -> tuple[Tile[Any], dict[int, Tensor]]:
    draws = [Draw(request=Generate(task="generate", model="bars", seed=9), index=index) for index in range(20)]
    tile = Tile(net, VAE.tasks["generate"](small_spec(), DATA), draws[0], CPU, width=width)
    return tile, {draw.index: image for draw, image in sample(tile, draws)}


@pytest.mark.parametrize(("room", "width"), [(7, 4), (3, 1), (1, 1)])
def test_a_tile_that_does_not_fit_is_halved_and_draws_what_one_of_that_width_draws(room: int, width: int) -> None:
    net = build(VAE, small_spec(), DATA).eval()

    tile, images = drawn(Cramped(net, lambda rows: rows <= room))

    assert tile.width == width
    assert list(images) == list(range(20))
    _, expected = drawn(net, width)
    assert all(torch.equal(image, expected[index]) for index, image in images.items())


def test_a_tile_that_stops_fitting_loses_no_draw() -> None:
    net = build(VAE, small_spec(), DATA).eval()
    steps: list[int] = []

    tile, images = drawn(Cramped(net, lambda rows: bool(steps.append(rows)) or len(steps) != 3))

    assert tile.width == 4
    assert sorted(images) == list(range(20))


def test_a_tile_of_one_cannot_be_halved() -> None:
    net = build(VAE, small_spec(), DATA).eval()

    with pytest.raises(OutOfMemory, match="not even one sample"):
        drawn(Cramped(net, lambda rows: False))


@pytest.mark.parametrize(("below", "device", "width"), [(64, "cuda", 32), (2, "cuda", 1), (8, "cpu", 4)])
def test_the_next_width_is_half(below: int, device: str, width: int) -> None:
    assert widest(lambda slots: torch.zeros(slots, 64).sigmoid(), torch.device(device), below=below) == width


def test_the_next_width_gives_all_slots_the_same_bits() -> None:
    """24 numbers a slot: four slots leave a rest of 32, which is no whole vector."""
    assert widest(lambda slots: torch.zeros(slots, 24).sigmoid(), CPU, below=8) == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("GET was unable to find an engine to execute this computation after trying 12 plans."),
    ],
)
def test_the_ways_in_which_memory_runs_out(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory")])
def test_other_errors_are_not_about_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_a_process_with_too_little_memory_trains_on_and_stays_well() -> None:
    """With a real limit of the operating system: the batch is halved, and afterwards all goes on as before."""
    command = [sys.executable, "-m", "tests.engine.elsewhere", "confined"]
    done = subprocess.run(command, check=True, timeout=110, capture_output=True, text=True)

    before, confined, after = done.stdout.split()
    assert before == after == "4096"
    assert 1 <= int(confined) < 4096
