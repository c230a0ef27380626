"""Whose turn it is: deficit round robin in device-seconds among tenants of one priority, and ageing.

Each tenant has an account of the device-seconds it has had (``Share.attained``), charged when an attempt
ends; running attempts count with what they have used so far and a quantum. The tenant with the least
comes first, which is deficit round robin (Shreedhar and Varghese, 1995) with the common quantum of all
active tenants left out: adding the same to everybody's deficit changes no order. A tenant that has had
nothing waiting starts where the others stand, so nobody saves up credit by staying away.
"""

from typing import Any, Final
from uuid import UUID

from sqlalchemy import CTE, TextClause, cast, func, select, text
from sqlalchemy import Text as SqlText
from sqlalchemy.dialects.postgresql import insert

from shared.jobs.rows import Share, Usage

HIGHEST: Final = 2
"""Rank of the priority that ageing ends at (``Priority.HIGH``)."""

IN_FLIGHT: Final = """
    SELECT jobs.tenant_id, jobs.priority,
        sum(extract(epoch FROM clock_timestamp() - attempts.started_at + CAST(:quantum AS interval))) AS seconds
    FROM jobs JOIN attempts ON attempts.job_id = jobs.id AND attempts.fence = jobs.fence
    WHERE jobs.state IN ('running', 'canceling', 'pausing') GROUP BY 1, 2
"""
"""Device-seconds of attempts that have not been charged yet. Takes ``quantum``."""

RANK: Final = (
    f"least({HIGHEST}, priority + floor(extract(epoch FROM clock_timestamp() - queued_at)"
    " / extract(epoch FROM CAST(:ageing AS interval))))"
)
"""Priority of a waiting job, risen by its age. Takes ``ageing``."""

MAY_START: Final = """(not_before IS NULL OR not_before <= clock_timestamp())
    AND (start_deadline IS NULL OR start_deadline > clock_timestamp() OR started_at IS NOT NULL)"""
"""Whether a queued job backs off or is too late."""

WAITING_TENANTS: Final = """
    (SELECT tenant_id FROM jobs WHERE state = 'queued' ORDER BY tenant_id LIMIT 1)
    UNION ALL
    SELECT (SELECT tenant_id FROM jobs WHERE state = 'queued' AND tenant_id > last.tenant_id ORDER BY tenant_id LIMIT 1)
    FROM waiting_tenants AS last WHERE last.tenant_id IS NOT NULL
"""
"""Body of a recursive ``waiting_tenants (tenant_id)``: one index probe per tenant that waits; ends in NULL."""

_ENTER: Final = text(f"""
WITH active AS (
    SELECT shares.tenant_id, shares.attained + coalesce(in_flight.seconds, 0) AS attained
    FROM shares LEFT JOIN ({IN_FLIGHT}) AS in_flight USING (tenant_id, priority)
    WHERE shares.priority = :priority AND shares.tenant_id <> :tenant_id AND (
        in_flight.seconds IS NOT NULL OR EXISTS (
            SELECT FROM jobs AS waiting WHERE waiting.tenant_id = shares.tenant_id
                AND waiting.priority = :priority AND waiting.state = 'queued'))
)
INSERT INTO shares (tenant_id, priority, attained)
SELECT :tenant_id, :priority, coalesce((SELECT min(attained) FROM active), 0)
WHERE NOT EXISTS (
    SELECT FROM jobs WHERE tenant_id = :tenant_id AND priority = :priority
        AND state IN ('queued', 'running', 'canceling', 'pausing') AND id <> :job_id)
ON CONFLICT (tenant_id, priority) DO UPDATE SET attained = greatest(shares.attained, excluded.attained)
""")  # noqa: S608  (constants of ours)


def enter(tenant_id: UUID, priority: int, job_id: UUID, *, quantum: Any) -> tuple[TextClause, dict[str, Any]]:
    """Statement and parameters: a tenant whose first active job is ``job_id`` starts where the others stand."""
    return _ENTER, {"tenant_id": tenant_id, "priority": priority, "job_id": job_id, "quantum": quantum}


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
        select(spent.c.tenant_id, spent.c.priority, func.sum(spent.c.seconds))
        .group_by(spent.c.tenant_id, spent.c.priority)
        .order_by(cast(spent.c.tenant_id, SqlText), spent.c.priority)
    )
    account = insert(Share).from_select(["tenant_id", "priority", "attained"], totals)
    attained = Share.attained + account.excluded.attained
    charged = account.on_conflict_do_update(index_elements=["tenant_id", "priority"], set_={"attained": attained})
    return usage.cte("usage_of_attempt"), charged.cte("charged")
