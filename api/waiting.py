"""What SQL knows about jobs beyond their rows: attempts, retries, places in the queue, and who could run them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Literal
from uuid import UUID

from sqlalchemy import UUID as SQL_UUID
from sqlalchemy import Text, bindparam, func, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from api.eta import FEWEST, Forecast, Place, QueueFacts, Rival, WorkerFacts
from shared.database import PLANNED_ONCE
from shared.ids import public
from shared.jobs import fairness
from shared.jobs.need_rows import Need
from shared.jobs.rows import Attempt, Job
from shared.jobs.state import JobState
from shared.jobs.workers import GONE_AFTER
from shared.settings import JobSettings
from shared.wire import QueueView

FARTHEST: Final = 1000
"""Places in a queue are counted up to here, so that a long queue does not slow down submissions."""
_SAMPLE: Final = 200
"""Ended attempts of a queue that an estimate rests on, the newest."""
_LATELY: Final = timedelta(hours=1)
"""For which it is asked who has had how much of the devices."""
_HEAD: Final = 32
"""Jobs in line that are looked at one by one for an estimate."""


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """What a view of a job needs besides its row."""

    attempts: Sequence[Attempt] = field(default_factory=list[Attempt])
    device_seconds: float | None = None
    queue: QueueView | None = None
    retried_by: UUID | None = None


# The order is that of the claim (shared/jobs/claims.py), played forward: each job that is taken adds what its tenant's
# jobs usually cost to the tenant's account. Workers that serve several queues take the best of all of them, so a queue
# is looked at together with those beside it. Jobs that back off are passed over. Who wants nothing but what waits for
# other jobs is in no line, and whoever comes back starts where those stand who are in one or run (fairness.py). Lines
# are read to the same depth, and not at all where none of the jobs lies within it.
_PLACES: Final = text(f"""
WITH RECURSIVE {fairness.LINES}, live AS (
    SELECT DISTINCT ON (workers.name) workers.name, workers.queues, held.queue, held.tenant_id,
        extract(epoch FROM clock_timestamp() - attempts.started_at) AS elapsed,
        CASE WHEN jsonb_typeof(held.figures->'eta_seconds') = 'number'
            THEN greatest(0, (held.figures->>'eta_seconds')::float8) END AS remaining
    FROM workers
    LEFT JOIN jobs AS held ON held.worker = workers.name AND held.state = 'running'
    LEFT JOIN attempts ON attempts.job_id = held.id AND attempts.fence = held.fence
    WHERE workers.state IN ('idle', 'busy') AND workers.seen_at > clock_timestamp() - :gone_after
    ORDER BY workers.name, attempts.started_at DESC
), asked AS MATERIALIZED (
    SELECT q.queue, array(
        SELECT q.queue UNION SELECT unnest(live.queues) FROM live WHERE q.queue = ANY(live.queues)) AS beside
    FROM unnest(:queues) AS q (queue)
), queues AS MATERIALIZED (
    SELECT DISTINCT unnest(beside) AS queue FROM asked
), recent AS MATERIALIZED (
    SELECT queues.queue, ended.* FROM queues CROSS JOIN LATERAL (
        SELECT tenant_id, priority, seconds, created_at FROM usage WHERE usage.queue = queues.queue
        ORDER BY created_at DESC LIMIT {_SAMPLE}
    ) AS ended
), usual AS MATERIALIZED (
    SELECT queue, tenant_id, avg(seconds) AS seconds FROM recent
    GROUP BY GROUPING SETS ((queue, tenant_id), (queue)) HAVING tenant_id IS NULL OR count(*) >= {FEWEST}
), in_line AS MATERIALIZED (
    SELECT tenant_id, attained FROM accounts WHERE EXISTS (
        SELECT FROM jobs WHERE state = 'queued' AND tenant_id = accounts.tenant_id AND queued_at IS NOT NULL)
), active AS MATERIALIZED (
    SELECT tenant_id, attained FROM in_line UNION ALL
    SELECT tenant_id, sum(seconds) + coalesce((
        SELECT attained FROM shares WHERE shares.tenant_id = in_flight.tenant_id), 0)
    FROM in_flight WHERE tenant_id NOT IN (SELECT tenant_id FROM in_line) GROUP BY tenant_id
), depth AS MATERIALIZED (
    SELECT {FARTHEST} / greatest(1, count(*)) AS places FROM in_line
), foremost AS MATERIALIZED (
    SELECT DISTINCT ON (tenant_id, queue, priority) tenant_id, queue, priority, queued_at, id
    FROM jobs WHERE id = ANY(:ids) AND state = 'queued' ORDER BY tenant_id, queue, priority, queued_at, id
), near AS MATERIALIZED (
    SELECT EXISTS (SELECT FROM foremost WHERE NOT EXISTS (
        SELECT FROM jobs WHERE state = 'queued' AND tenant_id = foremost.tenant_id AND queue = foremost.queue
            AND priority = foremost.priority AND (queued_at, id) < (foremost.queued_at, foremost.id)
        OFFSET (SELECT greatest(0, places - 1) FROM depth) LIMIT 1)) AS is_any
), waiting AS MATERIALIZED (
    SELECT asked.queue AS asked, lines.queue, head.id, head.queued_at, head.may_start, lines.tenant_id, lines.attained,
        CASE WHEN head.place <= 1 THEN {fairness.RISEN} ELSE lines.priority END AS rank,
        coalesce(own.seconds, all_own.seconds, extract(epoch FROM CAST(:quantum AS interval))) AS seconds
    FROM asked JOIN lines ON lines.queue = ANY(asked.beside) AND (SELECT is_any FROM near) CROSS JOIN LATERAL (
        SELECT id, queued_at, {fairness.MAY_START} AS may_start,
            count(*) FILTER (WHERE {fairness.MAY_START}) OVER (ORDER BY queued_at, id) AS place
        FROM jobs WHERE state = 'queued' AND tenant_id = lines.tenant_id AND queue = lines.queue
            AND priority = lines.priority AND queued_at IS NOT NULL
        ORDER BY queued_at, id LIMIT (SELECT places FROM depth)
    ) AS head
    LEFT JOIN usual AS own ON own.queue = lines.queue AND own.tenant_id = lines.tenant_id
    LEFT JOIN usual AS all_own ON all_own.queue = lines.queue AND all_own.tenant_id IS NULL
), turns AS (
    SELECT *, attained + coalesce(sum(seconds) FILTER (WHERE may_start) OVER (
        PARTITION BY asked, tenant_id ORDER BY rank DESC, queued_at, id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    ), 0) AS turn FROM waiting
), placed AS MATERIALIZED (
    SELECT asked, queue, id, tenant_id, may_start, seconds, rank, turn,
        1 + count(*) FILTER (WHERE may_start) OVER earlier AS place,
        coalesce(sum(seconds) FILTER (WHERE may_start) OVER earlier, 0) AS work
    FROM turns WINDOW earlier AS (
        PARTITION BY asked ORDER BY rank DESC, turn, queued_at, id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
), lately AS MATERIALIZED (
    SELECT queue, tenant_id, priority, seconds, max(extract(epoch FROM clock_timestamp() - created_at) + seconds)
        OVER (PARTITION BY queue) AS period
    FROM recent WHERE created_at > clock_timestamp() - :lately
), rivals AS MATERIALIZED (
    SELECT asked.queue AS asked, lately.tenant_id AS tenant, priority, sum(seconds / period) AS rate,
        avg(seconds) AS usual, coalesce(
            (SELECT attained FROM active WHERE active.tenant_id = lately.tenant_id) + coalesce((
                SELECT sum(seconds) FROM waiting
                WHERE waiting.asked = asked.queue AND waiting.tenant_id = lately.tenant_id AND may_start), 0),
            greatest((SELECT min(attained) FROM active), (
                SELECT attained FROM shares WHERE shares.tenant_id = lately.tenant_id), 0)) AS level
    FROM asked JOIN lately ON lately.queue = ANY(asked.beside) GROUP BY 1, 2, 3
)
SELECT clock_timestamp() AS now, (
    SELECT coalesce(jsonb_object_agg(id, jsonb_build_object(
        'tenant', tenant_id, 'position', place, 'rank', rank, 'work', work, 'turn', turn)), '{{}}') FROM placed
    WHERE asked = queue AND id = ANY(:ids)
) AS places, (
    SELECT jsonb_object_agg(asked.queue, jsonb_build_object(
        'workers', (
            SELECT coalesce(jsonb_agg(jsonb_build_object('elapsed', elapsed, 'remaining', remaining, 'usual', coalesce(
                (SELECT seconds FROM usual WHERE usual.queue = live.queue AND usual.tenant_id = live.tenant_id),
                (SELECT seconds FROM usual WHERE usual.queue = live.queue AND usual.tenant_id IS NULL)))), '[]')
            FROM live WHERE asked.queue = ANY(live.queues)),
        'shapes', (
            SELECT coalesce(jsonb_agg(recent.seconds / greatest(coalesce(own.seconds, all_own.seconds), 0.001)), '[]')
            FROM recent LEFT JOIN usual AS own ON own.queue = recent.queue AND own.tenant_id = recent.tenant_id
            JOIN usual AS all_own ON all_own.queue = recent.queue AND all_own.tenant_id IS NULL
            WHERE recent.queue = ANY(asked.beside)),
        'head', (
            SELECT coalesce(jsonb_agg(seconds ORDER BY place), '[]') FROM placed
            WHERE placed.asked = asked.queue AND may_start AND place <= {_HEAD}),
        'rivals', (
            SELECT coalesce(jsonb_agg(to_jsonb(rivals) - 'asked'), '[]') FROM rivals WHERE rivals.asked = asked.queue)
    )) FROM asked
) AS queues
""").bindparams(bindparam("queues", type_=ARRAY(Text)), bindparam("ids", type_=ARRAY(SQL_UUID)))  # noqa: S608  (constants of ours)


_IDS: Final = func.any(bindparam("ids", type_=ARRAY(SQL_UUID)))
_UNTIL: Final = func.coalesce(Attempt.ended_at, func.clock_timestamp())
_ATTEMPTS: Final = (
    select(Attempt, func.extract("epoch", _UNTIL - col(Attempt.started_at)))
    .where(col(Attempt.job_id) == _IDS)
    .order_by(col(Attempt.fence))
)
_RETRIES: Final = select(col(Job.retry_of), col(Job.id)).where(col(Job.retry_of) == _IDS)


async def facts(session: AsyncSession, jobs: Sequence[Job], settings: JobSettings) -> dict[UUID, JobFacts]:
    """The facts of each job, in at most five statements, of which one says how the place is planned."""
    attempts, seconds = await _attempts(session, [job.id for job in jobs if job.fence])
    queued = [job for job in jobs if job.state == JobState.QUEUED]
    places = await _places(session, [job for job in queued if job.queued_at is not None], settings)
    places |= await _held_up(session, [job.id for job in queued if job.queued_at is None])
    retries = await _retries(session, [job.id for job in jobs if job.state.is_final])
    return {
        job.id: JobFacts(
            attempts=attempts[job.id],
            device_seconds=seconds.get(job.id),
            queue=places.get(job.id),
            retried_by=retries.get(job.id),
        )
        for job in jobs
    }


async def _attempts(
    session: AsyncSession, ids: Sequence[UUID]
) -> tuple[defaultdict[UUID, list[Attempt]], dict[UUID, float]]:
    found: defaultdict[UUID, list[Attempt]] = defaultdict(list)
    seconds: defaultdict[UUID, float] = defaultdict(float)
    if ids:
        for row, duration in await session.execute(_ATTEMPTS, {"ids": ids}):
            found[row.job_id].append(row)
            seconds[row.job_id] += float(duration)
    return found, {job_id: round(total, 3) for job_id, total in seconds.items()}


async def _retries(session: AsyncSession, ids: Sequence[UUID]) -> dict[UUID, UUID]:
    if not ids:
        return {}
    return {row.retry_of: row.id for row in await session.execute(_RETRIES, {"ids": ids})}


async def _places(session: AsyncSession, waiting: Sequence[Job], settings: JobSettings) -> dict[UUID, QueueView]:
    if not waiting:
        return {}
    wanted = {"queues": sorted({job.queue for job in waiting}), "ids": [job.id for job in waiting]}
    wanted |= {"gone_after": GONE_AFTER, "lately": _LATELY, "ageing": settings.ageing, "quantum": settings.quantum}
    row = (await session.execute(_PLACES, wanted, execution_options=PLANNED_ONCE)).one()
    forecasts = {name: Forecast(_queue_facts(known)) for name, known in row.queues.items()}
    return {job.id: _queue_view(job, row, forecasts[job.queue]) for job in waiting}


async def _held_up(session: AsyncSession, ids: Sequence[UUID]) -> dict[UUID, QueueView]:
    """Of jobs that are in no line, for they wait for others."""
    if not ids:
        return {}
    unended = select(col(Need.job_id), col(Need.needs_job_id)).join(Job, col(Job.id) == col(Need.needs_job_id))
    unended = unended.where(col(Need.job_id).in_(ids), col(Job.completed_at).is_(None)).distinct()
    waits_for: defaultdict[UUID, list[str]] = defaultdict(list)
    for row in await session.execute(unended.order_by(col(Need.needs_job_id))):
        waits_for[row.job_id].append(public("job", row.needs_job_id))
    return {one: QueueView(position=None, reason="waiting_for_jobs", waits_for=waits_for[one]) for one in ids}


def _queue_facts(known: dict[str, Any]) -> QueueFacts:
    return QueueFacts(
        workers=[WorkerFacts(**worker) for worker in known["workers"]],
        rivals=[Rival(**rival) for rival in known["rivals"]],
        shapes=known["shapes"],
        head=known["head"],
    )


def _queue_view(job: Job, row: Any, forecast: Forecast) -> QueueView:
    place = Place(**row.places[str(job.id)]) if str(job.id) in row.places else None
    position = place.position if place else FARTHEST + 1
    backoff = max(0.0, (job.not_before - row.now).total_seconds()) if job.not_before else 0.0
    reason = _reason(backoff, position, is_served=bool(row.queues[job.queue]["workers"]))
    return QueueView(position=position, reason=reason, eta=forecast.at(place, backoff=backoff) if place else None)


def _reason(
    backoff: float, place: int, *, is_served: bool
) -> Literal["waiting_for_worker", "no_compatible_worker", "backing_off", "behind_others"]:
    if backoff:
        return "backing_off"
    if not is_served:
        return "no_compatible_worker"
    return "waiting_for_worker" if place == 1 else "behind_others"
