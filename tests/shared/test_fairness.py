"""Whose turn it is: tenants share by device-seconds, nobody saves up, nothing starves."""

from collections import Counter
from datetime import timedelta

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from shared.jobs import claims, upkeep
from shared.jobs.rows import Job
from shared.jobs.state import Priority
from tests.shared.line import SETTINGS, TERMS, Line

AGEING = SETTINGS.ageing.total_seconds()


@pytest.fixture
def line(session: Session) -> Line:
    return Line(session)


def test_tenants_get_equal_device_time_whatever_the_size_of_their_jobs(line: Line) -> None:
    short, long = line.tenant("short"), line.tenant("long")
    line.join(short, count=40)
    line.join(long, count=40)

    for _ in range(24):
        claim = line.start()
        line.sleep(30 if claim.tenant_id == long else 5)
        line.finish(claim)
        # Deficit round robin's bound: never further apart than the longest job.
        assert abs(line.served(short) - line.served(long)) <= 30 + 1

    assert line.served(short) > 60


def test_a_newcomer_shares_at_once_and_does_not_take_over(line: Line) -> None:
    old, new = line.tenant("old"), line.tenant("new")
    line.join(old, count=60)
    for _ in range(20):
        line.serve(30)
    line.join(new, count=20)

    turns = [line.serve(30).tenant_id for _ in range(10)]

    assert turns[0] == new or turns[1] == new
    assert Counter(turns) == {old: 5, new: 5}


def test_staying_away_saves_no_credit(line: Line) -> None:
    busy, away = line.tenant("busy"), line.tenant("away")
    line.join(away)
    line.join(busy, count=60)
    for _ in range(30):
        line.serve(30)
    line.join(away, count=20)

    assert Counter(line.serve(30).tenant_id for _ in range(10)) == {busy: 5, away: 5}


def test_what_runs_counts_before_it_is_charged(line: Line) -> None:
    first, second = line.tenant("first"), line.tenant("second")
    line.join(first, count=10)
    line.join(second, count=10)

    running = Counter(line.start(f"w{number}").tenant_id for number in range(6))

    assert running == {first: 3, second: 3}


def test_a_tenant_whose_jobs_fail_pays_for_them_too(line: Line) -> None:
    from shared.errors import InternalError
    from shared.jobs import attempts

    tenant_id = line.tenant("unlucky")
    line.join(tenant_id)
    claim = line.start()
    line.sleep(40)

    attempts.fail(line.session, claim.job_id, claim.fence, InternalError("x"), backoff=timedelta(0))
    attempts.fail(line.session, claim.job_id, claim.fence, InternalError("x"), backoff=timedelta(0))

    assert line.served(tenant_id) == pytest.approx(40, abs=1)
    assert line.attained(tenant_id) == pytest.approx(40, abs=1)


def test_a_clock_that_was_put_back_gives_nobody_anything_back(line: Line) -> None:
    rich, poor = line.tenant("rich"), line.tenant("poor")
    line.join(rich, count=2)
    first, _ = line.join(poor, count=2)
    running = line.start()
    line.sleep(-3600)
    beside = line.start("another")
    line.finish(running)

    assert (running.tenant_id, beside.job_id) == (rich, first)
    assert (line.served(rich), line.attained(rich)) == (0, 0)


def test_a_flood_that_has_waited_long_does_not_pass_by_a_newcomer(line: Line) -> None:
    flood, new = line.tenant("flood"), line.tenant("new")
    line.join(flood, count=60)
    line.sleep(3 * AGEING)
    line.serve(30)
    line.join(new, count=5)

    assert new in [line.serve(30).tenant_id for _ in range(2)]


@pytest.mark.parametrize(("below", "above"), [(Priority.LOW, Priority.NORMAL), (Priority.NORMAL, Priority.HIGH)])
def test_the_higher_priority_comes_first_whoever_asked_first(line: Line, below: Priority, above: Priority) -> None:
    patient, urgent = line.tenant("patient"), line.tenant("urgent")
    line.join(patient, priority=below)
    (wanted,) = line.join(urgent, priority=above)

    assert line.start().job_id == wanted


def test_a_low_job_does_not_starve_under_endless_urgent_ones(line: Line) -> None:
    low, urgent = line.tenant("low"), line.tenant("urgent")
    line.join(low, priority=Priority.NORMAL)
    line.serve(1000)  # it has had more than anybody else
    (waiting,) = line.join(low, priority=Priority.LOW)
    waited = 0.0
    while True:
        line.join(urgent, priority=Priority.HIGH, count=2)
        claim = line.serve(60)
        if claim.job_id == waiting:
            break
        waited += 60
        assert waited < 3 * AGEING

    assert waited >= AGEING


@pytest.mark.parametrize("queues", [["train"], ["train", "upkeep"]])
def test_a_low_job_does_not_starve_while_its_tenant_is_served_in_another_queue(line: Line, queues: list[str]) -> None:
    low, busy = line.tenant("low"), line.tenant("busy")
    (waiting,) = line.join(low, priority=Priority.LOW, queue="train")
    waited = 0.0
    while True:
        line.join(busy, queue="train", count=2)
        line.join(low, priority=Priority.LOW)
        line.serve(1)
        claim = line.serve(60, queues=queues)
        if claim.job_id == waiting:
            break
        waited += 61
        assert waited < 3 * AGEING

    assert waited >= AGEING


def test_jobs_of_one_tenant_and_priority_are_served_in_their_order(line: Line) -> None:
    jobs = line.join(line.tenant("orderly"), count=5)

    assert [line.serve(3).job_id for _ in range(5)] == jobs


def test_a_job_whose_attempt_was_lost_keeps_its_place_and_its_time_in_line(line: Line) -> None:
    first, second = line.join(line.tenant("orderly"), count=2)
    line.sleep(20)
    assert line.start().job_id == first
    line.sleep(100)
    assert [job_id for job_id, _ in upkeep.reap(line.session)] == [first]
    line.sleep(3)

    assert line.start().job_id == first
    waited = line.session.get_one(Job, first, populate_existing=True).timings["queue_ms"]
    assert waited == pytest.approx(23_000, abs=2_000)
    assert line.start().job_id == second


def test_many_claims_at_once_find_a_job_each(engine: Engine) -> None:
    with Session(engine) as setup, setup.begin():
        jobs = Line(setup).join(Line(setup).tenant("crowded"), count=9)
    sessions = [Session(engine) for _ in jobs]
    try:
        taken = [
            claim.job_id
            for number, session in enumerate(sessions)
            for claim in claims.claim(session, worker=f"w{number}", queues=["generate"], terms=TERMS)
        ]
    finally:
        for session in sessions:
            session.rollback()
            session.close()
        with Session(engine) as cleaning, cleaning.begin():
            for job_id in jobs:
                cleaning.delete(cleaning.get_one(Job, job_id))

    assert sorted(taken) == sorted(jobs)


def test_a_claim_that_nobody_confirmed_is_found_again_while_it_holds(line: Line) -> None:
    from shared.ids import uuid7
    from shared.jobs import attempts

    line.join(line.tenant("cut off"))
    token = uuid7()
    (claim,) = claims.claim(line.session, worker="w", queues=["generate"], terms=TERMS, token=token)

    assert claims.reclaim(line.session, token) == [claim]
    assert claims.reclaim(line.session, uuid7()) == []
    attempts.hand_back(line.session, claim.job_id, claim.fence)
    assert claims.reclaim(line.session, token) == []
