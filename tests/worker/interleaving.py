"""Actors who take turns: before each SQL statement, and before each call to storage, another may go on.

Which one is drawn from a seed, so that an order that shows a mistake can be seen again. Actors are greenlets: one runs
at a time, and never waits. So that none waits for another's lock, those who share a ``lane`` take turns only between
their transactions.
"""

import random
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet
from sqlalchemy import Engine, event


class Interleaving:
    """Actors, and the order in which they act."""

    def __init__(self, seed: int, engine: Engine) -> None:
        self.random = random.Random(seed)
        self._actors: dict[greenlet, str] = {}
        self._inside: dict[str, greenlet] = {}
        self._main = getcurrent()
        for point in ("before_cursor_execute", "commit"):
            event.listen(engine, point, self._pause)
        event.listen(engine, "begin", self._enter)
        for point in ("commit", "rollback"):
            event.listen(engine, point, self._leave)

    def add(self, lane: str, work: Callable[[], Any]) -> None:
        """One who acts in this lane."""
        self._actors[greenlet(work, parent=self._main)] = lane

    def pause(self) -> None:
        """Let somebody else go on; called by an actor, or by nobody's turn."""
        if getcurrent() in self._actors:
            self._main.switch()

    def run(self) -> None:
        """Until all have done their work."""
        while self._actors:
            ready = [each for each, lane in self._actors.items() if self._inside.get(lane, each) is each]
            chosen = self.random.choice(ready)
            chosen.switch()
            if chosen.dead:
                del self._actors[chosen]

    def _pause(self, *_: Any) -> None:
        self.pause()

    def _enter(self, *_: Any) -> None:
        # A turn first: a transaction begins with the lane free.
        self.pause()
        if (lane := self._actors.get(getcurrent())) is not None:
            self._inside[lane] = getcurrent()

    def _leave(self, *_: Any) -> None:
        if (lane := self._actors.get(getcurrent())) is not None:
            self._inside.pop(lane, None)
