"""A dead man's switch: burns unless it is fed in time. By the monotonic clock, whatever the main thread does."""

import time
from collections.abc import Callable
from threading import Event, Thread, current_thread


class Fuse:
    """Calls ``burn`` once, from its own thread, when ``feed`` was not called for ``seconds``."""

    def __init__(self, seconds: float, burn: Callable[[], object]) -> None:
        self._seconds = seconds
        self._burn = burn
        self._fed = time.monotonic()
        self._done = Event()
        self._thread = Thread(target=self._watch, name="fuse", daemon=True)
        self.burnt = False

    def feed(self, when: float) -> None:
        """It was good at ``when`` (monotonic seconds): the moment a heartbeat was *sent*, not answered."""
        self._fed = when

    def light(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def put_out(self) -> None:
        """Burn no more. Safe to call twice, and from ``burn``."""
        self._done.set()
        # One that has begun to burn must be done with it: what runs next is not its to kill.
        if self._thread.is_alive() and self._thread is not current_thread():
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._left()):
            if self._left() <= 0:
                self.burnt = True
                self._burn()
                return

    def _left(self) -> float:
        return max(0.0, self._fed + self._seconds - time.monotonic())
