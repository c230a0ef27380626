"""Accepting a job: once per idempotency key, in one transaction, without a word to the broker."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
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
from shared.wire import GenerateRequest, JobView, TrainRequest

ACCEPTED = 202


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A client's request for a job."""

    tenant_id: UUID
    request: TrainRequest | GenerateRequest
    body: Mapping[str, Any]
    """The request as it was sent, by which a repetition is recognized."""
    idempotency_key: str | None


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """What the client is answered."""

    job_id: UUID
    body: str
    """A ``JobView``; for a replay byte for byte what the first request was answered."""
    is_replay: bool


async def accept(parts: Parts, links: Links, submission: Submission) -> Accepted:
    """Record the job, or find the one that this request made before.

    Raises:
        InvalidSpec: a reference in the spec cannot be used.
        IdempotencyMismatch, IdempotencyInProgress: see ``shared/jobs/idempotency.py``.
    """
    async with parts.transaction() as session:
        stored = await _begin(session, parts, submission)
        if stored is not None:
            return Accepted(job_id=ids.parse("job", json.loads(stored.body)["id"]), body=stored.body, is_replay=True)
        view = await _submit(session, parts, links, submission)
        body = view.model_dump_json()
        if submission.idempotency_key is not None:
            answer = Answer(ACCEPTED, body)
            await idempotency.complete(session, submission.tenant_id, submission.idempotency_key, answer)
    job_id = ids.parse("job", view.id)
    parts.relay.wake(job_id)
    return Accepted(job_id=job_id, body=body, is_replay=False)


async def _begin(session: AsyncSession, parts: Parts, submission: Submission) -> Answer | None:
    if submission.idempotency_key is None:
        return None
    return await idempotency.begin(
        session,
        submission.tenant_id,
        submission.idempotency_key,
        idempotency.digest({"path": "/v1/jobs", "body": submission.body}),
        lifetime=parts.settings.jobs.idempotency_lifetime,
    )


async def _submit(session: AsyncSession, parts: Parts, links: Links, submission: Submission) -> JobView:
    job = await requests.submit(session, submission.tenant_id, submission.request, settings=parts.settings.jobs)
    known = await facts(session, [job])
    return views.job(job, known[job.id], links)


async def show(parts: Parts, links: Links, tenant_id: UUID, job_id: UUID) -> JobView:
    """The job as it is now; raises ``NotFound``."""
    async with parts.transaction() as session:
        job = await requests.get(session, tenant_id, job_id)
        return views.job(job, (await facts(session, [job]))[job.id], links)


async def wait_final(parts: Parts, links: Links, tenant_id: UUID, job_id: UUID, seconds: float) -> JobView | None:
    """The job once it has ended; None if that takes longer. Holds no database session while it waits."""
    with parts.news.of(job_id) as listener:
        async for _ in listener.chances(seconds):
            view = await show(parts, links, tenant_id, job_id)
            if view.is_final:
                return view
    return None
