"""What keeps jobs moving, in every worker, done by one at a time under a SQL lease.

Reaps lost attempts, expires and redispatches jobs, has trainings give way; publishes bells in a
thread of its own, because the broker may hang. Each round is safe to be cut off anywhere and to run twice.
The worker's own sign of life is not under the lease. Where no worker lives the API does a part: ``api/upkeep.py``.
"""

import logging
import os
import time
from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from shared.jobs import claims, continuity, turns, upkeep, workers
from shared.relay import BROKER_AWAY, Bells, Relay
from shared.settings import Settings

if TYPE_CHECKING:
    from worker.supervisor import Supervisor

logger = logging.getLogger(__name__)

_SIGN_IN_EVERY = 5.0


class Ticker:
    """One worker's share in the housekeeping."""

    def __init__(self, settings: Settings, engine: Engine, supervisor: "Supervisor", *, host: str) -> None:
        self._settings = settings
        self._supervisor = supervisor
        self._relay = Relay(engine, Bells(settings.broker))
        self._host = host
        self._signed_in = 0.0
        self._signed_as = ""
        self._leads = Event()
        self._lead_lease = upkeep.lead_lease(settings.worker.tick)
        self._rounds = {"tick": settings.worker.tick, "lease": settings.jobs.lease}

    def run_forever(self) -> None:
        """Tick until the process ends; give the housekeeping up when the worker is told to end."""
        seconds, draining = self._settings.worker.tick.total_seconds(), self._supervisor.draining
        while True:
            self._survive(self.tick)
            if draining.is_set():
                time.sleep(seconds)
            else:
                draining.wait(seconds)

    def publish_forever(self) -> None:
        """Publish the outbox while this worker does the housekeeping, and at once when it has queued jobs."""
        while True:
            self.publish()

    def publish(self) -> None:
        """One round of that."""
        has_queued = self._supervisor.has_queued.wait(self._settings.worker.tick.total_seconds())
        if has_queued:  # else it may have come just now
            self._supervisor.has_queued.clear()
        if has_queued or self._leads.is_set():
            self._survive(self._publish)

    def tick(self) -> None:
        """One round; a worker that is told to end only lets another do it."""
        self._sign_in()
        if self._supervisor.draining.is_set():
            self._resign()
            return
        leases_mean_something = self._supervisor.ask(lambda s: continuity.see(s, self._supervisor.name, **self._rounds))
        if not self._takes_lead():
            return
        if leases_mean_something:
            self._reap()
        for job_id in [*self._supervisor.transact(upkeep.expire), *self._supervisor.transact(turns.preempt)]:
            self._supervisor.ring(job_id)
        self._supervisor.transact(self._end_slices)
        self._supervisor.transact(upkeep.settle_needs)
        self._supervisor.ask(upkeep.settle_datasets)
        self._supervisor.ask(lambda s: upkeep.redispatch(s, after=self._settings.jobs.redispatch_after))

    def _end_slices(self, session: Session) -> None:
        terms = claims.Terms.of(self._settings.jobs)
        turns.end_slices(session, time_slice=self._settings.worker.time_slice, terms=terms)

    def _reap(self) -> None:
        for job_id, state in self._supervisor.transact(upkeep.reap):
            logger.warning("job %s: lease ran out, now %s", job_id, state.value)
            self._supervisor.ring(job_id)

    def _takes_lead(self) -> bool:
        leads = False
        try:
            leads = self._supervisor.ask(
                lambda s: upkeep.hold(s, upkeep.LEASE, self._supervisor.name, self._lead_lease)
            )
        finally:
            # Without a moment in between in which whoever leads seems not to.
            (self._leads.set if leads else self._leads.clear)()
        return leads

    def _resign(self) -> None:
        if self._leads.is_set():
            self._supervisor.ask(lambda s: upkeep.release(s, upkeep.LEASE, self._supervisor.name))
            self._leads.clear()

    def _survive(self, work: Callable[[], None]) -> None:
        try:
            work()
        except SQLAlchemyError as error:
            logger.warning("housekeeping failed, trying again: %s", str(error).splitlines()[0])
        except Exception:
            logger.exception("housekeeping failed, trying again")

    def _sign_in(self) -> None:
        supervisor, now = self._supervisor, time.monotonic()
        state = "draining" if supervisor.draining.is_set() else "busy" if supervisor.busy else "idle"
        if state == self._signed_as and now - self._signed_in < _SIGN_IN_EVERY:
            return
        says: dict[str, Any] = {"name": supervisor.name, "host": self._host, "pid": os.getpid(), "state": state}
        says |= {"queues": supervisor.queues, "device": supervisor.device.name, "job_id": supervisor.job_id}
        supervisor.ask(lambda s: workers.sign_in(s, **says))
        models = {"hits": supervisor.device.model_hits, "misses": supervisor.device.model_misses}
        supervisor.ask(lambda s: workers.count_models(s, supervisor.name, **models))
        if not self._signed_as:
            supervisor.ask(lambda s: workers.started(s, supervisor.name))
        self._signed_in, self._signed_as = now, state

    def _publish(self) -> None:
        try:
            while self._relay.run_once():
                pass
        except BROKER_AWAY as error:
            logger.warning("the broker is away; workers poll SQL meanwhile: %s", error)
