"""The state machine against a real database: exactly the moves of the table, each with all its traces."""

from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.errors import InternalError, LeaseLost, StorageUnavailable, UploadFailed
from shared.ids import uuid7
from shared.jobs import attempts, claims, upkeep
from shared.jobs.moves import move
from shared.jobs.rows import Artifact, Attempt, Bell, Event, Job, Tenant
from shared.jobs.state import HELD, MOVES, AttemptOutcome, JobState, JobType
from shared.settings import JobSettings

LEASE = timedelta(seconds=30)
TERMS = claims.Terms.of(JobSettings())
NOW = func.clock_timestamp()


def make_job(session: Session, state: JobState = JobState.QUEUED, **columns: object) -> UUID:
    """A job as it would be in ``state``; held ones by attempt 1."""
    tenant = Tenant(name=uuid7().hex)
    session.add(tenant)
    session.flush()
    held = {"lease_until": NOW + LEASE, "worker": "w0"} if state in HELD else {}
    final = {"completed_at": NOW} if state.is_final else {}
    failed = {"error_code": "internal", "error_message": "x"} if state == JobState.FAILED else {}
    job = Job(
        tenant_id=tenant.id, queue="generate", spec={}, inputs={}, summary="test", state=state,
        **{"type": JobType.EXPORT, "max_attempts": 3, "fence": 0 if state == JobState.QUEUED else 1}
        | held | final | failed | columns,
    )  # fmt: skip
    session.add(job)
    session.flush()
    if job.fence:
        session.add(Attempt(job_id=job.id, fence=1, worker="w0"))
        session.flush()
    return job.id


def state_of(session: Session, job_id: UUID) -> JobState:
    return (
        session.scalars(select(Job).where(col(Job.id) == job_id).execution_options(populate_existing=True)).one().state
    )


def attempt_of(session: Session, job_id: UUID, fence: int = 1) -> Attempt:
    session.expire_all()
    return session.get_one(Attempt, (job_id, fence))


def count(session: Session, row: type, job_id: UUID) -> int:
    return session.scalar(select(func.count()).select_from(row).where(row.job_id == job_id)) or 0  # pyright: ignore


@pytest.mark.parametrize("start", JobState)
@pytest.mark.parametrize("target", JobState)
def test_exactly_the_moves_in_the_table_are_made(session: Session, start: JobState, target: JobState) -> None:
    job_id = make_job(session, start)
    values = {"lease_until": NOW + LEASE} if target in HELD else {}
    error = InternalError("x") if target == JobState.FAILED else None

    moved = session.execute(move(target, col(Job.id) == job_id, error=error, **values)).all()

    assert bool(moved) == (target in MOVES[start])
    assert state_of(session, job_id) == (target if moved else start)
    assert count(session, Event, job_id) == len(moved)


def test_a_job_goes_back_to_the_queue_with_a_bell(session: Session) -> None:
    job_id = make_job(session, JobState.RUNNING)

    attempts.hand_back(session, job_id, 1)

    assert count(session, Bell, job_id) == 1


@pytest.mark.parametrize(
    ("start", "end", "outcome"),
    [
        (JobState.RUNNING, JobState.QUEUED, AttemptOutcome.INTERRUPTED),
        (JobState.CANCELING, JobState.CANCELED, AttemptOutcome.CANCELED),
        (JobState.PAUSING, JobState.PAUSED, AttemptOutcome.PAUSED),
    ],
)
def test_a_stopped_attempt_ends_as_it_was_told_to(
    session: Session, start: JobState, end: JobState, outcome: AttemptOutcome
) -> None:
    job_id = make_job(session, start)

    attempts.hand_back(session, job_id, 1)

    assert (state_of(session, job_id), attempt_of(session, job_id).outcome) == (end, outcome)


def test_claims_are_numbered_and_never_reset(session: Session) -> None:
    job_id = make_job(session)

    fences = []
    for _ in range(3):
        (claim,) = claims.claim(session, worker="w", queues=["generate"], terms=TERMS)
        fences.append(claim.fence)
        attempts.hand_back(session, job_id, claim.fence)

    assert fences == [1, 2, 3]


def test_a_job_of_another_queue_is_not_claimed(session: Session) -> None:
    make_job(session)

    assert not claims.claim(session, worker="w", queues=["train"], terms=TERMS)


def test_a_job_that_backs_off_is_not_claimed_before_its_time(session: Session) -> None:
    job_id = make_job(session, JobState.RUNNING)
    attempts.fail(session, job_id, 1, UploadFailed("x"), backoff=timedelta(seconds=60))

    assert state_of(session, job_id) == JobState.QUEUED
    assert not claims.claim(session, worker="w", queues=["generate"], terms=TERMS)


