"""What an attempt may do: heartbeat, report, record, and end. How it begins is in ``claims.py``.

Every function takes the caller's session and never commits; every write is guarded by the fence.
Times are the database's (``clock_timestamp()``): no worker's clock decides anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, case, func, literal, select, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.errors import JobError, LeaseLost
from shared.jobs import products
from shared.jobs.moves import append_event, move, move_by_case
from shared.jobs.rows import Artifact, Attempt, Job
from shared.jobs.state import HELD, AttemptOutcome, JobState, JobType

LONGEST_BACKOFF: Final = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One attempt, as its worker holds it."""

    job_id: UUID
    fence: int
    tenant_id: UUID
    type: JobType
    spec: Mapping[str, Any]
    inputs: Mapping[str, Any]
    """What the references in the spec stand for (``shared/jobs/products.py``)."""
    timeout: timedelta | None


@dataclass(frozen=True, kw_only=True)
class NewArtifact:
    """An object that lies in storage already and wants its row."""

    kind: str
    name: str
    key: str
    size_bytes: int
    sha256: str
    media_type: str
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])


def _current(job_id: UUID, fence: int) -> tuple[ColumnElement[bool], ...]:
    return col(Job.id) == job_id, col(Job.fence) == fence, col(Job.state).in_(HELD)


class Standing(NamedTuple):
    """What a heartbeat is answered."""

    state: JobState
    """May ask the attempt to stop."""
    preempt: bool
    """Whether the attempt shall give its device away at the next checkpoint."""


def heartbeat(session: Session, job_id: UUID, fence: int, *, lease: timedelta) -> Standing:
    """Hold the job for another ``lease``.

    Raises:
        LeaseLost: the attempt is over; nothing it does from now on counts.
    """
    statement = (
        update(Job)
        .where(*_current(job_id, fence))
        .values(lease_until=func.clock_timestamp() + literal(lease))
        .returning(col(Job.state), col(Job.preempt_fence))
    )
    return _standing(session.execute(statement).one_or_none(), job_id, fence)


def progress(
    session: Session,
    job_id: UUID,
    fence: int,
    *,
    step: int,
    steps: int,
    phase: str | None,
    figures: Mapping[str, Any],
    lease: timedelta,
) -> Standing:
    """``heartbeat`` that also reports where the attempt is, with a ``job.progress`` event."""
    data = {
        "step": step,
        "steps": steps,
        "phase": phase,
        "attempt": fence,
        "value": step / steps if steps else 0.0,
        **figures,
    }
    values = {"step": step, "steps": steps, "phase": phase, "figures": dict(figures)}
    statement = append_event(
        job_id,
        "job.progress",
        data,
        *_current(job_id, fence)[1:],
        lease_until=func.clock_timestamp() + literal(lease),
        **values,
    )
    return _standing(session.execute(statement).one_or_none(), job_id, fence)


def _standing(row: Any, job_id: UUID, fence: int) -> Standing:
    if row is None:
        raise LeaseLost(f"job {job_id}: attempt {fence} is over")
    return Standing(JobState(row.state), row.preempt_fence == fence)


def note(session: Session, job_id: UUID, fence: int, kind: str, data: Mapping[str, Any]) -> None:
    """Add a ``job.metric`` or ``job.log`` event.

    Raises:
        LeaseLost: the attempt is over.
    """
    statement = append_event(job_id, kind, {**data, "attempt": fence}, *_current(job_id, fence)[1:])
    _standing(session.execute(statement).one_or_none(), job_id, fence)


def record(session: Session, claim: Claim, artifact: NewArtifact) -> None:
    """Make an object visible while its job still runs (previews, checkpoints).

    Again for the same object it changes nothing: a commit that was answered by an error may have happened.

    Raises:
        LeaseLost: the attempt is over.
    """
    held = select(col(Job.state), col(Job.preempt_fence)).where(*_current(claim.job_id, claim.fence)).with_for_update()
    _standing(session.execute(held).one_or_none(), claim.job_id, claim.fence)
    same = (col(Artifact.key) == artifact.key, col(Artifact.sha256) == artifact.sha256)
    if session.scalars(select(col(Artifact.id)).where(*same)).one_or_none() is not None:
        return
    row = _artifact(claim, artifact)
    event = f"job.{artifact.kind}" if artifact.kind in ("preview", "checkpoint") else "job.artifact"
    data = {"id": f"art_{row.id.hex}", "kind": row.kind, "name": row.name, "details": dict(artifact.details)}
    note(session, claim.job_id, claim.fence, event, data)
    session.add(row)
    session.flush()
    if artifact.kind == "checkpoint":
        _supersede(session, claim.job_id, keep=artifact.details.get("keep", 1))


