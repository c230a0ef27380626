"""What the search for second jobs goes through: scenes with an idempotency key, and seeded bugs that it must find."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy import Engine, text, update
from sqlalchemy.exc import OperationalError

from api import crowd, submission
from api.parts import Parts
from api.waiting import JobFacts
from shared import ids
from shared.jobs import erasure, idempotency, requests
from shared.jobs.idempotency import Answer
from shared.jobs.rows import IdempotencyKey, Job
from tests.model.keyed import Accepted, Client, Explored, Orders, Scene, accept_alone, asked
from tests.model.operations import TENANT
from tests.model.planting import Plant

PATIENCE: Final = timedelta(hours=1)
"""So long a request waits for another with its key: here somebody always goes on before."""
ANA, BEN = Client(name="Ana"), Client(name="Ben")


async def _a_job(parts: Parts) -> Accepted:
    made = await accept_alone(parts, asked(ANA))
    assert isinstance(made, Accepted)
    return made


async def _an_old_key(parts: Parts) -> None:
    await _a_job(parts)
    async with parts.transaction() as session:
        old = datetime.now(UTC) - 2 * parts.settings.jobs.idempotency_lifetime
        await session.execute(update(IdempotencyKey).values(created_at=old))


async def _an_erased_job(parts: Parts) -> None:
    job_id = (await _a_job(parts)).job_id
    async with parts.transaction() as session:
        await requests.cancel(session, TENANT, job_id)
    async with parts.transaction() as session:
        await erasure.erase(session, TENANT, job_id)


SCENES: Final = {
    "two at once": Scene(clients=(ANA, BEN), orders=40),
    "three at once": Scene(clients=(ANA, BEN, Client(name="Cem")), orders=26, faults=0),
    "a crowd of one key": Scene(clients=(Client(name="Ana and Ada", times=2), BEN), orders=18, faults=0),
    "two bodies": Scene(
        clients=(ANA, Client(name="Ben", steps=3)), orders=80, answers=frozenset({"202", "idempotency_key_reuse"})
    ),
    "an old key": Scene(clients=(ANA, BEN), orders=56, before=_an_old_key),
    "an erased job": Scene(clients=(ANA, BEN), orders=10, before=_an_erased_job, makes=0, answers=frozenset({"gone"})),
}


def _taken_without_conflict(patch: pytest.MonkeyPatch) -> None:
    """A key that was not there when it was looked up is taken, whoever has taken it since."""
    is_free = "NOT EXISTS (SELECT FROM idempotency_keys WHERE (tenant_id, key) = (asked.tenant_id, asked.key))"
    taking = idempotency._TAKE.text.replace(
        "ON CONFLICT DO NOTHING",
        f"WHERE {is_free} ON CONFLICT (tenant_id, key) DO UPDATE SET request_sha256 = excluded.request_sha256",
    )
    patch.setattr(idempotency, "_TAKE", text(taking).bindparams(*idempotency._TAKE._bindparams.values()))


def _a_crowd_is_not_compared(patch: pytest.MonkeyPatch) -> None:
    real = crowd._used

    async def used(session: Any, asking: Any, prepared: Any) -> list[int]:
        places = await real(session, asking, prepared)
        return [place for place in places if place == 0]

    patch.setattr(crowd, "_used", used)


def _committed_before_its_job(patch: pytest.MonkeyPatch) -> None:
    real = idempotency.take

    async def take(session: Any, keys: Any) -> Any:
        taken = await real(session, keys)
        await session.commit()
        return taken

    patch.setattr(idempotency, "take", take)


def _never_answered(patch: pytest.MonkeyPatch) -> None:
    async def complete_all(session: Any, answers: Any) -> None:
        """The answer is not kept."""

    patch.setattr(idempotency, "complete_all", complete_all)


def _a_held_key_is_passed_over(patch: pytest.MonkeyPatch) -> None:
    """Who has waited in vain for a key makes a job without it."""
    real = idempotency.take

    async def take(session: Any, keys: Any) -> Any:
        await session.execute(text("SAVEPOINT before"))
        try:
            return await real(session, keys)
        except OperationalError:
            await session.execute(text("ROLLBACK TO SAVEPOINT before"))
            return {(tenant_id, key) for tenant_id, key, _ in keys}

    patch.setattr(idempotency, "take", take)


def _bodies_are_alike(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(idempotency, "digest", lambda body: "0" * 64)


def _replayed_after_erasure(patch: pytest.MonkeyPatch) -> None:
    async def replay(session: Any, tenant_id: UUID, stored: Answer) -> Accepted:
        """Whether the job is still there is not asked."""
        job_id = ids.parse("job", json.loads(stored.body)["id"])
        return Accepted(job_id=job_id, status=HTTPStatus(stored.status), body=stored.body, is_replay=True)

    patch.setattr(submission, "_replay", replay)


def _forgotten_with_its_job(patch: pytest.MonkeyPatch) -> None:
    async def forget(session: Any, tenant_id: Any, job_id: str) -> None:
        await session.execute(text("DELETE FROM idempotency_keys WHERE body LIKE :known"), {"known": f"%{job_id}%"})

    patch.setattr(erasure, "_forget_answers", forget)


def _deleted_at_any_age(patch: pytest.MonkeyPatch) -> None:
    real = idempotency.begin

    async def begin(*args: Any, **how: Any) -> Any:
        return await real(*args, **(how | {"lifetime": timedelta(0)}))

    patch.setattr(idempotency, "begin", begin)


BUGS: Final[dict[str, tuple[Plant, str, str]]] = {
    "looked up, then written": (_taken_without_conflict, "two at once", "a key makes one job"),
    "the requests of a crowd are not compared": (_a_crowd_is_not_compared, "a crowd of one key", "a key makes one job"),
    "the key is committed before its job": (_committed_before_its_job, "two at once", "every client is answered"),
    "the answer is not kept": (_never_answered, "two at once", "every client is answered"),
    "a held key is passed over": (_a_held_key_is_passed_over, "two at once", "a key makes one job"),
    "bodies are not compared": (_bodies_are_alike, "two bodies", "an answer is of its request"),
    "an erased job is replayed": (_replayed_after_erasure, "an erased job", "an answer is of its request"),
    "a key is forgotten with its job": (_forgotten_with_its_job, "an erased job", "a key makes one job"),
    "a key ends at any age": (_deleted_at_any_age, "two at once", "a key makes one job"),
}


async def _no_facts(session: Any, jobs: Sequence[Job], settings: Any) -> dict[UUID, JobFacts]:
    """What a job's view says of the queue has nothing to do with keys, and costs more than all else here."""
    return {job.id: JobFacts() for job in jobs}


def go_through(engine: Engine, scene: Scene, plant: Plant = lambda patch: None) -> Explored:
    """Every order of the scene, with the seeded bug.

    Raises:
        Violation: an order breaks a promise.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idempotency, "_PATIENCE", PATIENCE)
        patch.setitem(idempotency.begin.__kwdefaults__, "wait", PATIENCE)
        for module in (crowd, submission):
            patch.setattr(module, "facts", _no_facts)
        plant(patch)
        orders = Orders(engine, scene)
        try:
            return orders.run()
        finally:
            orders.close()
