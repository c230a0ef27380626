"""Aliases: what they stand for, and how they are moved. Async, in the caller's transaction, never commits.

Changes to the aliases of a model take turns, by a lock on the model's row: each sees what the one before it left, so
the history has no gap and a gate compares with the version that is really replaced.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from shared import ids
from shared.errors import GateFailed, InvalidSpec, NotFound, PreconditionFailed
from shared.ids import uuid7
from shared.jobs import gates, requests
from shared.jobs.alias_rows import AliasMove, ModelAlias
from shared.jobs.gates import Evaluation
from shared.jobs.rows import Dataset, Job, Model, ModelVersion
from shared.jobs.state import JobState, JobType
from shared.specs.gate import AliasRequest, Bound, Check

Condition = Callable[[UUID | None], bool]
"""Whether an alias may be changed whose latest move this is; None: there is no such alias."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """Which alias, and who asks."""

    tenant_id: UUID
    key_id: UUID
    model: str
    alias: str


@dataclass(frozen=True, kw_only=True)
class Standing:
    """An alias and the number of the version that it stands for."""

    alias: ModelAlias
    version: int


async def find(session: AsyncSession, tenant_id: UUID, model_name: str, alias: str) -> Standing:
    """Raise NotFound unless the tenant has a model with this alias."""
    model = await find_model(session, tenant_id, model_name)
    standing = await _standing(session, model.id, alias)
    if standing is None:
        raise NotFound(f"no such alias: {model_name}@{alias[:100]}")
    return standing


async def find_model(session: AsyncSession, tenant_id: UUID, name: str, *, lock: bool = False) -> Model:
    """Raise NotFound unless the tenant has a model of this name."""
    statement = select(Model).where(col(Model.tenant_id) == tenant_id, col(Model.name) == name.replace("\0", ""))
    if lock:
        statement = statement.with_for_update(key_share=True)
    model = (await session.execute(statement)).scalar_one_or_none()
    if model is None:
        raise NotFound(f"no such model: {name[:100]}")
    return model


async def versions(session: AsyncSession, model_ids: Sequence[UUID]) -> dict[UUID, dict[str, int]]:
    """Of each model, the versions that its aliases stand for."""
    statement = (
        select(col(ModelAlias.model_id), col(ModelAlias.name), col(ModelVersion.version))
        .join(ModelVersion, col(ModelVersion.id) == col(ModelAlias.version_id))
        .where(col(ModelAlias.model_id).in_(model_ids))
        .order_by(col(ModelAlias.name))
    )
    found: dict[UUID, dict[str, int]] = {model_id: {} for model_id in model_ids}
    for model_id, name, version in (await session.execute(statement)).all():
        found[model_id][name] = version
    return found


async def put(session: AsyncSession, named: Named, asked: AliasRequest, may: Condition) -> tuple[Standing, bool]:
    """Make the alias stand for a version, if that passes its gate. What is so already stays so, and is no move.

    The gate that counts is the alias's own; one that comes with the move has to be passed besides, and takes its place.
    A gate alone can be changed without passing it: it is for the next move.

    Returns:
        How the alias stands, and whether it is new.

    Raises:
        NotFound: the tenant has no such model, or no such job as ``evaluation``.
        Gone: the evaluation was erased.
        InvalidSpec: no such version, or dataset of a bound; or the evaluation is none of this version.
        PreconditionFailed: ``may`` says no.
        GateFailed: it does not pass; nothing is changed.
    """
    model = await find_model(session, named.tenant_id, named.model, lock=True)
    now = await _standing(session, model.id, named.alias)
    version = await _version(session, model, asked.version)
    # Read as bounds: of a large number SQL gives back the digits, which are not the number that was asked for.
    kept = [] if now is None else [_as_json(Bound.model_validate(bound)) for bound in now.alias.gate]
    gate = kept if asked.gate is None else [_as_json(bound) for bound in asked.gate]
    if now is not None and now.version == version.version and kept == gate:
        return now, False
    if not may(None if now is None else now.alias.move_id):
        raise PreconditionFailed(f"{named.model}@{named.alias} has changed, or is not there")
    await _know_datasets(session, named.tenant_id, asked.gate or [])
    checks: list[Check] = []
    if now is None or now.version != version.version:
        asked_for = [Bound.model_validate(one) for one in [*kept, *(one for one in gate if one not in kept)]]
        checks = await _pass(session, named, asked_for, version, asked.evaluation, now)
    move = _move(model, named, now, version.version, gate, checks)
    alias = (
        now.alias if now else ModelAlias(model_id=model.id, name=named.alias, version_id=version.id, move_id=move.id)
    )
    alias.version_id, alias.gate, alias.move_id = version.id, gate, move.id
    session.add_all([move, alias])
    await session.flush()
    await session.refresh(alias)
    return Standing(alias=alias, version=version.version), now is None


async def remove(session: AsyncSession, named: Named, may: Condition) -> None:
    """Take the name away, with its gate; its history stays.

    Raises:
        NotFound: there is none.
        PreconditionFailed: ``may`` says no.
    """
    model = await find_model(session, named.tenant_id, named.model, lock=True)
    now = await find(session, named.tenant_id, named.model, named.alias)
    if not may(now.alias.move_id):
        raise PreconditionFailed(f"{named.model}@{named.alias} has changed")
    session.add(_move(model, named, now, None, [], []))
    await session.delete(now.alias)
    await session.flush()


def _move(
    model: Model, named: Named, now: Standing | None, to: int | None, gate: list[dict[str, Any]], checks: list[Check]
) -> AliasMove:
    return AliasMove(
        id=uuid7(),
        model_id=model.id,
        alias=named.alias,
        from_version=None if now is None else now.version,
        to_version=to,
        gate=gate,
        checks=[one.model_dump(mode="json", exclude_none=True) for one in checks],
        key_id=named.key_id,
    )


def _as_json(bound: Bound) -> dict[str, Any]:
    return bound.model_dump(mode="json", exclude_none=True)


async def _standing(session: AsyncSession, model_id: UUID, alias: str) -> Standing | None:
    statement = (
        select(ModelAlias, col(ModelVersion.version))
        .join(ModelVersion, col(ModelVersion.id) == col(ModelAlias.version_id))
        .where(col(ModelAlias.model_id) == model_id, col(ModelAlias.name) == alias.replace("\0", ""))
    )
    row = (await session.execute(statement)).one_or_none()
    return None if row is None else Standing(alias=row[0], version=row[1])


async def _version(session: AsyncSession, model: Model, number: int) -> ModelVersion:
    wanted = (col(ModelVersion.model_id) == model.id, col(ModelVersion.version) == number)
    version = (await session.execute(select(ModelVersion).where(*wanted))).scalar_one_or_none()
    if version is None:
        raise InvalidSpec(f"no such model: {model.name}@{number}", pointer="/version")
    return version


async def _know_datasets(session: AsyncSession, tenant_id: UUID, gate: Sequence[Bound]) -> None:
    """Raise InvalidSpec for a bound on a dataset that the tenant does not have: no evaluation could ever meet it."""
    named = {ids.parse("ds", bound.dataset) for bound in gate if bound.dataset is not None}
    wanted = (col(Dataset.tenant_id) == tenant_id, col(Dataset.id).in_(named))
    known = {ids.public("ds", one) for one in await session.scalars(select(col(Dataset.id)).where(*wanted))}
    for place, bound in enumerate(gate):
        if bound.dataset is not None and bound.dataset not in known:
            raise InvalidSpec(f"no such dataset: {bound.dataset}", pointer=f"/gate/{place}/dataset")


async def _pass(
    session: AsyncSession,
    named: Named,
    bounds: Sequence[Bound],
    version: ModelVersion,
    evaluation: str | None,
    now: Standing | None,
) -> list[Check]:
    """How the version stands to every bound; raises GateFailed unless all hold."""
    if evaluation is None:
        found = await _evaluations(session, named.tenant_id, version.id)
    else:
        found = [await _evaluation(session, named.tenant_id, version, evaluation)]
    current = None if now is None else await _evaluations(session, named.tenant_id, now.alias.version_id)
    checks = [gates.check(bound, found, current) for bound in bounds]
    if failed := [one for one in checks if not one.passed]:
        ref = f"{named.model}@{version.version}"
        detail = f"{ref} does not pass the gate of {named.alias}: {len(failed)} of {len(checks)} bounds do not hold"
        raise GateFailed(detail, [one.model_dump(mode="json", exclude_none=True) for one in checks])
    return checks


async def _evaluations(session: AsyncSession, tenant_id: UUID, version_id: UUID) -> list[Evaluation]:
    """Of the version, newest first."""
    statement = (
        select(Job)
        .where(col(Job.type) == JobType.EVALUATE, col(Job.inputs)["version_id"].astext == str(version_id))
        .where(col(Job.tenant_id) == tenant_id, col(Job.state) == JobState.SUCCEEDED, col(Job.erased_at).is_(None))
        .order_by(col(Job.completed_at).desc(), col(Job.id).desc())
    )
    jobs = (await session.scalars(statement)).all()
    return [Evaluation.of(ids.public("job", job.id), job.spec, job.result) for job in jobs]


async def _evaluation(session: AsyncSession, tenant_id: UUID, version: ModelVersion, job_id: str) -> Evaluation:
    job = await requests.get(session, tenant_id, ids.parse("job", job_id))
    if job.type != JobType.EVALUATE or job.inputs.get("version_id") != str(version.id):
        raise InvalidSpec("the job is no evaluation of this version", pointer="/evaluation")
    if job.state != JobState.SUCCEEDED:
        raise InvalidSpec(f"the evaluation is {job.state.value}: only one that succeeded counts", pointer="/evaluation")
    return Evaluation.of(job_id, job.spec, job.result)
