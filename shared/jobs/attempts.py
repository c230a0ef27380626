"""What an attempt may do: heartbeat, report, record, and end. How it begins is in ``claims.py``.

Every function takes the caller's session and never commits; every write is guarded by the fence.
Times are the database's (``clock_timestamp()``): no worker's clock decides anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any, Final, NamedTuple, cast
from uuid import UUID

from sqlalchemy import ColumnElement, Select, bindparam, case, exists, func, literal, select, text, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.errors import JobError, LeaseLost
from shared.ids import uuid7
from shared.jobs import needs, pauses, products
from shared.jobs.moves import is_in, move, move_by_case
from shared.jobs.rows import Attempt, Event, Job
from shared.jobs.state import ENDED_BADLY, HELD, AttemptOutcome, JobState, JobType


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
    company: str | None = None
    """What it shares a device by with others that have the same; None: it has the device for itself."""


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


def _current(job_id: Any, fence: Any) -> tuple[ColumnElement[bool], ...]:
    return col(Job.id) == job_id, col(Job.fence) == fence, is_in(HELD)


class Standing(NamedTuple):
    """What a heartbeat is answered."""

    state: JobState
    """May ask the attempt to stop."""
    preempt: bool
    """Whether the attempt shall give its device away at the next checkpoint."""
    event_seq: int
    """Number of the job's latest event."""


def heartbeat(session: Session, job_id: UUID, fence: int, *, lease: timedelta) -> Standing:
    """Hold the job for another ``lease``.

    Raises:
        LeaseLost: the attempt is over; nothing it does from now on counts.
    """
    statement = (
        update(Job)
        .where(*_current(job_id, fence))
        .values(lease_until=func.clock_timestamp() + literal(lease))
        .returning(col(Job.state), col(Job.preempt_fence), col(Job.event_seq))
    )
    row = session.execute(statement).one_or_none()
    if row is None:
        raise LeaseLost(f"job {job_id}: attempt {fence} is over")
    return _standing(row, fence)


def _standing(row: Any, fence: int) -> Standing:
    return Standing(JobState(row.state), row.preempt_fence == fence, row.event_seq)


