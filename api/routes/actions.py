"""What is done to a job that exists: cancel, pause, resume, retry, reproduce, erase. Each may be asked for again."""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response, status
from sqlalchemy.ext.asyncio import AsyncSession

from api import submission
from api.auth import Caller
from api.paging import refuse_unknown_parameters
from api.parts import Parts
from api.routes.dependencies import POLL_SECONDS, IdempotencyKey, JobWriter, TheLinks, TheParts
from api.submission import Record, Submission
from api.views import Links
from shared import ids
from shared.jobs import erasure, needs, requests
from shared.jobs.rows import Job
from shared.jobs.state import JobState
from shared.wire import JobView

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[Depends(refuse_unknown_parameters)])

_ENDING: Final[dict[int | str, dict[str, Any]]] = {
    202: {"model": JobView, "description": "It will be canceled once its device is free."}
}
_PAUSING: Final[dict[int | str, dict[str, Any]]] = {
    202: {"model": JobView, "description": "It will be paused once its checkpoint is written."}
}
_FOUND: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": JobView, "description": "It was retried before: that job, as it is now."}
}


@router.post("/{job_id}/cancel", operation_id="cancelJob", responses=_ENDING)
async def cancel_job(caller: JobWriter, job_id: str, parts: TheParts, links: TheLinks, response: Response) -> JobView:
    """Ask for a stop. Idempotent: 202 until the device is free, 200 once the job has ended, however it did."""
    view = await _change(parts, links, job_id, lambda session, job: requests.cancel(session, caller.tenant_id, job))
    if not view.is_final:
        _say_pending(response, view)
    return view


@router.post("/{job_id}/pause", operation_id="pauseJob", responses=_PAUSING)
async def pause_job(caller: JobWriter, job_id: str, parts: TheParts, links: TheLinks, response: Response) -> JobView:
    """Free the worker and keep what was done. Idempotent: 202 while a checkpoint is written, 200 once it is paused.

    A job that waits is paused at once; one that has ended, or is being canceled, cannot be (409).
    """
    view = await _change(parts, links, job_id, lambda session, job: requests.pause(session, caller.tenant_id, job))
    if view.state != JobState.PAUSED:
        _say_pending(response, view)
    return view


@router.post("/{job_id}/resume", operation_id="resumeJob")
async def resume_job(caller: JobWriter, job_id: str, parts: TheParts, links: TheLinks) -> JobView:
    """Let a paused job wait for a worker again, which goes on exactly where it was. Idempotent.

    A pause that has not happened yet is withdrawn. A job that has ended, or is being canceled, cannot be resumed (409).
    """
    settings = parts.settings.jobs
    return await _change(
        parts, links, job_id, lambda session, job: requests.resume(session, caller.tenant_id, job, settings=settings)
    )


@router.post(
    "/{job_id}/retry",
    operation_id="retryJob",
    status_code=status.HTTP_202_ACCEPTED,
    response_model=JobView,
    responses=_FOUND,
)
async def retry_job(
    *,
    caller: JobWriter,
    job_id: str,
    request: Request,
    parts: TheParts,
    links: TheLinks,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """A new job that asks for the same as one that failed, expired or was canceled; the new one's `retry_of` names it.

    A training goes on from the last checkpoint. A job that had waited for the model of another waits for the retry of
    that; where there is none, it is refused (422, `dependency_failed`). Idempotent: a job is retried by one job only.
    The first request makes it (202), any later one finds it (200); retry that one if it failed too. With an
    `Idempotency-Key`, sending it again gives the stored answer instead.
    """
    wanted = ids.parse("job", job_id)

    async def record(session: AsyncSession) -> tuple[Job, bool]:
        return await requests.retry(session, caller.tenant_id, wanted, settings=parts.settings.jobs)

    return await _accept(parts, links, _asked(caller, request, idempotency_key, record))


@router.post(
    "/{job_id}/reproduce",
    operation_id="reproduceJob",
    status_code=status.HTTP_202_ACCEPTED,
    response_model=JobView,
)
async def reproduce_job(
    *,
    caller: JobWriter,
    job_id: str,
    request: Request,
    parts: TheParts,
    links: TheLinks,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Do again what a job did that succeeded, from the same inputs and from the start, and compare the bytes.

    The new job's `reproduces` tells what it has to match, and once it has ended `result.reproduction` whether it did:
    `identical`, both SHA-256, and what differs in the fingerprints of the two runs. It registers no model version and
    no dataset. Each request makes a job of its own, but for those with the same `Idempotency-Key`.

    A job that has not succeeded cannot be reproduced (409, `invalid_state`), nor can one whose inputs are gone (409,
    `not_reproducible`).
    """
    wanted = ids.parse("job", job_id)

    async def record(session: AsyncSession) -> tuple[Job, bool]:
        return await requests.reproduce(session, caller.tenant_id, wanted, settings=parts.settings.jobs), True

    return await _accept(parts, links, _asked(caller, request, idempotency_key, record))


@router.delete("/{job_id}", operation_id="eraseJob", status_code=status.HTTP_204_NO_CONTENT)
async def erase_job(caller: JobWriter, job_id: str, parts: TheParts) -> None:
    """Erase an ended job with its spec, labels, events and artifacts; from then on it is 410.

    What a model or a dataset is made of stays with that, and so does what was charged. One that has not ended cannot
    be erased (409): cancel it first.
    """
    wanted = ids.parse("job", job_id)
    async with parts.transaction() as session:
        await erasure.erase(session, caller.tenant_id, wanted)
    parts.relay.wake(wanted)


def _asked(caller: Caller, request: Request, idempotency_key: str | None, record: Record) -> Submission:
    """A request for a job whose path says all of it."""
    return Submission(
        tenant_id=caller.tenant_id, path=request.url.path, body={}, idempotency_key=idempotency_key, record=record
    )


async def _accept(parts: Parts, links: Links, asked: Submission) -> Response:
    accepted = await submission.accept(parts, links, asked)
    headers = {"Location": links.job(accepted.job_id)["self"]}
    if accepted.status == HTTPStatus.ACCEPTED:
        headers["Retry-After"] = POLL_SECONDS
    if accepted.is_replay:
        headers["Idempotency-Replayed"] = "true"
    return Response(accepted.body, accepted.status, headers=headers, media_type="application/json")


async def _change(
    parts: Parts, links: Links, job_id: str, change: Callable[[AsyncSession, UUID], Awaitable[Job]]
) -> JobView:
    wanted = ids.parse("job", job_id)
    async with parts.transaction() as session:
        view = await submission.view(session, parts, links, await change(session, wanted))
    for job in (wanted, *needs.news(session)):
        parts.relay.wake(job)
    return view


def _say_pending(response: Response, view: JobView) -> None:
    response.status_code = status.HTTP_202_ACCEPTED
    response.headers.update({"Location": view.urls["self"], "Retry-After": POLL_SECONDS})
