"""What a training does about damaged checkpoints, a loss that is no number, and a more urgent job."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load as load_safetensors

from shared.errors import NanLoss, UploadFailed
from tests.jobs.folder_run import FolderRun
from worker.engine.checkpoint import Checkpoint
from worker.families import FAMILIES
from worker.families.family import Measured
from worker.jobs import train as executor
from worker.jobs.background import Background
from worker.jobs.train import train
from worker.run import Stopped, StopReason, StoredObject

MakeRun = Callable[..., FolderRun]
Plant = Callable[[Callable[[int, int], Any]], None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Multiply a training's losses by ``factor(step, rows)``, where ``step`` counts from 0; it may also raise."""

    def planted(factor: Callable[[int, int], Any]) -> None:
        (name, loss) = next(iter(FAMILIES["vae"].losses.items()))

        def changed(spec: Any, net: Any, batch: Any, noise: Any) -> Measured:
            measured = loss(spec, net, batch, noise)
            if not net.training:
                return measured
            return replace(measured, loss=measured.loss * factor(noise.step_B[0].item(), len(noise.step_B)))

        monkeypatch.setattr(executor, "FAMILIES", {"vae": replace(FAMILIES["vae"], losses={name: changed})})

    return planted


def stopped(run: FolderRun, step: int, reason: StopReason = "interrupt") -> FolderRun:
    run.stop_at = (step, reason)
    with pytest.raises(Stopped, match=reason):
        train(run)
    return run


def weights(run: FolderRun) -> dict[str, bytes]:
    body = (run.folder / train(run)["weights"]["key"]).read_bytes()
    return {name: tensor.tobytes() for name, tensor in load_safetensors(body).items()}


def trained_steps(run: FolderRun) -> list[int]:
    return [step for step, _, values in run.steps if values]


