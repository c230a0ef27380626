"""What clients may ask of a job: pause, resume and retry it; and how many may wait."""

from contextlib import suppress
from datetime import timedelta

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.errors import IllegalMove, InternalError, NotFound, QueueFull
from shared.ids import public, uuid7
from shared.jobs import attempts, claims, requests, upkeep
from shared.jobs.attempts import Claim
from shared.jobs.rows import Artifact, Attempt, Bell, Dataset, DatasetState, Event, Job
from shared.jobs.state import AttemptOutcome, JobState
from shared.specs.ingest import IngestSpec
from tests.shared.desk import QUEUES, SETTINGS, TERMS, Desk
from tests.shared.needing import draw, succeed


def fail(desk: Desk, claim: Claim) -> None:
    desk.work(lambda s: attempts.fail(s, claim.job_id, claim.fence, InternalError("x"), backoff=timedelta(0)))


def test_a_waiting_job_is_paused_at_once_and_not_claimed(desk: Desk) -> None:
    job = desk.submit()

    assert desk.pause(job.id).state == JobState.PAUSED
    assert desk.pause(job.id).state == JobState.PAUSED
    assert not desk.work(lambda s: claims.claim(s, worker="w", queues=QUEUES, terms=TERMS))


def test_a_running_job_is_paused_once_its_attempt_has_stopped_and_goes_on_later(desk: Desk) -> None:
    job = desk.submit()
    first = desk.claim()

    assert desk.pause(job.id).state == JobState.PAUSING
    assert desk.work(lambda s: attempts.heartbeat(s, job.id, 1, lease=TERMS.lease)).state == JobState.PAUSING
    assert desk.work(lambda s: attempts.hand_back(s, job.id, first.fence)) == JobState.PAUSED
    assert desk.resume(job.id).state == JobState.QUEUED
    assert desk.claim().fence == 2
    attempt = desk.work(lambda s: s.get_one(Attempt, (job.id, 1)))
    assert attempt.outcome == AttemptOutcome.PAUSED
    ended = desk.job(job.id)
    assert (ended.failures, ended.losses, ended.interruptions) == (0, 0, 0)


def test_a_pause_that_has_not_happened_yet_is_withdrawn(desk: Desk) -> None:
    job = desk.submit()
    claim = desk.claim()
    desk.pause(job.id)

    assert desk.resume(job.id).state == JobState.RUNNING
    # The runner had been told to stop, and did: nobody paused the job, so it waits for its next turn.
    assert desk.work(lambda s: attempts.hand_back(s, job.id, claim.fence)) == JobState.QUEUED


def test_a_resumed_job_is_rung_for_and_waits_for_nothing(desk: Desk) -> None:
    job = desk.submit()
    desk.pause(job.id)
    desk.force(job.id, not_before=func.clock_timestamp() + timedelta(hours=1))
    bells = desk.count(Bell)

    desk.resume(job.id)

    assert desk.count(Bell) == bells + 1
    assert desk.claim().job_id == job.id


@pytest.mark.parametrize("state", [state for state in JobState if state.is_final])
def test_what_has_ended_is_neither_paused_nor_resumed(desk: Desk, state: JobState) -> None:
    job = desk.submit()
    ended = {"error_code": "internal", "error_message": "x"} if state == JobState.FAILED else {}
    desk.force(job.id, state=state, completed_at=func.clock_timestamp(), **ended)
    before = desk.job(job.id)

    for request in (desk.pause, desk.resume):
        with pytest.raises(IllegalMove):
            request(job.id)

    assert desk.job(job.id).model_dump() == before.model_dump()


def test_a_job_that_is_being_canceled_is_neither_paused_nor_resumed(desk: Desk) -> None:
    job = desk.submit()
    desk.claim()
    desk.do(lambda session: requests.cancel(session, desk.tenant_id, job.id))

    for request in (desk.pause, desk.resume, desk.retry):
        with pytest.raises(IllegalMove):
            request(job.id)


def test_nobody_touches_a_job_of_another_tenant(desk: Desk) -> None:
    job = desk.submit()
    desk.tenant_id = uuid7()

    for request in (desk.pause, desk.resume, desk.retry):
        with pytest.raises(NotFound):
            request(job.id)


