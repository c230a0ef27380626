"""Statements that go ahead of another one, in the same round trip: what they are answered is of no interest.

A round trip costs more than most statements: two processes wait for each other, and a thread for its turn. psycopg's
pipelines save them, BEGIN's among others. What SQLAlchemy does around a statement stays as it is.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Final

import psycopg
from sqlalchemy import Engine, TextClause, event
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

Ahead = tuple[TextClause, Mapping[str, Any]]
"""A statement and its parameters, which psycopg must know how to send as they are."""

_OPTION: Final = "noisemill_ahead"
_DIALECT: Final = PGDialect_psycopg()


def after(*ahead: Ahead) -> dict[str, Any]:
    """Execution options of a statement that is to run once these have. They are one transaction, also on a connection
    that commits each statement, unless that is one of the event loop. What fails first is raised, and
    nothing after it happens.
    """
    return {_OPTION: ahead}


def support(engine: Engine) -> None:
    """Make the engine heed ``after``: all of ours do."""
    event.listen(engine, "do_execute", execute)


def sent_before(context: Any) -> list[tuple[str, Mapping[str, Any]]] | None:
    """What goes ahead of the statement of this context, as psycopg sends it; None if nothing was said about that."""
    ahead: tuple[Ahead, ...] | None = context.execution_options.get(_OPTION)
    return None if ahead is None else [(_text(clause), values) for clause, values in ahead]


def execute(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
    """What heeds it. Returns whether there was something to heed, and so all is done."""
    if (ahead := sent_before(context)) is None:
        return False
    if context.dialect.is_async:
        for one in ahead:
            cursor.execute(*one)
        cursor.execute(statement, parameters)
        return True
    try:
        _execute_all(cursor, [*ahead, (statement, parameters)])
    except BaseException:
        if cursor.connection.autocommit:
            with suppress(psycopg.Error):  # it is gone, and with it the transaction
                cursor.connection.rollback()
        raise
    return True


def _execute_all(cursor: Any, statements: Sequence[tuple[str, Any]]) -> None:
    """``cursor`` is left with the answer to the last."""
    connection = cursor.connection
    with connection.pipeline():
        if connection.autocommit:
            connection.execute("BEGIN")
        for one in statements[:-1]:
            connection.execute(*one)
        cursor.execute(*statements[-1])
        if connection.autocommit:
            connection.execute("COMMIT")


@cache
def _text(clause: TextClause) -> str:
    return str(clause.compile(dialect=_DIALECT))
