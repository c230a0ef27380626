"""Celery's configuration. What its workers are sent is in ``relay.py``.

A message carries a job id and is acknowledged early; losing or doubling it is harmless.
Why each setting: docs/reliability.md.
"""

# Celery ships no types.
# pyright: reportMissingTypeStubs=false

from collections.abc import Mapping
from typing import Any, Final, cast

from celery import Celery

from shared.settings import BrokerSettings

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
    """The Celery app of the workers, and of whoever looks at them."""
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
