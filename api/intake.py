"""Datasets on their way in: through the API as a form, or straight to storage by a presigned URL.

Either way the object is in storage, with its size and SHA-256 known, before the ingest job exists.
"""

import asyncio
import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from pydantic import ConfigDict, ValidationError
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from api.errors import FieldsRefused
from api.multipart import FilePart, Form
from api.parts import Parts
from api.pointers import field_error
from shared.described import Described
from shared.errors import IllegalMove, InvalidSpec, NotFound, StorageAway, UnsupportedMedia
from shared.ids import public, uuid7
from shared.jobs import requests
from shared.jobs.keys import source_key
from shared.jobs.rows import Dataset, DatasetState
from shared.media import ANYTHING, upload_kind
from shared.specs.ingest import IngestSpec
from shared.specs.spec import DatasetKind
from shared.wire import DatasetName, DatasetUpload, FieldError, Resolution


class DatasetForm(Described):
    """The fields of the form besides ``file``."""

    model_config = ConfigDict(extra="forbid")

    name: DatasetName
    """What to call it."""
    modality: DatasetKind | None = None
    """What it must turn out to be; told by the content when left out."""
    resolution: Resolution | None = None
    """Side length that images are brought to; their own when left out."""


def check_form(form: Form) -> tuple[DatasetForm, FilePart]:
    """The form's fields and its file.

    Raises:
        FieldsRefused: some are missing or wrong.
        InvalidSpec: the file is not one that can become such a dataset.
    """
    wrong: list[FieldError] = []
    fields: DatasetForm | None = None
    try:
        fields = DatasetForm.model_validate(form.fields)
    except ValidationError as error:
        wrong = [field_error(one, form.fields) for one in error.errors(include_url=False)]
    if form.file is None or not form.file.filename:
        wrong.append(FieldError(pointer="/file", detail="Field required"))
    elif not form.file.size_bytes:
        wrong.append(FieldError(pointer="/file", detail="the file is empty"))
    if fields is None or form.file is None or wrong:
        raise FieldsRefused(wrong)
    _check_kind(form.file.filename, form.file.content_type, fields.modality, pointer="/file")
    _spec(uuid7(), fields.modality, fields.resolution)
    return fields, form.file


def _check_kind(filename: str, content_type: str | None, modality: DatasetKind | None, *, pointer: str) -> None:
    try:
        upload_kind(filename, content_type, modality)
    except UnsupportedMedia as error:
        # 415 is about the request's own content type; this is about a file in it.
        raise InvalidSpec(error.detail, pointer=pointer) from None


def _spec(dataset_id: UUID, modality: DatasetKind | None, resolution: int | None) -> IngestSpec:
    asked = {"dataset": public("ds", dataset_id), "modality": modality, "resolution": resolution}
    try:
        return IngestSpec.model_validate(asked)
    except ValidationError as error:
        raise FieldsRefused([field_error(one, asked) for one in error.errors(include_url=False)]) from None


async def take(parts: Parts, tenant_id: UUID, fields: DatasetForm, file: FilePart) -> Dataset:
    """Put the file into storage, then record the dataset and queue its ingestion.

    Raises:
        StorageAway: that took so long that the file may be collected as one which nothing names.
    """
    dataset_id = uuid7()
    key = source_key(dataset_id)
    async with parts.transaction() as session:
        began_at = await session.scalar(select(func.clock_timestamp()))
    stored = await asyncio.to_thread(parts.storage.put, key, file.path, media_type=ANYTHING)
    source = {"filename": file.filename, "key": key, "size_bytes": stored.size_bytes, "sha256": stored.sha256}
    async with parts.transaction() as session:
        dataset = Dataset(
            id=dataset_id, tenant_id=tenant_id, name=fields.name, state=DatasetState.INGESTING, source=source
        )
        session.add(dataset)
        await session.flush()
        await _ingest(session, parts, dataset, _spec(dataset_id, fields.modality, fields.resolution))
        # The last statement: PostgreSQL ends a transaction that then waits for its commit.
        if await session.scalar(select(func.clock_timestamp() - began_at > parts.settings.jobs.orphan_grace / 2)):
            raise StorageAway("the upload took too long to be recorded")
    return _announce(parts, dataset)


