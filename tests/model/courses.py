"""What an operation's code does next depends on what PostgreSQL has answered it so far, and on nothing else.

So its *courses* are kept: the statements that it sent, by what was answered to each. Where a course is known its
statements are sent again without the Python that built them; PostgreSQL executes them all the same. Two answers count
as one if they differ only in what no code decides by: times, and of a whole job its versions and how long things took.
That this leaves out nothing that matters is not assumed: ``replay.py`` runs without it and would see a difference.
"""

import re
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import psycopg
from sqlalchemy import Engine, event

from shared.ahead import execute, sent_before, support

_SERIAL: Final = re.compile(r"sa_savepoint_\d+")
"""SQLAlchemy numbers its savepoints; of two with one name the latest is meant."""
_TIME: Final = psycopg.adapters.types["timestamptz"].oid
_ASIDE: Final = frozenset({b"timings", b"state_version", b"event_seq"})
"""What nobody reads where it comes as a part of a whole job."""


class Ended(NamedTuple):
    """The operation is over."""

    answer: Hashable


@dataclass
class Sent:
    """A statement, and what came next by what was answered."""

    statement: str
    parameters: Any
    then: dict[Hashable, "Sent | Ended"] = field(default_factory=dict)


class _Heard(NamedTuple):
    statement: str
    parameters: Any
    answer: Hashable


class Courses:
    """Of every operation, as far as they are known."""

    def __init__(self, engine: Engine) -> None:
        """``engine``: of the connections that operations are given."""
        self._engine = engine
        self._first: dict[Hashable, dict[Hashable, Sent | Ended]] = {}

    def follow(self, raw: Any, operation: Hashable) -> Ended | None:
        """Execute the operation on a psycopg connection.

        Returns:
            None: this course is not known to its end, and the transaction may have failed.
        """
        then: dict[Hashable, Sent | Ended] = self._first.get(operation, {})
        key: Hashable = None
        with suppress(psycopg.Error):
            while (step := then.get(key)) is not None:
                if isinstance(step, Ended):
                    return step
                key, then = _answer(raw.execute(step.statement, step.parameters)), step.then
        return None

    def record(self, operation: Hashable, run: Callable[[], Hashable]) -> Hashable:
        """What ``run`` answers, which is this operation; whatever it sends is remembered."""
        heard: list[_Heard] = []

        def hear(cursor: Any, statement: str, parameters: Any, context: object) -> bool:
            for one in [*(sent_before(context) or ()), (statement, parameters)]:
                cursor.execute(*one)
                heard.append(_Heard(_SERIAL.sub("sa_savepoint", one[0]), one[1], _answer(cursor)))
            return True

        event.remove(self._engine, "do_execute", execute)  # else it would come first, and nothing be heard
        event.listen(self._engine, "do_execute", hear)
        try:
            answer = run()
        finally:
            event.remove(self._engine, "do_execute", hear)
            support(self._engine)
        self._add(operation, heard, answer)
        return answer

    def _add(self, operation: Hashable, heard: list[_Heard], answer: Hashable) -> None:
        then, key = self._first.setdefault(operation, {}), None
        for statement, parameters, answered in heard:
            step = then.setdefault(key, Sent(statement, parameters))
            if not isinstance(step, Sent) or step.statement != statement:
                raise AssertionError(f"{operation}: after the same answers it sent another statement: {statement}")
            then, key = step.then, answered
        then[key] = Ended(answer)

    def without(self, touched: Callable[[Hashable], bool]) -> "Courses":
        """A copy that knows nothing of some operations."""
        copy = Courses(self._engine)
        copy._first = {operation: then for operation, then in self._first.items() if not touched(operation)}
        return copy


def _answer(cursor: Any) -> Hashable:
    """As PostgreSQL sent it: reading it costs more than all else here."""
    found = cursor.pgresult
    if not found.nfields:
        return cursor.rowcount
    names = [found.fname(column) for column in range(found.nfields)]
    aside = _ASIDE if _ASIDE.issubset(names) else frozenset[bytes]()
    times = [column for column in range(found.nfields) if found.ftype(column) == _TIME]
    others = [column for column, name in enumerate(names) if found.ftype(column) != _TIME and name not in aside]
    return tuple(
        (tuple(found.get_value(row, one) for one in others), tuple(found.get_value(row, one) is None for one in times))
        for row in range(found.ntuples)
    )
