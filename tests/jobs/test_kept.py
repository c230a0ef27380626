"""What an attempt at drawing samples has finished is not drawn again by the next, and is the same to the byte."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from shared.errors import UploadFailed
from tests.jobs.conftest import DATASET_ID, DIFFUSION
from tests.jobs.folder_desk import FolderDesk, served
from tests.jobs.folder_run import FolderRun
from tests.jobs.test_generate import samples_of
from worker.engine.sampling import Tile
from worker.jobs import kept, order
from worker.jobs.generate import generate, serve
from worker.jobs.train import train
from worker.run import Stopped

MakeRun = Callable[..., FolderRun]
ASKED: dict[str, Any] = {"base": DIFFUSION, "num_samples": 20, "solver": "euler", "steps": 3, "seed": 5}
NUM_STEPS = 20 * 3


@pytest.fixture
def attempt(train_run: MakeRun, generate_run: MakeRun) -> MakeRun:
    """An attempt at the same job; ``after`` the one that broke off."""
    trained = train(train_run(base=DIFFUSION))

    def make(after: FolderRun | None = None, **spec: Any) -> FolderRun:
        resume = {"resume": after.checkpoints()} if after is not None else {}
        return generate_run(trained, inputs=resume, **(ASKED | spec))

    return make


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of samples that entered a tile."""
    indices: list[int] = []
    admit = Tile.admit

    def noting(tile: Tile[Any], draws: Any) -> None:
        indices.extend(draw.index for draw in draws)
        admit(tile, draws)

    monkeypatch.setattr(Tile, "admit", noting)
    return indices