@pytest.mark.parametrize(
    "write", ["heartbeat", "progress", "log", "artifact", "succeed", "fail", "postpone", "hand_back"]
)
def test_no_write_of_an_older_attempt_is_accepted(session: Session, write: str) -> None:
    job_id = make_job(session, JobState.RUNNING, fence=2)
    session.add(Attempt(job_id=job_id, fence=2, worker="w2"))
    session.flush()
    before = session.execute(select(Job.__table__).where(col(Job.id) == job_id)).one()  # pyright: ignore

    with pytest.raises(LeaseLost) if write == "heartbeat" else _no_error():
        assert write_as(session, job_id, 1, write) is None

    assert session.execute(select(Job.__table__).where(col(Job.id) == job_id)).one() == before  # pyright: ignore
    assert count(session, Event, job_id) == 0


def claim_of(session: Session, job_id: UUID, fence: int) -> attempts.Claim:
    tenant_id = session.get_one(Job, job_id).tenant_id
    return attempts.Claim(
        job_id=job_id, fence=fence, tenant_id=tenant_id, type=JobType.EXPORT, spec={}, inputs={}, timeout=None
    )


def write_as(session: Session, job_id: UUID, fence: int, write: str) -> object:
    """One write of an attempt, by its name."""
    claim = claim_of(session, job_id, fence)
    artifact = attempts.NewArtifact(
        kind="preview", name="p", key=uuid7().hex, size_bytes=1, sha256="0", media_type="text/plain"
    )
    where = attempts.Progress(step=1, steps=2, phase="x")
    writes = {
        "heartbeat": lambda: attempts.heartbeat(session, job_id, fence, lease=LEASE),
        "progress": lambda: attempts.report(session, claim, [where.as_report()], where=where, lease=LEASE),
        "log": lambda: attempts.report(session, claim, [attempts.Report(type="job.log", data={})], lease=LEASE),
        "artifact": lambda: attempts.report(session, claim, [attempts.Report.of(artifact)], lease=LEASE),
        "succeed": lambda: attempts.succeed(session, claim, result={}, artifacts=[artifact], timings={}, steps=1),
        "fail": lambda: attempts.fail(session, job_id, fence, UploadFailed("x"), backoff=LEASE),
        "postpone": lambda: attempts.postpone(
            session, job_id, fence, StorageUnavailable("x"), backoff=LEASE, patience=10 * LEASE
        ),
        "hand_back": lambda: attempts.hand_back(session, job_id, fence),
    }
    return writes[write]()


class _no_error:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_success_after_a_cancel_is_refused(session: Session) -> None:
    job_id = make_job(session, JobState.CANCELING)

    assert write_as(session, job_id, 1, "succeed") is None
    assert state_of(session, job_id) == JobState.CANCELING


def lose(session: Session, job_id: UUID) -> None:
    session.execute(Job.__table__.update().where(col(Job.id) == job_id).values(lease_until=NOW - LEASE))  # pyright: ignore


@pytest.mark.parametrize(
    ("start", "losses", "end"),
    [
        (JobState.RUNNING, 0, JobState.QUEUED),
        (JobState.RUNNING, 2, JobState.FAILED),
        (JobState.CANCELING, 0, JobState.CANCELED),
        (JobState.PAUSING, 0, JobState.PAUSED),
    ],
)
def test_an_attempt_whose_lease_ran_out_is_reaped(
    session: Session, start: JobState, losses: int, end: JobState
) -> None:
    job_id = make_job(session, start, losses=losses)
    lose(session, job_id)

    upkeep.reap(session)

    attempt = attempt_of(session, job_id)
    assert (state_of(session, job_id), attempt.outcome, attempt.error_code) == (end, AttemptOutcome.LOST, "worker_lost")


def test_an_attempt_within_its_lease_is_not_reaped(session: Session) -> None:
    make_job(session, JobState.RUNNING)

    assert not upkeep.reap(session)


def test_a_lost_bell_is_rung_again(session: Session) -> None:
    job_id = make_job(session, queued_at=NOW - LEASE)

    assert upkeep.redispatch(session, after=timedelta(seconds=20)) == 1
    assert upkeep.redispatch(session, after=timedelta(seconds=20)) == 0
    assert count(session, Bell, job_id) == 1


def test_a_job_expires_when_nobody_starts_it_in_time(session: Session) -> None:
    late, early = make_job(session, start_deadline=NOW - LEASE), make_job(session, start_deadline=NOW + LEASE)

    assert upkeep.expire(session) == [late]
    assert (state_of(session, late), state_of(session, early)) == (JobState.EXPIRED, JobState.QUEUED)


def test_a_job_past_its_start_deadline_is_not_claimed(session: Session) -> None:
    make_job(session, start_deadline=NOW - LEASE)

    assert not claims.claim(session, worker="w", queues=["generate"], terms=TERMS)


