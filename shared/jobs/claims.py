"""Taking work: which waiting jobs are claimed, and how a claim is found again whose commit nobody confirmed.

Like ``attempts.py``: the caller's session, no commit, the database's clock.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import UUID as SQL_UUID
from sqlalchemy import RowMapping, Text, TextClause, bindparam, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.database import PLANNED_ONCE
from shared.errors import InputGone, InternalError, NotFound
from shared.jobs import fairness, products
from shared.jobs.attempts import Claim, fail
from shared.jobs.rows import Attempt, Job
from shared.jobs.state import HELD, JobType
from shared.settings import JobSettings

logger = logging.getLogger(__name__)

_WANTED: Final = ("id", "fence", "tenant_id", "type", "spec", "inputs", "timeout_seconds", "alone")
"""Columns that make a claim."""
_UNSAID: Final = 16
"""Samples that a generate job draws which does not say how many."""
_AT_ONCE: Final = 16
"""Jobs looked at beyond those wanted: so many claims at the same moment find one each."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """On what terms jobs are claimed."""

    lease: timedelta
    ageing: timedelta
    quantum: timedelta

    @classmethod
    def of(cls, settings: JobSettings) -> "Terms":
        return cls(lease=settings.lease, ageing=settings.ageing, quantum=settings.quantum)


_JOINS: Final = "type = 'generate' AND NOT alone AND inputs->>'version_id' = :company"
"""Which queued jobs may join those that share a model; ``ix_jobs_company`` finds them."""
FIRST: Final = 256
"""Jobs looked at in each line to see whether somebody in it may not join: who stands further back has no claim to be
served before those."""
_OTHERS: Final = f"""others AS MATERIALIZED (
    SELECT max(lines.priority) AS highest FROM lines WHERE EXISTS (
        SELECT FROM (
            SELECT type, alone, inputs FROM jobs
            WHERE state = 'queued' AND tenant_id = lines.tenant_id AND queue = lines.queue AND priority = lines.priority
                AND {fairness.MAY_START}
            ORDER BY queued_at, id LIMIT {FIRST}
        ) AS first WHERE ({_JOINS}) IS NOT TRUE)
), """  # noqa: S608  (constants of ours)
"""How urgent the most urgent of those is that may not."""
_OTHERS_MAY_WAIT: Final = """coalesce(
    (SELECT highest FROM others) <= CASE WHEN CAST(:others_wait AS boolean) THEN lines.priority ELSE -1 END, true)"""


# SKIP LOCKED may answer "none" while rows are merely locked, so nobody stops polling on one empty
# answer. MATERIALIZED: the locking scan must run once, never inside a join.
def _claiming(condition: str, tables: str = "", fits: str = "true") -> TextClause:
    return text(f"""
