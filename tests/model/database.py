"""PostgreSQL as a function: (state of the database, operation) -> (answer, state), each pair executed once.

A state is everything in the tables that operations may change, with times as seconds from now. To execute an
operation its rows are put into empty tables, the operation runs, the rows are read, and all of it is rolled back.
Two states count as one if no operation can tell them apart (``canonical.py``); the first that was met stands for all.
Knows nothing of workers, messages or storage.
"""

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, DateTime, Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from shared.errors import LeaseLost, RequestRefused
from shared.jobs.rows import Job
from tests.model.canonical import Canonical, canonical
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
    times = ", ".join(f"'{name}', extract(epoch FROM t.{name} - now)" for name in _times(table))
    order = ", ".join(f"t.{column.name}" for column in table.primary_key)
    rows = f"to_jsonb(t) || jsonb_build_object({times})"
    return f"'{table.name}', (SELECT coalesce(jsonb_agg({rows} ORDER BY {order}), '[]') FROM {table.name} t)"


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
BEGIN {" ".join(map(_filling, TABLES))} END $$;
CREATE FUNCTION model_read() RETURNS text LANGUAGE plpgsql AS $$
DECLARE now timestamptz := clock_timestamp();
BEGIN RETURN jsonb_build_object({", ".join(map(_reading, TABLES))}); END $$;
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
        before: Callable[[Operation], None],
    ) -> None:
        """
        Args:
            connection: to a database that is empty but for the fixed tables, with ``INSTALL`` executed.
            judge: is shown each executed step once (rows before, after, operation) and raises what it finds wrong.
            before: is told what is executed next.
        """
        self._connection = connection
        self._judge = judge
        self._before = before
        self._text: list[str] = []
        self._rows: list[Rows] = []
        self._canonical: list[Canonical] = []
        self._known: dict[Canonical, int] = {}
        self._learned: dict[tuple[int, Operation], tuple[Hashable, int]] = {}
        self._jumped: dict[int, int] = {}
        self.empty = self._intern(json.dumps({table.name: [] for table in TABLES}))

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
                self._judge(self.rows(state), json.loads(text), operation)
            except Violation as broken:
                raise Violation(broken.promise, broken.what, [str(operation)]) from broken
            known = self._learned[state, operation] = answer, self._intern(text)
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
        return self._intern(json.dumps(rows))

    def _intern(self, text: str) -> int:
        rows = json.loads(text)
        form = canonical(rows)
        if form not in self._known:
            self._known[form] = len(self._text)
            self._text.append(text)
            self._rows.append(rows)
            self._canonical.append(form)
        return self._known[form]

    def _execute(self, state: int, operation: Operation) -> tuple[Hashable, str]:
        rows = self._text[state]
        self._before(operation)
        with self._connection.begin() as transaction:
            raw: Any = self._connection.connection.driver_connection
            with raw.pipeline():  # with the BEGIN before it, one round trip
                raw.execute("SELECT model_fill(%s)", (rows,))
            with Session(self._connection, join_transaction_mode="rollback_only") as session:
                answer = perform(session, operation)
                with raw.pipeline():
                    read = raw.execute("SELECT model_read()")
                    raw.rollback()
            transaction.rollback()
        return answer, rows if isinstance(answer, Refused) else read.fetchone()[0]


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
