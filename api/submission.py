"""Accepting a job: once per idempotency key, in one transaction, without a word to the broker."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from api import views
from api.parts import Parts
from api.views import Links
from api.waiting import facts
from shared import ids
from shared.jobs import idempotency, requests
from shared.jobs.idempotency import Answer
from shared.jobs.rows import Job
from shared.wire import JobView

Record = Callable[[AsyncSession], Awaitable[tuple[Job, bool]]]
"""Records a job, or finds the one that is there already; says whether it recorded it."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A client's request for a job."""

    tenant_id: UUID
    path: str
    body: Mapping[str, Any]
    """The request as it was sent; by it and ``path`` a repetition is recognized."""
    idempotency_key: str | None
    record: Record


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """What the client is answered."""

    job_id: UUID
    status: HTTPStatus
    """202 if this request made the job, 200 if it found one."""
    body: str
    """A ``JobView``; for a replay byte for byte what the first request was answered."""
    is_replay: bool


async def accept(parts: Parts, links: Links, submission: Submission) -> Accepted:
    """Record the job, or find the one that this request made before.

    Raises:
        RequestRefused: what ``submission.record`` raises.
        Gone: the job that this request made was erased.
        IdempotencyMismatch, IdempotencyInProgress: see ``shared/jobs/idempotency.py``.
    """
    async with parts.transaction() as session:
        stored = await _begin(session, parts, submission)
        if stored is not None:
            return await _replay(session, submission.tenant_id, stored)
        job, is_new = await submission.record(session)
        body = (await view(session, parts, links, job)).model_dump_json()
        status = HTTPStatus.ACCEPTED if is_new else HTTPStatus.OK
        if submission.idempotency_key is not None:
            answer = Answer(status, body)
            await idempotency.complete(session, submission.tenant_id, submission.idempotency_key, answer)
    parts.relay.wake(job.id)
    return Accepted(job_id=job.id, status=status, body=body, is_replay=False)


async def _begin(session: AsyncSession, parts: Parts, submission: Submission) -> Answer | None:
    if submission.idempotency_key is None:
        return None
    return await idempotency.begin(
        session,
        submission.tenant_id,
        submission.idempotency_key,
        idempotency.digest({"path": submission.path, "body": submission.body}),
        lifetime=parts.settings.jobs.idempotency_lifetime,
    )


async def _replay(session: AsyncSession, tenant_id: UUID, stored: Answer) -> Accepted:
    job_id = ids.parse("job", json.loads(stored.body)["id"])
    await requests.get(session, tenant_id, job_id)
    return Accepted(job_id=job_id, status=HTTPStatus(stored.status), body=stored.body, is_replay=True)


async def view(session: AsyncSession, parts: Parts, links: Links, job: Job) -> JobView:
    """The job as clients see it now."""
    return views.job(job, (await facts(session, [job], parts.settings.jobs))[job.id], links)


async def show(parts: Parts, links: Links, tenant_id: UUID, job_id: UUID) -> JobView:
    """The job as it is now; raises ``NotFound``."""
    async with parts.transaction() as session:
        return await view(session, parts, links, await requests.get(session, tenant_id, job_id))
