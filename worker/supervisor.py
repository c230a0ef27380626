"""Claims a job, has the runner do it, and commits what comes of it under the fence.

Never imports torch, so that a busy or hung device cannot starve the heartbeat. One attempt at a
time; what happens within one is in ``worker/watch.py``. A claim whose commit nobody confirmed is looked
for again before the next one is made.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import NamedTuple, TypeVar
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from shared.database import AWAY
from shared.errors import LeaseLost
from shared.ids import uuid7
from shared.jobs import attempts, claims
from shared.settings import Settings
from worker.device import Device
from worker.ringer import Ringer
from worker.watch import Watch

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _Held(NamedTuple):
    """A claim, and a moment (monotonic seconds) at which its lease had not begun to run yet."""

    claim: attempts.Claim
    asked_at: float


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
        self._unwrapped = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._ringer = Ringer(settings.broker)
        self._doubtful: dict[UUID, float] = {}
        """Tokens of claims whose commit was not confirmed, and when they were made (monotonic seconds)."""
        self._turn = Lock()
        self._lock_file = lock_file

    @property
    def busy(self) -> bool:
        return self._turn.locked()

    def run_next(self) -> bool:
        """Claim the best waiting job and run it to the end of its attempt; False if there was none."""
        # A shutdown does not wait for a runner that still starts.
        with self._turn:
            return not self.draining.is_set() and self.device.ready() and self._run_next()

    def _run_next(self) -> bool:
        with self._marked_busy():
            if self.draining.is_set():
                return False
            try:
                held = self._found_again() or self._claim()
            except AWAY as error:
                logger.warning("could not claim: %s", str(error).splitlines()[0])
                return False
            if held is None:
                return False
            self.ring(held.claim.job_id)
            self.job_id = held.claim.job_id
            try:
                Watch(self, held.claim, asked_at=held.asked_at).see_through()
            finally:
                self.job_id = None
            return True

    def _claim(self) -> _Held | None:
        terms = claims.Terms.of(self.settings.jobs)
        token, asked_at = uuid7(), time.monotonic()
        self._doubtful[token] = asked_at
        found = self.transact(lambda s: claims.claim(s, worker=self.name, queues=self.queues, terms=terms, token=token))
        del self._doubtful[token]
        return _Held(found[0], asked_at) if found else None

    def _found_again(self) -> _Held | None:
        """An attempt that was claimed without our knowing it, and is still ours."""
        lease = self.settings.jobs.lease
        for token, asked_at in list(self._doubtful.items()):
            for claim in self.transact(lambda s, token=token: claims.reclaim(s, token)):
                sent = time.monotonic()
                try:
                    self.ask(lambda s, claim=claim: attempts.heartbeat(s, claim.job_id, claim.fence, lease=lease))
                except LeaseLost:
                    continue
                del self._doubtful[token]
                return _Held(claim, sent)
            # The commit may still be on its way to the server; after a lease nothing of it can be left.
            if time.monotonic() - asked_at > lease.total_seconds():
                del self._doubtful[token]
        return None

    def transact(self, work: Callable[[Session], T]) -> T:
        """Do ``work`` in one transaction of its own."""
        with Session(self._engine) as session, session.begin():
            return work(session)

    def ask(self, statement: Callable[[Session], T]) -> T:
        """Do what is one statement: it needs no transaction around it, and so is one round trip."""
        with Session(self._unwrapped) as session:
            return statement(session)

    def ring(self, job_id: UUID) -> None:
        """Tell listeners that the job has news, without waiting for the broker."""
        self._ringer.ring(job_id)

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
