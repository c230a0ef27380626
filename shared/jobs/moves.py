"""One statement moves jobs: the guarded UPDATE, its event, the end of its attempt, what that cost and made, its bell.

Built here, executed by ``requests.py`` (async), ``attempts.py`` and ``upkeep.py`` (sync). Because all of
it is a single SQL statement, of two racing writers exactly one matches a row, and no event, attempt
or bell can be missing or extra.
"""

from collections.abc import Iterable
from typing import Any, Final

from sqlalchemy import (
    CTE,
    Boolean,
    ColumnElement,
    Select,
    Table,
    Text,
    case,
    cast,
    column,
    func,
    insert,
    literal,
    literal_column,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import col

from shared.errors import JobError
from shared.jobs.fairness import charge
from shared.jobs.rows import Artifact, Attempt, Bell, Event, Job
from shared.jobs.state import HELD, AttemptOutcome, JobState, states_before

FINAL: Final = tuple(state for state in JobState if state.is_final)
_JOB: Final[Table] = Job.metadata.tables["jobs"]

Cases = list[tuple[JobState, ColumnElement[bool]]]


def is_in(states: Iterable[JobState]) -> ColumnElement[bool]:
    """Whether the job is in one of these, written out: an ``IN`` with parameters is put together for each execution."""
    names = ", ".join(f"'{state.value}'" for state in sorted(states))
    return literal_column(f"jobs.state IN ({names})", Boolean)


def move(to: JobState, *conditions: ColumnElement[bool], **values: Any) -> Select[Any]:
    """Move every job that matches ``conditions`` and may legally move to ``to``.

    Args:
        values: further columns of the job to set; ``outcome`` says how the attempt ended.

    Returns:
        A statement that moves, and yields the moved rows as they are afterwards.
    """
    return move_by_case([(to, is_in(states_before(to)))], *conditions, **values)


def move_by_case(
    cases: Cases,
    *conditions: ColumnElement[bool],
    outcome: AttemptOutcome | dict[JobState, AttemptOutcome] | None = None,
    error: JobError | None = None,
    seconds: float | ColumnElement[Any] | None = None,
    artifacts: ColumnElement[Any] | None = None,
    **values: Any,
) -> Select[Any]:
    """``move``, where the target is the first case that holds; a job for which none holds stays.

    A case whose condition does not imply a legal move never applies: the table of moves is
    added to each condition. ``error`` goes to the attempt, and to the job if that fails. ``seconds`` is the attempt's
    part of the device's time, which is all of it when left out. ``artifacts``: JSON of the objects that it has stored.
    """
    targets = [to for to, _ in cases]
    legal = [(condition & is_in(states_before(to)), literal(to.value, Text)) for to, condition in cases]
    target = case(*legal)
    moved = (
        update(Job)
        .where(*conditions, target.is_not(None))
        .values(_values(target, targets) | _error(target, error) | values)
        .returning(*_JOB.c)
        .cte("moved")
    )
    statement = select(moved).add_cte(_event(moved))
    if outcome is not None:
        by_state = outcome if isinstance(outcome, dict) else dict.fromkeys(targets, outcome)
        ended = _end_attempt(moved, by_state, error, seconds)
        statement = statement.add_cte(ended, *charge(moved, ended))
    if artifacts is not None:
        statement = statement.add_cte(_made(moved, artifacts))
    if JobState.QUEUED in targets:
        statement = statement.add_cte(_bell(moved))
    return statement


def append_event(
    job_id: Any, kind: str, data: dict[str, Any], *conditions: ColumnElement[bool], **values: Any
) -> Select[Any]:
    """Add an event that moves nothing, and set ``values``; yields a row only where ``conditions`` hold."""
    touched = (
        update(Job)
        .where(col(Job.id) == job_id, *conditions)
        .values(event_seq=Job.event_seq + 1, state_version=Job.state_version + 1, **values)
        .returning(col(Job.id), col(Job.event_seq), col(Job.state), col(Job.preempt_fence))
        .cte("touched")
    )
    rows = select(touched.c.id, touched.c.event_seq, literal(kind, Text), literal(data, JSONB))
    event = insert(Event).from_select(["job_id", "seq", "type", "data"], rows).cte("event")
    return select(touched).add_cte(event)


def _values(target: ColumnElement[Any], targets: list[JobState]) -> dict[str, Any]:
    """What every move sets besides the state: counters, and the columns that go with the target."""
    changes: dict[str, Any] = {
        "state": target,
        "state_version": Job.state_version + 1,
        "event_seq": Job.event_seq + 1,
    }
    if not set(targets) & HELD:
        changes |= {"lease_until": None, "worker": None, "phase": None}
    if set(targets) & set(FINAL):
        final = or_(*(target == literal(state.value, Text) for state in set(targets) & set(FINAL)))
        changes["completed_at"] = case((final, func.clock_timestamp()), else_=null())
    if JobState.QUEUED in targets:
        # Whoever was paused joins the line anew; whose attempt was lost, cut short or failed keeps the place. Who waits
        # for other jobs has none.
        joins = (
            (target == JobState.QUEUED.value) & (col(Job.state) == JobState.PAUSED) & col(Job.queued_at).is_not(None)
        )
        changes["queued_at"] = case((joins, func.clock_timestamp()), else_=col(Job.queued_at))
    return changes


def _error(target: ColumnElement[Any], error: JobError | None) -> dict[str, Any]:
    if error is None:
        return {}
    failed = target == JobState.FAILED.value
    return {
        "error_code": case((failed, literal(error.code, Text)), else_=null()),
        "error_message": case((failed, literal(str(error), Text)), else_=null()),
    }


def _event(moved: CTE) -> CTE:
    error = func.jsonb_build_object("code", moved.c.error_code, "message", moved.c.error_message)
    data = func.jsonb_build_object(
        *("state", moved.c.state, "state_version", moved.c.state_version, "attempt", moved.c.fence),
        *("error", case((moved.c.error_code.is_not(None), error), else_=cast(null(), JSONB))),
    )
    rows = select(moved.c.id, moved.c.event_seq, literal("job.state", Text), func.jsonb_strip_nulls(data))
    return insert(Event).from_select(["job_id", "seq", "type", "data"], rows).cte("event")


def _end_attempt(
    moved: CTE,
    outcomes: dict[JobState, AttemptOutcome],
    error: JobError | None,
    seconds: float | ColumnElement[Any] | None,
) -> CTE:
    outcome = case(*((moved.c.state == to, literal(how.value, Text)) for to, how in outcomes.items()))
    why = {} if error is None else {"error_code": error.code, "error_message": str(error)}
    # The database's own clock may have been put back meanwhile, which gives nobody anything back.
    passed = func.greatest(func.extract("epoch", col(Attempt.ended_at) - col(Attempt.started_at)), 0)
    # No worker's clock makes anybody pay for more than the database saw pass. (``least`` takes no notice of a NULL.)
    spent = passed if seconds is None else func.least(passed, seconds)
    return (
        update(Attempt)
        .where(col(Attempt.job_id) == moved.c.id, col(Attempt.fence) == moved.c.fence, col(Attempt.ended_at).is_(None))
        .values(outcome=outcome, ended_at=func.clock_timestamp(), **why)
        .returning(col(Attempt.job_id), col(Attempt.fence), spent.label("seconds"))
        .cte("ended")
    )


def _bell(moved: CTE) -> CTE:
    waiting = select(moved.c.id).where(moved.c.state == JobState.QUEUED, moved.c.queued_at.is_not(None))
    return insert(Bell).from_select(["job_id"], waiting).cte("bell")


def _made(moved: CTE, artifacts: ColumnElement[Any]) -> CTE:
    table = Artifact.metadata.tables["artifacts"]
    own = [table.c[name] for name in ("id", "kind", "name", "key", "size_bytes", "sha256", "media_type", "details")]
    columns = [column(one.name, one.type) for one in own]
    made = func.jsonb_to_recordset(artifacts).table_valued(*columns, name="told", joins_implicitly=True)
    told = made.render_derived(with_types=True)
    rows = select(moved.c.tenant_id, moved.c.id, moved.c.fence, *told.c)
    return insert(Artifact).from_select(["tenant_id", "job_id", "fence", *(one.name for one in own)], rows).cte("made")
