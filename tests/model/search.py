"""Breadth first through every world that can be reached, in order of the number of moves: a trace is a shortest one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection

from tests.model import invariants
from tests.model.database import Database
from tests.model.healing import Healing
from tests.model.operations import Operations, submit
from tests.model.violation import Violation
from tests.model.world import Adversary, Rules, World


@dataclass(frozen=True, kw_only=True)
class Explored:
    """How much was searched."""

    worlds: int
    transitions: int
    depth: int
    """Moves on the longest of the shortest ways to a world."""
    database_states: int
    executed: int
    """Operations that PostgreSQL executed, each in another state or with other arguments."""


class Search:
    """All worlds of one set of rules."""

    def __init__(self, database: Database, rules: Rules, adversary: type[Adversary] = Adversary) -> None:
        """Submits the job.

        Raises:
            Violation: that already breaks a promise.
        """
        self.database = database
        _, submitted = database.apply(database.empty, submit(rules.bounds))
        job_id = UUID(database.rows(submitted)["jobs"][0]["id"])
        self.first = World(submitted, left=rules.left)
        self.adversary = adversary(database, Operations(job_id, rules.bounds), rules)
        self._healings = [Healing(database, self.adversary.operations, ways) for ways in rules.heals_by]
        self._came_from: dict[World, tuple[World, str] | None] = {}

    def run(self) -> Explored:
        """Visit every world.

        Raises:
            Violation: a promise is broken, with the shortest trace.
        """
        transitions = depth = 0
        self._came_from = {self.first: None}
        self._visit(self.first)
        frontier = [self.first]
        while frontier:
            found: list[World] = []
            for world in _by_database(frontier):
                for name, after in self._moves(world):
                    transitions += 1
                    if after not in self._came_from:
                        self._came_from[after] = world, name
                        found.append(after)
            for world in _by_database(found):
                self._visit(world)
            frontier, depth = found, depth + bool(found)
        return Explored(
            worlds=len(self._came_from),
            transitions=transitions,
            depth=depth,
            database_states=self.database.num_states,
            executed=self.database.num_executed,
        )

    def _moves(self, world: World) -> Iterator[tuple[str, World]]:
        try:
            yield from self.adversary.moves(world)
        except Violation as broken:
            raise self._traced(broken, world) from None

    def _visit(self, world: World) -> None:
        try:
            invariants.judge_world(self.database.rows(world.database), world)
            self.adversary.disturb_the_end(world)
            for healing in self._healings:
                healing.demand(world.database, message=world.message and not self.adversary.rules.losses)
        except Violation as broken:
            raise self._traced(broken, world) from None

    def _traced(self, broken: Violation, world: World) -> Violation:
        return Violation(broken.promise, broken.what, [*self._way_to(world), *broken.trace])

    def _way_to(self, world: World) -> list[str]:
        moves: list[str] = []
        while (step := self._came_from[world]) is not None:
            world, name = step
            moves.append(name)
        return moves[::-1]


def _by_database(worlds: list[World]) -> list[World]:
    """One after the other what happens in one state of the database: it need not be put into the tables so often."""
    return sorted(worlds, key=lambda world: world.database)


@contextmanager
def searching(
    connection: Connection, rules: Rules, adversary: type[Adversary] = Adversary, *, database: Database | None = None
) -> Iterator[Search]:
    """A search on a database that was made by ``prepared``; with a fresh memory, unless ``database`` is given."""
    database = database or Database(connection, judge=invariants.judge_step)
    try:
        yield Search(database, rules, adversary)
    finally:
        database.rest()
