"""Datasets: upload, announce a direct upload and complete it, look, list."""

from typing import Any

from fastapi import APIRouter, Depends, Request, Response, status
from sqlalchemy import select
from sqlmodel import col

from api import intake, views
from api.body import JsonBody, require_media_type
from api.multipart import read_form
from api.paging import refuse_unknown_parameters
from api.routes.dependencies import DatasetReader, DatasetWriter, TheLinks, ThePaging, TheParts
from shared import ids
from shared.jobs.rows import Dataset
from shared.wire import DatasetUpload, DatasetView, Page

router = APIRouter(prefix="/v1/datasets", tags=["datasets"], dependencies=[Depends(refuse_unknown_parameters)])

_announcement = JsonBody[DatasetUpload](DatasetUpload)


@router.post(
    "",
    operation_id="createDataset",
    status_code=status.HTTP_202_ACCEPTED,
    responses={
        201: {"model": DatasetView, "description": "Announced: upload the file as `upload` says, then complete it."}
    },
)
async def create_dataset(
    caller: DatasetWriter, request: Request, response: Response, parts: TheParts, links: TheLinks
) -> DatasetView:
    """Upload a dataset as a form with `name` and `file`; a job ingests it (202).

    Or announce it as JSON and upload it straight to storage (201), which suits large files.
    """
    if require_media_type(request, "multipart/form-data", "application/json") == "application/json":
        upload = await _announcement(request)
        dataset = await intake.announce(parts, caller.tenant_id, upload)
        response.status_code = status.HTTP_201_CREATED
    else:
        async with read_form(request, parts.settings.api.max_upload) as form:
            dataset = await intake.take(parts, caller.tenant_id, *intake.check_form(form))
    response.headers["Location"] = links.dataset(dataset.id)["self"]
    return views.dataset(dataset, links, upload=await intake.upload_link(parts, dataset))


@router.post(
    "/{dataset_id}/complete",
    operation_id="completeDataset",
    responses={202: {"model": DatasetView, "description": "Its ingestion was queued."}},
)
async def complete_dataset(
    caller: DatasetWriter, dataset_id: str, response: Response, parts: TheParts, links: TheLinks
) -> DatasetView:
    """Say that the direct upload is done: it is checked, and a job ingests it. Idempotent."""
    dataset, was_queued = await intake.complete(parts, caller.tenant_id, ids.parse("ds", dataset_id))
    if was_queued:
        response.status_code = status.HTTP_202_ACCEPTED
        response.headers["Location"] = links.dataset(dataset.id)["self"]
    return views.dataset(dataset, links)


@router.get("", operation_id="listDatasets")
async def list_datasets(
    caller: DatasetReader, request: Request, response: Response, parts: TheParts, links: TheLinks, paging: ThePaging
) -> Page[DatasetView]:
    """Datasets, newest first."""
    statement = select(Dataset).where(col(Dataset.tenant_id) == caller.tenant_id)
    async with parts.transaction() as session:
        rows, has_more = await paging.fetch(session, statement, col(Dataset.id), newest_first=True)
    shown = [views.dataset(row, links) for row in rows]
    return paging.page(request, response, shown, rows[-1].id if rows else None, has_more=has_more)


@router.get("/{dataset_id}", operation_id="getDataset")
async def get_dataset(caller: DatasetReader, dataset_id: str, parts: TheParts, links: TheLinks) -> DatasetView:
    """A dataset. While its direct upload is awaited, `upload` says how, to keys that may write."""
    async with parts.transaction() as session:
        dataset = await intake.find(session, caller.tenant_id, ids.parse("ds", dataset_id))
    upload: Any = await intake.upload_link(parts, dataset) if "datasets:write" in caller.scopes else None
    return views.dataset(dataset, links, upload=upload)
