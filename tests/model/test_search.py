"""Every world that the adversary can reach, and from each the way to an end."""

import pytest
from sqlalchemy import Connection

from tests.model.search import Explored, searching
from tests.model.sizes import DEADLINE, EVERYTHING, OUTBOX, WIDE
from tests.model.world import Rules


def explore(connection: Connection, rules: Rules) -> Explored:
    with searching(connection, rules) as search:
        explored = search.run()
    print(explored)
    return explored


@pytest.mark.timeout(300)
def test_no_promise_is_broken_in_any_world(connection: Connection) -> None:
    explored = explore(connection, EVERYTHING)

    assert explored.worlds > 1_000 and explored.database_states > 100 and explored.depth > 10


def test_the_outbox_alone_loses_no_job(connection: Connection) -> None:
    explored = explore(connection, OUTBOX)

    assert explored.worlds > 1_000


def test_a_job_with_a_deadline_starts_or_expires(connection: Connection) -> None:
    explored = explore(connection, DEADLINE)

    assert explored.worlds > 1_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_promise_is_broken_with_more_of_everything(connection: Connection) -> None:
    explored = explore(connection, WIDE)

    assert explored.worlds > 10_000
