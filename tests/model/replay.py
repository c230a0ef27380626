"""Whether the search may be believed: what it remembers of a state must hold however that state was reached.

The search executes an operation once for all states that ``canonical.py`` calls one, from rows that it puts into the
tables itself, and with statements that it built before. Here random ways through what it has learned are gone straight
on PostgreSQL: from a submission of their own, operation after operation in a transaction each, nothing remembered, and
the clock advanced by an UPDATE of every time in every table. Each answer and each state on the way must be the same.
"""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, DateTime, text
from sqlalchemy.orm import Session

from tests.model.canonical import JUMP, Canonical, canonical
from tests.model.database import TABLES, Database, Operation, Refused, Step, perform
from tests.model.operations import Operations, submit
from tests.model.world import Rules

TRACES: Final = 500
LONGEST: Final = 25


def jump(connection: Connection) -> None:
    """The clock advances: every time in every table lies so much earlier."""
    for table in TABLES:
        times = [column.name for column in table.columns if isinstance(column.type, DateTime)]
        if times:
            earlier = ", ".join(f"{name} = {name} - :by" for name in times)
            connection.execute(text(f"UPDATE {table.name} SET {earlier}"), {"by": JUMP})


class Straight:
    """One job on PostgreSQL, in a transaction that is rolled back afterwards; each operation in a savepoint."""

    def __init__(self, connection: Connection, rules: Rules) -> None:
        self._connection = connection
        self.do(submit(rules.bounds))
        self.operations = Operations(UUID(self._rows()["jobs"][0]["id"]), rules.bounds)

    def do(self, operation: Operation) -> object:
        with Session(self._connection, join_transaction_mode="create_savepoint") as session:
            answer = perform(session, operation)
            if isinstance(answer, Refused):
                session.rollback()
            else:
                session.commit()
        return answer

    @property
    def state(self) -> Canonical:
        return canonical(self._rows())

    def _rows(self) -> dict[str, Any]:
        return json.loads(self._connection.scalar(text("SELECT model_read()")))


def walk(steps: Mapping[int, Sequence[Step]], first: int, chance: random.Random) -> list[Step]:
    """A way through what the database has learned; seven of ten steps change something where any does."""
    way, state = list[Step](), first
    while len(way) < LONGEST and steps[state]:
        changing = [step for step in steps[state] if step.after != state]
        way.append(chance.choice(changing if changing and chance.random() < 0.7 else steps[state]))
        state = way[-1].after
        if not changing and chance.random() < 0.3:
            break
    return way


def retrace(connection: Connection, rules: Rules, database: Database, way: Sequence[Step]) -> None:
    """Go this way on PostgreSQL, and compare."""
    told: list[str] = []
    with connection.begin() as transaction:
        straight = Straight(connection, rules)
        for operation, answer, after in way:
            told.append(str(operation or "the clock jumps"))
            if operation is None:
                jump(connection)
            else:
                again = getattr(straight.operations, operation.name)(*operation.arguments)
                assert _comparable(straight.do(again)) == _comparable(answer), told
            assert straight.state == database.canonical(after), told
        transaction.rollback()


def _comparable(answer: object) -> object:
    """A claim names checkpoints by keys with the job's id: how many there are is what can be compared."""
    return (answer[0], len(answer[1])) if isinstance(answer, tuple) else answer
