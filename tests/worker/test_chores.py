"""All chores: that what is shown is done, that it may be done twice, by several, or be cut off."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from threading import Barrier
from typing import Any, TypeVar

import pytest
from sqlalchemy.orm import Session

from shared.jobs.rows import Bell, Event, IdempotencyKey, Worker
from tests.worker.contents import DAY, HOUR, MONTH, NAMES, NOW, begin_upload, key_of, put_in_order
from tests.worker.house import House
from worker import chores
from worker.chores import Chore

T = TypeVar("T")


def in_disorder(house: House) -> House:
    """Something for each chore, beside as much that is none of its business."""
    lost, _ = house.running_job(max_attempts=1)
    house.upload(lost, 1, "preview-lost")
    begin_upload(house, key_of(lost, 1, "large"))
    house.lose(lost)
    _, claim = house.running_job()
    house.upload(claim.job_id, claim.fence, "preview-running")
    begin_upload(house, key_of(claim.job_id, claim.fence, "large"))
    ended = house.ended_job(ago=2 * MONTH, event_seq=3)
    house.artifact(ended, "checkpoint-old")
    house.artifact(ended, "sample-kept")
    house.artifact(ended, "preview-expired", expires_at=NOW - HOUR)
    house.artifact(ended, "preview-removed", removed_at=NOW - HOUR)
    with Session(house.engine) as session, session.begin():
        kinds = enumerate(("job.state", "job.metric", "job.state"), start=1)
        session.add_all(Event(job_id=ended, seq=seq, type=kind, data={}) for seq, kind in kinds)
        session.add(Bell(job_id=ended, sent_at=NOW - 2 * HOUR))
        session.add(IdempotencyKey(tenant_id=house.tenant_id, key="k", request_sha256="0", created_at=NOW - 2 * DAY))
        session.add(Worker(name="w", host="h", pid=1, queues=[], state="idle", seen_at=NOW - 2 * DAY))
    return house


def test_every_chore_is_tested_here(house: House) -> None:
    assert [each.name for each in chores.chores(house.settings, house.storage, house.transact)] == NAMES


def rows_of(due: dict[str, Any]) -> int:
    """What doing it counts: a log is its events, and the job whose it is."""
    return due.get("events", 0) + 1


def test_what_is_shown_beforehand_is_done_and_nothing_is_changed_by_showing(house: House) -> None:
    in_disorder(house)
    for name in NAMES:
        before = house.everything()
        shown = list(house.chore(name).find())

        assert house.everything() == before, name
        assert shown, name
        assert house.chore(name).do().total() == sum(map(rows_of, shown)), name
        assert house.everything() != before, name


def test_what_was_done_is_not_due_any_more(house: House) -> None:
    in_disorder(house)
    for name in NAMES:
        chore = house.chore(name)
        while chore.do().total():
            pass
        before = house.everything()

        assert (list(chore.find()), chore.do().total()) == ([], 0), name
        assert house.everything() == before, name


def test_two_at_once_do_what_one_does(house: House) -> None:
    in_disorder(house)
    start = Barrier(2)

    def work(both: list[Chore]) -> None:
        for chore in both:
            start.wait(20)
            chore.do()

    twice = [house.chore(name) for name in NAMES for _ in range(3)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, [twice, [house.chore(chore.name) for chore in twice]]))

    assert [name for name in NAMES if list(house.chore(name).find())] == []
    assert house.names() == {"preview-running", "sample-kept"}


class CutOffError(Exception):
    """The process ended here."""


def cut_off(house: House, chore: Any, *, before: int) -> Chore:
    """``chore``, ended just before this commit; what it did to storage by then is done."""
    commits = iter(range(1000))

    def transact(work: Callable[[Session], T]) -> T:
        with Session(house.engine) as session:
            result = work(session)
            if next(commits) == before:
                raise CutOffError
            session.commit()
            return result

    chore._transact = transact
    return chore


@pytest.mark.parametrize("before", range(4))
def test_a_house_that_was_left_in_the_middle_is_put_in_order_by_the_next(house: House, before: int) -> None:
    in_disorder(house)
    for name in NAMES:
        house.chore("orphans").do()
        chore = cut_off(house, house.chore(name), before=before)
        with suppress(CutOffError):
            chore.do()

    put_in_order(house)

    assert house.names() == {"preview-running", "sample-kept"}
    assert [upload.key.split("/")[-1] for upload in house.storage.unfinished("")] == ["large"]
    assert [len(list(house.chore(name).find())) for name in NAMES] == [0] * len(NAMES)


def test_what_is_young_is_not_forgotten(house: House) -> None:
    job_id = house.ended_job()
    with Session(house.engine) as session, session.begin():
        session.add(Bell(job_id=job_id))
        session.add(Bell(job_id=job_id, sent_at=NOW))
        session.add(IdempotencyKey(tenant_id=house.tenant_id, key="k", request_sha256="0"))
        session.add(Worker(name="w", host="h", pid=1, queues=[], state="idle", seen_at=NOW - timedelta(hours=23)))
    before = house.everything()

    put_in_order(house)

    assert house.everything() == before
