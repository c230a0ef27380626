"""Whose turn it is: deficit round robin in device-seconds among tenants, and ageing across priorities.

Each tenant has an account of the device-seconds it has had (``Share.attained``), charged when an attempt
ends; running attempts count with what they have used so far and a quantum. The tenant with the least
comes first, which is deficit round robin (Shreedhar and Varghese, 1995) with the common quantum of all
active tenants left out: adding the same to everybody's deficit changes no order. A tenant that has had
nothing to do starts where the others stand, so nobody saves up credit by staying away.

A line is what one tenant has waiting in one queue at one priority. It ages while it is not served at all: then its
first job rises by one priority after each period. A long line that is served does not rise, however
long its last job has been waiting: otherwise whoever floods the queue would pass by everybody who comes later.
"""

from typing import Any, Final
from uuid import UUID

from sqlalchemy import CTE, TextClause, bindparam, cast, func, select, text
from sqlalchemy import UUID as SQL_UUID
from sqlalchemy import Text as SqlText
from sqlalchemy.dialects.postgresql import ARRAY, insert

from shared.jobs.rows import Share, Usage

HIGHEST: Final = 2
"""Rank of the priority that ageing ends at (``Priority.HIGH``)."""

MAY_START: Final = """queued_at IS NOT NULL AND (not_before IS NULL OR not_before <= clock_timestamp())
    AND (start_deadline IS NULL OR start_deadline > clock_timestamp() OR started_at IS NOT NULL)"""
"""Whether a queued job is in line, and neither backs off nor is too late."""

_HELD_NOW: Final = """
    SELECT jobs.tenant_id, jobs.queue, jobs.priority,
        extract(epoch FROM greatest(clock_timestamp() - attempts.started_at, '0') + CAST(:quantum AS interval))
        / count(*) OVER (PARTITION BY jobs.worker) AS seconds
    FROM jobs JOIN attempts ON attempts.job_id = jobs.id AND attempts.fence = jobs.fence
    WHERE jobs.state IN ('running', 'canceling', 'pausing')"""
"""Running attempts with what they have had; those that share a worker's device share its time."""

LINES: Final = f"""
waiting_tenants (tenant_id) AS (
    (SELECT tenant_id FROM jobs WHERE state = 'queued' ORDER BY tenant_id LIMIT 1)
    UNION ALL
    SELECT (
        SELECT tenant_id FROM jobs WHERE state = 'queued' AND tenant_id > last.tenant_id ORDER BY tenant_id LIMIT 1)
    FROM waiting_tenants AS last WHERE last.tenant_id IS NOT NULL
), held AS ({_HELD_NOW}), in_flight AS MATERIALIZED (
    SELECT tenant_id, queue, priority, sum(seconds) AS seconds FROM held GROUP BY 1, 2, 3
), accounts AS (
    SELECT tenant_id, coalesce((SELECT attained FROM shares WHERE shares.tenant_id = waiting_tenants.tenant_id), 0)
        + coalesce((SELECT sum(seconds) FROM in_flight WHERE in_flight.tenant_id = waiting_tenants.tenant_id), 0)
        AS attained
    FROM waiting_tenants WHERE tenant_id IS NOT NULL
), lines AS MATERIALIZED (
    SELECT accounts.tenant_id, accounts.attained, queues.queue, p.priority, CASE WHEN EXISTS (
        SELECT FROM in_flight WHERE in_flight.tenant_id = accounts.tenant_id
            AND in_flight.queue = queues.queue AND in_flight.priority = p.priority
    ) THEN clock_timestamp() ELSE (
        SELECT max(created_at) FROM usage WHERE usage.tenant_id = accounts.tenant_id
            AND usage.queue = queues.queue AND usage.priority = p.priority
    ) END AS served_at
    FROM accounts CROSS JOIN queues CROSS JOIN generate_series(0, {HIGHEST}) AS p (priority)
)"""  # noqa: S608  (constants of ours)
"""Tables of a ``WITH RECURSIVE``: ``lines`` (tenant_id, attained, queue, priority, served_at). Takes ``quantum``, and a
table ``queues`` (queue) of those that are looked at.

The tenants are found by one index probe each.
"""

RISEN: Final = f"""least({HIGHEST}, lines.priority + greatest(0, floor(
    extract(epoch FROM clock_timestamp() - greatest(queued_at, lines.served_at))
    / extract(epoch FROM CAST(:ageing AS interval)))))"""
"""Rank of the first job of a line. Takes ``ageing``."""

_ENTER: Final = text(f"""
WITH held AS ({_HELD_NOW}), in_flight AS MATERIALIZED (
    SELECT tenant_id, sum(seconds) AS seconds FROM held GROUP BY 1
), active AS (
    SELECT shares.attained + coalesce(in_flight.seconds, 0) AS attained
    FROM shares LEFT JOIN in_flight USING (tenant_id)
    WHERE shares.tenant_id <> :tenant_id AND (in_flight.seconds IS NOT NULL OR EXISTS (
        SELECT FROM jobs WHERE jobs.tenant_id = shares.tenant_id AND state = 'queued' AND queued_at IS NOT NULL))
)
INSERT INTO shares (tenant_id, attained) SELECT :tenant_id, coalesce((SELECT min(attained) FROM active), 0)
WHERE NOT EXISTS (
    SELECT FROM jobs WHERE tenant_id = :tenant_id AND state IN ('queued', 'running', 'canceling', 'pausing')
        AND queued_at IS NOT NULL AND id <> ALL(:job_ids))
ON CONFLICT (tenant_id) DO UPDATE SET attained = greatest(shares.attained, excluded.attained)
""").bindparams(bindparam("job_ids", type_=ARRAY(SQL_UUID)))  # noqa: S608  (constants of ours)


def enter(tenant_id: UUID, *job_ids: UUID, quantum: Any) -> tuple[TextClause, dict[str, Any]]:
    """Statement and parameters: a tenant that has no active jobs but ``job_ids`` starts where the others stand."""
    return _ENTER, {"tenant_id": tenant_id, "job_ids": list(job_ids), "quantum": quantum}


def charge(moved: CTE, ended: CTE) -> tuple[CTE, CTE]:
    """Parts of the statement that ends attempts: their usage, and their tenants' accounts.

    ``moved`` holds the jobs as they are afterwards, ``ended`` the attempts ``(job_id, fence, seconds)``.
    """
    spent = (
        select(moved.c.id, ended.c.fence, moved.c.tenant_id, moved.c.queue, moved.c.priority, ended.c.seconds)
        .join(ended, ended.c.job_id == moved.c.id)
        .subquery()
    )
    usage = insert(Usage).from_select(["job_id", "fence", "tenant_id", "queue", "priority", "seconds"], select(spent))
    # In one order for everybody, so that two statements that charge many tenants never wait for each other.
    totals = (
        select(spent.c.tenant_id, func.sum(spent.c.seconds))
        .group_by(spent.c.tenant_id)
        .order_by(cast(spent.c.tenant_id, SqlText))
    )
    account = insert(Share).from_select(["tenant_id", "attained"], totals)
    attained = Share.attained + account.excluded.attained
    charged = account.on_conflict_do_update(index_elements=["tenant_id"], set_={"attained": attained})
    return usage.cte("usage_of_attempt"), charged.cte("charged")
