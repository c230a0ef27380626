"""Jobs that share a device: who joins whom, what each has to do with the others' troubles, and what it is charged."""

import signal
import time
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.ids import uuid7
from shared.jobs import requests, upkeep
from shared.jobs.rows import Attempt, Job, Tenant, Usage
from shared.jobs.state import AttemptOutcome, JobState
from tests.worker.conftest import Models, Workplace
from tests.worker.scripted_runner import SEATS


def spans(workplace: Workplace) -> list[Attempt]:
    return sorted(workplace.rows(Attempt), key=lambda attempt: attempt.started_at or 0)


def seconds(attempt: Attempt) -> float:
    assert attempt.started_at is not None
    assert attempt.ended_at is not None
    return (attempt.ended_at - attempt.started_at).total_seconds()


def test_jobs_of_one_model_share_the_device(workplace: Workplace, models: Models) -> None:
    version = models.version()
    jobs = [models.job(version, ["steps", 10, 0.05]) for _ in range(SEATS)]

    workplace.supervisor().run_next()

    attempts = spans(workplace)
    assert [workplace.state(job) for job in jobs] == [JobState.SUCCEEDED] * SEATS
    assert max(one.started_at for one in attempts) < min(one.ended_at for one in attempts)


def test_who_shares_the_device_is_charged_a_part_of_it(workplace: Workplace, models: Models) -> None:
    version = models.version()
    for _ in range(SEATS):
        models.job(version, ["steps", 10, 0.05])

    workplace.supervisor().run_next()

    attempts, spent = spans(workplace), [one.seconds for one in workplace.rows(Usage)]
    passed = (max(one.ended_at for one in attempts) - min(one.started_at for one in attempts)).total_seconds()
    alone = sum(seconds(one) for one in attempts)
    assert sum(spent) == pytest.approx(passed, rel=0.4)
    assert sum(spent) < alone / 2


def test_who_is_alone_is_charged_all_of_it(workplace: Workplace, models: Models) -> None:
    job = models.job(models.version(), ["steps", 10, 0.1])

    workplace.supervisor().run_next()

    (attempt,), (usage,) = workplace.attempts(job), workplace.rows(Usage)
    assert usage.seconds == pytest.approx(seconds(attempt), rel=0.25)


def test_who_stays_longer_is_charged_more(workplace: Workplace, models: Models) -> None:
    version = models.version()
    long, short = models.job(version, ["steps", 30, 0.1]), models.job(version, ["steps", 5, 0.1])

    workplace.supervisor().run_next()

    spent = {usage.job_id: usage.seconds for usage in workplace.rows(Usage)}
    assert spent[long] > 3 * spent[short] > 0


def test_a_job_that_comes_later_joins(workplace: Workplace, models: Models, wait_until) -> None:
    version = models.version()
    first = models.job(version, ["steps", 20, 0.1])
    running = workplace.background(workplace.supervisor().run_next)
    wait_until(lambda: workplace.get(first).step > 2)

    second = models.job(version, ["steps", 1, 0.01])
    wait_until(lambda: workplace.state(second) == JobState.SUCCEEDED)

    assert workplace.state(first) == JobState.RUNNING
    running.join(20)
    assert workplace.state(first) == JobState.SUCCEEDED


@pytest.mark.parametrize(("samples", "claimed"), [([1, 1, 1, 1], 3), ([2, 2, 2, 2], 2), ([50, 1, 1, 1], 1)])
def test_jobs_of_many_samples_take_as_many_places(
    workplace: Workplace, models: Models, samples: list[int], claimed: int
) -> None:
    version = models.version()
    for number in samples:
        job = models.job(version)
        with Session(workplace.engine) as session, session.begin():
            session.execute(update(Job).where(col(Job.id) == job).values(spec={"num_samples": number}))

    assert len(workplace.supervisor().claim_company(version, room=3, others_wait=True)) == claimed


def test_no_more_join_than_there_is_room_for(workplace: Workplace, models: Models, wait_until) -> None:
    version = models.version()
    jobs = [models.job(version, ["steps", 10, 0.1]) for _ in range(3 * SEATS)]
    running = workplace.background(workplace.supervisor().run_next)

    now = select(func.count()).where(col(Job.id).in_(jobs), col(Job.state) == JobState.RUNNING)
    most = 0
    while running.is_alive():
        with Session(workplace.engine) as session:
            most = max(most, session.scalar(now) or 0)

    assert most == SEATS
    assert {workplace.state(job) for job in jobs} == {JobState.SUCCEEDED}


@pytest.mark.parametrize("columns", [{"alone": True}, {"queue": "elsewhere"}])
def test_who_may_not_join_does_not(workplace: Workplace, models: Models, columns: dict[str, Any]) -> None:
    version = models.version()
    models.job(version, ["steps", 5, 0.05])
    other = models.job(version, ["steps", 1, 0.01], **columns)
    elsewhere = models.job(models.version("letters"), ["steps", 1, 0.01])

    workplace.supervisor().run_next()

    assert workplace.state(other) == workplace.state(elsewhere) == JobState.QUEUED


