"""The relay as a thread: publishes what committed transactions left in the outbox, and rings event bells.

Requests only wake it, so that no request ever waits for the broker. When the broker is away it tries again with
growing pauses; the outbox keeps everything meanwhile.
"""

import logging
import threading
from collections import deque
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Engine

from shared.database import AWAY, make_engine
from shared.settings import Settings

logger = logging.getLogger(__name__)

LONGEST_PAUSE: Final = timedelta(seconds=10)
_BATCH: Final = 100
_GATHER_SECONDS: Final = 0.02
_RINGS_KEPT: Final = 1000
"""More rings than that are dropped, which costs a listener one poll."""


class RelayThread:
    """Runs until ``stop``. A daemon: it never keeps a process alive, because SQL remembers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._rings: deque[UUID] = deque(maxlen=_RINGS_KEPT)
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread, soon."""
        self._stopping.set()
        self._woken.set()
        self._thread.join(timeout=2)

    def wake(self, job_id: UUID | None = None) -> None:
        """There may be a bell in the outbox, and there is news of this job, unless it is new. Returns at once."""
        if job_id is not None:
            self._rings.append(job_id)
        self._woken.set()

    def _run(self) -> None:
        # Its own engine, closed when the thread ends: a request to stop may find it waiting for the broker.
        engine = make_engine(self._settings.database, "noisemill-relay", ping=False)
        try:
            self._work(engine)
        finally:
            engine.dispose()

    def _work(self, engine: Engine) -> None:
        # Redis takes a while to import; the API serves meanwhile.
        from shared.events import EventBell  # noqa: PLC0415
        from shared.relay import BROKER_AWAY, RELAY_PAUSE, Bells, Relay  # noqa: PLC0415

        bell = EventBell(self._settings.broker)
        relay = Relay(engine, Bells(self._settings.broker), batch=_BATCH)
        failures = 0
        while not self._stopping.is_set():
            try:
                while relay.run_once() == _BATCH and not self._stopping.is_set():
                    pass
            except (*BROKER_AWAY, *AWAY) as error:
                failures += 1
                self._complain(failures, error)
            except Exception:
                # A bug must not end the relay for good; idle workers look into SQL meanwhile.
                failures += 1
                logger.exception("the relay failed")
            else:
                failures = self._recovered(failures)
                self._ring(bell)
            self._pause(RELAY_PAUSE, failures)

    def _ring(self, bell: Any) -> None:
        while self._rings and not self._stopping.is_set():
            bell.ring(self._rings.popleft())

    def _pause(self, pause: timedelta, failures: int) -> None:
        if failures:
            # Not cut short by new requests: each would cost another time-out.
            self._stopping.wait(min(pause * 2 ** min(failures, 8), LONGEST_PAUSE).total_seconds())
        # What comes in quick succession is published together; what comes alone does not wait for company.
        elif not self._stopping.wait(_GATHER_SECONDS):
            self._woken.wait(pause.total_seconds())
        self._woken.clear()

    def _complain(self, failures: int, error: BaseException) -> None:
        if failures == 1:
            logger.warning("bells cannot be published, jobs wait in the outbox: %s", type(error).__name__)

    def _recovered(self, failures: int) -> int:
        if failures:
            logger.info("bells are published again, after %d failures", failures)
        return 0
