"""What Celery's parent process does for its pool's child, which supervises (``worker/lifecycle.py``).

The parent receives messages and answers remote control, so Flower sees it whatever the device does. At SIGTERM it has
the child hand its job back, and waits until it has. It imports nothing of SQL and storage: the child, which does,
cannot start before it.
"""

import atexit
import fcntl
import logging
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Final, cast

from billiard.process import active_children
from celery import Celery, bootsteps, signals
from celery.platforms import EX_OK
from celery.worker import state

from shared.settings import Settings

logger = logging.getLogger(__name__)

DRAIN = signal.SIGURG
"""Parent to child: hand your job back and claim no more. Billiard takes nearly all other signals of its
children for itself, and this one harms nobody who has no handler yet."""

_EVENTS_WAIT: Final = 0.05
"""Seconds."""


def connect(app: Celery) -> None:
    """Have Celery call what is below."""
    cast(Any, app).steps["worker"].add(HandBackFirst)
    cast(Any, app).steps["consumer"].add(EventsLater)
    signals.celeryd_after_setup.connect(_parent_starts)


def _parent_starts(sender: str, instance: Any, **_: Any) -> None:
    """Tell the child, through its environment, what Celery's command line said."""
    # Locked by the child while a job runs. Its content is the child's pid once it can hear ``DRAIN``, then that it has.
    folder = tempfile.mkdtemp(prefix="noisemill-worker-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["NOISEMILL_WORKER_LOCK"] = f"{folder}/busy"
    os.environ["NOISEMILL_WORKER_NAME"] = sender
    os.environ["NOISEMILL_WORKER_QUEUES"] = ",".join(instance.app.amqp.queues.consume_from)


class HandBackFirst(bootsteps.StartStopStep):
    """Parent: at the first SIGTERM, SIGINT or SIGQUIT hand the job back, then shut down warm.

    A step of the worker's blueprint, because Celery sends ``worker_shutting_down`` only after its own
    wait for running tasks. A second signal is Celery's to handle.
    """

    requires = ("celery.worker.components:Pool",)

    def start(self, parent: Any) -> None:
        del parent
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, partial(self._stop, celerys=signal.getsignal(number)))
        if (state.should_stop, state.should_terminate) != (None, None):
            # The signal came before our handlers, and the pool's child is on its way already.
            drain_child()

    def _stop(self, number: int, frame: Any, *, celerys: Any) -> None:
        signal.signal(number, celerys)
        logger.warning("%s: handing the job back", signal.Signals(number).name)
        drain_child()
        state.should_stop = EX_OK


class EventsLater(bootsteps.StartStopStep):
    """Parent: what monitors are told of tasks goes out a moment later, and together: a message each time takes longer
    than all else that is done for a task, and Celery would send it before the child has the task.
    """

    # What is left is to be told before Celery tells that the worker has ended: monitors take who speaks for alive.
    requires = ("celery.worker.consumer.events:Events", "celery.worker.consumer.heart:Heart")

    def start(self, parent: Any) -> None:
        dispatcher, hub = parent.event_dispatcher, parent.hub
        is_due = Event()

        def flush() -> None:
            is_due.clear()
            if parent.event_dispatcher is dispatcher:
                dispatcher.flush()

        def soon() -> None:
            if not is_due.is_set():
                is_due.set()
                hub.call_later(_EVENTS_WAIT, flush)

        if hub is not None:
            dispatcher.on_send_buffered = soon

    def stop(self, parent: Any) -> None:
        if parent.event_dispatcher is not None:
            parent.event_dispatcher.flush()


def drain_child() -> None:
    """Tell the child to hand its job back, and wait until it has, within the grace.

    One that still starts is told as soon as it can hear, so that it claims nothing once this returns.
    """
    settings = Settings.read().worker
    deadline = time.monotonic() + settings.drain_grace.total_seconds() + 5
    while time.monotonic() < deadline and active_children():
        # Until the child is up there is no file, or one with the number of a child that is dead.
        with suppress(OSError, ValueError), (settings.lock or Path()).open("r+") as file:
            pid, *heard = file.read().split()
            if heard:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            os.kill(int(pid), DRAIN)
        time.sleep(0.05)