def test_of_two_tickers_one_holds_the_lease(session: Session) -> None:
    assert upkeep.hold(session, "ticker", "a", LEASE)
    assert not upkeep.hold(session, "ticker", "b", LEASE)
    upkeep.release(session, "ticker", "a")
    assert upkeep.hold(session, "ticker", "b", LEASE)


def test_a_ticker_that_died_is_succeeded_when_its_lease_is_over(session: Session) -> None:
    assert upkeep.hold(session, "ticker", "a", timedelta(seconds=-1))
    assert upkeep.hold(session, "ticker", "b", LEASE)


def test_two_workers_never_claim_the_same_job(engine: Engine) -> None:
    with Session(engine) as setup, setup.begin():
        ids = {make_job(setup) for _ in range(20)}
    with Session(engine) as one, Session(engine) as two:
        first = {claim.job_id for claim in claims.claim(one, worker="a", queues=["generate"], terms=TERMS, limit=10)}
        second = {claim.job_id for claim in claims.claim(two, worker="b", queues=["generate"], terms=TERMS, limit=100)}
        one.rollback()
        two.rollback()
    with Session(engine) as cleanup, cleanup.begin():
        cleanup.execute(Job.__table__.delete().where(col(Job.id).in_(ids)))  # pyright: ignore
    assert first.isdisjoint(second)
    assert first | second == ids


def test_a_job_that_started_in_time_outlives_its_start_deadline(session: Session) -> None:
    job_id = make_job(session, JobState.RUNNING, started_at=NOW - LEASE, start_deadline=NOW - timedelta(seconds=1))
    attempts.hand_back(session, job_id, 1)

    assert upkeep.expire(session) == []
    assert [claim.job_id for claim in claims.claim(session, worker="w", queues=["generate"], terms=TERMS)] == [job_id]


def test_a_job_whose_inputs_make_no_sense_fails_and_lets_the_next_one_through(session: Session) -> None:
    broken, good = make_job(session, type=JobType.GENERATE, priority=2), make_job(session)

    found = claims.claim(session, worker="w", queues=["generate"], terms=TERMS, limit=2)

    assert [claim.job_id for claim in found] == [good]
    assert state_of(session, broken) == JobState.FAILED


def test_an_artifact_whose_commit_was_not_confirmed_may_be_recorded_again(session: Session) -> None:
    job_id = make_job(session, JobState.RUNNING)
    artifact = attempts.NewArtifact(
        kind="preview", name="p", key=uuid7().hex, size_bytes=1, sha256="0", media_type="text/plain"
    )

    for _ in range(2):
        attempts.report(session, claim_of(session, job_id, 1), [attempts.Report.of(artifact)], lease=LEASE)

    assert (count(session, Artifact, job_id), count(session, Event, job_id)) == (1, 1)


def test_a_report_is_not_written_behind_an_event_that_its_sender_has_not_seen(session: Session) -> None:
    """So one that was sent twice, because nobody confirmed it, is written once."""
    job_id = make_job(session, JobState.RUNNING, event_seq=4)
    claim, said = claim_of(session, job_id, 1), attempts.Report(type="job.log", data={"message": "x"})

    answers = [attempts.report(session, claim, [said], after=4, lease=LEASE) for _ in range(2)]

    assert [answer and answer.event_seq for answer in answers] == [5, None]
    assert count(session, Event, job_id) == 1
    assert attempts.is_reported(session, claim, said, after=4)
    assert not attempts.is_reported(session, claim, said, after=5)


def test_a_report_holds_the_lease_and_says_where_the_attempt_is(session: Session) -> None:
    job_id = make_job(session, JobState.RUNNING)
    lose(session, job_id)
    where = attempts.Progress(step=3, steps=4, phase="training", figures={"loss": 0.5})

    attempts.report(session, claim_of(session, job_id, 1), [where.as_report()], where=where, lease=LEASE)

    session.expire_all()
    job = session.get_one(Job, job_id)
    assert (job.step, job.steps, job.phase, job.figures) == (3, 4, "training", {"loss": 0.5})
    assert not upkeep.reap(session)


def test_a_retry_waits_for_ten_minutes_at_most(session: Session) -> None:
    job_id = make_job(session, JobState.RUNNING, failures=60, max_attempts=100)

    attempts.fail(session, job_id, 1, UploadFailed("x"), backoff=timedelta(seconds=2))

    waits = session.scalar(select(col(Job.not_before) <= NOW + timedelta(minutes=10)).where(col(Job.id) == job_id))
    assert waits


def test_a_long_queue_is_not_rung_for_job_by_job(session: Session) -> None:
    """Nobody takes bells while all workers are busy, so they would pile up in the broker."""
    for _ in range(upkeep.RUNG_AT_ONCE + 5):
        make_job(session, queued_at=NOW - LEASE)

    rung = [upkeep.redispatch(session, after=timedelta(seconds=20)) for _ in range(2)]

    assert rung == [upkeep.RUNG_AT_ONCE, 0]