@dataclass(frozen=True, kw_only=True)
class Report:
    """One event of an attempt, and the row of the object that it announces."""

    type: str
    data: Mapping[str, Any]
    artifact: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, artifact: NewArtifact) -> "Report":
        """Makes an object visible while its job still runs (previews, checkpoints)."""
        artifact_id, details = uuid7(), dict(artifact.details)
        data = {"id": f"art_{artifact_id.hex}", "kind": artifact.kind, "name": artifact.name, "details": details}
        event = f"job.{artifact.kind}" if artifact.kind in ("preview", "checkpoint") else "job.artifact"
        return cls(type=event, data=data, artifact=vars(artifact) | {"id": str(artifact_id), "details": details})


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where an attempt is."""

    step: int
    steps: int
    phase: str | None
    figures: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def as_report(self) -> Report:
        where = {"step": self.step, "steps": self.steps, "phase": self.phase}
        value = self.step / self.steps if self.steps else 0.0
        return Report(type="job.progress", data={**where, "value": value, **self.figures})


# All that an attempt has to say in one statement, which is a heartbeat besides: a beat costs one round trip, and what
# it says is there as a whole or not at all. An object that has its row already is not announced again. With a new
# checkpoint only the last that it wants to "keep" stay, and the one with the lowest score. The last are those that were
# made last: a training that had to go back behind one that is damaged goes on from what it makes now.
_REPORT: Final = text(f"""
WITH said AS (
    SELECT value->>'type' AS type, value->'data' AS data, nullif(value->'artifact', 'null') AS artifact,
        row_number() OVER (ORDER BY place) AS place
    FROM jsonb_array_elements(:reports) WITH ORDINALITY AS listed (value, place)
    WHERE NOT EXISTS (SELECT FROM artifacts
        WHERE key = value->'artifact'->>'key' AND sha256 = value->'artifact'->>'sha256')
), touched AS (
    UPDATE jobs SET lease_until = clock_timestamp() + :lease,
        event_seq = event_seq + num_events, state_version = state_version + num_events,
        step = coalesce(CAST(:step AS bigint), step), steps = coalesce(CAST(:steps AS bigint), steps),
        phase = coalesce(CAST(:phase AS text), phase), figures = coalesce(CAST(:figures AS jsonb), figures)
    FROM (SELECT count(*) AS num_events FROM said) AS counted
    WHERE id = :job_id AND fence = :fence AND state IN ({", ".join(f"'{state.value}'" for state in sorted(HELD))})
        AND event_seq = coalesce(CAST(:after AS bigint), event_seq)
    RETURNING id, tenant_id, fence, state, preempt_fence, event_seq, num_events
), event AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, event_seq - num_events + place, type, data || jsonb_build_object('attempt', fence) FROM touched, said
), told AS (
    SELECT place, object.* FROM said, jsonb_populate_record(NULL::artifacts, artifact) AS object
    WHERE artifact IS NOT NULL
), checkpoints AS (
    SELECT artifacts.id, artifacts.fence, artifacts.details FROM touched JOIN artifacts ON artifacts.job_id = touched.id
    WHERE kind = 'checkpoint' AND removed_at IS NULL AND EXISTS (SELECT FROM told WHERE kind = 'checkpoint')
    UNION ALL
    SELECT told.id, touched.fence, told.details FROM touched, told WHERE kind = 'checkpoint'
), ranked AS (
    SELECT id, details->>'score' IS NULL AS is_unscored, row_number() OVER (ORDER BY fence DESC, id DESC) AS from_last,
        row_number() OVER (ORDER BY CAST(details->>'score' AS float), fence DESC, id DESC) AS from_best
    FROM checkpoints
), superseded AS (
    SELECT id FROM ranked WHERE (is_unscored OR from_best > 1) AND from_last > (
        SELECT coalesce(CAST(details->>'keep' AS int), 1) FROM told WHERE kind = 'checkpoint'
        ORDER BY place DESC LIMIT 1)
), removed AS (
    UPDATE artifacts SET removed_at = clock_timestamp() WHERE id IN (SELECT id FROM superseded)
), made AS (
    INSERT INTO artifacts (id, tenant_id, job_id, fence, kind, name, key, size_bytes, sha256, media_type, details,
        removed_at)
    SELECT told.id, touched.tenant_id, touched.id, touched.fence, told.kind, told.name, told.key, told.size_bytes,
        told.sha256, told.media_type, told.details,
        CASE WHEN told.id IN (SELECT id FROM superseded) THEN clock_timestamp() END
    FROM touched, told
)
SELECT state, preempt_fence, event_seq FROM touched
""").bindparams(bindparam("reports", type_=JSONB), bindparam("figures", type_=JSONB(none_as_null=True)))  # noqa: S608  (constants of ours)


def report(
    session: Session,
    claim: Claim,
    reports: Sequence[Report],
    *,
    where: Progress | None = None,
    after: int | None = None,
    lease: timedelta,
) -> Standing | None:
    """``heartbeat`` that also adds events and their artifacts, in this order, and says where the attempt is.

    ``after``: the event that must still be the job's latest. With it, what was sent twice because nobody confirmed it
    is written once.

    Returns:
        None: nothing was written, for the attempt is over (``heartbeat`` tells) or another event came first
        (``is_reported`` tells whether that was ours).
    """
    wanted = {"job_id": claim.job_id, "fence": claim.fence, "lease": lease, "after": after}
    wanted |= {"step": None, "steps": None, "phase": None, "figures": None} | (vars(where) if where else {})
    row = session.execute(_REPORT, wanted | {"reports": [vars(one) for one in reports]}).one_or_none()
    return None if row is None else _standing(row, claim.fence)


def is_reported(session: Session, claim: Claim, report: Report, *, after: int) -> bool:
    """Whether this report is among the events behind ``after``: a statement without an answer may have happened."""
    same = col(Event.data) == literal({**report.data, "attempt": claim.fence}, JSONB)
    later = exists().where(
        col(Event.job_id) == claim.job_id, col(Event.seq) > after, col(Event.type) == report.type, same
    )
    return bool(session.scalar(select(later)))


def succeed(
    session: Session,
    claim: Claim,
    *,
    result: Mapping[str, Any],
    artifacts: Sequence[NewArtifact],
    timings: Mapping[str, float],
    steps: int,
    seconds: float | None = None,
) -> JobState | None:
    """End the attempt well: state, artifacts and what the job made become visible together.

    ``seconds``, here and below: its part of the time of a device that it shared.

    Returns:
        ``succeeded``, or None: a cancel came first or the attempt is over, and nothing changed.
    """
    is_shown = products.shows_as_it_is(claim.type, claim.inputs)
    told = {"of_job": claim.job_id, "of_fence": claim.fence, "of_seconds": seconds, "of_steps": steps}
    told |= {"of_timings": dict(timings), "of_result": dict(result) if is_shown else None}
    # Listed by name, whichever was stored first.
    told |= {"of_artifacts": [vars(one) | {"id": str(uuid7())} for one in sorted(artifacts, key=lambda one: one.name)]}
    if session.execute(_success(), told).one_or_none() is None:
        return None
    if not is_shown:
        complete = products.publish(
            session, claim.tenant_id, claim.job_id, claim.type, spec=claim.spec, inputs=claim.inputs, result=result
        )
        session.execute(update(Job).where(col(Job.id) == claim.job_id).values(result=complete))
        session.flush()
        needs.settle(session, [claim.job_id])
    return JobState.SUCCEEDED


@cache
def _success() -> Select[Any]:
    """What ``succeed`` does, made once: to put it together takes longer than all else that a worker does for it."""
    steps = cast(Any, bindparam("of_steps", 0))
    json = JSONB(none_as_null=True)
    moved = move(
        JobState.SUCCEEDED,
        *_current(bindparam("of_job"), bindparam("of_fence")),
        outcome=AttemptOutcome.SUCCEEDED,
        seconds=bindparam("of_seconds", 0.0),
        step=steps,
        steps=steps,
        timings=col(Job.timings).op("||")(bindparam("of_timings", type_=JSONB)),
        result=bindparam("of_result", type_=json),
        artifacts=bindparam("of_artifacts", type_=JSONB),
    )
    return moved.with_only_columns(moved.selected_columns["id"])


def fail(
    session: Session, job_id: UUID, fence: int, error: JobError, *, backoff: timedelta, seconds: float | None = None
) -> JobState | None:
    """End the attempt badly: queued again if the error may pass and attempts are left, else failed.

    Returns:
        The state the job is in now, or None: the attempt was over already.
    """
    spent = Job.failures + Job.losses + 1
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
        seconds=seconds,
        failures=Job.failures + 1,
        not_before=pauses.end_of(backoff, Job.failures),
    )
    return _end(session, statement)


def _end(session: Session, statement: Select[Any]) -> JobState | None:
    """End an attempt by this move; returns the state that the job is in now, or None: the attempt was over already."""
    moved = session.execute(statement).mappings().one_or_none()
    if moved is None:
        return None
    if (state := JobState(moved["state"])) in ENDED_BADLY:
        needs.settle(session, [moved["id"]])
    return state


def postpone(
    session: Session,
    job_id: UUID,
    fence: int,
    error: JobError,
    *,
    backoff: timedelta,
    patience: timedelta,
    seconds: float | None = None,
) -> JobState | None:
    """End an attempt by an outage, which is nobody's fault: queued again after a pause, which counts against no limit.

    The pauses double. When those since the job last stored something would come to more than ``patience``, it fails.

    Returns:
        The state the job is in now, or None: the attempt was over already.
    """
    backoff = max(backoff, pauses.SHORTEST)
    earlier = pauses.num_outages(job_id, error)
    lasts = earlier >= pauses.num_within(patience, backoff)
    statement = move_by_case(
        [
            (JobState.CANCELED, col(Job.state) == JobState.CANCELING),
            (JobState.PAUSED, col(Job.state) == JobState.PAUSING),
            (JobState.FAILED, lasts),
            (JobState.QUEUED, literal(True)),
        ],
        *_current(job_id, fence),
        outcome={
            JobState.CANCELED: AttemptOutcome.CANCELED,
            JobState.PAUSED: AttemptOutcome.PAUSED,
            JobState.FAILED: AttemptOutcome.FAILED,
            JobState.QUEUED: AttemptOutcome.INTERRUPTED,
        },
        error=error,
        seconds=seconds,
        failures=Job.failures + case(((col(Job.state) == JobState.RUNNING) & lasts, 1), else_=0),
        interruptions=Job.interruptions + case(((col(Job.state) == JobState.RUNNING) & ~lasts, 1), else_=0),
        not_before=pauses.end_of(backoff, earlier),
    )
    return _end(session, statement)


_AFTER_A_SLICE: Final = case((col(Job.type) == JobType.GENERATE, func.clock_timestamp()), else_=col(Job.queued_at))


def hand_back(
    session: Session,
    job_id: UUID,
    fence: int,
    *,
    preempted: bool = False,
    parted: bool = False,
    seconds: float | None = None,
) -> JobState | None:
    """End an attempt that stopped when it was told to: canceled, paused, or queued for the next worker.

    ``preempted``: it gave its device to others (``turns.py``); a generate job, which had a time slice, goes to the end
    of its line. ``parted``: it ended together with others, nobody knows because of which, so that from now on it is
    tried alone, where only its own failures count.

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
        seconds=seconds,
        interruptions=Job.interruptions + case((col(Job.state) == JobState.RUNNING, 1), else_=0),
        alone=literal(value=True) if parted else col(Job.alone),
        queued_at=_AFTER_A_SLICE if preempted else col(Job.queued_at),
    )
    return _end(session, statement)


def outcome_of(session: Session, job_id: UUID, fence: int) -> AttemptOutcome | None:
    """How the attempt ended, for a worker whose commit was answered by an error; None: it has not."""
    statement = select(col(Attempt.outcome)).where(col(Attempt.job_id) == job_id, col(Attempt.fence) == fence)
    return session.scalars(statement).one_or_none()
