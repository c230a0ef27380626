"""Housekeeping: collects what nobody needs any more, in every worker, done by one at a time under a SQL lease.

A thread of its own, so that slow storage never delays the ticker. ``python -m worker.janitor --dry-run`` shows what a
round would do, and without the option does one now: what is collected is safe to collect by several at once.
"""

import argparse
import json
import logging
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from threading import Event
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from shared.database import make_engine
from shared.errors import StorageError
from shared.jobs import upkeep
from shared.settings import Settings

if TYPE_CHECKING:
    from worker.chores import Chore

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LEASE: Final = "janitor"
_FIRST_ROUND: Final = timedelta(minutes=1)
"""After the start, or one period after it if that is shorter."""


class Janitor:
    """One worker's share in the housekeeping."""

    def __init__(self, settings: Settings, engine: Engine, *, name: str) -> None:
        self._settings = settings
        self._engine = engine
        self._name = name
        self._chores: list[Chore] | None = None

    @property
    def chores(self) -> "list[Chore]":
        """All chores; made, and boto3 with them, by the worker that does them."""
        if self._chores is None:
            from shared.storage import Storage  # noqa: PLC0415
            from worker.chores import chores  # noqa: PLC0415

            self._chores = chores(self._settings, Storage(self._settings.s3), self._transact)
        return self._chores

    def run_until(self, over: Event) -> None:
        """Do rounds until ``over``, then leave them to another worker."""
        period = self._settings.worker.collect
        pause = min(period, _FIRST_ROUND)
        # Workers that were started together do not ask together.
        while not over.wait(pause.total_seconds() * random.uniform(0.5, 1)):
            pause = period
            try:
                self.round()
            except Exception:
                logger.exception("housekeeping failed, trying again")
        with suppress(SQLAlchemyError):
            self._transact(lambda s: upkeep.release(s, _LEASE, self._name))

    def round(self) -> None:
        """Do every chore once, unless another worker does them. One that fails does not keep the others."""
        if self._is_mine():
            for chore in self.chores:
                self._do(chore)
                if not self._is_mine():
                    return

    def _do(self, chore: "Chore") -> None:
        try:
            done = chore.do()
        except (SQLAlchemyError, StorageError) as error:
            logger.warning("housekeeping (%s) failed, trying again: %s", chore.name, str(error).splitlines()[0])
            return
        if told := ", ".join(f"{count} {what}" for what, count in done.items() if count):
            logger.info("housekeeping: %s: %s", chore.name, told)

    def _is_mine(self) -> bool:
        lease = self._settings.worker.collect * 2
        try:
            return self._transact(lambda s: upkeep.hold(s, _LEASE, self._name, lease))
        except SQLAlchemyError as error:
            logger.warning("housekeeping failed, trying again: %s", str(error).splitlines()[0])
            return False

    def _transact(self, work: Callable[[Session], T]) -> T:
        with Session(self._engine) as session, session.begin():
            return work(session)


def main(arguments: list[str] | None = None) -> int:
    """Do one round now, or show it as JSON; whoever holds the lease. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m worker.janitor", description="Collect what nobody needs any more.")
    parser.add_argument("--dry-run", action="store_true", help="show what is due and change nothing")
    parser.add_argument("--only", metavar="NAME", help="this chore alone")
    options = parser.parse_args(arguments)
    settings = Settings.read()
    engine = make_engine(settings.database, "noisemill janitor")
    try:
        janitor = Janitor(settings, engine, name="janitor")
        chores = [chore for chore in janitor.chores if options.only in (None, chore.name)]
        if not chores:
            parser.error(f"no such chore: {options.only}; there are {', '.join(c.name for c in janitor.chores)}")
        report = {chore.name: _shown(chore) if options.dry_run else chore.do() for chore in chores}
    finally:
        engine.dispose()
    json.dump(report, sys.stdout, default=str, indent=2)
    sys.stdout.write("\n")
    return 0


def _shown(chore: "Chore") -> dict[str, Any]:
    due = list(chore.find())
    return {"count": len(due), "due": due}


if __name__ == "__main__":
    sys.exit(main())
