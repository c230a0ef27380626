"""How threads do something to jobs: in one statement, or in a transaction of its own. The parts know only sessions."""

from collections.abc import Callable, Sequence
from typing import TypeVar
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from shared.jobs import needs

T = TypeVar("T")


def ask(engine: Engine, statement: Callable[[Session], T]) -> T:
    """Do what is one statement: it needs no transaction around it, and so is one round trip.

    Stopped after it, we keep none of its rows locked: every worker's round waits for that of ``rounds``.
    """
    with Session(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        return statement(session)


def transact(engine: Engine, work: Callable[[Session], T], tell: Callable[[Sequence[UUID]], None]) -> T:
    """Do ``work`` in one transaction of its own, and ``tell`` what became of those who waited for others."""
    with Session(engine) as session:
        try:
            with session.begin():
                return work(session)
        finally:
            # Also where nobody confirmed the commit: a ring in vain costs a look.
            tell(needs.news(session))