def test_a_pausing_job_whose_worker_died_for_the_last_time_fails(desk: Desk) -> None:
    job = desk.submit(max_attempts=1)
    desk.claim()
    desk.pause(job.id)
    desk.force(job.id, lease_until=func.clock_timestamp() - timedelta(seconds=1))

    desk.work(upkeep.reap)

    assert desk.job(job.id).state == JobState.FAILED


def test_a_retry_asks_for_the_same_and_knows_what_it_retries(desk: Desk) -> None:
    job = desk.submit(max_attempts=1, priority="high", labels={"a": "b"}, timeout_seconds=60, start_deadline_seconds=90)
    fail(desk, desk.claim())

    again = desk.retry(job.id)

    assert again.id != job.id and again.retry_of == job.id and again.state == JobState.QUEUED
    same = ("type", "spec", "priority", "labels", "max_attempts", "timeout_seconds", "summary", "queue")
    assert {name: getattr(again, name) for name in same} == {name: getattr(job, name) for name in same}
    assert again.start_deadline and again.created_at
    assert again.start_deadline - again.created_at == pytest.approx(timedelta(seconds=90), abs=timedelta(seconds=1))
    assert desk.count(Event, col(Event.job_id) == again.id) == 1
    assert desk.claim().job_id == again.id


def test_many_retries_at_once_make_one_job(desk: Desk) -> None:
    job = desk.submit(max_attempts=1)
    fail(desk, desk.claim())

    answers = desk.ask(*[lambda s: requests.retry(s, desk.tenant_id, job.id, settings=SETTINGS)] * 16)

    made = [answer for answer in answers if isinstance(answer, tuple)]
    assert len(made) == 16
    assert len({again.id for again, _ in made}) == 1
    assert sum(is_new for _, is_new in made) == 1
    assert desk.count(Job) == 2


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING, JobState.PAUSED, JobState.SUCCEEDED])
def test_what_goes_on_or_ended_well_is_not_retried(desk: Desk, state: JobState) -> None:
    job = desk.submit()
    if state in (JobState.RUNNING, JobState.SUCCEEDED):
        desk.claim()
    if state == JobState.PAUSED:
        desk.pause(job.id)
    if state == JobState.SUCCEEDED:
        desk.force(job.id, state=state, completed_at=func.clock_timestamp(), lease_until=None)

    with pytest.raises(IllegalMove):
        desk.retry(job.id)


def test_a_retried_training_goes_on_from_the_last_checkpoint_of_its_line(desk: Desk) -> None:
    job = desk.submit(max_attempts=1)
    claim = desk.claim()
    desk.checkpoint(claim, 100, keep=3)
    desk.checkpoint(claim, 200, keep=3)
    fail(desk, claim)
    second = desk.retry(job.id)
    claim = desk.claim()
    assert [place["step"] for place in claim.inputs["resume"]] == [200, 100]
    fail(desk, claim)
    desk.retry(second.id)

    third = desk.claim()
    desk.checkpoint(third, 50, keep=3)

    assert [place["step"] for place in third.inputs["resume"]] == [200, 100]
    fail(desk, third)
    again = desk.retry(third.job_id)
    # Its parent's come first, for the grandparents' were given up before.
    assert [place["step"] for place in desk.claim().inputs["resume"]] == [50, 200, 100]
    assert again.retry_of == third.job_id


def test_the_next_attempt_at_drawing_goes_on_from_what_the_last_has_left(desk: Desk) -> None:
    desk.submit()
    succeed(desk, desk.claim())
    draw(desk, "digits")
    first = desk.claim()
    desk.checkpoint(first, 8, keep=1)
    desk.checkpoint(first, 16, keep=1)
    desk.work(lambda session: attempts.hand_back(session, first.job_id, first.fence))

    second = desk.claim()

    # The first finds nothing, and does not ask.
    assert (first.fence, "resume" in first.inputs) == (1, False)
    assert [place["step"] for place in second.inputs["resume"]] == [16]
    assert second.job_id == first.job_id


