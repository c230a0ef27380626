"""Statements that go ahead of another one, in the same round trip: what they are answered is of no interest.

A round trip costs more than most statements: two processes wait for each other, and a thread for its turn. psycopg's
pipelines save them, BEGIN's among others. What SQLAlchemy does around a statement stays as it is.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from sqlalchemy import Engine, TextClause, event
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

Ahead = tuple[TextClause, Mapping[str, Any]]
"""A statement and its parameters, which psycopg must know how to send as they are."""

_OPTION: Final = "noisemill_ahead"
_DIALECT: Final = PGDialect_psycopg()


def after(*ahead: Ahead) -> dict[str, Any]:
    """Execution options of a statement that is to run once these have. They are one transaction, also on a connection
    that commits each statement. What fails first is raised, and nothing after it happens.
    """
    return {_OPTION: ahead}


def support(engine: Engine) -> None:
    """Make the engine heed ``after``: all of ours do."""
    event.listen(engine, "do_execute", _execute)


def _execute(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
    ahead: tuple[Ahead, ...] | None = context.execution_options.get(_OPTION)
    if ahead is None:
        return False
    if context.dialect.is_async:
        for clause, values in ahead:
            cursor.execute(_text(clause), values)
        cursor.execute(statement, parameters)
        return True
    connection = cursor.connection
    with connection.pipeline():
        if connection.autocommit:
            connection.execute("BEGIN")
        for clause, values in ahead:
            connection.execute(_text(clause), values)
        cursor.execute(statement, parameters)
        if connection.autocommit:
            connection.execute("COMMIT")
    return True


@cache
def _text(clause: TextClause) -> str:
    return str(clause.compile(dialect=_DIALECT))
