"""Jobs that are submitted at about the same time, recorded in one transaction: a crowd pays for one commit.

Each request is accepted or refused for itself. What cannot be decided for several at once (a key that was used before,
a queue that is nearly full) is decided one by one, as ``api/submission.py`` does it. A thread of its own does this.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final
from uuid import UUID

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from api import views
from api.parts import Parts
from api.submission import Accepted, Submission, accept
from api.threads import ThreadParts, run
from api.together import Together
from api.views import Links
from api.waiting import facts
from shared.database import AWAY
from shared.errors import QueueFull, RequestRefused
from shared.ids import uuid7
from shared.jobs import admission, idempotency, requests
from shared.jobs.admission import NewJob
from shared.jobs.idempotency import Answer
from shared.jobs.rows import Job
from shared.wire import AnyJobRequest

PATH: Final = "/v1/jobs"
MOST: Final = 32
"""Jobs recorded at once: well below the margin within which a tenant's queue may be overfilled by those uncounted."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A client's request for a new job."""

    job_id: UUID = field(default_factory=uuid7)
    """Of the job that is made, if one is."""
    tenant_id: UUID
    request: AnyJobRequest
    body: Any
    """The request as it was sent."""
    idempotency_key: str | None
    links: Links


class Alone(Exception):
    """Stands for an answer that must be looked for without company."""


class Crowd(Together[Asked, Accepted]):
    """The one of a process: takes requests for new jobs as they come."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        of_thread = ThreadParts(**vars(parts))
        super().__init__(lambda crowd: run(accept_all(of_thread, crowd)), most=MOST, name="crowd")

    async def submit(self, new: Asked) -> Accepted:
        """Record the job, or find the one that this request made before; raises what ``submission.accept`` raises."""
        with suppress(Alone):
            return await self.ask(new)
        return await accept(self._parts, new.links, _alone(self._parts, new))


def _alone(parts: Parts, new: Asked) -> Submission:
    settings = parts.settings.jobs

    async def record(session: AsyncSession) -> tuple[Job, bool]:
        return await requests.submit(session, new.tenant_id, new.request, settings=settings, job_id=new.job_id), True

    return Submission(
        tenant_id=new.tenant_id, path=PATH, body=new.body, idempotency_key=new.idempotency_key, record=record
    )


async def accept_all(parts: Parts, crowd: Sequence[Asked]) -> Sequence[Accepted | Exception]:
    """What each of a crowd is answered, or what is raised for it."""
    try:
        async with parts.transaction() as session:
            answers = await _record(session, parts, crowd)
    except QueueFull:
        return [Alone()] * len(crowd)  # for some of them there may be room
    except DBAPIError as error:
        if isinstance(error, AWAY) and not idempotency.is_held(error):
            raise  # maybe of the commit: nobody knows whether it happened
        return [Alone()] * len(crowd)  # SQL refused it because of one of them
    parts.relay.wake()
    return answers


async def _record(session: AsyncSession, parts: Parts, crowd: Sequence[Asked]) -> list[Accepted | Exception]:
    settings = parts.settings.jobs
    prepared = [await _prepare(session, parts, new) for new in crowd]
    for place in await _used(session, crowd, prepared):
        prepared[place] = Alone()
    jobs = await admission.admit(session, [job for job in prepared if isinstance(job, NewJob)], settings)
    known, recorded = await facts(session, jobs, settings), iter(jobs)
    answers: list[Accepted | Exception] = []
    stored: dict[tuple[UUID, str], Answer] = {}
    for new, found in zip(crowd, prepared, strict=True):
        if isinstance(found, Exception):
            answers.append(found)
            continue
        job = next(recorded)
        body = views.job(job, known[job.id], new.links).model_dump_json()
        answers.append(Accepted(job_id=job.id, status=HTTPStatus.ACCEPTED, body=body, is_replay=False))
        if new.idempotency_key is not None:
            stored[new.tenant_id, new.idempotency_key] = Answer(HTTPStatus.ACCEPTED, body)
    await idempotency.complete_all(session, stored)
    return answers


async def _prepare(session: AsyncSession, parts: Parts, new: Asked) -> NewJob | Exception:
    try:
        settings = parts.settings.jobs
        return await requests.prepare(session, new.tenant_id, new.request, settings=settings, job_id=new.job_id)
    except RequestRefused as refusal:
        # A repetition is answered as the first request was, whatever has happened to what it names.
        return refusal if new.idempotency_key is None else Alone()


async def _used(session: AsyncSession, crowd: Sequence[Asked], prepared: Sequence[NewJob | Exception]) -> list[int]:
    """Places of the requests whose key was used before, or is another's in this crowd."""
    keyed = {
        place: (new.tenant_id, new.idempotency_key)
        for place, (new, job) in enumerate(zip(crowd, prepared, strict=True))
        if new.idempotency_key is not None and isinstance(job, NewJob)
    }
    first = {key: place for place, key in reversed(keyed.items())}
    asked = [(*key, idempotency.digest({"path": PATH, "body": crowd[place].body})) for key, place in first.items()]
    taken = await idempotency.take(session, asked) if asked else set()
    return [place for place, key in keyed.items() if key not in taken or first[key] != place]
