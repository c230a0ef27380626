"""Who asks: bearer keys (RFC 6750), of which only the SHA-256 is stored, and what each may do.

A key is 20 or more characters from a good source of randomness, so a fast hash is the right one.
"""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Annotated, Final
from uuid import UUID

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from sqlalchemy import func, select
from sqlmodel import col

from api.parts import Parts
from shared.errors import Forbidden, Unauthorized
from shared.jobs.rows import ApiKey

SCOPES: Final = ("jobs:read", "jobs:write", "datasets:read", "datasets:write", "models:read", "models:write")

_BEARER = HTTPBearer(auto_error=False, scheme_name="key", description="An API key, as `Authorization: Bearer <key>`.")


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


async def authenticate(
    needed: SecurityScopes,
    request: Request,
    parts: Annotated[Parts, Depends(Parts.of)],
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
) -> Caller:
    """The caller, if its key is valid and has the scopes.

    Raises:
        Unauthorized: no key, or not a valid one; which of the two reasons is not told.
        Forbidden: a scope is missing.
    """
    if credentials is None:
        raise _Unauthorized("an API key is needed: Authorization: Bearer <key>", "Bearer")
    caller = await _find(parts, digest(credentials.credentials))
    if caller is None:
        raise _Unauthorized("the API key is not valid", 'Bearer error="invalid_token"')
    request.state.tenant_id = caller.tenant_id
    for scope in needed.scopes:
        if scope not in caller.scopes:
            raise _Forbidden(scope)
    return caller


async def _find(parts: Parts, wanted: bytes) -> Caller | None:
    """One hash and one look-up by index, whatever the key is."""
    now = func.clock_timestamp()
    ended = func.coalesce(col(ApiKey.expires_at) <= now, False) | col(ApiKey.revoked_at).is_not(None)
    statement = select(ApiKey, ended).where(col(ApiKey.digest) == wanted)
    async with parts.transaction() as session:
        row = (await session.execute(statement)).one_or_none()
    if row is None or row[1] or not hmac.compare_digest(row[0].digest, wanted):
        return None
    return Caller(tenant_id=row[0].tenant_id, key_id=row[0].id, scopes=frozenset(row[0].scopes))