WITH RECURSIVE queues AS (SELECT DISTINCT unnest(:queues) AS queue), {fairness.LINES}, {tables}heads AS MATERIALIZED (
    SELECT head.id, head.queued_at, head.samples, lines.attained,
        CASE WHEN place = 1 THEN {fairness.RISEN} ELSE priority END AS rank
    FROM lines CROSS JOIN LATERAL (
        SELECT id, queued_at, row_number() OVER (ORDER BY queued_at, id) AS place,
            CASE WHEN jsonb_typeof(spec->'num_samples') = 'number' THEN (spec->>'num_samples')::numeric
                ELSE {_UNSAID} END AS samples FROM jobs
        WHERE state = 'queued' AND tenant_id = lines.tenant_id AND queue = lines.queue AND priority = lines.priority
            AND {fairness.MAY_START} AND {condition}
        ORDER BY queued_at, id LIMIT {_AT_ONCE} + :limit
    ) AS head
), best AS MATERIALIZED (
    SELECT *, sum(samples) OVER (ORDER BY rank DESC, attained, queued_at, id) - samples AS samples_before
    FROM heads ORDER BY rank DESC, attained, queued_at, id LIMIT {_AT_ONCE} + :limit
), candidate AS MATERIALIZED (
    SELECT jobs.id FROM jobs JOIN best ON best.id = jobs.id WHERE jobs.state = 'queued' AND {fits}
    ORDER BY best.rank DESC, best.attained, best.queued_at, best.id LIMIT :limit FOR UPDATE OF jobs SKIP LOCKED
), claimed AS (
    UPDATE jobs SET
        state = 'running', fence = fence + 1, worker = :worker, phase = 'starting',
        lease_until = clock_timestamp() + :lease, started_at = coalesce(started_at, clock_timestamp()),
        not_before = NULL, state_version = jobs.state_version + 1, event_seq = event_seq + 1,
        timings = timings || jsonb_build_object('queue_ms', coalesce((timings->>'queue_ms')::float8, 0)
            + round(1000 * extract(epoch FROM clock_timestamp() - greatest(queued_at, (
                SELECT max(ended_at) FROM attempts WHERE attempts.job_id = jobs.id)))))
    FROM candidate WHERE jobs.id = candidate.id AND jobs.state = 'queued'
    RETURNING jobs.*
), attempt AS (
    INSERT INTO attempts (job_id, fence, worker, token) SELECT id, fence, :worker, :token FROM claimed
), event AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, event_seq, 'job.state', jsonb_build_object(
        'state', state, 'state_version', state_version, 'attempt', fence, 'worker', worker) FROM claimed
)
SELECT {", ".join(_WANTED)} FROM claimed
""").bindparams(bindparam("queues", type_=ARRAY(Text)), bindparam("token", type_=SQL_UUID()))  # noqa: S608  (constants of ours)


_CLAIM: Final = _claiming("true")
_CLAIM_COMPANY: Final = _claiming(f"{_JOINS} AND {_OTHERS_MAY_WAIT}", _OTHERS, fits="samples_before < :limit")


def claim(
    session: Session, *, worker: str, queues: Sequence[str], terms: Terms, limit: int = 1, token: UUID | None = None
) -> list[Claim]:
    """Take the jobs whose turn it is in these queues, each with a fence of its own; maybe none.

    First by priority, risen by age; then the tenant that has had least (``fairness.py``); then the oldest.
    """
    wanted = {"worker": worker, "queues": list(queues), "limit": limit, "token": token}
    wanted |= {"lease": terms.lease, "ageing": terms.ageing, "quantum": terms.quantum}
    while rows := session.execute(_CLAIM, wanted, execution_options=PLANNED_ONCE).mappings().all():
        claims = [made for row in rows if (made := _claim(session, row)) is not None]
        if claims:
            return claims
    return []


def claim_company(
    session: Session,
    company: str,
    *,
    worker: str,
    queues: Sequence[str],
    terms: Terms,
    limit: int,
    token: UUID,
    others_wait: bool,
) -> list[Claim]:
    """Take jobs that can share a device with one of this ``company`` (``Claim.company``), in the same order.

    Those are as many as draw ``limit`` samples; the last one may draw more.

    ``others_wait``: whether jobs that cannot may go on waiting, if they are not more urgent; else none is taken while
    there are such.
    """
    wanted = {"worker": worker, "queues": list(queues), "limit": limit, "token": token, "company": company}
    wanted |= {"lease": terms.lease, "ageing": terms.ageing, "quantum": terms.quantum, "others_wait": others_wait}
    rows = session.execute(_CLAIM_COMPANY, wanted, execution_options=PLANNED_ONCE).mappings().all()
    return [made for row in rows if (made := _claim(session, row)) is not None]


def reclaim(session: Session, token: UUID) -> list[Claim]:
    """The claims that were made with ``token`` and still hold: for a worker whose commit was not confirmed."""
    held = (
        select(*(Job.metadata.tables["jobs"].c[name] for name in _WANTED))
        .join(Attempt, (col(Attempt.job_id) == Job.id) & (col(Attempt.fence) == Job.fence))
        .where(col(Attempt.token) == token, col(Attempt.ended_at).is_(None), col(Job.state).in_(HELD))
    )
    rows = session.execute(held).mappings().all()
    return [made for row in rows if (made := _claim(session, row)) is not None]


def _claim(session: Session, row: RowMapping) -> Claim | None:
    """The claim, or None: what the job refers to is gone, so it failed here and now."""
    seconds = row["timeout_seconds"]
    kind = JobType(row["type"])
    try:
        inputs = products.resolve(session, row["id"], kind, row["inputs"], fence=row["fence"])
    except NotFound as error:
        fail(session, row["id"], row["fence"], InputGone(error.detail), backoff=timedelta(0))
        return None
    except (LookupError, TypeError, ValueError):
        # A row that no claim can read would stay at the head of its queue and block everybody.
        logger.exception("job %s: its inputs cannot be resolved", row["id"])
        fail(session, row["id"], row["fence"], InternalError("its inputs cannot be resolved"), backoff=timedelta(0))
        return None
    return Claim(
        job_id=row["id"],
        fence=row["fence"],
        tenant_id=row["tenant_id"],
        type=kind,
        spec=row["spec"],
        inputs=inputs,
        timeout=None if seconds is None else timedelta(seconds=seconds),
        company=row["inputs"].get("version_id") if kind == JobType.GENERATE and not row["alone"] else None,
    )
