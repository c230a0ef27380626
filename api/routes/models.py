"""Models: registered names and their immutable versions. Their aliases are in ``aliases.py``."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Request, Response
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from api import views
from api.paging import refuse_unknown_parameters
from api.routes.dependencies import ModelReader, ThePaging, TheParts
from shared.errors import NotFound
from shared.jobs.aliases import find_model, versions
from shared.jobs.rows import Model, ModelVersion
from shared.wire import ModelVersionView, ModelView, Page

router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(refuse_unknown_parameters)])


@router.get("", operation_id="listModels")
async def list_models(
    caller: ModelReader, request: Request, response: Response, parts: TheParts, paging: ThePaging
) -> Page[ModelView]:
    """Registered names, newest first, each with its newest version and its aliases."""
    statement = select(Model).where(col(Model.tenant_id) == caller.tenant_id)
    async with parts.transaction() as session:
        rows, has_more = await paging.fetch(session, statement, col(Model.id), newest_first=True)
        newest = await _newest(session, [row.id for row in rows])
        aliases = await versions(session, [row.id for row in rows])
    shown = [views.model(row, newest.get(row.id), aliases[row.id]) for row in rows]
    return paging.page(request, response, shown, rows[-1].id if rows else None, has_more=has_more)


@router.get("/{name}", operation_id="getModel")
async def get_model(caller: ModelReader, name: str, parts: TheParts) -> ModelView:
    """A registered name, with its newest version and its aliases."""
    async with parts.transaction() as session:
        model = await find_model(session, caller.tenant_id, name)
        aliases = await versions(session, [model.id])
        return views.model(model, (await _newest(session, [model.id])).get(model.id), aliases[model.id])


@router.get("/{name}/versions", operation_id="listModelVersions")
async def list_versions(
    caller: ModelReader, name: str, request: Request, response: Response, parts: TheParts, paging: ThePaging
) -> Page[ModelVersionView]:
    """The versions of a model, newest first."""
    async with parts.transaction() as session:
        model = await find_model(session, caller.tenant_id, name)
        statement = select(ModelVersion).where(col(ModelVersion.model_id) == model.id)
        rows, has_more = await paging.fetch(session, statement, col(ModelVersion.id), newest_first=True)
    shown = [views.version(model, row) for row in rows]
    return paging.page(request, response, shown, rows[-1].id if rows else None, has_more=has_more)


@router.get("/{name}/versions/{version}", operation_id="getModelVersion")
async def get_version(
    caller: ModelReader, name: str, version: Annotated[int, Path(ge=1, lt=2**31)], parts: TheParts
) -> ModelVersionView:
    """One immutable set of weights."""
    async with parts.transaction() as session:
        model = await find_model(session, caller.tenant_id, name)
        statement = select(ModelVersion).where(
            col(ModelVersion.model_id) == model.id, col(ModelVersion.version) == version
        )
        row = (await session.execute(statement)).scalar_one_or_none()
    if row is None:
        raise NotFound(f"no such model: {name}@{version}")
    return views.version(model, row)


async def _newest(session: AsyncSession, model_ids: list[UUID]) -> dict[UUID, ModelVersion]:
    if not model_ids:
        return {}
    statement = (
        select(ModelVersion)
        .join(Model, col(Model.id) == col(ModelVersion.model_id))
        .where(col(Model.id).in_(model_ids), col(ModelVersion.version) == col(Model.latest))
    )
    return {row.model_id: row for row in (await session.execute(statement)).scalars()}
