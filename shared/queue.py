"""Celery's configuration, and the relay that publishes bells after their transaction committed.

A message carries a job id and is acknowledged early; losing or doubling it is harmless.
Why each setting: docs/reliability.md.
"""

# Celery ships no types.
# pyright: reportMissingTypeStubs=false

import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, cast

from celery import Celery
from kombu.exceptions import KombuError
from redis import RedisError
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.ids import public
from shared.jobs.rows import Bell, Job
from shared.jobs.state import JobState
from shared.settings import BrokerSettings

logger = logging.getLogger(__name__)

SETTINGS: Final[Mapping[str, Any]] = {
    # SQL, not the broker, remembers the job: a message is gone as soon as it is received.
    "task_acks_late": False,
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    "task_ignore_result": True,
    "task_reject_on_worker_lost": False,
    "task_retry_on_worker_lost": False,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    # Nothing from outside is executed: JSON only.
    "task_serializer": "json",
    "result_serializer": "json",
    "accept_content": ["json"],
    # The supervisor is a plain child process; the device belongs to the runner it starts.
    "worker_pool": "prefork",
    "worker_pool_start_method": "spawn",
    "worker_concurrency": 1,
    "worker_soft_shutdown_timeout": 20.0,
    # Celery kills a child that was not up in 4 s, and so does it again for ever where starting takes longer.
    "worker_proc_alive_timeout": 120.0,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    # Flower reads these events and uses remote control.
    "worker_send_task_events": True,
    "task_send_sent_event": False,
    "worker_enable_remote_control": True,
    "worker_hijack_root_logger": False,
    "task_default_queue": "train",
    "task_create_missing_queues": True,
    "timezone": "UTC",
}


def make_celery(settings: BrokerSettings) -> Celery:
    """The Celery app that API and workers share."""
    app = Celery("noisemill", broker=settings.url.get_secret_value(), set_as_current=False)
    conf = cast(Any, app).conf
    conf.update(SETTINGS)
    conf.broker_transport_options = {
        "visibility_timeout": 600,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        # Without time-outs a silently dropped connection leaves a worker deaf for ever.
        "socket_timeout": 10,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 5,
        "global_keyprefix": settings.prefix,
    }
    return app


_UNSENT: Final = (
    select(
        Bell.metadata.tables["outbox"].c["id"].label("bell_id"),
        *(Job.metadata.tables["jobs"].c[name] for name in ("id", "type", "queue", "summary", "state")),
    )
    .join(Job, col(Bell.job_id) == Job.id)
    .where(col(Bell.sent_at).is_(None))
    .order_by(col(Bell.id))
    .with_for_update(skip_locked=True, of=Bell)
)
"""Bells that no relay holds, each with what is told of its job."""


class Relay:
    """Publishes the unsent bells of the outbox. Several at once are safe."""

    def __init__(self, engine: Engine, app: Celery, *, batch: int = 100) -> None:
        self._engine = engine
        self._app: Any = app
        self._batch = batch

    def run_once(self) -> int:
        """Publish one batch; returns how many bells left the outbox.

        A crash between publishing and committing rings twice, which is harmless.

        Raises:
            RedisError, KombuError, OSError: the broker is away; the outbox is as it was.
        """
        with Session(self._engine) as session, session.begin():
            rows: Sequence[Any] = session.execute(_UNSENT.limit(self._batch)).all()
            self._publish_all([row for row in rows if row.state == JobState.QUEUED])
            sent = [row.bell_id for row in rows]
            session.execute(update(Bell).where(col(Bell.id).in_(sent)).values(sent_at=func.clock_timestamp()))
            return len(sent)

    def _publish_all(self, jobs: Sequence[Any]) -> None:
        """One pipeline for all of them: the broker is asked once."""
        if not jobs:
            return
        with self._app.producer_pool.acquire(block=True) as producer, producer.batch():
            for job in jobs:
                self._publish(job, producer)

    def _publish(self, job: Any, producer: Any) -> None:
        job_id = public("job", job.id)
        self._app.send_task(
            job.type.value,
            producer=producer,
            args=[job_id],
            queue=job.queue,
            argsrepr=f"({job_id}, {job.summary})",
            kwargsrepr="{}",
            retry=False,
            ignore_result=True,
        )


BROKER_AWAY: Final = (RedisError, KombuError, OSError)
"""What ``Relay.run_once`` raises while the broker is away."""

RELAY_PAUSE: Final = timedelta(seconds=1)
"""Between two tries of a relay, when nothing wakes it."""
