"""The long searches in two processes of their own; each on a database of its own."""

import multiprocessing
import random
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from typing import Final

from sqlalchemy import Connection

from tests.model import replay, sizes
from tests.model.prepared import prepared
from tests.model.search import Explored, Search, searching

LANES: Final = (("EVERYTHING",), ("OUTBOX", "DEADLINE", "OUTAGES"))
"""Names from ``sizes.py``, for each process; what the first has learned is then gone again straight on PostgreSQL."""


class _Here:
    """What the process of a lane keeps."""

    open: Final = ExitStack()
    """Until the process ends."""
    connection: Connection
    search: Search


class Elsewhere:
    """Searches that are under way."""

    def __init__(self, urls: list[str]) -> None:
        """``urls``: of an empty, migrated database for each lane."""
        self._explored: dict[str, Future[Explored]] = {}
        self._pools = [
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(url,))
            for url in urls
        ]
        for pool, names in zip(self._pools, LANES, strict=True):
            self._explored |= {name: pool.submit(_explore, name) for name in names}
        self._retraced = self._pools[0].submit(_retrace)

    def explored(self, name: str) -> Explored:
        """
        Raises:
            Violation: the search found one.
        """
        return self._explored[name].result()

    def retraced(self) -> int:
        """Number of traces.

        Raises:
            AssertionError: one went otherwise.
        """
        return self._retraced.result()

    def end(self) -> None:
        """Until then the processes stay, also with nothing to do; afterwards they are gone."""
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)


def _begin(url: str) -> None:
    _Here.connection = _Here.open.enter_context(prepared(url))


def _explore(name: str) -> Explored:
    with searching(_Here.connection, getattr(sizes, name)) as _Here.search:
        return _Here.search.run()


def _retrace() -> int:
    search = _Here.search
    tree = replay.grow(search.database.learned(), search.first.database, random.Random(1))
    replay.retrace(_Here.connection, search.adversary.rules, search.database, tree)
    return tree.num_ways
