"""What an operation's code does next depends on what PostgreSQL has answered it so far, and on nothing else.

So its *courses* are kept: the statements that it sent, by what was answered to each. Where a course is known its
statements are sent again without the Python that built them, all at once, in the hope that they are answered as the
last time; PostgreSQL executes them all the same. Two answers count as one if they differ only in what no code decides
by: times, and of a whole job its versions and how long things took. That this leaves out nothing that matters is not
assumed: ``replay.py`` runs without it and would see a difference.
"""

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import psycopg
from sqlalchemy import Engine, event

from shared.ahead import execute, sent_before, support
from tests.model.line import Call

_SERIAL: Final = re.compile(r"sa_savepoint_\d+")
"""SQLAlchemy numbers its savepoints; of two with one name the latest is meant."""
_TIME: Final = psycopg.adapters.types["timestamptz"].oid
_ASIDE: Final = frozenset({b"timings", b"state_version", b"event_seq"})
"""What nobody reads where it comes as a part of a whole job."""
_WRITES: Final = re.compile(rb"\b(?:INSERT\s+INTO|UPDATE|DELETE\s+FROM)\s+(\w+)", re.IGNORECASE)


class Ended(NamedTuple):
    """The operation is over."""

    answer: Hashable


@dataclass
class Sent:
    """A statement, and what came next by what was answered."""

    call: Call
    then: dict[Hashable, "Sent | Ended"] = field(default_factory=dict)
    latest: Hashable = None
    """What was answered the last time."""

    @property
    def writes(self) -> frozenset[str]:
        """Names of which some are the tables that it may write to."""
        return frozenset(name.decode().lower() for name in _WRITES.findall(self.call.statement))


class Course(NamedTuple):
    """A way that an operation goes from its begin to its end."""

    sent: Sequence[Sent]
    answers: Sequence[Hashable]
    """To each."""
    ended: Ended

    def taken(self) -> None:
        """It went so again."""
        for step, answer in zip(self.sent, self.answers, strict=True):
            step.latest = answer


class _Heard(NamedTuple):
    call: Call
    answer: Hashable


class Courses:
    """Of every operation, as far as they are known."""

    def __init__(self, engine: Engine) -> None:
        """``engine``: of the connections that operations are given."""
        self._engine = engine
        self._first: dict[Hashable, Sent | Ended] = {}

    def likely(self, operation: Hashable, heard: Sequence[Hashable]) -> Course | None:
        """The course that the operation takes if its first statements are answered so, and the others as the last time.

        Returns:
            None: none is known with these answers.
        """
        sent: list[Sent] = []
        answers: list[Hashable] = []
        step = self._first.get(operation)
        while isinstance(step, Sent):
            sent.append(step)
            answers.append(heard[len(answers)] if len(answers) < len(heard) else step.latest)
            step = step.then.get(answers[-1])
        return None if step is None else Course(sent, answers, step)

    def record(self, operation: Hashable, run: Callable[[], Hashable]) -> Hashable:
        """What ``run`` answers, which is this operation; whatever it sends is remembered."""
        heard: list[_Heard] = []

        def hear(cursor: Any, statement: str, parameters: Any, context: object) -> bool:
            for one in [*(sent_before(context) or ()), (_SERIAL.sub("sa_savepoint", statement), parameters)]:
                cursor.execute(*one)
                sent = cursor._convert_query(*one)
                call = Call(sent.query, sent.params or (), sent.types, sent.formats or ())
                heard.append(_Heard(call, answer_of(cursor.pgresult)))
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
        then, key = self._first, operation
        for call, answered in heard:
            step = then.setdefault(key, Sent(call))
            if not isinstance(step, Sent) or step.call.statement != call.statement:
                raise AssertionError(f"{operation}: after the same answers it sent another statement: {call.statement}")
            step.latest = answered
            then, key = step.then, answered
        then[key] = Ended(answer)

    def without(self, touched: Callable[[Hashable], bool]) -> "Courses":
        """A copy that knows nothing of some operations."""
        copy = Courses(self._engine)
        copy._first = {operation: step for operation, step in self._first.items() if not touched(operation)}
        return copy


def answer_of(found: Any) -> Hashable:
    """As PostgreSQL sent it: reading it costs more than all else here."""
    if not found.nfields:
        return found.command_tuples
    names = [found.fname(column) for column in range(found.nfields)]
    aside = _ASIDE if _ASIDE.issubset(names) else frozenset[bytes]()
    times = [column for column in range(found.nfields) if found.ftype(column) == _TIME]
    others = [column for column, name in enumerate(names) if found.ftype(column) != _TIME and name not in aside]
    return tuple(
        (tuple(found.get_value(row, one) for one in others), tuple(found.get_value(row, one) is None for one in times))
        for row in range(found.ntuples)
    )
