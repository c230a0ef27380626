"""Which workers there are, as they say themselves every few seconds."""

from datetime import timedelta
from uuid import UUID

from sqlalchemy import func, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.jobs.rows import Worker

GONE_AFTER = timedelta(seconds=15)
"""A worker that was not seen for longer counts as gone."""


def sign_in(
    session: Session,
    *,
    name: str,
    host: str,
    pid: int,
    queues: list[str],
    device: str | None,
    state: str,
    job_id: UUID | None,
) -> None:
    """Say that the worker lives, and what it does."""
    says = {"host": host, "pid": pid, "queues": queues, "device": device, "state": state, "job_id": job_id}
    row = insert(Worker).values(name=name, **says)
    session.execute(row.on_conflict_do_update(index_elements=["name"], set_=says | {"seen_at": func.clock_timestamp()}))


def count_models(session: Session, name: str, *, hits: int, misses: int) -> None:
    """Say how many jobs of the worker's process found their model loaded, and how many did not."""
    session.execute(update(Worker).where(col(Worker.name) == name).values(model_hits=hits, model_misses=misses))


def started(session: Session, name: str) -> None:
    """Say that the worker's process is a new one, whatever its name and number were before."""
    session.execute(update(Worker).where(col(Worker.name) == name).values(started_at=func.clock_timestamp()))
