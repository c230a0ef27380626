"""A client's promise that two requests are one: same key and body, same answer, one job.

The key's row is written in the transaction of the job itself, so that key and job exist together or
not at all. A second request with the key waits for that transaction, then replays its answer.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import bindparam, delete, func, literal, select, text, update
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from shared.errors import IdempotencyInProgress, IdempotencyMismatch
from shared.jobs.rows import IdempotencyKey

_LOCK_NOT_AVAILABLE = "55P03"
_PATIENCE = timedelta(milliseconds=100)

_TAKE: Final = text("""
INSERT INTO idempotency_keys (tenant_id, key, request_sha256)
SELECT tenant_id, key, request_sha256
FROM jsonb_to_recordset(:asked) AS asked (tenant_id uuid, key text, request_sha256 text)
ON CONFLICT DO NOTHING RETURNING tenant_id, key
""").bindparams(bindparam("asked", type_=JSONB))
_COMPLETE: Final = text("""
UPDATE idempotency_keys AS used SET status = told.status, body = told.body
FROM jsonb_to_recordset(:answers) AS told (tenant_id uuid, key text, status integer, body text)
WHERE used.tenant_id = told.tenant_id AND used.key = told.key
""").bindparams(bindparam("answers", type_=JSONB))


@dataclass(frozen=True)
class Answer:
    """What the first request was answered."""

    status: int
    body: str


def digest(body: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON body, whatever the order of its keys."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


async def begin(
    session: AsyncSession,
    tenant_id: UUID,
    key: str,
    request_sha256: str,
    *,
    lifetime: timedelta,
    wait: timedelta = timedelta(seconds=2),
) -> Answer | None:
    """Take the key for this transaction; returns the stored answer if it was used before.

    Raises:
        IdempotencyMismatch: it was used with another body.
        IdempotencyInProgress: the first request did not end within ``wait``.
    """
    mine = (col(IdempotencyKey.tenant_id) == tenant_id, col(IdempotencyKey.key) == key)
    expired = col(IdempotencyKey.created_at) < func.clock_timestamp() - literal(lifetime)
    await session.execute(text(f"SET LOCAL lock_timeout = {int(wait.total_seconds() * 1000)}"))
    try:
        await session.execute(delete(IdempotencyKey).where(*mine, expired))
        taken = await session.scalar(
            insert(IdempotencyKey)
            .values(tenant_id=tenant_id, key=key, request_sha256=request_sha256)
            .on_conflict_do_nothing()
            .returning(col(IdempotencyKey.key))
        )
    except DBAPIError as error:
        if is_held(error):
            raise IdempotencyInProgress("the first request with this Idempotency-Key has not ended yet") from error
        raise
    # What the request itself waits for, it waits for as long as any.
    await session.execute(text("SET LOCAL lock_timeout TO DEFAULT"))
    if taken is not None:
        return None
    stored = (await session.execute(select(IdempotencyKey).where(*mine))).scalar_one_or_none()
    if stored is None:
        # It expired and was removed since the INSERT met it.
        return await begin(session, tenant_id, key, request_sha256, lifetime=lifetime, wait=wait)
    if stored.request_sha256 != request_sha256:
        raise IdempotencyMismatch("this Idempotency-Key was used before with another body")
    if stored.status is None or stored.body is None:
        raise IdempotencyInProgress("the first request with this Idempotency-Key has not ended yet")
    return Answer(stored.status, stored.body)


async def take(session: AsyncSession, keys: Sequence[tuple[UUID, str, str]]) -> set[tuple[UUID, str]]:
    """Take, for this transaction, those of the keys (tenant, key, SHA-256 of the request) that were never used.

    ``begin`` tells what is with the others. Whoever holds one of them is hardly waited for.

    Raises:
        OperationalError: a first request with one of the keys has not ended (``is_held``).
    """
    await session.execute(text(f"SET LOCAL lock_timeout = {int(_PATIENCE.total_seconds() * 1000)}"))
    asked = [{"tenant_id": str(tenant_id), "key": key, "request_sha256": sha256} for tenant_id, key, sha256 in keys]
    taken = await session.execute(_TAKE, {"asked": asked})
    return {(row.tenant_id, row.key) for row in taken}


def is_held(error: DBAPIError) -> bool:
    """Whether somebody waited in vain for a key that another transaction holds."""
    return getattr(error.orig, "sqlstate", None) == _LOCK_NOT_AVAILABLE


async def complete(session: AsyncSession, tenant_id: UUID, key: str, answer: Answer) -> None:
    """Keep the answer for replays."""
    await session.execute(
        update(IdempotencyKey)
        .where(col(IdempotencyKey.tenant_id) == tenant_id, col(IdempotencyKey.key) == key)
        .values(status=answer.status, body=answer.body)
    )


async def complete_all(session: AsyncSession, answers: Mapping[tuple[UUID, str], Answer]) -> None:
    """``complete`` for several keys, each of a tenant."""
    if not answers:
        return
    told = [
        {"tenant_id": str(tenant_id), "key": key, "status": answer.status, "body": answer.body}
        for (tenant_id, key), answer in answers.items()
    ]
    await session.execute(_COMPLETE, {"answers": told})
