"""How Celery's pool child (one, spawned) starts and stops: it holds the supervisor, polls SQL while idle, keeps house.

What its parent does is in ``worker/parent.py``.
"""

import logging
import os
import random
import signal
import socket
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread

from shared.database import make_engine
from shared.settings import Settings
from worker.device import Device
from worker.janitor import Janitor
from worker.nursery import Nurseries
from worker.parent import DRAIN
from worker.scratch import Scratch
from worker.supervisor import Supervisor
from worker.ticker import Ticker

logger = logging.getLogger(__name__)

_supervisor: Supervisor | None = None


def supervisor() -> Supervisor:
    """This process's supervisor; only the pool's child has one."""
    if _supervisor is None:
        raise RuntimeError("no supervisor in this process: it is not a Celery pool child")
    return _supervisor


def child_starts() -> None:
    global _supervisor  # noqa: PLW0603  (Celery calls tasks without any context of ours)
    logging.getLogger().setLevel(logging.INFO)
    parent = os.getppid()
    settings = Settings.read()
    device = Device(
        Nurseries(settings.worker.nursery), scratch=_make_scratch(settings.worker.cache_dir.expanduser() / "scratch")
    )
    with suppress(OSError):  # who wants to give it work tries again
        device.start()  # gets ready while this process does
    # One thread beats for all attempts of a company: a row that somebody keeps locked must not keep it from others.
    engine = make_engine(
        settings.database, f"noisemill {settings.worker.name}", ping=False, lock_timeout=settings.worker.beat
    )
    lock = settings.worker.lock
    if lock is None:
        raise RuntimeError("no lock file: this process was not started by a Noisemill worker")
    supervisor = _supervisor = Supervisor(settings, engine, device, lock_file=lock)
    signal.signal(DRAIN, lambda *_: _child_drains(supervisor, lock))
    lock.write_text(str(os.getpid()))
    ticker = Ticker(settings, engine, supervisor, host=socket.gethostname())
    janitor = Janitor(settings, engine, name=supervisor.name)
    housekeeping = (ticker.run_forever, ticker.publish_forever, partial(janitor.run_until, supervisor.draining))
    for loop in (*housekeeping, lambda: _poll(supervisor), lambda: _die_with(parent)):
        Thread(target=loop, daemon=True).start()


def _make_scratch(folder: Path) -> Scratch | None:
    try:
        return Scratch(folder)
    except OSError as error:
        logger.warning("no folder of our own for what runners write in passing: %s", error)
        return None


def _child_drains(supervisor: Supervisor, lock: Path) -> None:
    supervisor.drain()
    # The parent goes on from here, so not before the supervisor knows.
    with suppress(OSError):
        lock.write_text(f"{os.getpid()} heard")


def child_stops() -> None:
    if _supervisor is not None:
        _supervisor.device.close()


def _poll(supervisor: Supervisor) -> None:
    """Look into SQL at the start and while idle, so that the queue moves even if every bell is lost."""
    seconds = supervisor.settings.worker.poll.total_seconds()
    while True:
        try:
            while not supervisor.busy and supervisor.run_next():
                pass
        except Exception:
            logger.exception("polling failed; trying again")
        if supervisor.draining.wait(seconds * random.uniform(0.75, 1.25)):
            return


def _die_with(parent: int) -> None:
    """A child whose parent was killed would go on unseen by Celery and Flower; end, runner first."""
    while os.getppid() == parent:
        time.sleep(0.25)
    child_stops()
    os._exit(1)
