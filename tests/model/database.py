"""PostgreSQL as a function: (state of the database, operation) -> (answer, state), each pair executed once.

A state is everything in the tables that operations may change, with times as seconds from now. To execute an
operation its rows are put into empty tables, the operation runs, the rows are read, and what it did is rolled back.
Where the operation's statements are known (``courses.py``), only those tables are read that they name as written to:
that these are all was seen when the statements were new, with every table read.
Two states count as one if no operation can tell them apart (``canonical.py``); the first that was met stands for all.
Knows nothing of workers, messages or storage.
"""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, DateTime, Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import shared.jobs.need_rows  # noqa: F401  (defines a table)
from shared.errors import LeaseLost, RequestRefused
from shared.jobs.rows import Job
from tests.model.canonical import Canonical, canonical
from tests.model.courses import Course, Courses, answer_of
from tests.model.line import Call, Line
from tests.model.violation import Violation

Rows = dict[str, list[dict[str, Any]]]
"""Table -> its rows; times are seconds from now."""

FIXED: Final = frozenset({"tenants", "datasets"})
"""Tables that are filled once and that no operation changes."""
TABLES: Final = tuple(table for table in Job.metadata.sorted_tables if table.name not in FIXED)


TIMES: Final = frozenset(
    column.name for table in TABLES for column in table.columns if isinstance(column.type, DateTime)
)


def _times(table: Table) -> list[str]:
    return [column.name for column in table.columns if isinstance(column.type, DateTime)]


def _reading(table: Table, now: str = "now") -> str:
    times = _times(table)
    columns = ", ".join(
        f"extract(epoch FROM {column.name} - {now}) AS {column.name}" if column.name in times else column.name
        for column in table.columns
    )
    order = ", ".join(column.name for column in table.primary_key)
    rows = f"SELECT {columns} FROM {table.name} ORDER BY {order}"
    return f"'{table.name}', (SELECT coalesce(json_agg(t), '[]') FROM ({rows}) t)"


def _filling(table: Table) -> str:
    times, dialect = _times(table), postgresql.dialect()
    names = ", ".join(column.name for column in table.columns)
    kinds = ", ".join(
        f"{column.name} {'float8' if column.name in times else column.type.compile(dialect)}"
        for column in table.columns
    )
    values = ", ".join(
        f"now + r.{column.name} * interval '1 second'" if column.name in times else f"r.{column.name}"
        for column in table.columns
    )
    source = f"jsonb_to_recordset(given->'{table.name}') AS r ({kinds})"
    insert = f"INSERT INTO {table.name} ({names}) OVERRIDING SYSTEM VALUE SELECT {values} FROM {source};"
    return f"IF given->'{table.name}' <> '[]' THEN {insert} END IF;"


INSTALL: Final = f"""
CREATE FUNCTION model_fill(given jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE now timestamptz := clock_timestamp();
BEGIN {" ".join(map(_filling, TABLES))}
PERFORM setval(pg_get_serial_sequence('outbox', 'id'), (SELECT coalesce(max(id), 0) + 1 FROM outbox), false); END $$;
CREATE FUNCTION model_read() RETURNS text LANGUAGE plpgsql AS $$
DECLARE now timestamptz := clock_timestamp();
BEGIN RETURN json_build_object({", ".join(map(_reading, TABLES))}); END $$;
"""
"""Two functions for the database of the model: put rows into the empty tables, and read them."""

NAMES: Final = frozenset(table.name for table in TABLES)
BEGIN: Final = Call(b"BEGIN")
ROLLBACK: Final = Call(b"ROLLBACK")
SAVE: Final = Call(b"SAVEPOINT loaded")
BACK: Final = Call(b"ROLLBACK TO SAVEPOINT loaded")
FILL: Final = b"SELECT model_fill($1)"
VACUUM: Final = b"VACUUM " + ", ".join(sorted(NAMES)).encode()
LOADED_BETWEEN: Final = 100
"""States that are loaded before what was rolled back is swept out: each statement would have to read over it."""


@cache
def read(names: frozenset[str]) -> Call:
    """The statement that reads these tables."""
    # Not ``clock_timestamp()``, which is another time for each row.
    tables = (_reading(table, "statement_timestamp()") for table in TABLES if table.name in names)
    return Call(f"SELECT json_build_object({', '.join(tables)})".encode())


@dataclass(frozen=True)
class Operation:
    """A call of the product's code; ``name`` and ``arguments`` say which."""

    name: str
    arguments: tuple[Hashable, ...]
    run: Callable[[Session], Hashable] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(getattr(one, '__name__', str(one)) for one in self.arguments)})"


