"""All chores: that what is shown is done, that it may be done twice, by several, or be cut off."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from threading import Barrier
from typing import Any, TypeVar
from uuid import UUID

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.jobs.rows import Bell, Dataset, DatasetState, Event, IdempotencyKey, Usage, UsageOfDay, Worker
from tests.worker.contents import DAY, HOUR, MONTH, NAMES, NOW, begin_upload, key_of, put_in_order
from tests.worker.house import House
from worker import chores
from worker.chores import Chore

T = TypeVar("T")

LONG_AGO = datetime(2020, 2, 2, 22, tzinfo=UTC)


def usage(house: House, job_id: UUID, fence: int, **columns: Any) -> Usage:
    """Old enough to be summed."""
    about = {"tenant_id": house.tenant_id, "queue": "train", "priority": 1, "seconds": 10.0, "created_at": LONG_AGO}
    return Usage(job_id=job_id, fence=fence, **about | columns)


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
        session.add_all(usage(house, ended, fence) for fence in (1, 2))
        waits = {"name": "d", "state": DatasetState.UPLOADING, "created_at": NOW - MONTH}
        session.add(Dataset(tenant_id=house.tenant_id, source={"key": "uploads/ds_1/source"}, **waits))
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


def sums(house: House) -> dict[tuple[date, str, int], tuple[int, float]]:
    with Session(house.engine) as session:
        rows = session.scalars(select(UsageOfDay)).all()
    return {(row.day, row.queue, row.priority): (row.attempts, row.seconds) for row in rows}


def test_what_old_attempts_used_is_summed_by_days_and_lines(house: House) -> None:
    """A sum that is there already grows; the day is that of UTC; nothing is summed twice."""
    job_id, next_day = house.ended_job(), LONG_AGO + timedelta(hours=3)
    with Session(house.engine) as session, session.begin():
        session.add(usage(house, job_id, 1))
        session.add(usage(house, job_id, 2, created_at=next_day))
        session.add(usage(house, job_id, 3, queue="generate", priority=2, seconds=1.5))
        session.add(usage(house, job_id, 4, created_at=NOW))
    house.chore("usage").do()
    house.transact(lambda s: s.add(usage(house, job_id, 5, seconds=7.0)))

    done = [house.chore("usage").do().total() for _ in range(2)]

    first, second = date(2020, 2, 2), date(2020, 2, 3)
    assert sums(house) == {
        (first, "train", 1): (2, 17.0), (second, "train", 1): (1, 10.0), (first, "generate", 2): (1, 1.5)
    }  # fmt: skip
    assert done == [1, 0]


def test_two_who_sum_at_once_count_each_attempt_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chores, "BATCH", 7)
    job_id = house.ended_job()
    rows = (usage(house, job_id, fence, created_at=LONG_AGO + timedelta(hours=fence)) for fence in range(300))
    house.transact(lambda s: s.add_all(rows))

    with ThreadPoolExecutor(4) as pool:
        done = sum(pool.map(lambda chore: chore.do().total(), [house.chore("usage") for _ in range(4)]))

    assert done == sum(attempts for attempts, _ in sums(house).values()) == 300
    assert sum(seconds for _, seconds in sums(house).values()) == 3000.0


def test_of_datasets_only_those_are_forgotten_whose_upload_is_awaited_for_long(house: House) -> None:
    for state in DatasetState:
        for age in (timedelta(days=6), timedelta(days=8)):
            about = {"name": f"{state} {age.days}", "state": state, "created_at": NOW - age}
            house.add(Dataset(tenant_id=house.tenant_id, source={}, **about))

    put_in_order(house)

    with Session(house.engine) as session:
        left = set(session.scalars(select(col(Dataset.name))))
    assert left == {f"{state} {days}" for state in DatasetState for days in (6, 8)} - {"uploading 8"}


@pytest.mark.parametrize(("name", "setting"), [("usage", "usage_lifetime"), ("announced", "announced_lifetime")])
def test_what_is_kept_for_ever_has_no_chore(house: House, name: str, setting: str) -> None:
    kept = house.settings.model_copy(update={"jobs": house.settings.jobs.model_copy(update={setting: None})})

    assert name not in [each.name for each in chores.chores(kept, house.storage, house.transact)]


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
