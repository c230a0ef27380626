"""The ends of jobs that requests wait for (``Prefer: wait=N``), looked for together, in a thread."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from sqlalchemy import UUID as SQL_UUID
from sqlalchemy import bindparam, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlmodel import col

from api import views
from api.news import Listener
from api.parts import Parts
from api.threads import ThreadParts, run
from api.together import Ended, Together
from api.views import Links
from api.waiting import JobFacts, facts
from shared import ids
from shared.database import AWAY
from shared.errors import Gone
from shared.jobs.rows import Job
from shared.wire import JobView

_MOST: Final = 64

_ENDED: Final = select(Job).where(
    col(Job.id) == func.any(bindparam("ids", type_=ARRAY(SQL_UUID))), col(Job.completed_at).is_not(None)
)


@dataclass(frozen=True, kw_only=True)
class Awaited:
    """A job that a request waits for."""

    job_id: UUID
    links: Links


class Ends(Together[Awaited, JobView | None]):
    """Tells of a job what it ended as, or None while it has not. Those who ask know that it is theirs."""

    def __init__(self, parts: Parts) -> None:
        of_thread = ThreadParts(**vars(parts))
        super().__init__(lambda asked: run(_look(of_thread, asked)), most=_MOST, name="ends")

    async def wait(self, awaited: Awaited, listener: Listener, seconds: float) -> JobView | None:
        """The job once it has ended; None if that takes longer. ``listener`` has heard since before the job was there.

        Raises:
            Gone: it was erased meanwhile.
        """
        async for _ in listener.chances(seconds):
            # The job is there: an error would have the client submit it again.
            with suppress(*AWAY, Ended):
                if (found := await self.ask(awaited)) is not None:
                    return found
        return None


async def _look(parts: ThreadParts, asked: Sequence[Awaited]) -> list[JobView | Exception | None]:
    async with parts.statements() as session:
        rows = (await session.execute(_ENDED, {"ids": [one.job_id for one in asked]})).scalars().all()
        known = await facts(session, rows, parts.settings.jobs) if rows else {}
    ended = {row.id: row for row in rows}
    return [_view(ended.get(one.job_id), known, one.links) for one in asked]


def _view(row: Job | None, known: Mapping[UUID, JobFacts], links: Links) -> JobView | Exception | None:
    if row is None:
        return None
    if row.erased_at is not None:
        return Gone(f"the job was erased: {ids.public('job', row.id)}")
    try:
        return views.job(row, known[row.id], links)
    except Exception as error:  # noqa: BLE001  (it is raised again, for who waits for this job alone)
        return error