@dataclass(frozen=True)
class Refused:
    """The operation raised, so its transaction was rolled back."""

    error: str


class Step(NamedTuple):
    """What has been learned of one operation in one state."""

    operation: Operation | None
    """None: the clock jumped."""
    answer: Hashable
    after: int


class Database:
    """One connection to an empty, migrated database, and what has been learned on it."""

    def __init__(
        self,
        connection: Connection,
        *,
        judge: Callable[[Rows, Rows, Operation], None],
    ) -> None:
        """
        Args:
            connection: to a database that is empty but for the fixed tables, with ``INSTALL`` executed.
            judge: is shown each executed step that wrote to a table once (rows before, after, operation) and raises
                what it finds wrong.
        """
        self._connection = connection
        self._judge = judge
        self._courses = Courses(connection.engine)
        self._line = Line.of(connection)
        self._loaded: int | None = None
        self._num_loaded = 0
        self._rows: list[Rows] = []
        self._canonical: list[Canonical] = []
        self._known: dict[Canonical, int] = {}
        self._learned: dict[tuple[int, Operation], tuple[Hashable, int]] = {}
        self._jumped: dict[int, int] = {}
        self.empty = self._intern({table.name: [] for table in TABLES})

    def branch(self, touched: Callable[[Operation], bool]) -> "Database":
        """A copy on the same connection that has learned nothing of some operations."""
        self.rest()
        copy = Database(self._connection, judge=self._judge)
        for name in ("_rows", "_canonical", "_known", "_jumped"):
            setattr(copy, name, getattr(self, name).copy())
        copy._learned = {pair: known for pair, known in self._learned.items() if not touched(pair[1])}
        copy._courses = self._courses.without(touched)
        return copy

    @property
    def num_states(self) -> int:
        return len(self._rows)

    @property
    def num_executed(self) -> int:
        """Pairs of a state and an operation that were executed."""
        return len(self._learned)

    def rows(self, state: int) -> Rows:
        """Not to be changed."""
        return self._rows[state]

    def canonical(self, state: int) -> Canonical:
        return self._canonical[state]

    def apply(self, state: int, operation: Operation) -> tuple[Any, int]:
        """What the operation answers in this state, and the state afterwards.

        Raises:
            Violation: the step breaks a promise; its trace is the operation.
        """
        known = self._learned.get((state, operation))
        if known is None:
            try:
                answer, written = self._execute(state, operation)
                after = self._with(state, written, operation) if written else state
            except Violation as broken:
                raise Violation(broken.promise, broken.what, [str(operation)]) from broken
            known = self._learned[state, operation] = answer, after
        return known

    def _with(self, state: int, written: Rows, operation: Operation) -> int:
        """The state in which some tables are others."""
        before = self.rows(state)
        after = before | written
        self._judge(before, after, operation)
        return self._intern(after)

    def learned(self) -> dict[int, list[Step]]:
        """By state, every step that was taken from it."""
        steps: dict[int, list[Step]] = {state: [] for state in range(self.num_states)}
        for (state, operation), (answer, after) in self._learned.items():
            steps[state].append(Step(operation, answer, after))
        for state, after in self._jumped.items():
            steps[state].append(Step(None, None, after))
        return steps

    def jump(self, state: int, by: timedelta) -> int:
        """The state after the clock has advanced: every time in it lies so much earlier."""
        if state not in self._jumped:
            self._jumped[state] = self._shifted(state, by)
        return self._jumped[state]

    def _shifted(self, state: int, by: timedelta) -> int:
        return self._intern(
            {
                table.name: [row | _earlier(row, _times(table), by) for row in self._rows[state][table.name]]
                for table in TABLES
            }
        )

    def _intern(self, rows: Rows) -> int:
        form = canonical(rows)
        if form not in self._known:
            self._known[form] = len(self._rows)
            self._rows.append(rows)
            self._canonical.append(form)
        return self._known[form]

    def _execute(self, state: int, operation: Operation) -> tuple[Hashable, Rows]:
        """What the operation answers, and each table that it may have written to, as it is afterwards."""
        try:
            if (done := self._follow(state, operation)) is None:
                done = self._record(state, operation)
        except BaseException:
            self.rest()
            raise
        return done

    def _follow(self, state: int, operation: Operation) -> tuple[Hashable, Rows] | None:
        """``_execute`` by a course that is known; None where it turns out that none is."""
        heard: list[Hashable] = []
        while (course := self._courses.likely(operation, heard)) is not None:
            load, names = self._loading(state), _written_by(course)
            calls = [*load, *(step.call for step in course.sent), *([read(names)] if names else []), BACK]
            found = self._line.ask(*calls)
            if len(found) < len(calls):
                self._line.demand(BACK)
            answers = [answer_of(one) for one in found[len(load) : len(load) + len(course.sent)]]
            if answers == course.answers and len(found) == len(calls):
                course.taken()
                return course.ended.answer, json.loads(found[-2].get_value(0, 0)) if names else {}
            # What was answered after the first surprise was answered to other statements than the operation sends.
            right = _num_alike(answers, course.answers)
            if not len(heard) <= right < len(answers):
                return None
            heard = answers[: right + 1]
        return None

    def _record(self, state: int, operation: Operation) -> tuple[Hashable, Rows]:
        """``_execute`` by the product's code, and remember its course."""
        if load := self._loading(state):
            self._line.demand(*load)
        answer = perform_and_keep(self._connection, operation, lambda run: self._courses.record(operation, run))
        found = self._line.demand(read(NAMES), BACK)[0]
        if isinstance(answer, Refused):
            return answer, {}
        after = json.loads(found.get_value(0, 0))
        course = self._courses.likely(operation, [])
        changed = {name for name, rows in self.rows(state).items() if not _alike(rows, after[name])}
        if course is None or not changed <= _written_by(course):
            raise AssertionError(f"{operation} changed {changed}, and its statements do not name all of these")
        return answer, after

    def _loading(self, state: int) -> list[Call]:
        """What puts this state into the tables, if it is not there already."""
        if self._loaded == state:
            return []
        if self._num_loaded % LOADED_BETWEEN == 0:
            self.rest()
            self._line.alone(VACUUM)
        begin = [BEGIN] if self._loaded is None else [ROLLBACK, BEGIN]
        if self._loaded is None:
            self.rest()
            self._connection.begin()
        self._loaded, self._num_loaded = state, self._num_loaded + 1
        return [*begin, Call(FILL, [json.dumps(self._rows[state]).encode()]), SAVE]

    def rest(self) -> None:
        """Leave the tables empty, for others to use."""
        self._connection.rollback()
        self._loaded = None


