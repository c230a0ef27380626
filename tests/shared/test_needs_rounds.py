"""Nobody who waits is left behind, whoever is submitted, locked or ended at that moment: the next round finds them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.errors import NanLoss
from shared.jobs import attempts, needs, requests, upkeep
from shared.jobs.attempts import Claim
from shared.jobs.need_rows import Need
from shared.jobs.rows import Bell, Job
from shared.jobs.state import JobState
from shared.wire import TrainRequest
from tests.conftest import WaitUntil
from tests.shared.desk import SETTINGS, TERMS, Desk
from tests.shared.needing import ask, diffuse, draw, drawing, ending_well, ref, succeed

ENDINGS: dict[str, Callable[[Session, Claim], object]] = {
    "succeeded": ending_well,
    "failed": lambda session, claim: attempts.fail(
        session, claim.job_id, claim.fence, NanLoss("no number"), backoff=TERMS.lease
    ),
}


def went_the_way_of(desk: Desk, second: Job, ending: str) -> bool:
    if ending == "failed":
        seen = desk.job(second.id)
        return (seen.state, seen.error_code) == (JobState.FAILED, "dependency_failed")
    return desk.claim().job_id == second.id


@pytest.mark.parametrize("ending", ENDINGS)
def test_who_is_submitted_while_the_other_ends_goes_the_way_of_that(desk: Desk, ending: str) -> None:
    first = desk.submit()
    claim = desk.claim()

    with Session(desk.engine) as session, session.begin():
        ENDINGS[ending](session, claim)
        second = draw(desk, ref(first))  # waits for nobody
    assert desk.work(upkeep.settle_needs) == ([second.id] if ending == "failed" else [])

    assert went_the_way_of(desk, second, ending)


@pytest.mark.parametrize("ending", ENDINGS)
def test_who_was_not_committed_when_the_other_ended_goes_the_way_of_that(desk: Desk, ending: str) -> None:
    first = desk.submit()
    claim = desk.claim()

    async def submit(session: Any) -> Job:
        job = await requests.submit(session, desk.tenant_id, drawing(ref(first)), settings=SETTINGS)
        desk.work(lambda other: ENDINGS[ending](other, claim))  # waits for nobody
        return job

    second = desk.do(submit)
    desk.work(upkeep.settle_needs)

    assert went_the_way_of(desk, second, ending)


@pytest.mark.parametrize("ending", ENDINGS)
def test_who_was_passed_over_is_found_by_the_next_round(desk: Desk, ending: str) -> None:
    first = desk.submit()
    second = draw(desk, ref(first))
    claim = desk.claim()

    with Session(desk.engine) as session, session.begin():
        session.execute(select(col(Job.id)).where(col(Job.id) == second.id).with_for_update())
        desk.work(lambda other: ENDINGS[ending](other, claim))
    assert desk.job(second.id).queued_at is None
    assert desk.job(second.id).state is JobState.QUEUED
    failed = desk.work(upkeep.settle_needs)

    assert failed == ([second.id] if ending == "failed" else [])
    assert went_the_way_of(desk, second, ending)
    assert desk.work(upkeep.settle_needs) == []


class Beside:
    """Somebody else's transaction, which goes as far as it gets."""

    def __init__(self, desk: Desk, work: Callable[[], object]) -> None:
        self._desk = desk
        self._before = self._waiting()
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(work)

    def _waiting(self) -> int:
        waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return self._desk.work(lambda session: session.scalar(waiting) or 0)

    def has_come_to_wait(self) -> bool:
        return self._waiting() > self._before

    def answer(self) -> object:
        """What it returned or raised."""
        self._pool.shutdown()
        return self._future.exception() or self._future.result()


def test_two_that_end_at_once_leave_nobody_who_needs_both_behind(desk: Desk, wait_until: WaitUntil) -> None:
    first = desk.submit()
    second = diffuse(desk, "second")
    third = ask(desk, TrainRequest.model_validate({"type": "train", "spec": {
        "family": "diffusion", "dataset": f"ds_{desk.dataset_id.hex}", "model": "third", "autoencoder": ref(first),
    }}))  # fmt: skip
    values = "(:job, 'init_from', :needed, '{}')"
    desk.work(
        lambda s: s.execute(
            text(f"INSERT INTO needs (job_id, field, needs_job_id, told) VALUES {values}"),
            {"job": third.id, "needed": second.id},
        )
    )
    both = [desk.claim(), desk.claim()]

    with Session(desk.engine) as session, session.begin():
        ending_well(session, both[0])
        other = Beside(desk, lambda: succeed(desk, both[1]))
        wait_until(other.has_come_to_wait)
    assert other.answer() is None

    assert desk.claim().job_id == third.id


def test_who_is_looked_at_while_the_last_that_it_needs_ends_does_not_fail(desk: Desk) -> None:
    """Whoever ends that passes over a row that is locked; the model is there only after it was looked for."""
    first, second = desk.submit(), diffuse(desk)
    passed_over, both = draw(desk, ref(first)), draw(desk, ref(first))
    desk.work(lambda s: s.add(Need(job_id=both.id, field="other", needs_job_id=second.id, told={})))
    succeed(desk, desk.claim(queues=["train"]))
    desk.force(passed_over.id, queued_at=None)
    ends = [desk.claim(queues=["train"])]

    def meanwhile(_: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        if "released AS" in statement and ends:
            succeed(desk, ends.pop())

    event.listen(desk.engine, "after_cursor_execute", meanwhile)
    desk.work(upkeep.settle_needs)
    event.remove(desk.engine, "after_cursor_execute", meanwhile)

    assert desk.job(both.id).error_message is None
    desk.work(upkeep.settle_needs)
    assert desk.job(both.id).queued_at is not None


def test_who_is_one_too_many_for_an_end_is_released_by_the_rounds(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where those before it wait for something else besides."""
    monkeypatch.setattr(needs, "_MOST", 2)
    first = desk.submit()
    second = diffuse(desk, "second", autoencoder=ref(first))
    for _ in range(3):
        diffuse(desk, "third", init_from=ref(second))
    waiting = [second, *(draw(desk, ref(first)) for _ in range(4))]
    released: list[int] = []

    def count() -> None:
        released.append(sum(desk.job(one.id).queued_at is not None for one in waiting))

    succeed(desk, desk.claim())
    count()
    for _ in range(2):
        desk.work(upkeep.settle_needs)
        count()

    assert released == [2, 4, 5]


def test_who_waits_keeps_nobody_from_being_rung_for_again(desk: Desk) -> None:
    first = desk.submit()
    succeed(desk, desk.claim())
    held = desk.submit()
    desk.claim()
    for _ in range(upkeep.RUNG_AT_ONCE):
        desk.force(draw(desk, ref(held)).id, priority=2)
    lost = draw(desk, ref(first))
    desk.work(lambda session: session.execute(text("DELETE FROM outbox")))
    desk.force(lost.id, queued_at=text("clock_timestamp() - interval '1 h'"))

    assert desk.work(lambda session: upkeep.redispatch(session, after=timedelta(minutes=1))) == 1
    assert desk.count(Bell, col(Bell.job_id) == lost.id) == 1
