"""How a worker starts and stops. Two processes of Celery's: the parent, and the child that supervises.

The parent receives messages and answers remote control, so Flower sees it whatever the device does. The
child (one, spawned) holds the supervisor, polls SQL while idle and does housekeeping. At SIGTERM the
parent has the child hand its job back, and waits until it has.
"""

import atexit
import fcntl
import logging
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, cast

from billiard.process import active_children
from celery import Celery, bootsteps, signals
from celery.platforms import EX_OK
from celery.worker import state

from shared.database import make_engine
from shared.settings import Settings
from worker.device import Device
from worker.janitor import Janitor
from worker.scratch import Scratch
from worker.supervisor import Supervisor
from worker.ticker import Ticker

logger = logging.getLogger(__name__)

DRAIN = signal.SIGURG
"""Parent to child: hand your job back and claim no more. Billiard takes nearly all other signals of its
children for itself, and this one harms nobody who has no handler yet."""

_supervisor: Supervisor | None = None


def supervisor() -> Supervisor:
    """This process's supervisor; only the pool's child has one."""
    if _supervisor is None:
        raise RuntimeError("no supervisor in this process: it is not a Celery pool child")
    return _supervisor


def connect(app: Celery) -> None:
    """Have Celery call what is below."""
    cast(Any, app).steps["worker"].add(HandBackFirst)
    signals.celeryd_after_setup.connect(_parent_starts)
    signals.worker_process_init.connect(_child_starts)
    signals.worker_process_shutdown.connect(_child_stops)


def _parent_starts(sender: str, instance: Any, **_: Any) -> None:
    """Tell the child, through its environment, what Celery's command line said."""
    # OpenMP threads that spin while they wait halve the speed of whoever shares the cores, the runner included.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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


def _child_starts(**_: Any) -> None:
    global _supervisor  # noqa: PLW0603  (Celery calls tasks without any context of ours)
    logging.getLogger().setLevel(logging.INFO)
    parent = os.getppid()
    settings = Settings.read()
    # One thread beats for all attempts of a company: a row that somebody keeps locked must not keep it from others.
    engine = make_engine(
        settings.database, f"noisemill {settings.worker.name}", ping=False, lock_timeout=settings.worker.beat
    )
    lock = settings.worker.lock
    if lock is None:
        raise RuntimeError("no lock file: this process was not started by a Noisemill worker")
    device = Device(scratch=_make_scratch(settings.worker.cache_dir.expanduser() / "scratch"))
    supervisor = _supervisor = Supervisor(settings, engine, device, lock_file=lock)
    signal.signal(DRAIN, lambda *_: _child_drains(supervisor, lock))
    lock.write_text(str(os.getpid()))
    supervisor.device.start()
    ticker = Ticker(settings, engine, supervisor, host=socket.gethostname())
    janitor = Janitor(settings, engine, name=supervisor.name)
    housekeeping = (ticker.run_forever, ticker.publish_forever, partial(janitor.run_until, supervisor.draining))
    for loop in (*housekeeping, lambda: _poll(supervisor), lambda: _die_with(parent)):
        Thread(target=loop, daemon=True).start()


def _make_scratch(folder: Path) -> Scratch | None:
    try:
        scratch = Scratch(folder)
    except OSError as error:
        logger.warning("no folder of our own for what runners write in passing: %s", error)
        return None
    os.environ["TMPDIR"] = str(scratch.folder)
    return scratch


def _child_drains(supervisor: Supervisor, lock: Path) -> None:
    supervisor.drain()
    # The parent goes on from here, so not before the supervisor knows.
    with suppress(OSError):
        lock.write_text(f"{os.getpid()} heard")


def _child_stops(**_: Any) -> None:
    if _supervisor is not None:
        _supervisor.device.kill()


def _poll(supervisor: Supervisor) -> None:
    """Look into SQL while idle, so that the queue moves even if every bell is lost."""
    seconds = supervisor.settings.worker.poll.total_seconds()
    while not supervisor.draining.wait(seconds * random.uniform(0.75, 1.25)):
        try:
            while not supervisor.busy and supervisor.run_next():
                pass
        except Exception:
            logger.exception("polling failed; trying again")


def _die_with(parent: int) -> None:
    """A child whose parent was killed would go on unseen by Celery and Flower; end, runner first."""
    while os.getppid() == parent:
        time.sleep(0.25)
    _child_stops()
    os._exit(1)