def test_one_that_must_be_alone_is_joined_by_nobody(workplace: Workplace, models: Models) -> None:
    version = models.version()
    models.job(version, ["steps", 5, 0.05], alone=True)
    other = models.job(version)

    workplace.supervisor().run_next()

    assert workplace.state(other) == JobState.QUEUED


def test_a_cancel_stops_one_and_leaves_the_others(workplace: Workplace, models: Models, wait_until) -> None:
    version = models.version()
    jobs = [models.job(version, ["steps", 20, 0.1], ["publish", "sample", "a", "x"]) for _ in range(3)]
    running = workplace.background(workplace.supervisor().run_next)
    wait_until(lambda: all(workplace.get(job).step > 0 for job in jobs))

    workplace.ask(requests.cancel, jobs[1])
    wait_until(lambda: workplace.state(jobs[1]) == JobState.CANCELED)

    running.join(20)
    assert [workplace.state(job) for job in jobs] == [JobState.SUCCEEDED, JobState.CANCELED, JobState.SUCCEEDED]
    assert [len(workplace.artifacts(job)) for job in jobs] == [1, 0, 1]
    assert {workplace.get(job).fence for job in jobs} == {1}


def test_a_timeout_ends_one_and_leaves_the_others(workplace: Workplace, models: Models) -> None:
    version = models.version()
    slow = models.job(version, ["steps", 100, 0.1], timeout_seconds=1, max_attempts=1)
    steady = models.job(version, ["steps", 25, 0.1])

    workplace.supervisor().run_next()

    assert (workplace.get(slow).error_code, workplace.state(steady)) == ("timeout", JobState.SUCCEEDED)
    assert len(workplace.attempts(steady)) == 1


def test_one_that_does_not_stop_takes_the_others_with_it_and_they_are_tried_again(
    workplace: Workplace, models: Models, wait_until
) -> None:
    version = models.version()
    deaf, other = models.job(version, ["hang", 60]), models.job(version, ["steps", 30, 0.1])
    supervisor = workplace.supervisor(drain_grace=timedelta(seconds=1))
    running = workplace.background(supervisor.run_next)
    wait_until(lambda: workplace.get(other).step > 0)

    workplace.ask(requests.cancel, deaf)
    running.join(20)

    assert (workplace.state(deaf), workplace.state(other)) == (JobState.CANCELED, JobState.QUEUED)
    job = workplace.get(other)
    assert (job.failures, job.losses, job.alone) == (0, 0, True)


def test_a_job_that_kills_the_runner_costs_the_others_no_attempt(workplace: Workplace, models: Models) -> None:
    version = models.version()
    poison = models.job(version, ["steps", 2, 0.1], ["die", signal.SIGKILL])
    others = [models.job(version, ["steps", 5, 0.1]) for _ in range(2)]
    supervisor = workplace.supervisor()

    while supervisor.run_next():
        time.sleep(0.01)

    assert workplace.get(poison).error_code == "worker_lost"
    assert [attempt.outcome for attempt in workplace.attempts(poison)] == [
        AttemptOutcome.INTERRUPTED,
        *[AttemptOutcome.FAILED] * 3,
    ]
    for job in others:
        assert workplace.state(job) == JobState.SUCCEEDED
        assert (workplace.get(job).failures, workplace.get(job).losses) == (0, 0)


def test_what_failed_for_everybody_is_tried_again_alone(workplace: Workplace, models: Models) -> None:
    version = models.version()
    jobs = [models.job(version, ["steps", 3, 0.05], ["part"]) for _ in range(2)]

    supervisor = workplace.supervisor()
    supervisor.run_next()

    assert [(workplace.state(job), workplace.get(job).alone) for job in jobs] == [(JobState.QUEUED, True)] * 2
    assert [workplace.get(job).failures for job in jobs] == [0, 0]
    assert supervisor.device.num_assigned == 0, "a runner that failed for everybody is replaced"


def test_a_hang_of_several_is_charged_to_none_of_them(workplace: Workplace, models: Models) -> None:
    version = models.version()
    jobs = [models.job(version, ["hang", 60]) for _ in range(2)]

    workplace.supervisor(stall=timedelta(seconds=1)).run_next()

    assert [(workplace.state(job), workplace.get(job).alone) for job in jobs] == [(JobState.QUEUED, True)] * 2
    assert [workplace.get(job).failures for job in jobs] == [0, 0]


def test_an_ending_that_sql_refuses_is_no_concern_of_the_others(workplace: Workplace, models: Models) -> None:
    """Two samples of one name: the second one's row is refused."""
    version = models.version()
    twice = [["publish", "sample", "a", "x"], ["publish", "sample", "a", "y"]]
    bad, good = models.job(version, *twice, max_attempts=1), models.job(version, ["steps", 30, 0.1])

    workplace.supervisor().run_next()

    assert (workplace.get(bad).error_code, workplace.state(good)) == ("internal", JobState.SUCCEEDED)
    assert len(workplace.attempts(good)) == 1


