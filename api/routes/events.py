"""A job's event log: as pages, or as a stream that goes on until the job has ended."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response, status
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from sqlmodel import col

from api import stream, views
from api.paging import link_next, refuse_unknown_parameters
from api.routes.dependencies import JobReader, TheParts
from shared import ids
from shared.jobs import requests
from shared.jobs.rows import Event
from shared.wire import EventView, Page

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[Depends(refuse_unknown_parameters)])

EVENT_STREAM = "text/event-stream"
_LARGEST = 2**53


@dataclass(frozen=True)
class Position:
    """Where in the log to go on: a dependency."""

    after: Annotated[int, Query(ge=0, le=_LARGEST, description="Number of the last event you have.")] = 0
    limit: Annotated[int, Query(ge=1, le=1000, description="Most entries of a page.")] = 100
    cursor: Annotated[int | None, Query(ge=0, le=_LARGEST, description="`next_cursor` of the page before.")] = None
    last_event_id: Annotated[
        int | None, Header(ge=0, le=_LARGEST, description="Goes before `after`; browsers send it.")
    ] = None

    @property
    def last_seen(self) -> int:
        """Number of the last event that the client has."""
        return next(number for number in (self.last_event_id, self.cursor, self.after) if number is not None)


@router.get(
    "/{job_id}/events",
    operation_id="listEvents",
    responses={
        200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}},
        204: {"description": "The stream has ended: nothing will ever follow the event you have."},
    },
)
async def list_events(
    *,
    caller: JobReader,
    job_id: str,
    request: Request,
    response: Response,
    parts: TheParts,
    position: Annotated[Position, Depends()],
    accept: Annotated[str, Header(include_in_schema=False)] = "",
) -> Page[EventView]:
    """What happened to a job, numbered from 1 without a gap. Of one that ended long ago only changes of state are left.

    With `Accept: text/event-stream`, a stream of server-sent events whose `id` is that number: first what happened
    already, then what happens, until the event that ends the job.
    """
    after, limit = position.last_seen, position.limit
    wanted = ids.parse("job", job_id)
    async with parts.transaction() as session:
        await requests.get(session, caller.tenant_id, wanted)
    if EVENT_STREAM in accept:
        if await stream.is_over(parts, wanted, after):
            return Response(status_code=status.HTTP_204_NO_CONTENT)  # type: ignore[return-value]
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream.events(parts, wanted, after), media_type=EVENT_STREAM, headers=headers)  # type: ignore[return-value]
    statement = select(Event).where(col(Event.job_id) == wanted, col(Event.seq) > after).order_by(col(Event.seq))
    async with parts.transaction() as session:
        found = [views.event(row) for row in (await session.execute(statement.limit(limit + 1))).scalars()]
    page = Page(data=found[:limit], has_more=len(found) > limit)
    if page.has_more:
        page.next_cursor = str(page.data[-1].seq)
        link_next(request, response, cursor=page.next_cursor)
    return page
