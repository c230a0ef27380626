"""Aliases: names for versions of models, which are moved by a gate; and how they were moved."""

from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Path, Request, Response, status
from sqlalchemy import select
from sqlmodel import col

from api import views
from api.body import JsonBody
from api.paging import refuse_unknown_parameters
from api.routes.dependencies import ModelReader, ModelWriter, ThePaging, TheParts
from shared.ids import public
from shared.jobs import aliases
from shared.jobs.alias_rows import AliasMove, ModelAlias
from shared.jobs.aliases import Condition, Named, Standing
from shared.jobs.rows import ApiKey
from shared.specs.gate import AliasRequest
from shared.specs.spec import AliasName
from shared.wire import AliasMoveView, AliasView, Page

router = APIRouter(
    prefix="/v1/models/{name}/aliases", tags=["models"], dependencies=[Depends(refuse_unknown_parameters)]
)

TheRequest = Annotated[AliasRequest, Depends(JsonBody[AliasRequest](AliasRequest))]
TheAlias = Annotated[AliasName, Path(description="`production`, `champion`, …; nothing that looks like a version.")]
IfMatch = Annotated[
    str | None, Header(alias="If-Match", description="`ETag` that the alias must still have; `*`: it must be there.")
]
IfNoneMatch = Annotated[
    str | None,
    Header(alias="If-None-Match", description="`*`: there must be no such alias yet.", pattern=r"^\s*\*\s*$"),
]

_MADE: Final[dict[int | str, dict[str, Any]]] = {201: {"model": AliasView, "description": "The alias is new."}}


@router.get("", operation_id="listAliases")
async def list_aliases(
    caller: ModelReader, name: str, request: Request, response: Response, parts: TheParts, paging: ThePaging
) -> Page[AliasView]:
    """The aliases of a model, in the order in which they were made."""
    async with parts.transaction() as session:
        model = await aliases.find_model(session, caller.tenant_id, name)
        statement = select(ModelAlias).where(col(ModelAlias.model_id) == model.id)
        rows, has_more = await paging.fetch(session, statement, col(ModelAlias.id), newest_first=False)
        versions = (await aliases.versions(session, [model.id]))[model.id]
    shown = [views.alias(model.name, row, versions[row.name]) for row in rows]
    return paging.page(request, response, shown, rows[-1].id if rows else None, has_more=has_more)


@router.get("/{alias}", operation_id="getAlias")
async def get_alias(caller: ModelReader, name: str, alias: TheAlias, parts: TheParts, response: Response) -> AliasView:
    """What an alias stands for now. Its `ETag` changes with every move and every change of its gate."""
    async with parts.transaction() as session:
        return _show(response, name, await aliases.find(session, caller.tenant_id, name, alias))


@router.put("/{alias}", operation_id="putAlias", responses=_MADE)
async def put_alias(
    *,
    caller: ModelWriter,
    name: str,
    alias: TheAlias,
    body: TheRequest,
    parts: TheParts,
    response: Response,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> AliasView:
    """Make an alias (201), or move it to another version, if that passes its gate (else 409 `gate_failed`). Idempotent.

    Looked at are succeeded evaluate jobs of the version. The gate belongs to the alias: a move has to pass the one it
    has, and one that comes with the move besides. With the version that the alias has already, `gate` is replaced
    without being passed. With `If-Match`, 412 if the alias is not any more what you saw.
    """
    named = Named(tenant_id=caller.tenant_id, key_id=caller.key_id, model=name, alias=alias)
    async with parts.transaction() as session:
        standing, is_new = await aliases.put(session, named, body, _condition(if_match, if_none_match))
    if is_new:
        response.status_code = status.HTTP_201_CREATED
    return _show(response, name, standing)


@router.delete("/{alias}", operation_id="deleteAlias", status_code=status.HTTP_204_NO_CONTENT)
async def delete_alias(
    caller: ModelWriter, name: str, alias: TheAlias, parts: TheParts, if_match: IfMatch = None
) -> None:
    """Remove an alias with its gate. The version that it stood for stays, and so does the history."""
    named = Named(tenant_id=caller.tenant_id, key_id=caller.key_id, model=name, alias=alias)
    async with parts.transaction() as session:
        await aliases.remove(session, named, _condition(if_match, None))


@router.get("/{alias}/moves", operation_id="listAliasMoves")
async def list_moves(
    *,
    caller: ModelReader,
    name: str,
    alias: TheAlias,
    request: Request,
    response: Response,
    parts: TheParts,
    paging: ThePaging,
) -> Page[AliasMoveView]:
    """Every move of an alias, newest first: when, by which key, from and to which version, and by what figures.

    Changes of its gate are told, too, and the history of an alias that was removed stays.
    """
    async with parts.transaction() as session:
        model = await aliases.find_model(session, caller.tenant_id, name)
        statement = select(AliasMove).where(col(AliasMove.model_id) == model.id, col(AliasMove.alias) == alias)
        rows, has_more = await paging.fetch(session, statement, col(AliasMove.id), newest_first=True)
        wanted = select(ApiKey).where(col(ApiKey.id).in_({row.key_id for row in rows}))
        keys = {key.id: key for key in (await session.scalars(wanted)).all()}
    shown = [views.alias_move(row, keys[row.key_id]) for row in rows]
    return paging.page(request, response, shown, rows[-1].id if rows else None, has_more=has_more)


def _show(response: Response, model: str, standing: Standing) -> AliasView:
    response.headers["ETag"] = _etag(standing.alias.move_id)
    return views.alias(model, standing.alias, standing.version)


def _etag(move_id: UUID) -> str:
    return f'"{public("mov", move_id)}"'


def _condition(if_match: str | None, if_none_match: str | None) -> Condition:
    """What the headers allow to change (RFC 9110, section 13.1)."""
    tags = None if if_match is None else [tag.strip() for tag in if_match.split(",")]

    def may(move_id: UUID | None) -> bool:
        if if_none_match is not None and move_id is not None:
            return False
        return tags is None or (move_id is not None and ("*" in tags or _etag(move_id) in tags))

    return may