def test_a_retried_ingestion_works_on_the_same_dataset(desk: Desk) -> None:
    async def ingest(session: AsyncSession) -> Job:
        dataset = await session.get_one(Dataset, desk.dataset_id)
        return await requests.submit_ingest(
            session, dataset, IngestSpec(dataset=public("ds", dataset.id)), settings=SETTINGS
        )

    job = desk.do(ingest)
    claim = desk.claim()
    desk.work(lambda s: attempts.fail(s, claim.job_id, claim.fence, InternalError("x"), backoff=timedelta(0)))
    desk.work(upkeep.settle_datasets)
    assert desk.work(lambda s: s.get_one(Dataset, desk.dataset_id)).state == DatasetState.FAILED

    again = desk.retry(job.id)
    desk.work(upkeep.settle_datasets)

    dataset = desk.work(lambda s: s.get_one(Dataset, desk.dataset_id))
    assert (dataset.state, dataset.job_id, dataset.error) == (DatasetState.INGESTING, again.id, None)


def test_no_more_jobs_wait_than_a_tenant_may_have(desk: Desk) -> None:
    few = SETTINGS.model_copy(update={"max_queued": 3})
    for _ in range(3):
        desk.submit(settings=few)

    with pytest.raises(QueueFull):
        desk.submit(settings=few)
    assert desk.count(Job) == 3
    desk.claim()
    desk.submit(settings=few)


def test_not_even_many_at_once_exceed_the_limit(desk: Desk) -> None:
    few = SETTINGS.model_copy(update={"max_queued": 5})

    answers = desk.ask(*(desk.submission(settings=few) for _ in range(20)))

    assert sum(isinstance(answer, QueueFull) for answer in answers) == 15
    assert desk.count(Job) == 5


def test_the_last_checkpoints_and_the_best_one_are_kept(desk: Desk) -> None:
    desk.submit()
    claim = desk.claim()
    for step, score in [(10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 2.5)]:
        desk.checkpoint(claim, step, keep=2, score=score)

    rows = desk.work(lambda s: list(s.scalars(select(Artifact).order_by(col(Artifact.id)))))
    assert [row.details["step"] for row in rows if row.removed_at is None] == [20, 40, 50]


def hand_back(desk: Desk, claim: Claim) -> None:
    desk.work(lambda s: attempts.hand_back(s, claim.job_id, claim.fence))


def kept(desk: Desk) -> list[int]:
    rows = desk.work(lambda s: list(s.scalars(select(Artifact).order_by(col(Artifact.id)))))
    return [row.details["step"] for row in rows if row.removed_at is None]


def test_of_checkpoints_told_together_only_those_to_be_kept_become_visible(desk: Desk) -> None:
    desk.submit()
    claim = desk.claim()
    desk.checkpoint(claim, 10, keep=2, score=5.0)

    said = [attempts.Report.of(desk.new_checkpoint(claim, step, keep=1, score=step / 10)) for step in (20, 30, 40)]
    desk.work(lambda s: attempts.report(s, claim, said, lease=TERMS.lease))

    assert kept(desk) == [20, 40]


def test_a_training_that_went_behind_a_damaged_checkpoint_goes_on_from_what_it_made_then(desk: Desk) -> None:
    desk.submit()
    first = desk.claim()
    desk.checkpoint(first, 100, keep=1)
    hand_back(desk, first)

    # The one of step 100 could not be read, and so the training began afresh.
    second = desk.claim()
    desk.checkpoint(second, 50, keep=1)
    hand_back(desk, second)

    assert [place["step"] for place in desk.claim().inputs["resume"]] == [50]


def test_a_checkpoint_is_superseded_by_the_statement_that_tells_of_the_next(desk: Desk) -> None:
    desk.submit()
    claim = desk.claim()
    desk.checkpoint(claim, 10, keep=1)
    said = [attempts.Report.of(desk.new_checkpoint(claim, 20, keep=1))]

    with desk.cut_off_after(1) as engine, suppress(ConnectionError), Session(engine) as session:
        attempts.report(session, claim, said, lease=TERMS.lease)

    assert kept(desk) == [20]


def test_an_attempt_that_is_over_supersedes_nothing(desk: Desk) -> None:
    desk.submit()
    first = desk.claim()
    desk.checkpoint(first, 10, keep=1)
    hand_back(desk, first)
    desk.claim()

    desk.checkpoint(first, 20, keep=1)

    assert kept(desk) == [10]
