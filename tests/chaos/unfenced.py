"""The control: Noisemill's own workers with the fence taken out, as queues are that only ask whether a job runs.

``celery -A tests.chaos.unfenced worker``. A worker that was given up and comes back may then write what it likes while
somebody else holds the job, and nothing kills its work. A chaos run over this must find violations.
"""

from typing import Final
from uuid import UUID

from sqlalchemy import ColumnElement, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import col

from shared.jobs import attempts
from shared.jobs.rows import Job
from shared.jobs.state import HELD
from worker import watch
from worker.app import app

__all__ = ["app"]

_FENCE: Final = "AND fence = :fence"
_ORDER: Final = "AND event_seq = coalesce(CAST(:after AS bigint), event_seq)"


def _running(job_id: UUID, fence: int) -> tuple[ColumnElement[bool], ...]:
    """In place of ``attempts._current``: somebody holds the job."""
    return col(Job.id) == job_id, col(Job.state).in_(HELD)


def _unguarded(statement: str) -> str:
    """``attempts._REPORT`` without what guards it."""
    if _FENCE not in statement or _ORDER not in statement:
        raise RuntimeError("the statement is guarded in another way; this control would prove nothing")
    return statement.replace(_FENCE, "").replace(_ORDER, "")


attempts._current = _running
attempts._REPORT = text(_unguarded(attempts._REPORT.text)).bindparams(
    bindparam("reports", type_=JSONB), bindparam("figures", type_=JSONB(none_as_null=True))
)
watch._ASK = watch._SELF_FENCE = 1e6  # of a lease: nobody's work is ever stopped or killed for silence
app.conf.imports = (*app.conf.imports, "tests.chaos.unfenced")  # the spawned child takes the fence out, too
