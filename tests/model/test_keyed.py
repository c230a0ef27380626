"""One job per idempotency key, in every order of clients, processes that die and answers that are lost."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine

from tests.model.keyed_scenes import BUGS, SCENES, go_through
from tests.model.prepared import tuned
from tests.model.violation import Violation


@pytest.fixture(scope="module")
def engine(connection: Connection) -> Iterator[Engine]:
    # What fails in a pipeline, as some of it must, leaves plans that psycopg takes for made until it forgets them all.
    engine = tuned(connection.engine.url, keeps_plans=False, pool_size=5)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("name", SCENES)
def test_a_key_makes_one_job_in_every_order(engine: Engine, name: str) -> None:
    explored = go_through(engine, SCENES[name])

    print(explored)
    assert explored.orders == SCENES[name].orders


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_is_found(engine: Engine, bug: str) -> None:
    plant, scene, promise = BUGS[bug]

    with pytest.raises(Violation) as found:
        go_through(engine, SCENES[scene], plant)

    print(found.value)
    assert found.value.promise == promise and found.value.trace
