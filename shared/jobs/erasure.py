"""Erasing an ended job: what it said and made is gone, that it was is not. Async, in the caller's transaction.

The row stays as a tombstone, so that its id is never anything else and other rows may refer to it: usage, the
models it trained, the job that was its retry. Objects are deleted by the collector, after their rows' ``removed_at``.
"""

from typing import Any, Final
from uuid import UUID

from sqlalchemy import delete, func, null, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from shared.errors import IllegalMove
from shared.ids import public
from shared.jobs import requests
from shared.jobs.need_rows import Need
from shared.jobs.rows import Artifact, Attempt, Dataset, Event, IdempotencyKey, Job, ModelVersion

_EMPTY: Final[dict[str, Any]] = {
    "summary": "erased",
    **{column: {} for column in ("spec", "inputs", "labels", "figures", "timings")},
    **dict.fromkeys(("result", "error_message"), null()),
}


async def erase(session: AsyncSession, tenant_id: UUID, job_id: UUID) -> None:
    """Leave a tombstone. What a model or a dataset is made of stays with that.

    Raises:
        NotFound: the tenant has no such job.
        Gone: it was erased before.
        IllegalMove: it has not ended.
    """
    mine = (col(Job.id) == job_id, col(Job.tenant_id) == tenant_id)
    await session.execute(select(col(Job.id)).where(*mine).with_for_update())
    job = await requests.get(session, tenant_id, job_id)
    if not job.state.is_final:
        raise IllegalMove(f"the job is {job.state.value}: only one that has ended is erased")
    now = func.clock_timestamp()
    # The attempts first: their rows show that nothing of this job is being written any more.
    await session.execute(delete(Attempt).where(col(Attempt.job_id) == job_id))
    await session.execute(delete(Event).where(col(Event.job_id) == job_id))
    await session.execute(delete(Need).where(col(Need.job_id) == job_id))
    unused = (col(Artifact.removed_at).is_(None), col(Artifact.key).not_in(await _keys_in_use(session, job_id)))
    await session.execute(update(Artifact).where(col(Artifact.job_id) == job_id, *unused).values(removed_at=now))
    await _forget_answers(session, tenant_id, public("job", job_id))
    erased = update(Job).where(*mine).values(**_EMPTY, erased_at=now, state_version=Job.state_version + 1)
    await session.execute(erased)


async def _keys_in_use(session: AsyncSession, job_id: UUID) -> list[str]:
    """Keys of the job's objects that its model version or its dataset is made of."""
    weights = (await session.scalars(select(col(ModelVersion.weights)).where(col(ModelVersion.job_id) == job_id))).all()
    files = (await session.scalars(select(col(Dataset.files)).where(col(Dataset.job_id) == job_id))).all()
    return [each["key"] for each in (*weights, *(file for listed in files for file in listed))]


async def _forget_answers(session: AsyncSession, tenant_id: UUID, job_id: str) -> None:
    """Keep of the answers that showed the job only which job it was: a replay still makes no second one."""
    beginning = f'{{"id":"{job_id}"'
    answers = (col(IdempotencyKey.tenant_id) == tenant_id, func.starts_with(IdempotencyKey.body, beginning))
    await session.execute(update(IdempotencyKey).where(*answers).values(body=beginning + "}"))
