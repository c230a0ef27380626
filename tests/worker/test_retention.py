"""What is kept for a while: artifacts by their kinds, checkpoints, links, and the logs of jobs."""

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.jobs.rows import Artifact, Event, Job
from shared.jobs.state import JobState, JobType
from tests.worker.contents import DAY, HOUR, MONTH, NOW, dataset, put_in_order, version
from tests.worker.house import House
from worker import chores


@pytest.mark.parametrize(
    ("kind", "lifetime"), [("checkpoint", 7 * DAY), ("preview", MONTH), ("sample", None), ("weights", None)]
)
def test_an_artifact_is_kept_for_as_long_after_its_job_as_its_kind_says(
    house: House, kind: str, lifetime: timedelta | None
) -> None:
    job_id = house.ended_job()
    artifact = house.artifact(job_id, kind)
    house.artifact(house.job(fence=1), kind)

    for _ in range(2):
        house.chore("lifetimes").do()

    with Session(house.engine) as session:
        end = session.get_one(Job, job_id).completed_at
        dated = {row.id: row.expires_at for row in session.scalars(select(Artifact)) if row.expires_at}
    assert dated == ({artifact: end + lifetime} if end and lifetime else {})


def test_artifacts_of_all_kinds_but_those_kept_for_ever_expire_if_they_are_set_to(house: House) -> None:
    job_id = house.ended_job()
    for kind in ("checkpoint", "preview", "sample"):
        house.artifact(job_id, kind)

    chore = house.chore("lifetimes", artifact_lifetime=DAY, checkpoint_lifetime=None)

    assert {each["key"].rpartition("/")[2] for each in chore.find()} == {"preview", "sample"}


def test_what_a_model_or_a_dataset_is_made_of_never_expires_and_is_not_deleted_though_removed(house: House) -> None:
    job_id = house.ended_job(ago=2 * MONTH)
    for name in ("checkpoint-model", "checkpoint-data"):
        house.artifact(job_id, name)
        house.artifact(job_id, f"{name}-expired", expires_at=NOW - DAY)
        house.artifact(job_id, f"{name}-removed", removed_at=NOW - DAY)
    keys = sorted(house.keys())
    with_model, with_data = [[key for key in keys if each in key] for each in ("model", "data")]
    for key in with_model:
        version(house, house.ended_job(), key)
    dataset(house, job_id=job_id, files=[{"key": key} for key in with_data])
    before = house.everything()["artifacts"]

    put_in_order(house)

    assert house.names() == {key.rpartition("/")[2] for key in with_model + with_data}
    assert house.everything()["artifacts"] == before


def test_an_expired_artifact_becomes_a_tombstone_without_an_object(house: House) -> None:
    artifact = house.artifact(house.ended_job(), "preview-1", expires_at=NOW - DAY)
    house.artifact(house.ended_job(), "preview-2", expires_at=NOW + DAY)

    put_in_order(house)

    with Session(house.engine) as session:
        row = session.get_one(Artifact, artifact)
    assert (row.removed_at is not None, row.deleted_at is not None) == (True, True)
    assert house.names() == {"preview-2"}


