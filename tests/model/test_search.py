"""Every world that the adversary can reach, and from each the way to an end."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from sqlalchemy import Connection

from noisemill.local.servers import Postgres
from tests.conftest import _fresh_database as fresh_database
from tests.model import replay
from tests.model.elsewhere import LANES, Elsewhere
from tests.model.search import searching
from tests.model.sizes import WIDE


@pytest.fixture(scope="module")
def searches(postgres: Postgres, migrated_template: str) -> Iterator[Elsewhere]:
    with ExitStack() as stack:
        searches = Elsewhere([stack.enter_context(fresh_database(postgres, migrated_template)) for _ in LANES])
        stack.callback(searches.end)
        yield searches


def test_no_promise_is_broken_in_any_world(searches: Elsewhere) -> None:
    explored = searches.explored("EVERYTHING")

    print(explored)
    assert explored.worlds > 5_000 and explored.database_states > 300 and explored.depth > 10


def test_what_the_search_remembers_holds_on_postgresql(searches: Elsewhere) -> None:
    """See ``replay.py``."""
    assert searches.retraced() == replay.TRACES


@pytest.mark.parametrize("name", ["OUTBOX", "DEADLINE", "OUTAGES"])
def test_no_promise_is_broken_by(searches: Elsewhere, name: str) -> None:
    """OUTBOX: it alone loses no job. DEADLINE: a job that has one starts in time or expires. OUTAGES: storage that is
    away costs no attempt, and is not waited for for ever."""
    explored = searches.explored(name)

    print(explored)
    assert explored.worlds > 500


@pytest.mark.long
def test_no_promise_is_broken_with_more_of_everything(connection: Connection) -> None:
    with searching(connection, WIDE) as search:
        explored = search.run()

    print(explored)
    assert explored.worlds > 10_000
