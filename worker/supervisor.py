"""Claims a job, has the runner do it, and commits what comes of it under the fence.

Never imports torch, so that a busy or hung device cannot starve the heartbeat. One attempt at a
time; what happens within one is in ``worker/watch.py``.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import TypeVar
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from shared.database import AWAY
from shared.events import EventBell
from shared.jobs import attempts, claims
from shared.settings import Settings
from worker.device import Device
from worker.watch import Watch

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Supervisor:
    """Of one device. ``run_next`` may be called from several threads: they take turns."""

    def __init__(self, settings: Settings, engine: Engine, device: Device, *, lock_file: Path) -> None:
        self.settings = settings
        self.name = settings.worker.name
        self.queues = [queue for queue in settings.worker.queues.split(",") if queue]
        self.device = device
        self.draining = Event()
        self.job_id: UUID | None = None
        self._engine = engine
        self._bell = EventBell(settings.broker)
        self._turn = Lock()
        self._lock_file = lock_file

    @property
    def busy(self) -> bool:
        return self._turn.locked()

    def run_next(self) -> bool:
        """Claim the best waiting job and run it to the end of its attempt; False if there was none."""
        with self._turn, self._marked_busy():
            if self.draining.is_set() or not self.device.ready():
                return False
            asked_at = time.monotonic()
            claim = self._claim()
            if claim is None:
                return False
            self.job_id = claim.job_id
            try:
                Watch(self, claim, asked_at=asked_at).see_through()
            finally:
                self.job_id = None
            return True

    def _claim(self) -> attempts.Claim | None:
        terms = claims.Terms.of(self.settings.jobs)
        try:
            found = self.transact(lambda s: claims.claim(s, worker=self.name, queues=self.queues, terms=terms))
        except AWAY as error:
            # If the claim did commit, its lease runs out and the job is queued again.
            logger.warning("could not claim: %s", error)
            return None
        for claim in found:
            self.ring(claim.job_id)
        return found[0] if found else None

    def transact(self, work: Callable[[Session], T]) -> T:
        """Do ``work`` in one transaction of its own."""
        with Session(self._engine) as session, session.begin():
            return work(session)

    def ring(self, job_id: UUID) -> None:
        """Tell listeners that the job has news."""
        self._bell.ring(job_id)

    def drain(self) -> None:
        """Claim nothing more, and hand the running job back."""
        self.draining.set()

    @contextmanager
    def _marked_busy(self) -> Iterator[None]:
        """Hold the lock file, by which the Celery parent sees when a shutdown may go on."""
        descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