def _written_by(course: Course) -> frozenset[str]:
    """Names of the tables that an operation may have written to and not taken back."""
    if isinstance(course.ended.answer, Refused):
        return frozenset()
    written = frozenset[str]().union(*(step.writes for step in course.sent))
    # Rows may go with those that they belong to.
    return NAMES if any(b"DELETE" in step.call.statement for step in course.sent) else NAMES & written


def _num_alike(some: Sequence[Hashable], others: Sequence[Hashable]) -> int:
    """How many are the same until one is not."""
    return next(
        (number for number, (one, other) in enumerate(zip(some, others, strict=False)) if one != other), len(some)
    )


def _earlier(row: Mapping[str, Any], times: Iterable[str], by: timedelta) -> dict[str, float]:
    return {name: row[name] - by.total_seconds() for name in times if row[name] is not None}


def _alike(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> bool:
    """Whether nobody has written to a table: meanwhile every time in it has become a little earlier."""
    return len(before) == len(after) and all(
        _near(row[name], new[name]) if name in TIMES else row[name] == new[name]
        for row, new in zip(before, after, strict=True)
        for name in row
    )


def _near(before: float | None, after: float | None) -> bool:
    return before is after if before is None or after is None else abs(before - after) < 60


def perform_and_keep(
    connection: Connection,
    operation: Operation,
    around: Callable[[Callable[[], Hashable]], Hashable] = lambda run: run(),
) -> Hashable:
    """``perform`` in a savepoint, of which nothing is left if the operation raised.

    Raises:
        Violation: see there.
    """
    with Session(connection, join_transaction_mode="create_savepoint") as session:
        session.connection()
        answer = around(lambda: perform(session, operation))
        if not isinstance(answer, Refused):
            session.commit()
    return answer


def perform(session: Session, operation: Operation) -> Hashable:
    """The operation's answer; ``Refused`` if it raised, and then the caller rolls back, as the product's callers do.

    Raises:
        Violation: PostgreSQL itself refused, which no operation of a right product makes it do.
    """
    try:
        answer = operation.run(session)
        session.flush()
    except (LeaseLost, RequestRefused) as error:
        return Refused(type(error).__name__)
    except DBAPIError as error:
        raise Violation("PostgreSQL refuses nothing", f"{operation}: {str(error.orig).splitlines()[0]}") from error
    return answer
