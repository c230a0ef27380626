"""Statements that PostgreSQL is sent without waiting for the answer to each: what most cost here is their message."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Final, NamedTuple

import psycopg
from psycopg.pq import ExecStatus
from sqlalchemy import Connection

_DONE: Final = (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK)


class Call(NamedTuple):
    """A statement and its parameters, as libpq takes them."""

    statement: bytes
    values: Sequence[bytes | None] = ()
    types: Sequence[int] = ()
    formats: Sequence[int] = ()


class Line:
    """The wire below one connection of psycopg, which is idle meanwhile."""

    def __init__(self, raw: Any) -> None:
        """``raw``: psycopg's connection."""
        self._wire = raw.pgconn
        self._names = (b"line_%d" % number for number in count())
        self._prepared: dict[tuple[bytes, tuple[int, ...]], bytes] = {}

    @classmethod
    def of(cls, connection: Connection) -> "Line":
        """The one of this connection, which remembers what it has prepared."""
        raw: Any = connection.connection.driver_connection
        return connection.info.setdefault("line", cls(raw))

    def ask(self, *calls: Call) -> list[Any]:
        """Execute all in one message.

        Returns:
            A ``PGresult`` for each that was executed; those after one that failed were not.
        """
        named = [(self._name(call), call) for call in calls]
        self._wire.enter_pipeline_mode()
        try:
            for name, call in named:
                self._wire.send_query_prepared(name, call.values, call.formats or None)
            self._wire.pipeline_sync()
            return [found for found in self._results() if found.status in _DONE]
        finally:
            self._wire.exit_pipeline_mode()

    def demand(self, *calls: Call) -> list[Any]:
        """Execute all.

        Raises:
            psycopg.Error: one failed.
        """
        found = self.ask(*calls)
        if len(found) < len(calls):
            raise psycopg.DatabaseError(self._wire.error_message)
        return found

    def alone(self, statement: bytes) -> None:
        """Execute what may not be one of several."""
        found = self._wire.exec_(statement)
        if found.status not in _DONE:
            raise psycopg.DatabaseError(found.error_message)

    def _name(self, call: Call) -> bytes:
        """Its name on the server, which may have to be told of it first."""
        key = call.statement, tuple(call.types)
        if key not in self._prepared:
            name = next(self._names)
            found = self._wire.prepare(name, call.statement, call.types or None)
            if found.status not in _DONE:
                raise psycopg.DatabaseError(found.error_message)
            self._prepared[key] = name
        return self._prepared[key]

    def _results(self) -> Iterator[Any]:
        while (found := self._wire.get_result()) is None or found.status != ExecStatus.PIPELINE_SYNC:
            if found is not None:
                yield found
