"""Two operations at once are one after the other: why the search may take each for a single step.

One operation runs and does not commit yet; another runs on a second connection, to its end or until it waits for the
first; then the first commits. What is then in the database, and what both answered, must be what the model says of
one of the two orders. Every pair of operations of which either changes something is tried, in each kind of state.
"""

import json
from collections.abc import Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import product
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy import ColumnElement, Connection, Engine, text
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.errors import UploadFailed
from shared.jobs import requests
from shared.jobs.rows import Job
from tests.model.canonical import JUMP, Canonical, canonical
from tests.model.database import TABLES, Database, Operation, Refused, perform
from tests.model.operations import Operations
from tests.model.prepared import tuned
from tests.model.search import Search, searching
from tests.model.sizes import EVERYTHING

Outcome = tuple[Hashable, Hashable, Canonical]

PREPARED: Final = {
    "queued": (),
    "running": ("claim",),
    "running, and its lease ran out": ("claim", "jump"),
    "canceling": ("claim", "cancel"),
    "pausing": ("claim", "pause"),
    "pausing, and its lease ran out": ("claim", "pause", "jump"),
    "paused": ("pause",),
    "queued again, for long": ("claim", "hand_back", "relay", "jump"),
}

EMPTY: Final = text(f"WITH {', '.join(f'no_{table.name} AS (DELETE FROM {table.name})' for table in TABLES)} SELECT")
OVERTAKEN: Final[dict[str, Hashable]] = {"claim": None, "record": False, "reap": 0}
"""What an operation answers that does nothing because the other is under way.

A claim passes over a locked row, as if it had looked a moment before there was work; the reaper comes again soon. A
report names the event that it follows; if another comes first, its sender looks again.
"""


@pytest.fixture(scope="module")
def search(connection: Connection) -> Iterator[Search]:
    with searching(connection, EVERYTHING) as search:
        yield search


@pytest.fixture(scope="module")
def engine(connection: Connection) -> Iterator[Engine]:
    engine = tuned(connection.engine.url, pool_size=3, pool_use_lifo=True)
    yield engine
    engine.dispose()


def steps_of(do: Operations) -> dict[str, Operation]:
    attempt = (do.claim(1), do.heartbeat(1), do.record(1))
    endings = (do.finish(1), do.fail(1, UploadFailed), do.postpone(1), do.hand_back(1))
    client, upkeep = (do.cancel(), do.pause(), do.resume()), (do.reap(), do.redispatch(), do.relay())
    return {operation.name: operation for operation in (*attempt, *endings, *client, *upkeep)}


@pytest.mark.parametrize("kind", PREPARED)
def test_two_at_once_are_one_after_the_other(engine: Engine, search: Search, kind: str) -> None:
    database, operations = search.database, steps_of(search.adversary.operations)
    state = search.first.database
    for name in PREPARED[kind]:
        state = database.jump(state, JUMP) if name == "jump" else database.apply(state, operations[name])[1]
    if kind == "queued again, for long":
        operations["claim"] = search.adversary.operations.claim(2)

    pairs = [
        (first, second, in_turn(database, state, first, second))
        for first, second in product(operations.values(), repeat=2)
        if any(database.apply(state, one)[1] != state for one in (first, second))
    ]

    database.rest()
    assert len(pairs) > 20
    for first, second, right in pairs:
        assert at_once(engine, database.rows(state), first, second) in right, f"{first} || {second}"


def test_a_cancel_that_locks_nothing_would_be_noticed(
    engine: Engine, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds the job neither running nor, a moment later, queued."""
    operations, state = search.adversary.operations, search.first.database
    right = in_turn(search.database, state, operations.claim(1), operations.cancel())

    async def unlocked(session: object, tenant_id: UUID, job_id: UUID) -> tuple[ColumnElement[bool], ...]:
        return col(Job.id) == job_id, col(Job.tenant_id) == tenant_id

    search.database.rest()
    monkeypatch.setattr(requests, "_lock", unlocked)

    assert at_once(engine, search.database.rows(state), operations.claim(1), operations.cancel()) not in right


def in_turn(database: Database, state: int, first: Operation, second: Operation) -> list[Outcome]:
    """What the model says of both orders."""
    one, after_one = database.apply(state, first)
    two, after_both = database.apply(after_one, second)
    two_first, after_two = database.apply(state, second)
    one_last, after_all = database.apply(after_two, first)
    orders = [(one, two, database.canonical(after_both)), (one_last, two_first, database.canonical(after_all))]
    # The second may also do nothing, and say so.
    overtaken = [(one, OVERTAKEN[second.name], database.canonical(after_one))] if second.name in OVERTAKEN else []
    return orders + overtaken


def at_once(engine: Engine, rows: Any, first: Operation, second: Operation) -> Outcome:
    """What happens when the second runs while the first has not committed."""
    with engine.connect() as one, engine.connect() as two, engine.connect() as beside:
        beside.execute(text("SELECT model_fill(:rows)"), {"rows": json.dumps(rows)})
        beside.commit()
        try:
            with ThreadPoolExecutor(1) as thread, Session(one) as session:
                answer = perform(session, first)
                other = thread.submit(alone, two, second)
                wait_for(beside, other, {"blocker": backend_of(one), "waiting": backend_of(two)})
                session.rollback() if isinstance(answer, Refused) else session.commit()
                answers = answer, other.result()
            return *answers, canonical(json.loads(beside.scalar(text("SELECT model_read()"))))
        finally:
            beside.rollback()
            beside.execute(EMPTY)
            beside.commit()


def alone(connection: Connection, operation: Operation) -> Hashable:
    with Session(connection) as session:
        answer = perform(session, operation)
        session.rollback() if isinstance(answer, Refused) else session.commit()
        return answer


def backend_of(connection: Connection) -> int:
    raw: Any = connection.connection.driver_connection
    return raw.info.backend_pid


def wait_for(beside: Connection, other: Future[Hashable], backends: dict[str, int]) -> None:
    """Until the other is done, or waits for us."""
    waits = text("SELECT :blocker = ANY(pg_blocking_pids(:waiting))")
    while not wait([other], timeout=0.003).done:
        if beside.scalar(waits, backends):
            return
