"""Artifacts: what jobs made, each with a presigned URL to its bytes."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response, status
from sqlalchemy import select
from sqlmodel import col

from api import views
from api.paging import refuse_unknown_parameters
from api.parts import Parts
from api.routes.dependencies import JobReader, ThePaging, TheParts
from shared import ids
from shared.errors import Gone, NotFound
from shared.jobs import requests
from shared.jobs.rows import Artifact
from shared.wire import ArtifactView, Page

router = APIRouter(prefix="/v1", tags=["artifacts"], dependencies=[Depends(refuse_unknown_parameters)])


@router.get("/jobs/{job_id}/artifacts", operation_id="listArtifacts")
async def list_artifacts(
    *,
    caller: JobReader,
    job_id: str,
    request: Request,
    response: Response,
    parts: TheParts,
    paging: ThePaging,
    kind: Annotated[
        list[Annotated[str, Query(max_length=40, pattern="^[a-z_]+$")]] | None,
        Query(description="Of any of these kinds."),
    ] = None,
) -> Page[ArtifactView]:
    """What a job has made so far, oldest first."""
    async with parts.transaction() as session:
        job = await requests.get(session, caller.tenant_id, ids.parse("job", job_id))
        statement = select(Artifact).where(col(Artifact.job_id) == job.id, col(Artifact.removed_at).is_(None))
        if kind:
            statement = statement.where(col(Artifact.kind).in_(kind))
        rows, has_more = await paging.fetch(session, statement, col(Artifact.id), newest_first=False)
    shown = await asyncio.to_thread(_shown, parts, rows)
    return paging.page(request, response, shown, rows[-1].id if rows else None, has_more=has_more)


@router.get("/artifacts/{artifact_id}", operation_id="getArtifact")
async def get_artifact(caller: JobReader, artifact_id: str, parts: TheParts) -> ArtifactView:
    """One artifact, with a fresh presigned URL."""
    row = await _find(parts, caller.tenant_id, artifact_id)
    return (await asyncio.to_thread(_shown, parts, [row]))[0]


@router.get(
    "/artifacts/{artifact_id}/content",
    operation_id="getArtifactContent",
    status_code=status.HTTP_302_FOUND,
    response_class=Response,
    responses={302: {"description": "`Location` is a presigned URL."}},
)
async def get_content(caller: JobReader, artifact_id: str, parts: TheParts) -> Response:
    """The bytes: a redirect to storage. The URL works without a key, for a while."""
    row = await _find(parts, caller.tenant_id, artifact_id)
    link = await asyncio.to_thread(views.artifact_link, row, parts.storage)
    return Response(status_code=status.HTTP_302_FOUND, headers={"Location": link, "Cache-Control": "no-store"})


async def _find(parts: Parts, tenant_id: UUID, artifact_id: str) -> Artifact:
    wanted = ids.parse("art", artifact_id)
    statement = select(Artifact).where(col(Artifact.id) == wanted, col(Artifact.tenant_id) == tenant_id)
    async with parts.transaction() as session:
        row = (await session.execute(statement)).scalar_one_or_none()
    if row is None:
        raise NotFound(f"no such artifact: {artifact_id}")
    if row.removed_at is not None:
        raise Gone(f"the artifact was removed: {artifact_id}")
    return row


def _shown(parts: Parts, rows: Sequence[Artifact]) -> list[ArtifactView]:
    expires = datetime.now(UTC) + parts.settings.s3.link_lifetime
    return [views.artifact(row, views.artifact_link(row, parts.storage), expires) for row in rows]
