"""The relay: publishes what committed transactions left in the outbox, as messages that Celery's workers read.

Knows the form of a message and nothing else of Celery, which whoever only rings need not load.
"""

import base64
import json
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final
from uuid import uuid4

from redis import RedisError
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from shared.ahead import after
from shared.events import connect
from shared.ids import public
from shared.jobs.rows import Job
from shared.jobs.state import JobState
from shared.settings import BrokerSettings

_SEND: Final = text("""
WITH unsent AS MATERIALIZED (
    SELECT id FROM outbox WHERE sent_at IS NULL ORDER BY id LIMIT :most FOR UPDATE SKIP LOCKED
), sent AS (
    UPDATE outbox SET sent_at = clock_timestamp() FROM unsent WHERE outbox.id = unsent.id RETURNING outbox.id, job_id
)
SELECT jobs.id, type, queue, summary, state FROM sent JOIN jobs ON jobs.id = sent.job_id ORDER BY sent.id
""").columns(*(Job.metadata.tables["jobs"].c[name] for name in ("id", "type", "queue", "summary", "state")))
"""Takes bells out of the outbox that no other relay holds; yields what is told of the job of each."""
_WHILE_IT_RINGS: Final = after(
    (text("SET LOCAL plan_cache_mode = force_generic_plan"), {}),
    (text("SET LOCAL idle_in_transaction_session_timeout = '20s'"), {}),
)
"""The broker may be slow. What the transaction keeps locked meanwhile are bells, which nobody waits for; if it were
ended, they would be rung again and again."""

_ORIGIN: Final = f"relay@{socket.gethostname()}"
_NO_CALLBACKS: Final = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
_UNUSED: Final[Mapping[str, Any]] = {
    "shadow": None,
    "eta": None,
    "expires": None,
    "group": None,
    "group_index": None,
    "retries": 0,
    "timelimit": [None, None],
    "parent_id": None,
    "replaced_task_nesting": 0,
    "stamped_headers": None,
    "stamps": {},
}


def message(job: Any) -> str:
    """A bell as Celery's workers read it: a task of its protocol 2, in the envelope of kombu's Redis transport.

    Made here, because ``Celery.send_task`` takes ten times as long, and a submission has no time for that.
    """
    job_id, task_id = public("job", job.id), str(uuid4())
    body = json.dumps([[job_id], {}, _NO_CALLBACKS])
    return json.dumps(
        {
            "body": base64.b64encode(body.encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                **_UNUSED,
                "lang": "py",
                "task": job.type.value,
                "id": task_id,
                "root_id": task_id,
                "argsrepr": f"({job_id}, {job.summary})",
                "kwargsrepr": "{}",
                "origin": _ORIGIN,
                "ignore_result": True,
            },
            "properties": {
                "correlation_id": task_id,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": job.queue},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid4()),
            },
        }
    )


class Bells:
    """Puts messages where Celery's workers listen."""

    def __init__(self, settings: BrokerSettings) -> None:
        self._prefix = settings.prefix
        # A connection that died while nobody used it costs one more try, not a message.
        self._client: Any = connect(settings, retries=1)

    def ring(self, jobs: Sequence[Any]) -> None:
        """One message for each job; the broker is asked once.

        Raises:
            RedisError, OSError: it is away. It may have some of the messages.
        """
        queues: defaultdict[str, list[str]] = defaultdict(list)
        for job in jobs:
            queues[job.queue].append(message(job))
        with self._client.pipeline(transaction=False) as pipeline:
            for queue, messages in queues.items():
                pipeline.lpush(f"{self._prefix}{queue}", *messages)
            pipeline.execute()

    def close(self) -> None:
        self._client.close()


class Relay:
    """Publishes the unsent bells of the outbox. Several at once are safe."""

    def __init__(self, engine: Engine, bells: Bells, *, batch: int = 100) -> None:
        self._engine = engine
        self._bells = bells
        self._batch = batch

    def run_once(self) -> int:
        """Publish one batch; returns how many bells left the outbox.

        A crash between publishing and committing rings twice, which is harmless.

        Raises:
            RedisError, OSError: the broker is away; the outbox is as it was.
        """
        with Session(self._engine) as session, session.begin():
            rows = session.execute(_SEND, {"most": self._batch}, execution_options=_WHILE_IT_RINGS).all()
            waiting = [row for row in rows if row.state == JobState.QUEUED]
            if waiting:
                self._bells.ring(waiting)
            return len(rows)


BROKER_AWAY: Final = (RedisError, OSError)
"""What ``Relay.run_once`` raises while the broker is away."""

RELAY_PAUSE: Final = timedelta(seconds=1)
"""Between two tries of a relay, when nothing wakes it."""