def interrupted(run: FolderRun, reason: Any = "interrupt", at: int = NUM_STEPS // 2) -> FolderRun:
    run.stop_at = (at, reason)
    with pytest.raises(Stopped):
        generate(run)
    return run


@pytest.mark.parametrize("reason", ["interrupt", "pause"])
def test_an_attempt_that_had_to_leave_is_gone_on_with(attempt: MakeRun, drawn: list[int], reason: str) -> None:
    expected = generate(whole := attempt())
    broken = interrupted(attempt(), reason)
    [left] = broken.artifacts("checkpoint")
    done = json.loads(broken.body(left))["samples"]
    drawn.clear()

    result = generate(run := attempt(broken))

    assert 0 < len(done) < 20
    assert sorted(drawn) == [index for index in range(20) if str(index) not in done]
    assert run.logs == [f"Going on after {len(done)} of 20 samples."]
    assert result == expected
    assert samples_of(run) == samples_of(whole)
    assert [run.body(one) for one in run.artifacts("sheet")] == [whole.body(one) for one in whole.artifacts("sheet")]
    assert run.steps[-1][:2] == (NUM_STEPS, NUM_STEPS)


def test_one_that_broke_off_is_gone_on_with_from_its_last_list(
    attempt: MakeRun, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(attempt())["sha256"]
    monkeypatch.setattr(kept, "EVERY", 0.0)
    broken = attempt()

    def break_off(kind: str) -> None:
        if len(broken.artifacts("sample")) == 15 and kind == "sample":
            raise UploadFailed("storage is full")

    broken.before_publish = break_off
    with pytest.raises(UploadFailed):
        generate(broken)
    last = len(json.loads(broken.body(broken.artifacts("checkpoint")[-1]))["samples"])
    drawn.clear()

    assert generate(attempt(broken))["sha256"] == expected
    assert 0 < last <= 15
    assert len(drawn) == 20 - last


def test_an_attempt_whose_samples_were_all_stored_draws_nothing(attempt: MakeRun, drawn: list[int]) -> None:
    expected = generate(attempt())
    broken = interrupted(attempt(), at=NUM_STEPS)
    drawn.clear()

    assert generate(attempt(broken)) == expected
    assert drawn == []


@pytest.mark.parametrize("what", ["damaged", "gone", "list damaged", "list gone"])
def test_what_is_not_intact_is_drawn_again(attempt: MakeRun, drawn: list[int], what: str) -> None:
    expected = generate(attempt())
    broken = interrupted(attempt())
    [left] = broken.artifacts("checkpoint")
    done = json.loads(broken.body(left))["samples"]
    lost = left.stored.key if what.startswith("list") else next(iter(done.values()))["key"]
    if what.endswith("gone"):
        (broken.folder / lost).unlink()
    else:
        (broken.folder / lost).write_bytes(b"something else")
    drawn.clear()

    assert generate(attempt(broken)) == expected
    assert len(drawn) == (20 if what.startswith("list") else 20 - len(done) + 1)


def test_samples_that_were_computed_otherwise_are_drawn_again(
    attempt: MakeRun, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result has one fingerprint."""
    broken = interrupted(attempt())
    found = order.fingerprint
    monkeypatch.setattr(order, "fingerprint", lambda device: found(device) | {"device": "another"})
    drawn.clear()

    result = generate(run := attempt(broken))

    assert result["fingerprint"]["device"] == "another"
    assert (len(drawn), run.logs) == (20, [])


def test_a_canceled_job_keeps_nothing(attempt: MakeRun) -> None:
    assert interrupted(attempt(), "cancel").artifacts("checkpoint") == []


def test_arrays_are_kept_as_well_as_pictures(train_run: MakeRun, generate_run: MakeRun, drawn: list[int]) -> None:
    trained = train(train_run())
    asked: dict[str, Any] = {"task": "encode", "dataset": DATASET_ID, "num_samples": 30}
    expected = generate(generate_run(trained, **asked))
    broken = generate_run(trained, **asked)
    interrupted(broken, at=1)
    drawn.clear()

    again = generate_run(trained, inputs={"resume": broken.checkpoints()}, **asked)

    assert generate(again) == expected
    assert drawn == []


def test_who_is_asked_for_the_device_finishes_what_is_in_the_tile_and_begins_nothing(
    attempt: MakeRun, drawn: list[int]
) -> None:
    expected = generate(whole := attempt())
    drawn.clear()
    broken = interrupted(attempt(), "preempt", at=1)
    [left] = broken.artifacts("checkpoint")
    done = json.loads(broken.body(left))["samples"]

    assert sorted(map(int, done)) == sorted(drawn) == list(range(8))
    assert generate(run := attempt(broken)) == expected
    assert samples_of(run) == samples_of(whole)
    assert len(drawn) == 20


def test_one_that_gives_way_again_and_again_ends_after_as_many_tiles_as_ever(
    attempt: MakeRun, drawn: list[int]
) -> None:
    """And neither draws nor stores a sample twice on the way."""
    expected = generate(attempt())
    drawn.clear()
    run, stored = attempt(), 0
    for _ in range(2):
        interrupted(run, "preempt", at=1)
        stored += len(run.artifacts("sample"))
        run = attempt(run)
    run.stop_at = (1, "preempt")

    assert generate(run) == expected
    assert sorted(drawn) == list(range(20))
    assert stored == 16
    assert len(run.artifacts("sample")) == 20


def test_who_cannot_use_what_was_left_does_not_leave_before_it_has_more(
    attempt: MakeRun, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two devices that compute differently would else hand a job back and forth for ever."""
    broken = interrupted(attempt(), "preempt", at=1)
    found = order.fingerprint
    monkeypatch.setattr(order, "fingerprint", lambda device: found(device) | {"device": "another"})
    drawn.clear()

    other = interrupted(attempt(broken), "preempt", at=1)

    [left] = other.artifacts("checkpoint")
    assert len(json.loads(other.body(left))["samples"]) == len(drawn) > 8


def test_who_broke_off_with_less_than_was_there_leaves_what_was_there(
    attempt: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = interrupted(attempt(), "preempt", at=8 * 3 + 1)
    found = order.fingerprint
    monkeypatch.setattr(order, "fingerprint", lambda device: found(device) | {"device": "another"})

    other = interrupted(attempt(broken), "interrupt", at=8 * 3 + 1)

    assert 0 < len(other.artifacts("sample")) < len(broken.artifacts("sample"))
    assert other.artifacts("checkpoint") == []


def test_jobs_that_share_a_tile_give_way_each_by_itself(attempt: MakeRun) -> None:
    expected = [generate(attempt(seed=seed))["sha256"] for seed in (5, 6)]
    leaving, staying = attempt(seed=5), attempt(seed=6)
    leaving.stop_at = (1, "preempt")

    results = served(leaving, staying)

    assert isinstance(results[0], Stopped)
    assert results[1]["sha256"] == expected[1]
    assert generate(attempt(leaving, seed=5))["sha256"] == expected[0]


def test_nobody_is_asked_in_beside_one_that_gives_way(attempt: MakeRun) -> None:
    desk = FolderDesk(run := attempt())
    run.stop_at = (1, "preempt")

    serve(desk)

    assert desk.rooms[0] > 0
    assert desk.rooms[-1] == 0
