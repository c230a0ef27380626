"""Lists in pages: an opaque cursor, ``{data, next_cursor, has_more}``, and a ``Link`` to the next page (RFC 8288)."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import urlencode
from uuid import UUID

from fastapi import Query, Request, Response
from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncSession

from api.errors import FieldsRefused
from shared.wire import FieldError, ItemT, Page

MAX_LIMIT: Final = 200
_VERSION: Final = b"\x01"
_CURSOR_BYTES: Final = 17

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Paging:
    """Which page is asked for: a dependency."""

    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Most entries of a page.")] = 50
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None

    async def fetch(
        self, session: AsyncSession, statement: Select[RowT], key: Any, *, newest_first: bool
    ) -> tuple[list[RowT], bool]:
        """One page of rows ordered by ``key``, a UUIDv7, and whether there are more."""
        if self.cursor is not None:
            last = _decode(self.cursor)
            statement = statement.where(key < last if newest_first else key > last)
        ordered = statement.order_by(key.desc() if newest_first else key).limit(self.limit + 1)
        rows = list((await session.execute(ordered)).scalars())
        return rows[: self.limit], len(rows) > self.limit

    def page(
        self, request: Request, response: Response, items: Sequence[ItemT], last_id: UUID | None, *, has_more: bool
    ) -> Page[ItemT]:
        """The answer, which also says in its headers where it goes on."""
        cursor = _encode(last_id) if has_more and last_id is not None else None
        if cursor is not None:
            link_next(request, response, cursor=cursor)
        return Page(data=list(items), next_cursor=cursor, has_more=has_more)


def link_next(request: Request, response: Response, **changed: str) -> None:
    """Add ``Link: <...>; rel="next"``: the same request but for ``changed``."""
    query = [(name, value) for name, value in request.query_params.multi_items() if name not in changed]
    response.headers["Link"] = f'<{request.url.path}?{urlencode([*query, *changed.items()])}>; rel="next"'


def _encode(last_id: UUID) -> str:
    return base64.urlsafe_b64encode(_VERSION + last_id.bytes).rstrip(b"=").decode()


def _decode(cursor: str) -> UUID:
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != _CURSOR_BYTES or raw[:1] != _VERSION:
        raise FieldsRefused([FieldError(parameter="query cursor", detail="this is not a cursor that a page gave")])
    return UUID(bytes=raw[1:])


async def refuse_unknown_parameters(request: Request) -> None:
    """A misspelt filter must not quietly show everything."""
    if not request.query_params:
        return
    route = request.scope["route"]
    known = {
        parameter.alias for dependant in _with_dependencies(route.dependant) for parameter in dependant.query_params
    }
    # A family of parameters is documented as ``label.*``.
    families = tuple(
        one["name"][:-1] for one in (route.openapi_extra or {}).get("parameters", []) if one["name"].endswith("*")
    )
    unknown = [name for name in request.query_params if name not in known and not name.startswith(families or "\0")]
    if unknown:
        raise FieldsRefused(
            [FieldError(parameter=f"query {name[:100]}", detail="there is no such parameter") for name in unknown]
        )


def _with_dependencies(dependant: Any) -> list[Any]:
    found = [dependant]
    for needed in dependant.dependencies:
        found += _with_dependencies(needed)
    return found
