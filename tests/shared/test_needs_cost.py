"""However many wait, and however many ways lead to a model, each is looked at once: counted in statements and rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from shared.jobs import named, needs
from shared.jobs.rows import Job
from shared.wire import TrainRequest
from tests.shared.desk import Desk
from tests.shared.needing import ask, diffuse, draw, expire, ref


@contextmanager
def statements(engine: Any) -> Iterator[list[str]]:
    """Those that are executed meanwhile."""
    said = list[str]()

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        said.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    yield said
    event.remove(engine, "before_cursor_execute", note)


def num_to_name(desk: Desk, job: Job) -> int:
    """Statements that it takes to name the model that this job will make."""

    async def find(session: AsyncSession) -> int:
        with statements(session.get_bind()) as said:
            await named.find(session, desk.tenant_id, ref(job))
        return len(said)

    return desk.do(find)


def test_what_many_ways_lead_to_is_looked_at_once(desk: Desk) -> None:
    base = {"family": "vae", "dataset": f"ds_{desk.dataset_id.hex}", "model": "coded"}
    coded = desk.submit()
    for _ in range(4):
        coded = ask(desk, TrainRequest.model_validate({"type": "train", "spec": base | {"init_from": ref(coded)}}))
    drawn, cost = diffuse(desk, autoencoder=ref(coded)), list[int]()
    for _ in range(3):
        cost.append(num_to_name(desk, drawn))
        drawn = diffuse(desk, init_from=ref(drawn))

    # One more job in the row, and not all that it stands on once more.
    assert cost[2] - cost[1] == cost[1] - cost[0] <= 6


def test_however_many_reasons_are_told_it_is_a_statement_for_each_generation(desk: Desk) -> None:
    first, cost = desk.submit(), list[int]()
    for num_children in (2, 8):
        first = desk.submit()
        for number in range(num_children):
            draw(desk, ref(diffuse(desk, f"m{number}", autoencoder=ref(first))))
        with statements(desk.engine) as said:
            expire(desk, first.id)
        cost.append(len(said))

    assert cost[0] == cost[1]
    drawings = select(col(Job.error_message)).where(col(Job.type) == "generate")
    told = desk.work(lambda session: set(session.scalars(drawings)))
    cause = f"failed: {ref(first)}, whose model it needs, expired"
    assert (len(told), sum(one.endswith(cause) for one in told if one)) == (10, 8)


_SETTLED = """
WITH made AS (
    INSERT INTO jobs (id, tenant_id, type, queue, spec, inputs, summary, state, max_attempts, completed_at)
    SELECT gen_random_uuid(), :tenant_id, 'generate', 'generate', '{}', '{}', 'done', 'succeeded', 3, clock_timestamp()
    FROM generate_series(1, 10000) RETURNING id
) INSERT INTO needs (job_id, field, needs_job_id) SELECT id, 'model', id FROM made"""


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


def test_a_round_looks_at_each_need_of_who_waits_once(desk: Desk) -> None:
    """And at none of those who wait no more, however many there are."""
    first = desk.submit()
    for _ in range(5):
        draw(desk, ref(first))
    desk.work(lambda session: session.execute(text(_SETTLED), {"tenant_id": desk.tenant_id}))
    desk.work(lambda session: session.execute(text("ANALYZE jobs, needs")))

    plan = text(f"EXPLAIN (ANALYZE, FORMAT JSON) {needs._REMAINING}")
    (whole,) = desk.work(lambda session: session.scalars(plan).one())

    read = [node for node in nodes(whole["Plan"]) if node.get("Relation Name") == "needs"]
    assert sum(node["Actual Rows"] * node["Actual Loops"] for node in read) == 5
