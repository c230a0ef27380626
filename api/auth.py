"""Who asks: bearer keys (RFC 6750), of which only the SHA-256 is stored, and what each may do.

A key is 20 or more characters from a good source of randomness, so a fast hash is the right one.
"""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from sqlalchemy import Engine, LargeBinary, bindparam, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlmodel import col

from api.parts import Parts
from api.together import Together
from shared.errors import Forbidden, Unauthorized
from shared.jobs.rows import ApiKey

SCOPES: Final = ("jobs:read", "jobs:write", "datasets:read", "datasets:write", "models:read", "models:write")

_MOST: Final = 64
_LANES: Final = 2
"""Look-ups for so many callers at once, and so many look-ups side by side."""

BEARER = HTTPBearer(auto_error=False, scheme_name="key", description="An API key, as `Authorization: Bearer <key>`.")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """An authenticated client."""

    tenant_id: UUID
    key_id: UUID
    scopes: frozenset[str]


class _Unauthorized(Unauthorized):
    def __init__(self, detail: str, challenge: str) -> None:
        super().__init__(detail)
        self.headers = {"WWW-Authenticate": challenge}


class _Forbidden(Forbidden):
    def __init__(self, scope: str) -> None:
        super().__init__(f"the key lacks the scope {scope}")
        self.headers = {"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{scope}"'}


def digest(key: str) -> bytes:
    """What is stored of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Callers(Together[bytes, Caller | None]):
    """Tells of the digest of a key who holds it, if it is valid now."""

    def __init__(self, parts: Parts) -> None:
        # A single statement needs no transaction around it.
        engine = parts.thread_engine.execution_options(isolation_level="AUTOCOMMIT")
        super().__init__(partial(_find_all, engine), most=_MOST, lanes=_LANES, name="callers")


_KEYS: Final = select(
    *(col(column) for column in (ApiKey.digest, ApiKey.id, ApiKey.tenant_id, ApiKey.scopes)),
    (
        func.coalesce(col(ApiKey.expires_at) <= func.clock_timestamp(), False) | col(ApiKey.revoked_at).is_not(None)
    ).label("ended"),
).where(col(ApiKey.digest) == func.any(bindparam("wanted", type_=ARRAY(LargeBinary))))


def _find_all(engine: Engine, wanted: Sequence[bytes]) -> list[Caller | None]:
    """One look-up by index, whatever the keys are."""
    with engine.connect() as connection:
        rows = connection.execute(_KEYS, {"wanted": list(set(wanted))}).all()
    return [_holder(rows, one) for one in wanted]


def _holder(rows: Sequence[Any], wanted: bytes) -> Caller | None:
    for row in rows:
        if hmac.compare_digest(row.digest, wanted) and not row.ended:
            return Caller(tenant_id=row.tenant_id, key_id=row.id, scopes=frozenset(row.scopes))
    return None


async def authenticate(
    needed: SecurityScopes,
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)],
) -> Caller:
    """The caller, if its key is valid and has the scopes.

    Raises:
        Unauthorized: no key, or not a valid one; which of the two reasons is not told.
        Forbidden: a scope is missing.
    """
    if credentials is None:
        raise _Unauthorized("an API key is needed: Authorization: Bearer <key>", "Bearer")
    callers: Callers = request.app.state.callers
    caller = await callers.ask(digest(credentials.credentials))
    if caller is None:
        raise _Unauthorized("the API key is not valid", 'Bearer error="invalid_token"')
    request.state.tenant_id = caller.tenant_id
    for scope in needed.scopes:
        if scope not in caller.scopes:
            raise _Forbidden(scope)
    return caller