@pytest.fixture(autouse=True)
def stored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every checkpoint in storage before the next step begins, so that each test knows which there are."""
    start = Background.start

    def waited_for(background: Background, work: Callable[[], None]) -> None:
        start(background, work)
        background.join()

    monkeypatch.setattr(Background, "start", waited_for)


@pytest.fixture
def make_run(train_run: MakeRun) -> MakeRun:
    """A run with a checkpoint every three steps."""
    return partial(train_run, checkpoint_every=3)


@pytest.fixture
def broken_off(make_run: MakeRun) -> FolderRun:
    """A training with checkpoints of the steps 3, 6 and 8, where it was stopped."""
    run = make_run()
    return stopped(run, 8)


def test_a_checkpoint_says_what_is_kept_and_how_good_it_is(broken_off: FolderRun) -> None:
    described = [artifact.metadata for artifact in broken_off.artifacts("checkpoint")]

    held_out = {step: values["loss"] for step, split, values in broken_off.measured if split == "held_out"}
    assert [(about["step"], about["keep"]) for about in described] == [(3, 3), (6, 3), (8, 3)]
    assert [about["score"] for about in described] == [None, held_out[4], held_out[4]]


def test_a_resumed_training_knows_its_score(make_run: MakeRun) -> None:
    first = stopped(make_run(), 5)

    resumed = stopped(make_run(resume=[first]), 7)

    scores = [run.artifacts("checkpoint")[-1].metadata["score"] for run in (first, resumed)]
    assert scores[0] == scores[1] == first.measured[1][2]["loss"]


def damage(run: FolderRun, step: int, body: bytes = b"something else") -> None:
    (checkpoint,) = [found for found in run.checkpoints() if found["step"] == step]
    (run.folder / checkpoint["key"]).write_bytes(body)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(make_run: MakeRun, broken_off: FolderRun) -> None:
    damage(broken_off, 8)
    resumed = make_run(resume=[broken_off])

    assert weights(resumed) == weights(make_run())
    assert trained_steps(resumed)[0] == 7
    assert "The checkpoint of step 8 is damaged (SHA-256 " in resumed.logs[0]
    assert f"expected {broken_off.checkpoints()[0]['sha256']}); going on from step 6." in resumed.logs[0]


def test_a_checkpoint_that_is_gone_or_none_at_all_is_passed_over(make_run: MakeRun, broken_off: FolderRun) -> None:
    (broken_off.folder / broken_off.checkpoints()[0]["key"]).unlink()
    resumed = make_run(resume=[broken_off])
    nonsense = broken_off.folder / "nonsense"
    nonsense.write_bytes(b"something else")
    resumed.fetch = lambda stored: nonsense if "00000006" in stored.key else FolderRun.fetch(resumed, stored)  # type: ignore[method-assign]

    assert weights(resumed) == weights(make_run())
    assert trained_steps(resumed)[0] == 4
    assert [log.split(" (")[0] for log in resumed.logs] == [
        "The checkpoint of step 8 is gone; going on from step 6.",
        "The checkpoint of step 6 cannot be used",
        "Going on from step 3.",
    ]


def test_without_an_intact_checkpoint_a_training_starts_afresh_and_says_so(
    make_run: MakeRun, broken_off: FolderRun
) -> None:
    for step in (3, 6, 8):
        damage(broken_off, step)
    resumed = make_run(resume=[broken_off])

    assert weights(resumed) == weights(make_run())
    assert trained_steps(resumed) == list(range(1, 13))
    assert resumed.logs[-1].endswith("; starting afresh.")


def test_a_training_gives_way_at_the_next_checkpoint_and_goes_on_exactly(make_run: MakeRun) -> None:
    run = stopped(make_run(), 2, "preempt")

    assert trained_steps(run) == [1, 2, 3]
    assert [found["step"] for found in run.checkpoints()] == [3]
    assert weights(make_run(resume=[run])) == weights(make_run())


def test_a_milestone_that_was_broken_off_is_made_up_for(make_run: MakeRun) -> None:
    """Stopped between the preview and the figures of step 4: the next attempt begins with these."""
    train(straight := make_run())
    run = make_run()
    run.before_publish = lambda kind: setattr(run, "stop_at", (4, "interrupt")) if kind == "preview" else None
    with pytest.raises(Stopped):
        train(run)

    train(resumed := make_run(resume=[run]))

    assert run.measured + resumed.measured == straight.measured
    previews = [artifact.name for both in (run, resumed) for artifact in both.artifacts("preview")]
    assert previews == [artifact.name for artifact in straight.artifacts("preview")]


def test_a_stop_is_obeyed_although_the_last_checkpoint_cannot_be_stored(make_run: MakeRun) -> None:
    run = make_run()

    def refuse(kind: str) -> None:
        if kind == "checkpoint" and run.steps[-1][0] > 6:
            raise UploadFailed("no room")

    run.before_publish = refuse
    stopped(run, 7)

    assert "The checkpoint of step 7 was not stored (no room); the last is of step 6." in run.logs[-1]


@pytest.mark.parametrize(("at", "back_to"), [(2, 0), (7, 6)])
def test_a_loss_that_is_no_number_once_leaves_no_trace_in_the_weights(
    make_run: MakeRun, plant: Plant, at: int, back_to: int
) -> None:
    expected = weights(make_run())
    seen: list[int] = []
    plant(lambda step, rows: torch.nan if step == at and not (seen.count(step) or seen.append(step)) else 1)
    run = make_run()

    assert weights(run) == expected
    assert trained_steps(run) == [*range(1, at + 1), *range(back_to + 1, 13)]
    assert run.logs == [f"loss is nan at step {at + 1}: going back to step {back_to}, this once."]


def test_a_loss_that_stays_no_number_ends_the_training(make_run: MakeRun, plant: Plant) -> None:
    plant(lambda step, rows: torch.nan if step == 7 else 1)
    run = make_run()

    with pytest.raises(NanLoss, match="loss is nan at step 8, after the training had gone back"):
        train(run)

    assert trained_steps(run) == [*range(1, 8), 7]


def test_a_training_goes_back_once_in_all_its_attempts(make_run: MakeRun, plant: Plant) -> None:
    """The attempt dies at the first step after going back: what it stored says that it did."""
    plant(lambda step, rows: torch.nan if step == 7 else 1)
    run = make_run()
    with pytest.raises(NanLoss):
        train(run)

    resumed = make_run(resume=[run])
    with pytest.raises(NanLoss):
        train(resumed)

    assert trained_steps(resumed) == [7]


def test_going_back_finds_a_damaged_checkpoint_too(make_run: MakeRun, plant: Plant) -> None:
    run = make_run()

    def factor(step: int, rows: int) -> float:
        if step != 7 or len(run.logs):
            return 1
        damage(run, 6)
        return torch.nan

    plant(factor)
    train(run)

    assert trained_steps(run) == [*range(1, 8), *range(4, 13)]
    assert "step 6 is damaged" in run.logs[0]
    assert "going back to step 3" in run.logs[1]


def test_a_stop_on_the_way_back_is_obeyed(make_run: MakeRun, plant: Plant) -> None:
    plant(lambda step, rows: torch.nan if step == 7 else 1)
    run = make_run()

    def fetch(stored: StoredObject) -> Path:
        if "checkpoint" in stored.key:
            raise Stopped("interrupt")
        return FolderRun.fetch(run, stored)

    run.fetch = fetch  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        train(run)

    assert [found["step"] for found in run.checkpoints()] == [6, 3]


def numerics_of(run: FolderRun) -> dict[str, Any]:
    path = Path(run.folder / run.checkpoints()[0]["key"])
    return dict(Checkpoint.read(path).numerics)


def no_more_than(most: int, *, since: int = 0) -> Callable[[int, int], float]:
    """A device with room for so many samples at a time, from a step on."""

    def factor(step: int, rows: int) -> float:
        if rows > most and step >= since:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return 1

    return factor


def test_a_batch_that_does_not_fit_is_cut_until_it_does(make_run: MakeRun, plant: Plant) -> None:
    whole = train(straight := make_run(precision="fp32"))
    plant(no_more_than(5))

    result = train(run := make_run(precision="fp32"))

    assert (result["fingerprint"]["micro_batch"], result["fingerprint"]["halved_at"]) == (4, [0, 0])
    assert (whole["reproducibility"], result["reproducibility"]) == ("same_hardware", "same_hardware")
    assert run.logs == ["Memory ran out at step 1: going on with 4 samples at a time, to the same sum."]
    curves = [[values for _, _, values in each.steps if values] for each in (straight, run)]
    for expected, values in zip(*curves, strict=True):
        assert values == pytest.approx(expected, rel=1e-3)


def test_the_cut_is_part_of_a_checkpoint(make_run: MakeRun, plant: Plant) -> None:
    """The attempt that goes on has room enough, and computes as the one before did."""
    plant(no_more_than(5, since=3))
    straight = train(make_run())
    run = stopped(make_run(), 7)
    plant(lambda step, rows: 1)

    resumed = train(make_run(resume=[run]))

    assert (numerics_of(run)["micro_batch"], numerics_of(run)["halved_at"]) == (4, [3, 3])
    assert resumed["weights"]["sha256"] == straight["weights"]["sha256"]
    assert (resumed["reproducibility"], resumed["fingerprint"]["halved_at"]) == ("none", [3, 3])


def test_the_weights_of_a_cut_training_are_those_of_a_whole_one_but_for_rounding(
    make_run: MakeRun, plant: Plant
) -> None:
    whole = train(run := make_run(precision="fp32"))
    tensors = load_safetensors((run.folder / whole["weights"]["key"]).read_bytes())
    plant(no_more_than(3))

    cut = train(make_run(precision="fp32"))

    for name, tensor in load_safetensors((run.folder / cut["weights"]["key"]).read_bytes()).items():
        assert tensor == pytest.approx(tensors[name], abs=1e-4)
