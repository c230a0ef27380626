"""Who gives the device away, and when: a training to what is urgent, generate jobs to whoever's turn it is.

Like ``upkeep.py``, and done by the same process: the caller's session, no commit, the database's clock. An attempt is
asked by ``preempt_fence``, hears of it at its next heartbeat, and leaves when that costs least (``Run.boundary``).
"""

from datetime import timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import text, update
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.jobs import fairness
from shared.jobs.claims import FIRST, Terms
from shared.jobs.moves import append_event
from shared.jobs.rows import Job
from shared.jobs.state import JobState, JobType
from shared.jobs.workers import GONE_AFTER

WAITED: Final = timedelta(seconds=1)
"""Who waits for less may be taken by an idle worker any moment."""

# A worker with a training is the last resort: any other that lives and serves the queue takes the job sooner. One at
# a time for each queue, so that no more trainings give way than jobs wait.
_PREEMPT: Final = text(f"""
WITH live AS (
    SELECT workers.name, workers.queues, held.id, held.fence, held.priority, held.state, held.preempt_fence
    FROM workers LEFT JOIN jobs AS held ON held.worker = workers.name AND held.type = 'train'
        AND held.state IN ('running', 'canceling', 'pausing')
    WHERE workers.state IN ('idle', 'busy') AND workers.seen_at > clock_timestamp() - :gone_after
), urgent AS (
    SELECT DISTINCT queue FROM jobs
    WHERE state = 'queued' AND priority = {fairness.HIGHEST} AND type <> 'train' AND {fairness.MAY_START}
)
SELECT DISTINCT ON (urgent.queue) live.id, live.fence FROM urgent JOIN live ON urgent.queue = ANY(live.queues)
WHERE live.state = 'running' AND live.priority < {fairness.HIGHEST} AND NOT EXISTS (
    SELECT FROM live AS other WHERE urgent.queue = ANY(other.queues)
        AND (other.id IS NULL OR other.state <> 'running' OR other.preempt_fence = other.fence))
ORDER BY urgent.queue, live.priority, live.fence
""")  # noqa: S608  (constants of ours)


def preempt(session: Session) -> list[UUID]:
    """Ask a training to give way at its next checkpoint where a job of high priority waits that nobody else can take.

    Returns the jobs that were asked.
    """
    asked: list[UUID] = []
    for row in session.execute(_PREEMPT, {"gone_after": GONE_AFTER}).all():
        running = (col(Job.fence) == row.fence, col(Job.state) == JobState.RUNNING)
        said = {"message": "Asked to give way to an urgent job at the next checkpoint.", "attempt": row.fence}
        event = append_event(row.id, "job.log", said, *running, preempt_fence=Job.fence)
        if session.execute(event).one_or_none() is not None:
            asked.append(row.id)
    return asked


# One worker at a time for each queue, as above, and the one whose jobs have had the device for longest. What its jobs
# will have had when they are handed back is without the quantum that is counted for those that run.
_END_SLICES: Final = text(f"""
WITH RECURSIVE live AS (
    SELECT name, queues FROM workers WHERE state IN ('idle', 'busy') AND seen_at > clock_timestamp() - :gone_after
), running AS MATERIALIZED (
    SELECT jobs.worker, jobs.tenant_id, jobs.type, jobs.priority, jobs.inputs->>'version_id' AS model, jobs.alone,
        jobs.state <> 'running' OR coalesce(jobs.preempt_fence = jobs.fence, false) AS is_leaving, attempts.started_at,
        count(*) OVER (PARTITION BY jobs.worker) AS num
    FROM jobs JOIN attempts ON attempts.job_id = jobs.id AND attempts.fence = jobs.fence
    WHERE jobs.state IN ('running', 'canceling', 'pausing')
), companies AS MATERIALIZED (
    SELECT live.name, live.queues, min(started_at) AS since, array_agg(model) FILTER (WHERE NOT alone) AS models
    FROM live JOIN running ON running.worker = live.name
    GROUP BY live.name, live.queues HAVING bool_and(type = 'generate') AND NOT bool_or(is_leaving)
        AND min(started_at) < clock_timestamp() - CAST(:slice AS interval)
), queues AS (SELECT DISTINCT unnest(queues) AS queue FROM companies), {fairness.LINES}, best AS MATERIALIZED (
    SELECT DISTINCT ON (worker) worker, tenant_id, priority, attained FROM (
        SELECT worker, tenant_id, priority,
            coalesce((SELECT attained FROM shares WHERE shares.tenant_id = running.tenant_id), 0)
            + coalesce((SELECT sum(seconds) FROM in_flight WHERE in_flight.tenant_id = running.tenant_id), 0)
            - extract(epoch FROM CAST(:quantum AS interval))
                * count(*) OVER (PARTITION BY worker, tenant_id) / num AS attained
        FROM running WHERE worker IN (SELECT name FROM companies)
    ) AS one ORDER BY worker, priority DESC, attained
), waiting AS MATERIALIZED (
    SELECT lines.queue, lines.tenant_id, lines.attained, model,
        CASE WHEN place = 1 THEN {fairness.RISEN} ELSE priority END AS rank
    FROM lines CROSS JOIN LATERAL (
        SELECT DISTINCT ON (model) model, place, queued_at FROM (
            SELECT CASE WHEN type = 'generate' AND NOT alone THEN inputs->>'version_id' END AS model, queued_at,
                not_before, row_number() OVER (ORDER BY queued_at, id) AS place
            FROM jobs WHERE state = 'queued' AND tenant_id = lines.tenant_id AND queue = lines.queue
                AND priority = lines.priority AND {fairness.MAY_START}
            ORDER BY queued_at, id LIMIT {FIRST}
        ) AS first WHERE greatest(queued_at, not_before) < clock_timestamp() - CAST(:waited AS interval)
        ORDER BY model, place
    ) AS head
)
SELECT DISTINCT ON (waiting.queue) companies.name
FROM companies JOIN best ON best.worker = companies.name JOIN waiting ON waiting.queue = ANY(companies.queues)
WHERE (waiting.rank > best.priority OR waiting.rank = best.priority AND CASE
        WHEN waiting.model = ANY(companies.models) THEN waiting.attained < best.attained
        ELSE waiting.tenant_id = best.tenant_id OR waiting.attained <= best.attained END)
    AND NOT EXISTS (
        SELECT FROM live AS other LEFT JOIN running ON running.worker = other.name
        WHERE waiting.queue = ANY(other.queues) AND coalesce(running.is_leaving, true))
ORDER BY waiting.queue, companies.since
""")  # noqa: S608  (constants of ours)


def end_slices(session: Session, *, time_slice: timedelta, terms: Terms) -> list[str]:
    """Ask generate jobs that have had a device for longer than ``time_slice`` to give way to whom it is due.

    That is who is more urgent, or as urgent and of a tenant that has had less; of another model also who has had as
    much, the same tenant's among them. Who could share the device with those that have it, and is of a tenant that has
    had no less, waits for a place beside them.

    Returns the workers whose jobs were asked.
    """
    given = {"gone_after": GONE_AFTER, "slice": time_slice, "waited": WAITED}
    given |= {"quantum": terms.quantum, "ageing": terms.ageing}
    asked = list(session.execute(_END_SLICES, given).scalars())
    drawing = (col(Job.state) == JobState.RUNNING, col(Job.type) == JobType.GENERATE)
    session.execute(update(Job).where(col(Job.worker).in_(asked), *drawing).values(preempt_fence=Job.fence))
    return asked
