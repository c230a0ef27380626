"""One upload at a time beside the training. Knows not what is uploaded."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import get_native_id
from typing import Final

NICENESS: Final = 10
"""Of the thread, so that hashing and sending take the cores that training leaves."""


class Background:
    """A thread that does one thing at a time; a failure is raised by the next call."""

    def __init__(self, *, niceness: int = NICENESS) -> None:
        self._pool = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="upload", initializer=_give_way, initargs=(niceness,)
        )
        self._current: Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        return self._current is not None and not self._current.done()

    def start(self, work: Callable[[], None]) -> None:
        """Begin ``work`` once the previous one is done."""
        self.join()
        self._current = self._pool.submit(work)

    def join(self) -> None:
        """Wait until nothing is under way, and raise what went wrong."""
        if self._current is not None:
            self._current.result()
            self._current = None

    def abandon(self) -> None:
        """Wait for nothing and start nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _give_way(niceness: int) -> None:
    """Lower the priority of the calling thread alone, which Linux can."""
    os.setpriority(os.PRIO_PROCESS, get_native_id(), niceness)
