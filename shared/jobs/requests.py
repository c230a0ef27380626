"""What a client may do: submit a job, cancel, pause, resume, retry, reproduce.

Async, in the caller's transaction, never commits. Checks that need SQL (does the dataset exist, does the model's
family know the task) happen before (``drafts.py``), so that a job that was accepted can run.
"""

from dataclasses import replace
from datetime import timedelta
from functools import cache
from uuid import UUID

from pydantic import TypeAdapter
from sqlalchemy import ColumnElement, func, literal, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from shared import ids
from shared.errors import Gone, IllegalMove, NotFound, NotReproducible
from shared.jobs import admission, drafts, needs, products
from shared.jobs.admission import NewJob
from shared.jobs.drafts import Draft
from shared.jobs.moves import move, move_by_case
from shared.jobs.rows import Dataset, DatasetState, Job
from shared.jobs.state import QUEUES, JobState, JobType, Priority
from shared.reproduction import Original
from shared.settings import JobSettings
from shared.specs.ingest import IngestSpec
from shared.wire import AnyJobRequest, JobRequest


@cache
def _requests() -> TypeAdapter[AnyJobRequest]:
    return TypeAdapter(JobRequest)


async def submit(
    session: AsyncSession, tenant_id: UUID, request: AnyJobRequest, *, settings: JobSettings, job_id: UUID | None = None
) -> Job:
    """Record the job with its first event and its bell; ``job_id`` is its own, if one was made before.

    Raises:
        InvalidSpec: a reference in the spec cannot be used; the error points at the field.
        QueueFull: the tenant has as many jobs waiting as it may.
    """
    new = await prepare(session, tenant_id, request, settings=settings, job_id=job_id)
    return await _add(session, new, settings)


async def prepare(
    session: AsyncSession, tenant_id: UUID, request: AnyJobRequest, *, settings: JobSettings, job_id: UUID | None = None
) -> NewJob:
    """The job that ``request`` asks for, for ``admission.admit`` to record.

    Raises:
        InvalidSpec: a reference in the spec cannot be used; the error points at the field.
    """
    draft = await drafts.draft(session, tenant_id, request)
    job = _job(tenant_id, draft, max_attempts=request.max_attempts or settings.max_attempts)
    job.id = job_id or job.id
    job.priority = Priority(request.priority).rank
    job.labels = dict(request.labels)
    job.timeout_seconds = request.timeout_seconds
    if request.start_deadline_seconds is not None:
        deadline = literal(timedelta(seconds=request.start_deadline_seconds))
        job.start_deadline = await session.scalar(select(func.clock_timestamp() + deadline))
    return job


async def submit_ingest(session: AsyncSession, dataset: Dataset, spec: IngestSpec, *, settings: JobSettings) -> Job:
    """Queue the ingestion of an uploaded dataset.

    Raises:
        QueueFull: the tenant has as many jobs waiting as it may.
    """
    draft = Draft(
        type=JobType.INGEST,
        spec=spec.model_dump(mode="json"),
        summary=f"ingest {dataset.name}",
        inputs={"dataset_id": str(dataset.id)},
    )
    job = await _add(session, _job(dataset.tenant_id, draft, max_attempts=settings.max_attempts), settings)
    dataset.state = DatasetState.INGESTING
    dataset.job_id = job.id
    return job


async def cancel(session: AsyncSession, tenant_id: UUID, job_id: UUID) -> Job:
    """Cancel: at once if no attempt holds the job, else once its device is free. Idempotent.

    Raises:
        NotFound: the tenant has no such job.
    """
    now = func.coalesce(Job.cancel_requested_at, func.clock_timestamp())
    mine = await _lock(session, tenant_id, job_id)
    asked = move(JobState.CANCELING, *mine, cancel_requested_at=now)
    if (await session.execute(asked)).one_or_none() is None:
        waits = col(Job.state).in_([JobState.QUEUED, JobState.PAUSED])
        ended = move_by_case([(JobState.CANCELED, waits)], *mine, cancel_requested_at=now)
        if (await session.execute(ended)).one_or_none() is not None:
            await session.run_sync(needs.settle, [job_id])
    return await get(session, tenant_id, job_id)


