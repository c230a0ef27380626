"""Whether the search may be believed: what it remembers of a state must hold however that state was reached.

The search executes an operation once for all states that ``canonical.py`` calls one, from rows that it puts into the
tables itself, and where ``courses.py`` knows how it goes without the operation's own code. Here random ways through
what it has learned are gone straight on PostgreSQL: the product's code runs, one operation after the other from the
submission on, nothing is remembered, and the clock advances by an UPDATE of every time in every table. Each answer and
each state on the way must be the same. Ways that begin alike are gone together until they part, and then from a
savepoint each.
"""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, DateTime, text

from tests.model.canonical import JUMP, Canonical, canonical
from tests.model.database import TABLES, Database, Operation, Step, perform_and_keep
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


class Tree(dict[Step, "Tree"]):
    """Ways that begin alike: by the next step, how each goes on."""

    def add(self, way: Sequence[Step]) -> None:
        node = self
        for step in way:
            node = node.setdefault(step, Tree())

    @property
    def num_ways(self) -> int:
        return sum(after.num_ways for after in self.values()) or 1


class Straight:
    """One job on PostgreSQL, in a transaction that is rolled back afterwards; each operation in a savepoint."""

    def __init__(self, connection: Connection, rules: Rules) -> None:
        self._connection = connection
        self.do(submit(rules.bounds))
        self.operations = Operations(UUID(self._rows()["jobs"][0]["id"]), rules.bounds)

    def do(self, operation: Operation) -> object:
        return perform_and_keep(self._connection, operation)

    def go(self, database: Database, tree: Tree, told: list[str]) -> None:
        """Every way from here; each step is gone once, and taken back when all that follows was seen."""
        for (operation, answer, after), rest in tree.items():
            here = [*told, str(operation or "the clock jumps")]
            with self._connection.begin_nested() as savepoint:
                if operation is None:
                    jump(self._connection)
                else:
                    again = getattr(self.operations, operation.name)(*operation.arguments)
                    assert _comparable(self.do(again)) == _comparable(answer), here
                assert self.state == database.canonical(after), here
                self.go(database, rest, here)
                savepoint.rollback()

    @property
    def state(self) -> Canonical:
        return canonical(self._rows())

    def _rows(self) -> dict[str, Any]:
        return json.loads(self._connection.scalar(text("SELECT model_read()")))


def walk(
    steps: Mapping[int, Sequence[Step]], first: int, chance: random.Random, begun: Sequence[Step] = ()
) -> list[Step]:
    """A way through what the database has learned; seven of ten steps change something where any does."""
    way = list(begun)
    state = way[-1].after if way else first
    while len(way) < LONGEST and steps[state]:
        changing = [step for step in steps[state] if step.after != state]
        way.append(chance.choice(changing if changing and chance.random() < 0.7 else steps[state]))
        state = way[-1].after
        if not changing and chance.random() < 0.3:
            break
    return way


def grow(steps: Mapping[int, Sequence[Step]], first: int, chance: random.Random) -> Tree:
    """``TRACES`` different ways. Most leave another somewhere, so that what they share is gone once."""
    tree, way = Tree(), list[Step]()
    while tree.num_ways < TRACES:
        kept = way[: chance.randrange(len(way) // 2, len(way))] if way and chance.random() < 0.9 else []
        way = walk(steps, first, chance, kept)
        tree.add(way)
    return tree


def retrace(connection: Connection, rules: Rules, database: Database, tree: Tree) -> None:
    """Go all ways on PostgreSQL, and compare."""
    with connection.begin() as transaction:
        Straight(connection, rules).go(database, tree, [])
        transaction.rollback()


def _comparable(answer: object) -> object:
    """A claim names checkpoints by keys with the job's id: how many there are is what can be compared."""
    return (answer[0], len(answer[1])) if isinstance(answer, tuple) else answer
