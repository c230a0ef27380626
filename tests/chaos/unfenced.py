"""The control: Noisemill's own workers with the fence taken out of their SQL, and nothing else changed.

``python -m tests.chaos.unfenced``. A write of an attempt then asks whether somebody holds the job, as queues do
that only ask whether a job runs. Leases, the fuse that kills a runner for silence, and the order of reports stay.
"""

from typing import Final
from uuid import UUID

from sqlalchemy import ColumnElement, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import col

from shared.jobs import attempts
from shared.jobs.rows import Job
from shared.jobs.state import HELD
from worker.__main__ import main

_FENCE: Final = "AND fence = :fence"


def _running(job_id: UUID, fence: int) -> tuple[ColumnElement[bool], ...]:
    """In place of ``attempts._current``: somebody holds the job."""
    return col(Job.id) == job_id, col(Job.state).in_(HELD)


def _unfenced(statement: str) -> str:
    """``attempts._REPORT`` without its fence."""
    if _FENCE not in statement:
        raise RuntimeError("the statement is guarded in another way; this control would prove nothing")
    return statement.replace(_FENCE, "")


if __name__ == "__main__":
    main("tests.chaos.unfenced")
elif __name__ != "__mp_main__":  # under that name Celery's pool imports it once more
    from worker.app import app

    attempts._current = _running
    attempts._REPORT = text(_unfenced(attempts._REPORT.text)).bindparams(
        bindparam("reports", type_=JSONB), bindparam("figures", type_=JSONB(none_as_null=True))
    )
    app.conf.imports = (*app.conf.imports, "tests.chaos.unfenced")  # the spawned child takes the fence out, too
    __all__ = ["app"]
