"""A job's events as server-sent events (WHATWG HTML, section 9.2): first what is in SQL, then what comes.

The ``id:`` of each is its number in the job's log, so a client that reconnects with ``Last-Event-ID`` misses
nothing and sees nothing twice. No database session is held while waiting.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Final
from uuid import UUID

from sqlalchemy import select
from sqlmodel import col

from api import views
from api.parts import Parts
from shared.database import AWAY
from shared.jobs.rows import Event, Job
from shared.wire import EventView

HEARTBEAT_SECONDS: Final = 15.0
_BATCH: Final = 500
_OPENING: Final = b"retry: 2000\n\n"
_HEARTBEAT: Final = b": still here\n\n"


async def is_over(parts: Parts, job_id: UUID, after: int) -> bool:
    """Whether no event will ever follow number ``after``."""
    events, over = await _read(parts, job_id, after)
    return over and not events


async def events(parts: Parts, job_id: UUID, after: int) -> AsyncIterator[bytes]:
    """Every event after number ``after``, until the one that ended the job."""
    clock = asyncio.get_running_loop().time
    with parts.news.of(job_id) as listener:
        yield _OPENING
        quiet_since = clock()
        while not parts.news.closing:
            try:
                found, over = await _read(parts, job_id, after)
            except AWAY:
                return  # the client comes back, with the number of what it saw last
            for event in found:
                yield _message(event)
                after, quiet_since = event.seq, clock()
            if over:
                return
            if clock() - quiet_since >= HEARTBEAT_SECONDS:
                yield _HEARTBEAT
                quiet_since = clock()
            if len(found) < _BATCH:
                await listener.wait(quiet_since + HEARTBEAT_SECONDS - clock())


async def _read(parts: Parts, job_id: UUID, after: int) -> tuple[list[EventView], bool]:
    """Events after ``after``, and whether the log ends with them."""
    async with parts.transaction() as session:
        # The job first: its last event was committed with the state that this reads.
        state = await session.scalar(select(col(Job.state)).where(col(Job.id) == job_id))
        statement = (
            select(Event)
            .where(col(Event.job_id) == job_id, col(Event.seq) > after)
            .order_by(col(Event.seq))
            .limit(_BATCH)
        )
        found = [views.event(row) for row in (await session.execute(statement)).scalars()]
    return found, (state is None or state.is_final) and len(found) < _BATCH


def _message(event: EventView) -> bytes:
    return f"id: {event.seq}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n".encode()