async def announce(parts: Parts, tenant_id: UUID, upload: DatasetUpload) -> Dataset:
    """Record a dataset that will be uploaded straight to storage.

    Raises:
        FieldsRefused, InvalidSpec: it could never be ingested.
    """
    limit = parts.settings.api.max_upload
    if upload.size_bytes > limit:
        raise InvalidSpec(f"a dataset may have {limit} bytes at most", pointer="/size_bytes")
    _check_kind(upload.filename, None, upload.modality, pointer="/filename")
    dataset_id = uuid7()
    _spec(dataset_id, upload.modality, upload.resolution)
    source = {
        "filename": upload.filename,
        "key": source_key(dataset_id),
        "size_bytes": None,
        "sha256": None,
        "announced": upload.model_dump(mode="json", include={"size_bytes", "modality", "resolution"}),
    }
    async with parts.transaction() as session:
        dataset = Dataset(
            id=dataset_id, tenant_id=tenant_id, name=upload.name, state=DatasetState.UPLOADING, source=source
        )
        session.add(dataset)
        await session.flush()
        await session.refresh(dataset)
    return dataset


async def upload_link(parts: Parts, dataset: Dataset) -> Mapping[str, Any] | None:
    """How to upload an announced dataset; None once it is there."""
    if dataset.state != DatasetState.UPLOADING:
        return None
    size = dataset.source["announced"]["size_bytes"]
    expires = datetime.now(UTC) + parts.settings.s3.link_lifetime
    url = await asyncio.to_thread(parts.storage.upload_link, dataset.source["key"], size_bytes=size)
    # The signature covers the length, so it must be sent, also by clients that would stream without it.
    headers = {"Content-Length": str(size)}
    return {"method": "PUT", "url": url, "headers": headers, "expires_at": expires.isoformat()}


async def complete(parts: Parts, tenant_id: UUID, dataset_id: UUID) -> tuple[Dataset, bool]:
    """Check what was uploaded and queue its ingestion; once, however often it is asked for.

    Returns:
        The dataset, and whether this call queued it.

    Raises:
        IllegalMove: the upload is not there, or not the one that was announced.
    """
    async with parts.transaction() as session:
        dataset = await find(session, tenant_id, dataset_id)
    if dataset.state != DatasetState.UPLOADING:
        return dataset, False
    announced = dataset.source["announced"]
    size, digest = await asyncio.to_thread(_examine, parts, dataset.source["key"], announced["size_bytes"])
    async with parts.transaction() as session:
        dataset = await find(session, tenant_id, dataset_id, lock=True)
        if dataset.state != DatasetState.UPLOADING:
            return dataset, False
        known = {name: value for name, value in dataset.source.items() if name != "announced"}
        dataset.source = known | {"size_bytes": size, "sha256": digest}
        await _ingest(session, parts, dataset, _spec(dataset_id, announced["modality"], announced["resolution"]))
    return _announce(parts, dataset), True


def _examine(parts: Parts, key: str, announced_bytes: int) -> tuple[int, str]:
    """Size and SHA-256 of what really lies in storage."""
    from shared.storage import ObjectMissing  # noqa: PLC0415  (loads boto3, which only a running app needs)

    try:
        size = parts.storage.size(key)
        if size != announced_bytes:
            raise IllegalMove(f"{announced_bytes} bytes were announced, {size} were uploaded: upload it again")
        digest = hashlib.sha256()
        for chunk in parts.storage.stream(key, size_bytes=size):
            digest.update(chunk)
    except ObjectMissing:
        raise IllegalMove("nothing was uploaded yet: PUT the file to upload.url first") from None
    return size, digest.hexdigest()


async def find(session: AsyncSession, tenant_id: UUID, dataset_id: UUID, *, lock: bool = False) -> Dataset:
    """The tenant's dataset; raises ``NotFound``."""
    statement = select(Dataset).where(col(Dataset.id) == dataset_id, col(Dataset.tenant_id) == tenant_id)
    dataset = (await session.execute(statement.with_for_update() if lock else statement)).scalar_one_or_none()
    if dataset is None:
        raise NotFound(f"no such dataset: {public('ds', dataset_id)}")
    return dataset


async def _ingest(session: AsyncSession, parts: Parts, dataset: Dataset, spec: IngestSpec) -> None:
    await requests.submit_ingest(session, dataset, spec, settings=parts.settings.jobs)
    await session.flush()
    await session.refresh(dataset)


def _announce(parts: Parts, dataset: Dataset) -> Dataset:
    if dataset.job_id is not None:
        parts.relay.wake(dataset.job_id)
    return dataset