def test_a_lease_that_was_lost_when_the_runner_dies_ends_the_company(
    workplace: Workplace, models: Models, wait_until
) -> None:
    version = models.version()
    chatty = [models.job(version, ["chatter", 0.01], ["steps", 200, 0.1]) for _ in range(2)]
    supervisor = workplace.supervisor(beat=timedelta(seconds=60))
    running = workplace.background(supervisor.run_next)
    wait_until(lambda: all(workplace.state(job) == JobState.RUNNING for job in chatty))

    with Session(workplace.engine) as session, session.begin():
        past = {"lease_until": text("clock_timestamp() - interval '1 s'"), "queue": "elsewhere"}
        session.execute(update(Job).where(col(Job.id).in_(chatty)).values(**past))
        upkeep.reap(session)
    time.sleep(0.5)
    supervisor.device.kill()
    running.join(20)

    assert not running.is_alive()


def test_a_lost_lease_costs_the_others_nothing(workplace: Workplace, models: Models, wait_until) -> None:
    version = models.version()
    lost = models.job(version, ["steps", 200, 0.1], ["publish", "sample", "a", "x"])
    steady = models.job(version, ["steps", 20, 0.1])
    running = workplace.background(workplace.supervisor().run_next)
    wait_until(lambda: workplace.get(lost).step > 0 and workplace.get(steady).step > 0)

    with Session(workplace.engine) as session, session.begin():
        past = {"lease_until": text("clock_timestamp() - interval '1 s'")}
        session.execute(update(Job).where(col(Job.id) == lost).values(**past, queue="elsewhere"))
        upkeep.reap(session)
    running.join(20)

    assert (workplace.state(steady), len(workplace.attempts(steady))) == (JobState.SUCCEEDED, 1)
    assert (workplace.state(lost), workplace.artifacts(lost)) == (JobState.QUEUED, [])


def test_a_drained_worker_hands_all_of_them_back(workplace: Workplace, models: Models, wait_until) -> None:
    version = models.version()
    jobs = [models.job(version, ["steps", 100, 0.1]) for _ in range(3)]
    supervisor = workplace.supervisor()
    running = workplace.background(supervisor.run_next)
    wait_until(lambda: all(workplace.get(job).step > 0 for job in jobs))

    supervisor.drain()
    running.join(20)

    assert {workplace.state(job) for job in jobs} == {JobState.QUEUED}
    assert [(workplace.get(job).interruptions, workplace.get(job).alone) for job in jobs] == [(1, False)] * 3


def test_after_a_time_slice_other_models_get_their_turn(workplace: Workplace, models: Models) -> None:
    """Without it, the stream of jobs for one model would never end."""
    version = models.version()
    stream = [models.job(version, ["steps", 10, 0.05])]
    other = models.job(models.version("letters"), ["steps", 1, 0.01])
    stream += [models.job(version, ["steps", 10, 0.05]) for _ in range(29)]
    supervisor = workplace.supervisor(time_slice=timedelta(seconds=1))

    supervisor.run_next()
    supervisor.run_next()

    left = sum(workplace.state(job) == JobState.QUEUED for job in stream)
    assert workplace.state(other) == JobState.SUCCEEDED
    assert 0 < left < 30 - SEATS


def test_a_more_urgent_job_is_not_kept_waiting_by_less_urgent_ones(workplace: Workplace, models: Models) -> None:
    version = models.version()
    first, late = models.job(version, ["steps", 5, 0.05], priority=2), models.job(version, ["steps", 1, 0.01])
    urgent = models.job(models.version("letters"), ["steps", 1, 0.01], priority=2)
    supervisor = workplace.supervisor()

    supervisor.run_next()

    assert [workplace.state(job) for job in (first, urgent, late)] == [
        JobState.SUCCEEDED,
        JobState.QUEUED,
        JobState.QUEUED,
    ]
    supervisor.run_next()
    assert workplace.state(urgent) == JobState.SUCCEEDED


def test_a_warm_model_is_served_first_for_a_slice(workplace: Workplace, models: Models) -> None:
    version, other = models.version(), models.version("letters")
    models.job(version)
    supervisor = workplace.supervisor()
    supervisor.run_next()

    cold, warm = models.job(other), models.job(version)
    supervisor.run_next()

    assert (workplace.state(warm), workplace.state(cold)) == (JobState.SUCCEEDED, JobState.QUEUED)


def test_tenants_share_a_company_in_turns(workplace: Workplace, models: Models) -> None:
    """The order among those that can join is that of all claims: who has had least comes first."""
    version = models.version()
    flood = [models.job(version, ["steps", 10, 0.05]) for _ in range(4 * SEATS)]
    with Session(workplace.engine) as session, session.begin():
        tenant = Tenant(id=uuid7(), name="small")
        session.add(tenant)
    late = models.job(version, ["steps", 1, 0.01])
    with Session(workplace.engine) as session, session.begin():
        small = session.query(Tenant).where(col(Tenant.name) == "small").one()
        session.execute(update(Job).where(col(Job.id) == late).values(tenant_id=small.id))

    supervisor = workplace.supervisor()
    while supervisor.run_next():
        pass

    started = {one.job_id: one.started_at for one in workplace.rows(Attempt)}
    assert started[late] < sorted(started[job] for job in flood)[SEATS]
