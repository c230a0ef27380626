"""What ends jobs although no worker lives: lost attempts, deadlines, datasets of failed ingestions. A thread.

Workers do this, and more, in ``worker/ticker.py``. The API does it where none lives, under the same lease: no job stays
running, canceling or queued past its deadline because the last worker is gone. Nothing is rung for, as nobody hears.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from shared.database import make_engine
from shared.ids import uuid7
from shared.jobs import continuity, upkeep
from shared.jobs.doing import ask, transact
from shared.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")


class UpkeepThread:
    """Runs until ``stop``. A daemon: each round is safe to be cut off anywhere.

    ``tell`` is called with each job that has news.
    """

    def __init__(self, settings: Settings, tell: Callable[[UUID], None]) -> None:
        self._settings = settings
        self._tell = tell
        self._name = f"api {uuid7()}"
        self._lead_lease = upkeep.lead_lease(settings.worker.tick)
        self._rounds = {"tick": settings.worker.tick, "lease": settings.jobs.lease}
        self._leads = self._fails = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread, soon."""
        self._stopping.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        engine = make_engine(self._settings.database, "noisemill-upkeep")
        try:
            while not self._stopping.wait(self._settings.worker.tick.total_seconds()):
                self._survive(engine)
            self._resign(engine)
        except SQLAlchemyError as error:
            logger.warning("the housekeeping's lease runs out by itself: %s", _first_line(error))
        finally:
            engine.dispose()

    def _survive(self, engine: Engine) -> None:
        try:
            self._round(engine)
        except SQLAlchemyError as error:
            if not self._fails:
                logger.warning("housekeeping failed, trying on: %s", _first_line(error))
            self._fails = True
        except Exception:
            logger.exception("housekeeping failed, trying on")
        else:
            self._fails = False

    def _round(self, engine: Engine) -> None:
        leases_mean_something = ask(engine, lambda s: continuity.see(s, self._name, **self._rounds))
        if ask(engine, upkeep.is_watched):
            self._resign(engine)
            return
        self._leads = ask(engine, lambda s: upkeep.hold(s, upkeep.LEASE, self._name, self._lead_lease))
        if not self._leads:
            return
        if leases_mean_something:
            self._reap(engine)
        for job_id in self._transact(engine, upkeep.expire):
            self._tell(job_id)
        self._transact(engine, upkeep.settle_needs)
        ask(engine, upkeep.settle_datasets)

    def _reap(self, engine: Engine) -> None:
        for job_id, state in self._transact(engine, upkeep.reap):
            logger.warning("job %s: lease ran out and no worker lives, now %s", job_id, state.value)
            self._tell(job_id)

    def _resign(self, engine: Engine) -> None:
        if self._leads:
            ask(engine, lambda s: upkeep.release(s, upkeep.LEASE, self._name))
            self._leads = False

    def _transact(self, engine: Engine, work: Callable[[Session], T]) -> T:
        return transact(engine, work, self._tell_all)

    def _tell_all(self, settled: Sequence[UUID]) -> None:
        for job_id in settled:
            self._tell(job_id)


def _first_line(error: SQLAlchemyError) -> str:
    return str(error).splitlines()[0]