@pytest.mark.parametrize(
    ("state", "kept"), [(JobState.QUEUED, True), (JobState.PAUSED, True), (JobState.CANCELED, False)]
)
def test_a_checkpoint_stays_while_a_retry_may_go_on_from_it(house: House, state: JobState, kept: bool) -> None:
    first = house.ended_job(kind=JobType.TRAIN)
    second = house.ended_job(kind=JobType.TRAIN, retry_of=first, inputs={"lineage": [str(first)]})
    house.artifact(first, "checkpoint-1", expires_at=NOW - DAY)
    house.artifact(first, "preview-1", expires_at=NOW - DAY)
    ended = {"completed_at": NOW} if state.is_final else {}
    house.job(JobType.TRAIN, state=state, retry_of=second, inputs={"lineage": [str(second), str(first)]}, **ended)

    put_in_order(house)

    assert house.names() == ({"checkpoint-1"} if kept else set())


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING, JobState.PAUSED, JobState.CANCELED])
def test_what_a_job_is_made_from_stays_until_that_has_ended(house: House, state: JobState) -> None:
    made = [house.artifact(house.ended_job(), f"sample-{n}", expires_at=NOW - DAY) for n in range(5)]
    images, style, averages = [str(one) for one in made[:2]], str(made[2]), str(made[3])
    held = {"fence": 1, "lease_until": NOW + DAY} if state.is_held else {}
    ended = {"completed_at": NOW} if state.is_final else {}
    house.job(
        JobType.GENERATE, state=state, inputs={"artifact_ids": images, "style_artifact_id": style}, **held, **ended
    )
    house.job(JobType.REAVERAGE, state=state, inputs={"artifact_id": averages}, **held, **ended)

    put_in_order(house)

    assert house.names() == (set() if state.is_final else {f"sample-{n}" for n in range(4)})


def test_an_object_that_comes_back_after_it_was_deleted_is_collected(house: House) -> None:
    """A worker that was given up may still be uploading."""
    job_id = house.ended_job()
    house.artifact(job_id, "preview-1", removed_at=NOW - DAY)
    put_in_order(house)
    house.upload(job_id, 1, "preview-1")

    put_in_order(house)

    assert house.names() == set()


def test_a_superseded_checkpoint_is_deleted_while_its_training_goes_on(house: House) -> None:
    _, claim = house.running_job()
    for step in range(3):
        new = house.upload(claim.job_id, claim.fence, f"checkpoint-{step}", step=step, keep=2)
        house.record(claim, new)

    put_in_order(house)

    assert house.names() == {"checkpoint-1", "checkpoint-2"}


def test_a_link_to_an_object_works_for_as_long_as_was_said(house: House) -> None:
    house.artifact(house.ended_job(), "preview-1", removed_at=NOW)
    chore: Any = house.chore("removed")
    chore._age = HOUR

    assert chore.do().total() == 0
    assert house.names() == {"preview-1"}


def seqs(house: House, job_id: UUID) -> list[int]:
    with Session(house.engine) as session:
        return list(session.scalars(select(col(Event.seq)).where(col(Event.job_id) == job_id).order_by(col(Event.seq))))


def log(house: House, job_id: UUID, *kinds: str) -> None:
    with Session(house.engine) as session, session.begin():
        numbered = enumerate(kinds, start=1)
        session.add_all(Event(job_id=job_id, seq=seq, type=f"job.{kind}", data={}) for seq, kind in numbered)


def test_of_an_old_log_the_states_and_the_end_stay(house: House) -> None:
    kinds = ("state", "progress", "state", "metric", "log", "checkpoint", "state", "log")
    old = house.ended_job(ago=2 * MONTH, event_seq=len(kinds))
    young = house.ended_job(ago=DAY, event_seq=len(kinds))
    unended = house.job(event_seq=len(kinds))
    for job_id in (old, young, unended):
        log(house, job_id, *kinds)

    put_in_order(house)

    assert seqs(house, old) == [1, 3, 7, 8]
    assert seqs(house, young) == seqs(house, unended) == list(range(1, 9))


def test_a_long_log_is_pruned_in_several_steps(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chores, "BATCH", 2)
    jobs = [house.ended_job(ago=2 * MONTH, event_seq=6) for _ in range(3)]
    for job_id in jobs:
        log(house, job_id, "state", "log", "log", "log", "log", "state")

    assert house.chore("events").do()["rows"] == 3 * 4 + 3
    assert [seqs(house, job_id) for job_id in jobs] == [[1, 6]] * 3


def test_logs_are_kept_whole_if_they_are_set_to(house: House) -> None:
    settings = house.settings.jobs.model_copy(update={"event_lifetime": None})
    named = [each.name for each in chores.retention.duties(settings)]

    assert "events" not in named