async def pause(session: AsyncSession, tenant_id: UUID, job_id: UUID) -> Job:
    """Pause: at once if no attempt holds the job, else once it has left a checkpoint. Idempotent.

    Raises:
        NotFound: the tenant has no such job.
        IllegalMove: it has ended, or is being canceled.
    """
    mine = await _lock(session, tenant_id, job_id)
    asked = move(JobState.PAUSING, *mine)
    if (await session.execute(asked)).one_or_none() is None:
        await session.execute(move_by_case([(JobState.PAUSED, col(Job.state) == JobState.QUEUED)], *mine))
    job = await get(session, tenant_id, job_id)
    if job.state not in (JobState.PAUSING, JobState.PAUSED):
        raise IllegalMove(f"the job is {job.state.value}: it cannot be paused")
    return job


async def resume(session: AsyncSession, tenant_id: UUID, job_id: UUID, *, settings: JobSettings) -> Job:
    """Queue a paused job again, or withdraw a pause that has not happened yet. Idempotent.

    Raises:
        NotFound: the tenant has no such job.
        IllegalMove: it has ended, or is being canceled.
        QueueFull: the tenant has as many jobs waiting as it may.
    """
    mine = await _lock(session, tenant_id, job_id)
    withdrawn = move_by_case([(JobState.RUNNING, col(Job.state) == JobState.PAUSING)], *mine)
    if (await session.execute(withdrawn)).one_or_none() is None:
        queued = move_by_case([(JobState.QUEUED, col(Job.state) == JobState.PAUSED)], *mine, not_before=None)
        if (await session.execute(queued)).one_or_none() is not None:
            await admission.rejoin(session, tenant_id, job_id, settings)
    job = await get(session, tenant_id, job_id)
    if job.state not in (JobState.RUNNING, JobState.QUEUED):
        raise IllegalMove(f"the job is {job.state.value}: it cannot be resumed")
    return job


async def retry(session: AsyncSession, tenant_id: UUID, job_id: UUID, *, settings: JobSettings) -> tuple[Job, bool]:
    """A new job that asks for the same; a training goes on from the last checkpoint. Idempotent: one retry of each job.

    Returns:
        The job, and whether this call made it.

    Raises:
        NotFound: the tenant has no such job.
        IllegalMove: it has not ended, or well.
        Gone: it was erased, or its retry was.
        InvalidSpec: it had waited for another job, whose model cannot be had now, either.
        QueueFull: the tenant has as many jobs waiting as it may.
    """
    if (again := await _retry_of(session, tenant_id, job_id)) is not None:
        return again, False
    await _lock(session, tenant_id, job_id)
    ended = await get(session, tenant_id, job_id)
    if ended.state not in (JobState.FAILED, JobState.CANCELED, JobState.EXPIRED):
        raise IllegalMove(f"the job is {ended.state.value}: only one that failed, expired or was canceled is retried")
    if (again := await _retry_of(session, tenant_id, job_id)) is not None:
        return again, False
    draft = _draft_of(ended) if ended.queued_at else await _draft_anew(session, ended)
    if ended.type == JobType.TRAIN:
        draft.inputs["lineage"] = [str(ended.id), *ended.inputs.get("lineage", [])]
    new = await _like(session, ended, draft)
    new.retry_of = ended.id
    job = await _add(session, new, settings)
    if job.type == JobType.INGEST:
        values = {"state": DatasetState.INGESTING, "job_id": job.id, "error": None}
        await session.execute(update(Dataset).where(col(Dataset.job_id) == ended.id).values(**values))
    return job, True


