"""Every world that the adversary can reach, and from each the way to an end."""

import random

import pytest
from sqlalchemy import Connection

from tests.model import replay
from tests.model.search import Explored, Search, searching
from tests.model.sizes import DEADLINE, EVERYTHING, OUTBOX, WIDE
from tests.model.world import Rules


def explore(connection: Connection, rules: Rules) -> tuple[Search, Explored]:
    with searching(connection, rules) as search:
        explored = search.run()
    print(explored)
    return search, explored


@pytest.fixture(scope="module")
def everything(connection: Connection) -> tuple[Search, Explored]:
    return explore(connection, EVERYTHING)


@pytest.mark.timeout(600)
def test_no_promise_is_broken_in_any_world(everything: tuple[Search, Explored]) -> None:
    _, explored = everything

    assert explored.worlds > 1_000 and explored.database_states > 100 and explored.depth > 10


@pytest.mark.timeout(600)
def test_what_the_search_remembers_holds_on_postgresql(
    connection: Connection, everything: tuple[Search, Explored]
) -> None:
    """See ``replay.py``."""
    search, _ = everything
    steps, chance = search.database.learned(), random.Random(1)

    for _ in range(replay.TRACES):
        way = replay.walk(steps, search.first.database, chance)
        replay.retrace(connection, EVERYTHING, search.database, way)


@pytest.mark.timeout(300)
def test_the_outbox_alone_loses_no_job(connection: Connection) -> None:
    _, explored = explore(connection, OUTBOX)

    assert explored.worlds > 1_000


@pytest.mark.timeout(300)
def test_a_job_with_a_deadline_starts_or_expires(connection: Connection) -> None:
    _, explored = explore(connection, DEADLINE)

    assert explored.worlds > 1_000


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_no_promise_is_broken_with_more_of_everything(connection: Connection) -> None:
    _, explored = explore(connection, WIDE)

    assert explored.worlds > 10_000
