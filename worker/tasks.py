"""Celery's side of the worker: a bell rings, the supervisor claims. No logic here.

Celery's parent imports this, too, and only to know the names.

One task per type of job, so that Flower's list reads well. The message names the job it was rung
for; which job is claimed, SQL decides.
"""

from shared.jobs.state import JobType
from worker.app import app


def ring(job_id: str) -> None:
    """Run the best waiting job, if there is one."""
    del job_id
    from worker import lifecycle

    lifecycle.supervisor().run_next()


for _type in JobType:
    app.task(name=_type.value)(ring)
