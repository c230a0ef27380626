"""Rings the bells of jobs from a thread of its own: a broker that hangs keeps no heartbeat waiting."""

from threading import Condition, Thread
from uuid import UUID

from shared.events import EventBell
from shared.settings import BrokerSettings


class Ringer:
    """Takes orders at once; a job that was ordered again before its bell rang is rung for once."""

    def __init__(self, settings: BrokerSettings) -> None:
        self._bell = EventBell(settings)
        self._ordered: dict[UUID, bool] = {}
        """By job, whether all there is to tell is that an attempt begins."""
        self._order = Condition()
        Thread(target=self._ring_forever, name="ringer", daemon=True).start()

    def ring(self, job_id: UUID, *, begins: bool = False) -> None:
        with self._order:
            self._ordered[job_id] = begins and self._ordered.get(job_id, True)
            self._order.notify()

    def _ring_forever(self) -> None:
        while True:
            with self._order:
                self._order.wait_for(lambda: self._ordered)
                job_id = next(iter(self._ordered))
                begins = self._ordered.pop(job_id)
            self._bell.ring(job_id, begins=begins)