def _supersede(session: Session, job_id: UUID, *, keep: int) -> None:
    """Leave of the job's checkpoints the last ``keep`` and the one with the lowest score."""
    mine = (col(Artifact.job_id) == job_id, col(Artifact.kind) == "checkpoint", col(Artifact.removed_at).is_(None))
    step = col(Artifact.details)["step"].as_integer()
    score = col(Artifact.details)["score"].as_float()
    last = select(col(Artifact.id)).where(*mine).order_by(step.desc(), col(Artifact.id).desc()).limit(keep)
    best = select(col(Artifact.id)).where(*mine, score.is_not(None)).order_by(score, step.desc()).limit(1)
    kept = last.subquery().select().union(best.subquery().select())
    session.execute(
        update(Artifact).where(*mine, col(Artifact.id).not_in(kept)).values(removed_at=func.clock_timestamp())
    )


def _artifact(claim: Claim, artifact: NewArtifact) -> Artifact:
    return Artifact(
        tenant_id=claim.tenant_id,
        job_id=claim.job_id,
        fence=claim.fence,
        kind=artifact.kind,
        name=artifact.name,
        key=artifact.key,
        size_bytes=artifact.size_bytes,
        sha256=artifact.sha256,
        media_type=artifact.media_type,
        details=dict(artifact.details),
    )


def succeed(
    session: Session,
    claim: Claim,
    *,
    result: Mapping[str, Any],
    artifacts: Sequence[NewArtifact],
    timings: Mapping[str, float],
    steps: int,
) -> JobState | None:
    """End the attempt well: state, artifacts and what the job made become visible together.

    Returns:
        ``succeeded``, or None: a cancel came first or the attempt is over, and nothing changed.
    """
    where = _current(claim.job_id, claim.fence)
    moved = (
        session.execute(
            move(
                JobState.SUCCEEDED,
                *where,
                outcome=AttemptOutcome.SUCCEEDED,
                step=steps,
                steps=steps,
                timings=col(Job.timings).op("||")(literal(dict(timings), JSONB)),
            )
        )
        .mappings()
        .one_or_none()
    )
    if moved is None:
        return None
    session.add_all(_artifact(claim, artifact) for artifact in artifacts)
    complete = products.publish(
        session, claim.tenant_id, claim.job_id, claim.type, spec=claim.spec, inputs=claim.inputs, result=result
    )
    session.execute(update(Job).where(col(Job.id) == claim.job_id).values(result=complete))
    session.flush()
    return JobState.SUCCEEDED


def fail(session: Session, job_id: UUID, fence: int, error: JobError, *, backoff: timedelta) -> JobState | None:
    """End the attempt badly: queued again if the error may pass and attempts are left, else failed.

    Returns:
        The state the job is in now, or None: the attempt was over already.
    """
    spent = Job.failures + Job.losses + 1
    wait = func.least(backoff.total_seconds() * func.power(2, Job.failures), LONGEST_BACKOFF.total_seconds())
    again = literal(error.retryable) & (spent < Job.max_attempts)
    statement = move_by_case(
        [
            (JobState.CANCELED, col(Job.state) == JobState.CANCELING),
            (JobState.QUEUED, again & (col(Job.state) == JobState.RUNNING)),
            (JobState.PAUSED, again & (col(Job.state) == JobState.PAUSING)),
            (JobState.FAILED, literal(True)),
        ],
        *_current(job_id, fence),
        outcome={
            JobState.CANCELED: AttemptOutcome.CANCELED,
            JobState.QUEUED: AttemptOutcome.FAILED,
            JobState.PAUSED: AttemptOutcome.FAILED,
            JobState.FAILED: AttemptOutcome.FAILED,
        },
        error=error,
        failures=Job.failures + 1,
        not_before=func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, wait),
    )
    moved = session.execute(statement).mappings().one_or_none()
    if moved is None:
        return None
    return JobState(moved["state"])


def hand_back(session: Session, job_id: UUID, fence: int, *, preempted: bool = False) -> JobState | None:
    """End an attempt that stopped when it was told to: canceled, paused, or queued for the next worker.

    ``preempted``: it gave its device to a more urgent job.

    Returns:
        The state the job is in now, or None: the attempt was over already.
    """
    statement = move_by_case(
        [
            (JobState.CANCELED, col(Job.state) == JobState.CANCELING),
            (JobState.PAUSED, col(Job.state) == JobState.PAUSING),
            (JobState.QUEUED, col(Job.state) == JobState.RUNNING),
        ],
        *_current(job_id, fence),
        outcome={
            JobState.CANCELED: AttemptOutcome.CANCELED,
            JobState.PAUSED: AttemptOutcome.PAUSED,
            JobState.QUEUED: AttemptOutcome.PREEMPTED if preempted else AttemptOutcome.INTERRUPTED,
        },
        interruptions=Job.interruptions + case((col(Job.state) == JobState.RUNNING, 1), else_=0),
    )
    moved = session.execute(statement).mappings().one_or_none()
    return None if moved is None else JobState(moved["state"])


def outcome_of(session: Session, job_id: UUID, fence: int) -> AttemptOutcome | None:
    """How the attempt ended, for a worker whose commit was answered by an error; None: it has not."""
    statement = select(col(Attempt.outcome)).where(col(Attempt.job_id) == job_id, col(Attempt.fence) == fence)
    return session.scalars(statement).one_or_none()
