"""Workers, as they last said."""

from fastapi import APIRouter, Depends
from sqlalchemy import func, literal, select
from sqlmodel import col

from api import views
from api.paging import refuse_unknown_parameters
from api.routes.dependencies import JobReader, TheParts
from shared.jobs.rows import Job, Worker
from shared.jobs.workers import GONE_AFTER
from shared.wire import Page, WorkerView

router = APIRouter(prefix="/v1/workers", tags=["workers"], dependencies=[Depends(refuse_unknown_parameters)])


@router.get("", operation_id="listWorkers")
async def list_workers(caller: JobReader, parts: TheParts) -> Page[WorkerView]:
    """Workers that were heard of within the last day. Which job one runs is told to the job's owner only."""
    is_gone = col(Worker.seen_at) < func.clock_timestamp() - literal(GONE_AFTER)
    async with parts.transaction() as session:
        rows = (await session.execute(select(Worker, is_gone).order_by(col(Worker.name)))).all()
        theirs = [worker.job_id for worker, _ in rows if worker.job_id is not None]
        own = select(col(Job.id)).where(col(Job.id).in_(theirs), col(Job.tenant_id) == caller.tenant_id)
        own_jobs = list((await session.execute(own)).scalars())
    return Page(data=[views.worker(worker, is_gone=gone, own_jobs=own_jobs) for worker, gone in rows])
