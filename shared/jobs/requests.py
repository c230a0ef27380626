"""What a client may do: submit a job, cancel it. Async, in the caller's transaction, never commits.

Checks that need SQL (does the dataset exist, does the model's family know the task) happen here, so
that a job that was accepted can run.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import func, literal, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from shared import ids
from shared.errors import InvalidSpec, NotFound
from shared.jobs.moves import move, move_by_case
from shared.jobs.rows import Bell, Dataset, DatasetState, Event, Job, Model, ModelVersion
from shared.jobs.state import QUEUES, JobState, JobType, Priority
from shared.specs import FAMILIES, TrainSpec
from shared.specs.ingest import IngestSpec
from shared.specs.tasks import Generate, Interpolate, Reconstruct
from shared.wire import GenerateRequest, TrainRequest


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A request whose references have been looked up."""

    type: JobType
    spec: dict[str, Any]
    summary: str
    inputs: dict[str, str]


async def submit(
    session: AsyncSession, tenant_id: UUID, request: TrainRequest | GenerateRequest, *, max_attempts: int
) -> Job:
    """Record the job with its first event and its bell.

    Raises:
        InvalidSpec: a reference in the spec cannot be used; the error points at the field.
    """
    draft = await (
        _train(session, tenant_id, request.spec)
        if request.type == "train"
        else _generate(session, tenant_id, request.spec)
    )
    job = _job(tenant_id, draft, max_attempts=request.max_attempts or max_attempts)
    job.priority = Priority(request.priority).rank
    job.labels = dict(request.labels)
    job.timeout_seconds = request.timeout_seconds
    if request.start_deadline_seconds is not None:
        deadline = literal(timedelta(seconds=request.start_deadline_seconds))
        job.start_deadline = await session.scalar(select(func.clock_timestamp() + deadline))
    return await _add(session, job)


async def submit_ingest(session: AsyncSession, dataset: Dataset, spec: IngestSpec, *, max_attempts: int) -> Job:
    """Queue the ingestion of an uploaded dataset."""
    draft = _Draft(
        type=JobType.INGEST,
        spec=spec.model_dump(mode="json"),
        summary=f"ingest {dataset.name}",
        inputs={"dataset_id": str(dataset.id)},
    )
    job = await _add(session, _job(dataset.tenant_id, draft, max_attempts=max_attempts))
    dataset.state = DatasetState.INGESTING
    dataset.job_id = job.id
    return job


async def cancel(session: AsyncSession, tenant_id: UUID, job_id: UUID) -> Job:
    """Cancel: at once if no attempt holds the job, else once its device is free. Idempotent.

    Raises:
        NotFound: the tenant has no such job.
    """
    held = col(Job.state).in_([JobState.RUNNING, JobState.PAUSING])
    mine = (col(Job.id) == job_id, col(Job.tenant_id) == tenant_id)
    now = func.coalesce(Job.cancel_requested_at, func.clock_timestamp())
    # Two statements, each of which matches in its own states only; locked, so that the job cannot be claimed
    # or handed back in between and slip through both.
    await session.execute(select(col(Job.id)).where(*mine).with_for_update())
    asked = move(JobState.CANCELING, *mine, held, cancel_requested_at=now)
    if (await session.execute(asked)).one_or_none() is None:
        at_once = move_by_case(
            [(JobState.CANCELED, col(Job.state).in_([JobState.QUEUED, JobState.PAUSED]))],
            *mine,
            cancel_requested_at=now,
        )
        await session.execute(at_once)
    return await get(session, tenant_id, job_id)


