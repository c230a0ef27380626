"""Jobs: submit, look, list. What is done to one that exists is in ``actions.py``."""

from typing import Annotated, Final

from fastapi import APIRouter, Depends, Header, Query, Request, Response, status
from fastapi.routing import APIRoute
from sqlalchemy import Select, select
from sqlmodel import col

from api import submission, views
from api.body import JsonBody
from api.crowd import Asked, Crowd
from api.ends import Awaited, Ends
from api.errors import FieldsRefused
from api.paging import refuse_unknown_parameters
from api.prefer import seconds_to_wait
from api.routes.dependencies import (
    POLL_SECONDS,
    IdempotencyKey,
    JobReader,
    JobWriter,
    TheLinks,
    ThePaging,
    TheParts,
)
from api.waiting import facts
from shared import ids
from shared.jobs import requests
from shared.jobs.rows import Attempt, Job
from shared.jobs.state import JobState, JobType
from shared.wire import AnyJobRequest, AttemptView, FieldError, JobRequest, JobStateName, JobView, Page

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[Depends(refuse_unknown_parameters)])

_LABEL = "label."

BODY: Final = JsonBody[AnyJobRequest](JobRequest)
TheRequest = Annotated[AnyJobRequest, Depends(BODY)]
JobTypeName = JobType


@router.post("", status_code=status.HTTP_202_ACCEPTED, response_model=JobView, operation_id="submitJob")
async def submit_job(
    *,
    caller: JobWriter,
    body: TheRequest,
    request: Request,
    parts: TheParts,
    links: TheLinks,
    idempotency_key: IdempotencyKey = None,
    prefer: Annotated[
        list[str] | None, Header(description="`wait=N`: answer once the job has ended, at most N ≤ 60 seconds later.")
    ] = None,
) -> Response:
    """Accept a job and return at once; follow `urls.events`, or poll `urls.self`, for its state.

    A job's id in the place of a model stands for the model that the job makes: the new one waits for that.
    With an `Idempotency-Key`, sending the same body again gives the stored answer and makes no second job.
    """

    asked = Asked(
        tenant_id=caller.tenant_id,
        request=body,
        body=request.state.body,
        idempotency_key=idempotency_key,
        links=links,
    )
    crowd: Crowd = request.app.state.crowd
    # Listens before there is the job: what has ended by then was not there before.
    with parts.news.of(asked.job_id, only_ends=True) as listener:
        accepted = await crowd.submit(asked)
        headers = {"Location": links.job(accepted.job_id)["self"]}
        if accepted.is_replay:
            headers["Idempotency-Replayed"] = "true"
        elif wait := seconds_to_wait(prefer or []):
            ends: Ends = request.app.state.ends
            done = await ends.wait(Awaited(job_id=accepted.job_id, links=links), listener, wait)
            headers["Preference-Applied"] = f"wait={wait}"
            if done is not None:
                return _json(done.model_dump_json(), status.HTTP_200_OK, headers | {"ETag": _etag(done)})
    return _json(accepted.body, accepted.status, headers | {"Retry-After": POLL_SECONDS})


SUBMISSION: Final = next(route for route in router.routes if isinstance(route, APIRoute))


_LABEL_PARAMETER = {
    "name": f"{_LABEL}*",
    "in": "query",
    "description": "`label.<key>=<value>` keeps jobs with this label.",
    "schema": {"type": "string"},
    "example": "mnist",
}


@router.get("", operation_id="listJobs", openapi_extra={"parameters": [_LABEL_PARAMETER]})
async def list_jobs(
    *,
    caller: JobReader,
    request: Request,
    response: Response,
    parts: TheParts,
    links: TheLinks,
    paging: ThePaging,
    state: Annotated[list[JobStateName] | None, Query(description="In any of these states.")] = None,
    type: Annotated[list[JobTypeName] | None, Query(description="Of any of these types.")] = None,
) -> Page[JobView]:
    """Jobs, newest first. `label.<key>=<value>` keeps those with a label."""
    statement = select(Job).where(col(Job.tenant_id) == caller.tenant_id, col(Job.erased_at).is_(None))
    if state:
        statement = statement.where(col(Job.state).in_([JobState(name) for name in state]))
    if type:
        statement = statement.where(col(Job.type).in_(type))
    statement = _with_labels(statement, request)
    async with parts.transaction() as session:
        jobs, has_more = await paging.fetch(session, statement, col(Job.id), newest_first=True)
        known = await facts(session, jobs, parts.settings.jobs)
    shown = [views.job(job, known[job.id], links) for job in jobs]
    return paging.page(request, response, shown, jobs[-1].id if jobs else None, has_more=has_more)


def _with_labels(statement: Select[Job], request: Request) -> Select[Job]:
    labels = [
        (name.removeprefix(_LABEL), value)
        for name, value in request.query_params.multi_items()
        if name.startswith(_LABEL)
    ]
    for name, value in labels:
        if "\0" in name or "\0" in value:
            raise FieldsRefused([FieldError(parameter=f"query {_LABEL}*", detail="the text holds NUL")])
        statement = statement.where(col(Job.labels).contains({name: value}))
    return statement


@router.get("/{job_id}", operation_id="getJob", responses={304: {"description": "Nothing has changed."}})
async def get_job(
    caller: JobReader,
    job_id: str,
    parts: TheParts,
    links: TheLinks,
    response: Response,
    if_none_match: Annotated[str | None, Header(description="`ETag` of the view you have.")] = None,
) -> JobView:
    """A job. With `If-None-Match`, 304 while nothing has changed."""
    view = await submission.show(parts, links, caller.tenant_id, ids.parse("job", job_id))
    headers = {"ETag": _etag(view), "Cache-Control": "private, no-cache"}
    if not view.is_final:
        headers["Retry-After"] = POLL_SECONDS
    if _matches(if_none_match, headers["ETag"]):
        return Response(status_code=status.HTTP_304_NOT_MODIFIED, headers=headers)  # type: ignore[return-value]
    response.headers.update(headers)
    return view


@router.get("/{job_id}/attempts", operation_id="listAttempts")
async def list_attempts(caller: JobReader, job_id: str, parts: TheParts) -> Page[AttemptView]:
    """Every try at the job, first to last: who ran it, when, and how it ended."""
    async with parts.transaction() as session:
        job = await requests.get(session, caller.tenant_id, ids.parse("job", job_id))
        rows = (
            await session.execute(select(Attempt).where(col(Attempt.job_id) == job.id).order_by(col(Attempt.fence)))
        ).scalars()
        return Page(data=[views.attempt(row) for row in rows])


def _json(body: str, status_code: int, headers: dict[str, str]) -> Response:
    return Response(body, status_code, headers=headers, media_type="application/json")


def _etag(view: JobView) -> str:
    """Weak: it stands for what the view says, not for its bytes."""
    place = "-".join(["", str(view.queue.position), view.queue.reason, *view.queue.waits_for]) if view.queue else ""
    eta = f"-{view.queue.eta.p50}-{view.queue.eta.p90}" if view.queue and view.queue.eta else ""
    retry = "-retried" if view.retried_by else ""
    return f'W/"{view.state_version}{place}{eta}{retry}"'


def _matches(if_none_match: str | None, etag: str) -> bool:
    known = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return "*" in known or etag.removeprefix("W/") in known
