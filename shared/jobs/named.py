"""The models that specs name: versions that are there, and those that jobs have been asked to make.

Of both the same is known: what a job will make follows from its spec and its data. Async, in the caller's transaction.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Select, bindparam, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from shared import ids
from shared.errors import DependencyEnded, InvalidSpec
from shared.jobs.alias_rows import ModelAlias
from shared.jobs.rows import Dataset, Job, JsonObject, Model, ModelVersion
from shared.jobs.state import ENDED_BADLY, JobState, JobType
from shared.specs import FAMILIES
from shared.specs.spec import JOB_ID
from shared.specs.training import Trained

# Put together once: that takes longer than it takes SQL to answer them.
_VERSION: Final = select(Model, ModelVersion).join(ModelVersion, col(ModelVersion.model_id) == Model.id)
_OF_NAME: Final = _VERSION.where(col(Model.tenant_id) == bindparam("tenant_id"), col(Model.name) == bindparam("name"))
_NEWEST: Final = _OF_NAME.where(col(ModelVersion.version) == col(Model.latest))
_NUMBERED: Final = _OF_NAME.where(col(ModelVersion.version) == bindparam("version"))
_ALIAS: Final = select(col(ModelAlias.version_id)).where(
    col(ModelAlias.model_id) == Model.id, col(ModelAlias.name) == bindparam("alias")
)
_ALIASED: Final = _OF_NAME.where(col(ModelVersion.id) == _ALIAS.scalar_subquery())
_MADE_BY: Final = _VERSION.where(col(ModelVersion.job_id) == bindparam("job_id"))
_BY_ID: Final = _VERSION.where(col(ModelVersion.id) == bindparam("version_id"))

MOST_IN_A_CHAIN: Final = 32
"""Jobs that may wait for one another in a row: what the last will make is told by all of them."""
_MAKE_MODELS: Final = frozenset({JobType.TRAIN, JobType.REAVERAGE, JobType.IMPORT})
_TOLD: Final = ("shape", "num_classes")
"""What is told of a model beforehand, and has to be so when it is there."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """A model that a spec names."""

    ref: str
    """Its name and number, or the job that will make it."""
    name: str
    family: str
    spec: Mapping[str, Any]
    """Of its training."""
    info: Mapping[str, Any]
    """What is known of the data that it has learned from, or will have."""
    job_id: UUID
    """The job that made it, or will."""
    version_id: UUID | None
    """None: it is not there yet."""
    dataset_id: UUID | str | None
    waits: int = 0
    """Jobs in a row that have to end before it is there."""
    has_averages: bool = False
    """Whether the job that will make it leaves what others of its averages are made of (``ema: power``)."""

    @cached_property
    def trained(self) -> Trained:
        return Trained(spec=FAMILIES[self.family].model_validate(self.spec), info=self.info)

    def as_input(self, name: str = "version_id") -> dict[str, str]:
        """Its id, where it has one already."""
        return {} if self.version_id is None else {name: str(self.version_id)}

    def as_need(self, field: str) -> JsonObject:
        """That a job, whose spec names this model in ``field``, waits for it (``needs.py``)."""
        told = {name: self.info[name] for name in _TOLD if name in self.info}
        return {"field": field, "needs_job_id": str(self.job_id), "told": told}


_KNOWN: Final[dict[tuple[UUID, str], Named]] = {}
"""Versions that were asked for by their number, which are never changed or deleted."""
_MOST_KNOWN: Final = 1000


async def find(session: AsyncSession, tenant_id: UUID, ref: str, *, pointer: str | None = None) -> Named:
    """The model that ``name`` (its newest version), ``name@version``, ``name@alias`` or a job's id stands for.

    It stands for the same as long as the session lives: whoever names it there again, asks SQL once. By its number it
    does for ever. A job may end as soon as it was looked at: no lock keeps its worker from that (``needs.py``).

    Raises:
        InvalidSpec: there is none, or the job makes none.
        DependencyEnded: the job ended without making it.
    """
    if JOB_ID.fullmatch(ref):
        return await _of_job(session, tenant_id, ref, pointer)
    if (numbered := _KNOWN.get((tenant_id, ref))) is not None:  # other threads may clear them at any moment
        return numbered
    known: dict[tuple[UUID, str], Named] = session.info.setdefault("named", {})
    if (tenant_id, ref) not in known:
        known[tenant_id, ref] = found = await _of_name(session, tenant_id, ref, pointer)
        if ref == found.ref:
            if len(_KNOWN) >= _MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[tenant_id, ref] = found
    return known[tenant_id, ref]


async def _of_name(session: AsyncSession, tenant_id: UUID, ref: str, pointer: str | None) -> Named:
    name, _, which = ref.partition("@")
    asked: dict[str, Any] = {"tenant_id": tenant_id, "name": name}
    if not which:
        found = await _version(session, _NEWEST, asked)
    elif which.isdecimal():
        found = await _version(session, _NUMBERED, asked | {"version": int(which)})
    else:
        found = await _version(session, _ALIASED, asked | {"alias": which})
    if found is None:
        raise InvalidSpec(f"no such model: {ref}", pointer=pointer)
    return found


async def _version(
    session: AsyncSession, statement: Select[Model, ModelVersion], asked: Mapping[str, Any]
) -> Named | None:
    row = (await session.execute(statement, asked)).one_or_none()
    if row is None:
        return None
    model, version = row
    return Named(
        ref=f"{model.name}@{version.version}",
        name=model.name,
        family=version.family,
        spec=version.spec,
        info=version.info,
        job_id=version.job_id,
        version_id=version.id,
        dataset_id=version.dataset_id,
    )


async def _of_job(session: AsyncSession, tenant_id: UUID, ref: str, pointer: str | None) -> Named:
    """The model that the job has made or will make, or the last that was made to try it again."""
    job = await _last_try(session, tenant_id, ref, pointer)
    if job.state in ENDED_BADLY or job.state == JobState.CANCELING:
        ended = "is being canceled" if job.state == JobState.CANCELING else f"ended as {job.state.value}"
        raise DependencyEnded(f"{_public(job)} {ended}, and makes no model", pointer=pointer)
    if job.state == JobState.SUCCEEDED:
        made = await _version(session, _MADE_BY, {"job_id": job.id})
    else:
        made = await _promised(session, job, pointer)
    if made is None:
        raise InvalidSpec(f"{_public(job)} makes no model: it is of type {job.type.value}", pointer=pointer)
    return made


async def _last_try(session: AsyncSession, tenant_id: UUID, ref: str, pointer: str | None) -> Job:
    fresh = select(Job).where(col(Job.tenant_id) == tenant_id).execution_options(populate_existing=True)
    job = await session.scalar(fresh.where(col(Job.id) == ids.parse("job", ref)))
    if job is None:
        raise InvalidSpec(f"no such job: {ref}", pointer=pointer)
    while job.state in ENDED_BADLY:
        again = await session.scalar(fresh.where(col(Job.retry_of) == job.id))
        if again is None:
            break
        job = again
    return job


async def _promised(session: AsyncSession, job: Job, pointer: str | None) -> Named | None:
    """The model that a job which has not ended will make; looked at once, however many ways lead to it."""
    known: dict[UUID, Named] = session.info.setdefault("promised", {})
    if job.id in known:
        return known[job.id]
    if job.erased_at is not None:  # who waited for it has not been told yet
        raise DependencyEnded(f"{_public(job)} was erased, and makes no model", pointer=pointer)
    if job.type not in _MAKE_MODELS or "reproduces" in job.inputs:
        return None
    origins = {field: await _origin(session, job, field, pointer) for field in _origin_fields(job)}
    waits = 1 + max((origin.waits for origin in origins.values()), default=0)
    if waits > MOST_IN_A_CHAIN:
        raise InvalidSpec(f"more than {MOST_IN_A_CHAIN} jobs would wait for one another", pointer=pointer)
    known[job.id] = Named(
        ref=_public(job),
        job_id=job.id,
        version_id=None,
        dataset_id=job.inputs.get("dataset_id"),
        waits=waits,
        **await _to_be(session, job, origins),
    )
    return known[job.id]


def _origin_fields(job: Job) -> list[str]:
    """The fields by which a job names the models that it makes its own of."""
    match job.type:
        case JobType.TRAIN:
            return sorted(job.inputs["models"].keys() | job.inputs.get("needs", {}).keys())
        case JobType.REAVERAGE:
            return ["model"]
        case _:
            return []


async def _to_be(session: AsyncSession, job: Job, origins: Mapping[str, Named]) -> dict[str, Any]:
    """What follows from the spec of a job and its data."""
    if job.type == JobType.IMPORT:
        return {"name": job.spec["model"], **job.inputs["model"]}
    if job.type == JobType.REAVERAGE:
        origin, name = origins["model"], job.spec["name"]
        return {"name": name, "family": origin.family, "spec": {**origin.spec, "model": name}, "info": origin.info}
    return {
        "name": job.spec["model"],
        "family": job.spec["family"],
        "spec": {**job.spec, **{field: origin.ref for field, origin in origins.items()}},
        "info": await _info(session, UUID(job.inputs["dataset_id"]), origins),
        "has_averages": job.spec["ema"] == "power",
    }


async def _info(session: AsyncSession, dataset_id: UUID, origins: Mapping[str, Named]) -> dict[str, Any]:
    """What a training will tell of its data."""
    dataset = (await session.execute(select(Dataset).where(col(Dataset.id) == dataset_id))).scalar_one()
    told: dict[str, Any] = {name: dataset.info[name] for name in _TOLD if name in dataset.info}
    models = {field: {"family": one.family, "spec": one.spec, "info": one.info} for field, one in origins.items()}
    return told | ({"models": models} if models else {})


async def _origin(session: AsyncSession, job: Job, field: str, pointer: str | None) -> Named:
    """The model that a job makes its own of, by the field that names it."""
    own = job.inputs.get("models", {}).get(field) if job.type == JobType.TRAIN else job.inputs.get("version_id")
    if own is not None:
        origin = await _version(session, _BY_ID, {"version_id": UUID(own)})
    else:
        needed_id = ids.parse("job", job.inputs["needs"][field])
        needed = (await session.execute(select(Job).where(col(Job.id) == needed_id))).scalar_one()
        made = await _version(session, _MADE_BY, {"job_id": needed.id})
        origin = made or await _promised(session, needed, pointer)
    if origin is None:
        raise InvalidSpec(f"nothing makes the model that {_public(job)} needs", pointer=pointer)
    return origin


def _public(job: Job) -> str:
    return ids.public("job", job.id)
