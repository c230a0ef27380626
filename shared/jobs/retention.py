"""Rows that are kept for a while: dated, removed, forgotten. In batches, and several may do it at once.

Like ``attempts.py``: the caller's session, no commit, the database's clock. What is due is one SELECT, which a dry
run reads alone; the statement that does it locks it, and leaves what is in somebody else's hands for later.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import (
    CTE,
    Boolean,
    Interval,
    Select,
    case,
    delete,
    func,
    literal,
    literal_column,
    not_,
    select,
    text,
    update,
)
from sqlalchemy.orm import Session
from sqlmodel import SQLModel, col

from shared.jobs.garbage import FREE_ARTIFACT
from shared.jobs.rows import Artifact, Bell, Dataset, DatasetState, IdempotencyKey, Job, Worker
from shared.jobs.state import QUEUES
from shared.settings import JobSettings

BELL_LIFETIME: Final = timedelta(hours=1)
"""How long a bell is kept after it was sent."""
WORKER_LIFETIME: Final = timedelta(days=1)
"""How long a worker is listed after it was seen last."""

_NOW: Final = func.clock_timestamp()


@dataclass(frozen=True, kw_only=True)
class Duty:
    """What is due, and what is done with it."""

    name: str
    due: Select[*tuple[Any, ...]]
    table: type[SQLModel]
    act: Callable[[CTE], Any]
    """UPDATE or DELETE of the rows of a batch."""

    def find(self, session: Session) -> list[dict[str, Any]]:
        """All that is due now. Changes nothing."""
        return [dict(row) for row in session.execute(self.due).mappings()]

    def do(self, session: Session, *, limit: int) -> int:
        """Do it to at most so many; returns to how many."""
        batch = self.due.limit(limit).with_for_update(skip_locked=True, of=self.table).cte("batch")
        return len(session.execute(self.act(batch).returning(literal_column("1"))).all())


def _date(settings: JobSettings) -> Duty:
    """Say of what an ended job has made until when it is kept; said once, it stays so."""
    special = {"checkpoint": settings.checkpoint_lifetime, "preview": settings.preview_lifetime}
    if settings.artifact_lifetime is None:
        of_kind = col(Artifact.kind).in_([kind for kind, lifetime in special.items() if lifetime is not None])
    else:
        of_kind = col(Artifact.kind).not_in([kind for kind, lifetime in special.items() if lifetime is None])
    cases = ((col(Artifact.kind) == kind, literal(lifetime, Interval)) for kind, lifetime in special.items())
    lifetime = case(*cases, else_=literal(settings.artifact_lifetime, Interval))
    due = (
        select(col(Artifact.id), col(Artifact.key), (col(Job.completed_at) + lifetime).label("expires_at"))
        .join(Job, col(Job.id) == col(Artifact.job_id))
        .where(of_kind, col(Artifact.expires_at).is_(None), col(Artifact.removed_at).is_(None))
        .where(col(Job.completed_at).is_not(None), FREE_ARTIFACT)
    )
    return Duty(
        name="lifetimes",
        due=due,
        table=Artifact,
        act=lambda batch: update(Artifact).where(col(Artifact.id) == batch.c.id).values(expires_at=batch.c.expires_at),
    )


_INHERITED: Final = literal_column(
    """(artifacts.kind = 'checkpoint' AND EXISTS (
        SELECT FROM jobs AS heir WHERE heir.retry_of IS NOT NULL AND heir.completed_at IS NULL
            AND heir.inputs -> 'lineage' @> to_jsonb(CAST(artifacts.job_id AS text))))""",
    Boolean,
)
"""Whether a retry that has not ended may still go on from this checkpoint."""


# What is not correlated is found once for all artifacts, and only if one is due at all. Each state has its index.
_WANTED: Final = literal_column(
    r"""(CAST(artifacts.id AS text) IN (
        SELECT named.id FROM jobs AS unended CROSS JOIN LATERAL (
            SELECT value FROM jsonb_array_elements_text(unended.inputs -> 'artifact_ids')
            UNION ALL SELECT value FROM jsonb_each_text(unended.inputs) WHERE key LIKE '%artifact\_id'
        ) AS named (id)
        WHERE (unended.state = 'queued' OR unended.state = 'paused'
            OR unended.state IN ('running', 'canceling', 'pausing')) AND named.id IS NOT NULL))""",
    Boolean,
)
"""Whether a job that has not ended has this artifact for an input."""


def _expire() -> Duty:
    """Remove what was kept for long enough. The row stays, as a tombstone."""
    due = (
        select(col(Artifact.id), col(Artifact.key), col(Artifact.expires_at))
        .where(col(Artifact.expires_at) < _NOW, col(Artifact.removed_at).is_(None))
        .where(FREE_ARTIFACT, not_(_INHERITED), not_(_WANTED))
        .order_by(col(Artifact.expires_at))
    )
    return Duty(
        name="expired",
        due=due,
        table=Artifact,
        act=lambda batch: update(Artifact).where(col(Artifact.id) == batch.c.id).values(removed_at=_NOW),
    )


def _forget_bells() -> Duty:
    due = select(col(Bell.id), col(Bell.sent_at)).where(col(Bell.sent_at) < _NOW - literal(BELL_LIFETIME))
    return Duty(name="bells", due=due, table=Bell, act=lambda batch: delete(Bell).where(col(Bell.id) == batch.c.id))


def _forget_keys(settings: JobSettings) -> Duty:
    row = IdempotencyKey
    due = select(col(row.tenant_id), col(row.key), col(row.created_at)).where(
        col(row.created_at) < _NOW - literal(settings.idempotency_lifetime)
    )
    return Duty(
        name="idempotency_keys",
        due=due,
        table=row,
        act=lambda batch: delete(row).where(col(row.tenant_id) == batch.c.tenant_id, col(row.key) == batch.c.key),
    )


def _forget_workers() -> Duty:
    due = select(col(Worker.name), col(Worker.seen_at)).where(col(Worker.seen_at) < _NOW - literal(WORKER_LIFETIME))
    return Duty(
        name="workers", due=due, table=Worker, act=lambda batch: delete(Worker).where(col(Worker.name) == batch.c.name)
    )


def _forget_announced(lifetime: timedelta) -> Duty:
    """Datasets that were announced, and never uploaded or never completed; what was uploaded is then an orphan."""
    row = Dataset
    due = select(col(row.id), col(row.tenant_id), col(row.name), col(row.created_at)).where(
        col(row.state) == DatasetState.UPLOADING, col(row.created_at) < _NOW - literal(lifetime)
    )
    return Duty(name="announced", due=due, table=row, act=lambda batch: delete(row).where(col(row.id) == batch.c.id))


_WHOLE_LOGS: Final = """SELECT id, event_seq FROM jobs
    WHERE completed_at < clock_timestamp() - :lifetime AND log_pruned_at IS NULL ORDER BY completed_at"""
# The states stay, and the last event, by which readers see that there are no more.
_GOES: Final = "events.job_id = old.id AND events.type <> 'job.state' AND events.seq < old.event_seq"
_FIND: Final = text(f"""
WITH old AS ({_WHOLE_LOGS})
SELECT old.id AS job_id, count(events.seq) AS events FROM old LEFT JOIN events ON {_GOES} GROUP BY old.id
""")  # noqa: S608  (constants of ours)
_PRUNE: Final = text(f"""
WITH old AS ({_WHOLE_LOGS} LIMIT :limit FOR UPDATE SKIP LOCKED),
due AS (SELECT events.job_id, events.seq FROM old JOIN events ON {_GOES} LIMIT :limit),
gone AS (
    DELETE FROM events USING due WHERE events.job_id = due.job_id AND events.seq = due.seq RETURNING 1
), whole AS (
    UPDATE jobs SET log_pruned_at = clock_timestamp() FROM old
    WHERE jobs.id = old.id AND (SELECT count(*) FROM due) < :limit RETURNING 1
)
SELECT (SELECT count(*) FROM gone) + (SELECT count(*) FROM whole)
""")  # noqa: S608  (constants of ours)


@dataclass(frozen=True, kw_only=True)
class LogDuty:
    """Jobs that ended long ago keep of their logs what tells their states."""

    lifetime: timedelta
    name: str = "events"

    def find(self, session: Session) -> list[dict[str, Any]]:
        """Each job whose log is due, with how many events would go. Changes nothing."""
        return [dict(row) for row in session.execute(_FIND, {"lifetime": self.lifetime}).mappings()]

    def do(self, session: Session, *, limit: int) -> int:
        """Delete at most so many events; returns how many events went and logs were done with."""
        return session.execute(_PRUNE, {"lifetime": self.lifetime, "limit": limit}).scalar_one()


_OLD_USAGE: Final = """SELECT job_id, fence, tenant_id, queue, priority, seconds, created_at FROM usage
    WHERE queue = ANY(:queues) AND created_at < clock_timestamp() - :lifetime"""
# In one order for everybody, so that two that add to the same sums never wait for each other.
_SUM: Final = text(f"""
WITH old AS MATERIALIZED ({_OLD_USAGE} LIMIT :limit FOR UPDATE SKIP LOCKED),
gone AS (
    DELETE FROM usage USING old WHERE usage.job_id = old.job_id AND usage.fence = old.fence RETURNING old.*
), summed AS (
    INSERT INTO usage_of_days AS sums (tenant_id, day, queue, priority, attempts, seconds)
    SELECT tenant_id, CAST(created_at AT TIME ZONE 'UTC' AS date) AS day, queue, priority, count(*), sum(seconds)
    FROM gone GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
    ON CONFLICT (tenant_id, day, queue, priority) DO UPDATE
        SET attempts = sums.attempts + excluded.attempts, seconds = sums.seconds + excluded.seconds
)
SELECT count(*) FROM gone
""")  # noqa: S608  (constants of ours)
_QUEUES: Final = sorted(set(QUEUES.values()))
"""Named, so that their index serves."""


@dataclass(frozen=True, kw_only=True)
class UsageDuty:
    """Of attempts that ended long ago only the sum of each day is kept."""

    lifetime: timedelta
    name: str = "usage"

    def find(self, session: Session) -> list[dict[str, Any]]:
        """What is to be summed. Changes nothing."""
        return [dict(row) for row in session.execute(text(_OLD_USAGE), self._terms).mappings()]

    def do(self, session: Session, *, limit: int) -> int:
        """Sum at most so many; returns how many."""
        return session.execute(_SUM, {**self._terms, "limit": limit}).scalar_one()

    @property
    def _terms(self) -> dict[str, Any]:
        return {"lifetime": self.lifetime, "queues": _QUEUES}


def duties(settings: JobSettings) -> list[Duty | LogDuty | UsageDuty]:
    """In an order in which one may make work for the next."""
    logs = [] if settings.event_lifetime is None else [LogDuty(lifetime=settings.event_lifetime)]
    usage = [] if settings.usage_lifetime is None else [UsageDuty(lifetime=settings.usage_lifetime)]
    announced = [] if settings.announced_lifetime is None else [_forget_announced(settings.announced_lifetime)]
    rest = [*usage, *announced, _forget_bells(), _forget_keys(settings), _forget_workers()]
    return [_date(settings), _expire(), *logs, *rest]