async def get(session: AsyncSession, tenant_id: UUID, job_id: UUID) -> Job:
    """The tenant's job as it is in SQL now.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    found = select(Job).where(col(Job.id) == job_id, col(Job.tenant_id) == tenant_id)
    job = (await session.execute(found.execution_options(populate_existing=True))).scalar_one_or_none()
    if job is None:
        raise NotFound(f"no such job: {ids.public('job', job_id)}")
    return job


def _job(tenant_id: UUID, draft: _Draft, *, max_attempts: int) -> Job:
    return Job(
        tenant_id=tenant_id,
        type=draft.type,
        queue=QUEUES[draft.type],
        spec=draft.spec,
        inputs=draft.inputs,
        summary=draft.summary,
        state=JobState.QUEUED,
        state_version=1,
        event_seq=1,
        max_attempts=max_attempts,
    )


async def _add(session: AsyncSession, job: Job) -> Job:
    session.add(job)
    await session.flush()
    session.add(
        Event(job_id=job.id, seq=1, type="job.state", data={"state": "queued", "state_version": 1, "attempt": 0})
    )
    session.add(Bell(job_id=job.id))
    await session.flush()
    await session.refresh(job)
    return job


async def _train(session: AsyncSession, tenant_id: UUID, spec: TrainSpec) -> _Draft:
    dataset = await _dataset(session, tenant_id, spec.dataset, spec.modality)
    family = str(getattr(spec, "family", ""))
    return _Draft(
        type=JobType.TRAIN,
        spec=spec.model_dump(mode="json"),
        summary=f"train {family} {spec.model}",
        inputs={"dataset_id": str(dataset.id)},
    )


async def _generate(session: AsyncSession, tenant_id: UUID, spec: Generate | Reconstruct | Interpolate) -> _Draft:
    model, version = await find_version(session, tenant_id, spec.model, pointer="/spec/model")
    family = FAMILIES[version.family]
    if spec.task not in family.tasks:
        known = ", ".join(sorted(family.tasks))
        raise InvalidSpec(f"a {version.family} model cannot {spec.task}; it can {known}", pointer="/spec/task")
    ref = f"{model.name}@{version.version}"
    inputs = {"version_id": str(version.id)}
    if isinstance(spec, Reconstruct):
        dataset = await _dataset(session, tenant_id, spec.dataset, family.modality)
        if dataset.info.get("shape") != version.info.get("shape"):
            raise InvalidSpec(
                f"the dataset's samples are {dataset.info.get('shape')}, the model's {version.info.get('shape')}",
                pointer="/spec/dataset",
            )
        inputs["dataset_id"] = str(dataset.id)
    # The spec names the version that was the newest at submission, so that it means the same for ever.
    return _Draft(
        type=JobType.GENERATE,
        spec=spec.model_dump(mode="json") | {"model": ref},
        summary=f"{spec.task} {ref}",
        inputs=inputs,
    )


async def _dataset(session: AsyncSession, tenant_id: UUID, dataset_id: str, modality: str) -> Dataset:
    pointer = "/spec/dataset"
    found = select(Dataset).where(col(Dataset.id) == ids.parse("ds", dataset_id), col(Dataset.tenant_id) == tenant_id)
    dataset = (await session.execute(found)).scalar_one_or_none()
    if dataset is None:
        raise InvalidSpec(f"no such dataset: {dataset_id}", pointer=pointer)
    if dataset.state != DatasetState.READY:
        raise InvalidSpec(f"the dataset is not ready: it is {dataset.state.value}", pointer=pointer)
    if dataset.modality != modality:
        raise InvalidSpec(f"the dataset holds {dataset.modality}, and {modality} is needed", pointer=pointer)
    return dataset


async def find_version(
    session: AsyncSession, tenant_id: UUID, ref: str, *, pointer: str | None = None
) -> tuple[Model, ModelVersion]:
    """The model version that ``name`` (its newest) or ``name@version`` stands for.

    Raises:
        InvalidSpec: there is none.
    """
    name, _, number = ref.partition("@")
    wanted = col(ModelVersion.version) == (int(number) if number else col(Model.latest))
    found = (
        select(Model, ModelVersion)
        .join(ModelVersion, col(ModelVersion.model_id) == Model.id)
        .where(col(Model.tenant_id) == tenant_id, col(Model.name) == name, wanted)
    )
    row = (await session.execute(found)).one_or_none()
    if row is None:
        raise InvalidSpec(f"no such model: {ref}", pointer=pointer)
    return row[0], row[1]
