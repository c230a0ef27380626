"""When a tenant whose queue is full may submit again: a guess from how fast its jobs left the queue lately."""

from datetime import timedelta
from math import ceil
from typing import Final
from uuid import UUID

from sqlalchemy import text

from api.parts import Parts

SHORTEST: Final = 1
LONGEST: Final = 300
"""Bounds in seconds; the longest is also the answer where nothing has left the queue lately."""
_LATELY: Final = timedelta(minutes=10)
_SAMPLE: Final = 20

# An attempt made room when it began, one that is queued again took that back. From the start of the oldest of the
# newest attempts on, so that a queue which began to move a moment ago is not judged by the time before.
_PACE: Final = text(f"""
WITH newest AS (
    SELECT job_id, created_at, created_at - make_interval(secs => seconds) AS began FROM usage
    WHERE tenant_id = :tenant_id AND created_at > clock_timestamp() - :lately
    ORDER BY created_at DESC LIMIT {_SAMPLE}
), since AS (
    SELECT greatest(began, clock_timestamp() - :lately) AS since FROM newest ORDER BY created_at LIMIT 1
)
SELECT extract(epoch FROM clock_timestamp() - since)
    / nullif((SELECT count(*) FROM newest JOIN jobs ON jobs.id = job_id WHERE jobs.state <> 'queued'), 0)
FROM since
""")  # noqa: S608  (constants of ours)


async def seconds_until_room(parts: Parts, tenant_id: UUID) -> int:
    """Seconds after which one more job of the tenant may be accepted, as its jobs leave the queue now."""
    async with parts.transaction() as session:
        pace = await session.scalar(_PACE, {"tenant_id": tenant_id, "lately": _LATELY})
    return LONGEST if pace is None else min(max(ceil(pace), SHORTEST), LONGEST)
