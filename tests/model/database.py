"""PostgreSQL as a function: (state of the database, operation) -> (answer, state), each pair executed once.

A state is everything in the tables that operations may change, with times as seconds from now. To execute an
operation its rows are put into empty tables, the operation runs, the rows are read, and what it did is rolled back.
Two states count as one if no operation can tell them apart (``canonical.py``); the first that was met stands for all.
Knows nothing of workers, messages or storage.
"""

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, NamedTuple

from psycopg.sql import SQL, Literal
from sqlalchemy import Connection, DateTime, Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import shared.jobs.need_rows  # noqa: F401  (defines a table)
from shared.errors import LeaseLost, RequestRefused
from shared.jobs.rows import Job
from tests.model.canonical import Canonical, canonical
from tests.model.courses import Courses
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


def _reading(table: Table) -> str:
    times = _times(table)
    columns = ", ".join(
        f"extract(epoch FROM {column.name} - now) AS {column.name}" if column.name in times else column.name
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
            judge: is shown each executed step once (rows before, after, operation) and raises what it finds wrong.
        """
        self._connection = connection
        self._judge = judge
        self._courses = Courses(connection.engine)
        self._loaded: int | None = None
        self._text: list[str] = []
        self._rows: list[Rows] = []
        self._canonical: list[Canonical] = []
        self._known: dict[Canonical, int] = {}
        self._learned: dict[tuple[int, Operation], tuple[Hashable, int]] = {}
        self._jumped: dict[int, int] = {}
        nothing: Rows = {table.name: [] for table in TABLES}
        self.empty = self._intern(json.dumps(nothing), nothing)

    def branch(self, touched: Callable[[Operation], bool]) -> "Database":
        """A copy on the same connection that has learned nothing of some operations."""
        self.rest()
        copy = Database(self._connection, judge=self._judge)
        for name in ("_text", "_rows", "_canonical", "_known", "_jumped"):
            setattr(copy, name, getattr(self, name).copy())
        copy._learned = {pair: known for pair, known in self._learned.items() if not touched(pair[1])}
        copy._courses = self._courses.without(touched)
        return copy

    @property
    def num_states(self) -> int:
        return len(self._text)

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
                answer, text = self._execute(state, operation)
                rows = json.loads(text)
                self._judge(self.rows(state), rows, operation)
            except Violation as broken:
                raise Violation(broken.promise, broken.what, [str(operation)]) from broken
            known = self._learned[state, operation] = answer, self._intern(text, rows)
        return known

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
        rows = json.loads(self._text[state])
        for table in TABLES:
            for row in rows[table.name]:
                for name in _times(table):
                    if row[name] is not None:
                        row[name] -= by.total_seconds()
        return self._intern(json.dumps(rows), rows)

    def _intern(self, text: str, rows: Rows) -> int:
        """``text``: the rows as JSON."""
        form = canonical(rows)
        if form not in self._known:
            self._known[form] = len(self._text)
            self._text.append(text)
            self._rows.append(rows)
            self._canonical.append(form)
        return self._known[form]

    def _execute(self, state: int, operation: Operation) -> tuple[Hashable, str]:
        raw = self._load(state)
        try:
            if (ended := self._courses.follow(raw, operation)) is None:
                raw.execute("ROLLBACK TO SAVEPOINT loaded")
                answer = perform_and_keep(
                    self._connection,
                    operation,
                    lambda run: self._courses.record(operation, run),
                )
            else:
                answer = ended.answer
            read = raw.execute("SELECT model_read(); ROLLBACK TO SAVEPOINT loaded", prepare=False)
        except BaseException:
            self.rest()
            raise
        return answer, self._text[state] if isinstance(answer, Refused) else read.fetchone()[0]

    def _load(self, state: int) -> Any:
        """The psycopg connection, with this state in the tables."""
        raw: Any = self._connection.connection.driver_connection
        if self._loaded != state:
            if self._loaded is None:
                self.rest()
                self._connection.begin()
            empty = "" if self._loaded is None else "ROLLBACK; BEGIN; "
            # In one string, and so in one round trip: most of what an operation costs here is its messages.
            filled = SQL(empty + "SELECT model_fill({}); SAVEPOINT loaded").format(Literal(self._text[state]))
            raw.execute(filled, prepare=False)
            self._loaded = state
        return raw

    def rest(self) -> None:
        """Leave the tables empty, for others to use."""
        self._connection.rollback()
        self._loaded = None


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
