"""The Celery app of a worker (``python -m worker``). Also what Flower reads: ``celery -A worker.app flower``."""

from typing import Any

from celery import signals

from shared.queue import make_celery
from shared.settings import Settings
from worker import parent


def _child_starts(**_: Any) -> None:
    from worker.lifecycle import child_starts

    child_starts()


def _child_stops(**_: Any) -> None:
    from worker.lifecycle import child_stops

    child_stops()


app = make_celery(Settings.read().broker)
app.conf.imports = ("worker.tasks",)
parent.connect(app)
signals.worker_process_init.connect(_child_starts)
signals.worker_process_shutdown.connect(_child_stops)