async def reproduce(session: AsyncSession, tenant_id: UUID, job_id: UUID, *, settings: JobSettings) -> Job:
    """A new job that does again, from the same inputs and from the start, what one did that succeeded.

    Its result tells whether it made the same bytes (``shared/reproduction.py``).

    Raises:
        NotFound: the tenant has no such job.
        Gone: it was erased.
        IllegalMove: it has not succeeded.
        NotReproducible: what it read is gone, or it left nothing to compare with.
        QueueFull: the tenant has as many jobs waiting as it may.
    """
    await _lock(session, tenant_id, job_id)
    done = await get(session, tenant_id, job_id)
    if done.state != JobState.SUCCEEDED:
        raise IllegalMove(f"the job is {done.state.value}: only one that succeeded is reproduced")
    # References were pinned when it was submitted. What a retry went on from is no part of what was asked.
    read = {name: value for name, value in done.inputs.items() if name not in ("lineage", "needs", "reproduces")}
    inputs = read | {"reproduces": _original(done).model_dump(mode="json")}
    summary = f"reproduce {done.summary.removeprefix('reproduce ')}"
    job = await _like(session, done, replace(_draft_of(done), summary=summary, inputs=inputs))
    try:
        await session.run_sync(products.resolve, job.id, job.type, inputs)
    except NotFound as error:
        raise NotReproducible(f"the job cannot be run again: {error.detail}") from error
    return await _add(session, job, settings)


def _original(done: Job) -> Original:
    """What the second run of a job has to match."""
    result = done.result or {}
    sha256 = products.digest_of(done.type, result)
    if sha256 is None:
        raise NotReproducible("the job's result tells no SHA-256 to compare with")
    told = {name: result.get(name) for name in ("reproducibility", "fingerprint")}
    return Original.model_validate({"job_id": ids.public("job", done.id), "sha256": sha256, **told})


def _draft_of(ended: Job) -> Draft:
    return Draft(type=ended.type, spec=ended.spec, summary=ended.summary, inputs=dict(ended.inputs))


async def _draft_anew(session: AsyncSession, ended: Job) -> Draft:
    """Of a job that ended while it waited for others: what they, or those that try them again, have made or will."""
    asked = {"type": ended.type.value, "spec": ended.spec}
    return await drafts.draft(session, ended.tenant_id, _requests().validate_python(asked))


async def _like(session: AsyncSession, ended: Job, draft: Draft) -> NewJob:
    """A job on the same terms; not recorded yet."""
    job = _job(ended.tenant_id, draft, max_attempts=ended.max_attempts)
    job.priority, job.labels, job.timeout_seconds = ended.priority, ended.labels, ended.timeout_seconds
    if ended.start_deadline is not None and ended.created_at is not None:
        patience = literal(ended.start_deadline - ended.created_at)
        job.start_deadline = await session.scalar(select(func.clock_timestamp() + patience))
    return job


async def _retry_of(session: AsyncSession, tenant_id: UUID, job_id: UUID) -> Job | None:
    await get(session, tenant_id, job_id)
    made = await session.scalar(select(col(Job.id)).where(col(Job.retry_of) == job_id))
    return None if made is None else await get(session, tenant_id, made)


async def _lock(session: AsyncSession, tenant_id: UUID, job_id: UUID) -> tuple[ColumnElement[bool], ...]:
    """Conditions that name the job, now locked.

    A request is several statements, each of which matches in its own states only: without the lock the job could
    be claimed or handed back in between and slip through all of them.
    """
    mine = (col(Job.id) == job_id, col(Job.tenant_id) == tenant_id)
    await session.execute(select(col(Job.id)).where(*mine).with_for_update())
    return mine


async def get(session: AsyncSession, tenant_id: UUID, job_id: UUID) -> Job:
    """The tenant's job as it is in SQL now.

    Raises:
        NotFound: there is none, or it is another tenant's.
        Gone: it was erased.
    """
    found = select(Job).where(col(Job.id) == job_id, col(Job.tenant_id) == tenant_id)
    job = (await session.execute(found.execution_options(populate_existing=True))).scalar_one_or_none()
    if job is None:
        raise NotFound(f"no such job: {ids.public('job', job_id)}")
    if job.erased_at is not None:
        raise Gone(f"the job was erased: {ids.public('job', job_id)}")
    return job


def _job(tenant_id: UUID, draft: Draft, *, max_attempts: int) -> NewJob:
    return NewJob(
        tenant_id=tenant_id,
        type=draft.type,
        queue=QUEUES[draft.type],
        spec=draft.spec,
        inputs=draft.inputs,
        summary=draft.summary,
        max_attempts=max_attempts,
        needs=draft.needs,
    )


async def _add(session: AsyncSession, job: NewJob, settings: JobSettings) -> Job:
    (recorded,) = await admission.admit(session, [job], settings)
    return recorded
