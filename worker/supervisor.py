"""Claims a job, has the runner do it, and commits what comes of it under the fence.

Never imports torch, so that a busy or hung device cannot starve the heartbeat. One attempt at a time, or some that
share the device (``worker/company.py``); what happens within one is in ``worker/watch.py``. A claim whose commit nobody
confirmed is looked for again before the next one is made, and while that runs: the commit may arrive late.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import TypeVar
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from shared.database import AWAY
from shared.errors import LeaseLost
from shared.ids import uuid7
from shared.jobs import attempts, claims, doing, needs
from shared.settings import Settings
from worker.company import Company, Held
from worker.device import Device
from worker.ringer import Ringer

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
        self.has_queued = Event()
        """It handed jobs back, or released or ended who waited for others: their bells may lie in the outbox."""
        self.job_id: UUID | None = None
        self._engine = engine
        self._ringer = Ringer(settings.broker)
        self._doubtful: dict[UUID, float] = {}
        """Tokens of claims whose commit was not confirmed, and when they were made (monotonic seconds)."""
        self._warm: str | None = None
        """The company that the runner served last, and so has the model of."""
        self._slice_ends = 0.0
        self._turn = Lock()
        self._lock_file = lock_file

    @property
    def busy(self) -> bool:
        return self._turn.locked()

    def run_next(self) -> bool:
        """Claim the best waiting job, run it and whoever joins it to the end; False if there was none."""
        # A shutdown does not wait for a runner that still starts.
        with self._turn:
            return not self.draining.is_set() and self.device.ready() and self._run_next()

    def _run_next(self) -> bool:
        with self._marked_busy():
            if self.draining.is_set():
                return False
            try:
                held = self._found_again() or self._claim_warm() or self._claim()
            except AWAY as error:
                logger.warning("could not claim: %s", str(error).splitlines()[0])
                return False
            if not held:
                return False
            self.job_id = held[0].claim.job_id
            if held[0].claim.company != self._warm:
                self._warm = held[0].claim.company
                self._slice_ends = time.monotonic() + self.settings.worker.time_slice.total_seconds()
            try:
                Company(self, held, slice_ends=self._slice_ends).see_through()
            finally:
                self.job_id = None
            return True

    def _claim(self) -> list[Held]:
        """The best waiting job."""
        terms = claims.Terms.of(self.settings.jobs)
        held = self._claimed(
            lambda s, token: claims.claim(s, worker=self.name, queues=self.queues, terms=terms, token=token)
        )
        self._warm = None
        return held

    def _claim_warm(self) -> list[Held]:
        """One for the model that is loaded, while its time slice lasts."""
        if self._warm is None or time.monotonic() > self._slice_ends:
            return []
        return self.claim_company(self._warm, room=1, others_wait=True)

    def claim_company(self, company: str, *, room: int, others_wait: bool) -> list[Held]:
        """Jobs that can share the device with one of this company; first those claimed without our knowing it."""
        if found := self._found_again(lambda claim: claim.company == company):
            return found
        terms = claims.Terms.of(self.settings.jobs)
        how = {"worker": self.name, "queues": self.queues, "terms": terms, "limit": room, "others_wait": others_wait}
        return self._claimed(lambda s, token: claims.claim_company(s, company, token=token, **how))

    @property
    def is_in_doubt(self) -> bool:
        """Whether something may have been claimed without our knowing it."""
        return bool(self._doubtful)

    def _claimed(self, claim: Callable[[Session, UUID], list[attempts.Claim]]) -> list[Held]:
        token, asked_at = uuid7(), time.monotonic()
        self._doubtful[token] = asked_at
        found = self.settle(lambda s: claim(s, token))
        del self._doubtful[token]
        return [Held(one, asked_at) for one in found]

    def hand_back_doubtful(self) -> None:
        """Let others have what was claimed without our knowing it."""
        self._found_again(lambda _: False)

    def _found_again(self, fits: Callable[[attempts.Claim], bool] = lambda _: True) -> list[Held]:
        """Attempts that were claimed without our knowing it, and are still ours. What does not fit is handed back."""
        held = list[Held]()
        lease = self.settings.jobs.lease
        for token, asked_at in list(self._doubtful.items()):
            for claim in self.transact(lambda s, token=token: _reclaimed(s, token, fits)):
                sent = time.monotonic()
                try:
                    self.ask(lambda s, claim=claim: attempts.heartbeat(s, claim.job_id, claim.fence, lease=lease))
                except LeaseLost:
                    continue
                held.append(Held(claim, sent))
            # The commit may still be on its way to the server; after a lease nothing of it can be left.
            if held or time.monotonic() - asked_at > lease.total_seconds():
                del self._doubtful[token]
            if held:
                break
        return held

    def transact(self, work: Callable[[Session], T]) -> T:
        """Do ``work`` in one transaction of its own, and tell listeners what became of those who waited for others."""
        return doing.transact(self._engine, work, self._tell)

    def _tell(self, settled: Sequence[UUID]) -> None:
        for job_id in settled:
            self.ring(job_id)
        if settled:
            self.has_queued.set()

    def ask(self, statement: Callable[[Session], T]) -> T:
        """Do what is one statement."""
        return doing.ask(self._engine, statement)

    def settle(self, statement: Callable[[Session], T]) -> T:
        """``ask`` what decides who holds a job: a claim, or an end that is one statement."""
        return doing.ask(self._engine, statement)

    def ring(self, job_id: UUID, *, begins: bool = False) -> None:
        """Tell listeners that the job has news, without waiting for the broker; ``begins``: that an attempt does."""
        self._ringer.ring(job_id, begins=begins)

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


def _reclaimed(session: Session, token: UUID, fits: Callable[[attempts.Claim], bool]) -> list[attempts.Claim]:
    fitting: list[attempts.Claim] = []
    for claim in claims.reclaim(session, token):
        if fits(claim):
            fitting.append(claim)
        else:
            attempts.hand_back(session, claim.job_id, claim.fence, seconds=0.0)
            needs.news(session).append(claim.job_id)
    return fitting
