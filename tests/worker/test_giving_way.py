"""Who gives the device away: to a more urgent job, to whoever's turn it is, to a pause, and to nobody in between."""

from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from threading import Event
from typing import Any
from uuid import UUID

import pytest

from shared.jobs import requests
from shared.jobs.state import AttemptOutcome, JobState, JobType
from tests.worker.conftest import Models, Workplace
from worker.supervisor import Supervisor

WaitUntil = Callable[..., object]
LONG = ["train", 60, 0.05, 20]
HIGH = 2


def outcomes(workplace: Workplace, job_id: UUID) -> list[AttemptOutcome | None]:
    return [attempt.outcome for attempt in workplace.attempts(job_id)]


def weights(workplace: Workplace, job_id: UUID) -> str:
    (digest,) = [artifact.sha256 for artifact in workplace.artifacts(job_id) if artifact.kind == "weights"]
    return digest


def training(workplace: Workplace, **columns: object) -> UUID:
    return workplace.job(LONG, type=JobType.TRAIN, **columns)


def work(workplace: Workplace, supervisor: Supervisor, *, until: Event) -> None:
    def loop() -> None:
        while not until.wait(0.02):
            supervisor.run_next()

    workplace.background(loop)


@pytest.fixture
def undisturbed(workplace: Workplace) -> str:
    """Digest of the weights of a training that nobody interrupts."""
    job_id = training(workplace)
    workplace.supervisor("quiet").run_next()
    return weights(workplace, job_id)


def test_an_urgent_job_starts_at_the_next_checkpoint_of_the_only_worker(
    workplace: Workplace, undisturbed: str, wait_until: WaitUntil
) -> None:
    job_id, done, supervisor = training(workplace), Event(), workplace.supervisor()
    ticker = workplace.ticker(supervisor)
    work(workplace, supervisor, until=done)
    wait_until(lambda: workplace.get(job_id).step > 0)

    urgent = workplace.job(["steps", 1, 0.0], priority=HIGH)
    wait_until(lambda: ticker.tick() or workplace.state(urgent) == JobState.SUCCEEDED, timeout=30)
    first = workplace.attempts(job_id)[0]
    wait_until(lambda: workplace.state(job_id) == JobState.SUCCEEDED, timeout=30)
    done.set()

    assert first.outcome == AttemptOutcome.PREEMPTED
    assert outcomes(workplace, job_id) == [AttemptOutcome.PREEMPTED, AttemptOutcome.SUCCEEDED]
    assert (workplace.get(job_id).result or {})["first"] % 20 == 0  # it left where a checkpoint was due
    assert weights(workplace, job_id) == undisturbed


def test_nothing_gives_way_while_another_worker_is_idle(workplace: Workplace, wait_until: WaitUntil) -> None:
    job_id, done = training(workplace), Event()
    busy, idle = workplace.supervisor("busy"), workplace.supervisor("idle")
    tickers = [workplace.ticker(supervisor) for supervisor in (busy, idle)]
    work(workplace, busy, until=done)
    wait_until(lambda: workplace.get(job_id).step > 0)
    for ticker in tickers:
        ticker.tick()

    urgent = workplace.job(["steps", 1, 0.0], priority=HIGH)
    for ticker in tickers:
        ticker.tick()
    idle.run_next()
    wait_until(lambda: workplace.state(job_id) == JobState.SUCCEEDED, timeout=30)
    done.set()

    assert workplace.state(urgent) == JobState.SUCCEEDED
    assert outcomes(workplace, job_id) == [AttemptOutcome.SUCCEEDED]


@pytest.mark.parametrize(
    ("request_", "outcome", "state"),
    [
        (requests.cancel, AttemptOutcome.CANCELED, JobState.CANCELED),
        (requests.pause, AttemptOutcome.PAUSED, JobState.PAUSED),
    ],
)
def test_what_is_more_urgent_does_not_wait_for_the_checkpoint(
    workplace: Workplace, request_: Callable, outcome: AttemptOutcome, state: JobState, wait_until: WaitUntil
) -> None:
    job_id = workplace.job(["train", 10_000, 0.01, 10_000], type=JobType.TRAIN)
    supervisor = workplace.supervisor()
    running = workplace.background(supervisor.run_next)
    wait_until(lambda: workplace.get(job_id).step > 0)
    workplace.job(priority=HIGH)
    ticker = workplace.ticker(supervisor)
    wait_until(lambda: ticker.tick() or workplace.get(job_id).preempt_fence == 1)

    workplace.ask(request_, job_id)
    running.join(20)

    assert (workplace.state(job_id), outcomes(workplace, job_id)) == (state, [outcome])


def test_a_runner_that_dies_before_the_checkpoint_was_not_preempted(
    workplace: Workplace, wait_until: WaitUntil
) -> None:
    job_id = workplace.job(["train", 10_000, 0.01, 10_000], type=JobType.TRAIN)
    supervisor = workplace.supervisor()
    running = workplace.background(supervisor.run_next)
    wait_until(lambda: workplace.get(job_id).step > 0)
    workplace.job(priority=HIGH)
    ticker = workplace.ticker(supervisor)
    wait_until(lambda: ticker.tick() or workplace.get(job_id).preempt_fence == 1)

    supervisor.device.kill()
    running.join(20)

    assert (outcomes(workplace, job_id), workplace.get(job_id).failures) == ([AttemptOutcome.FAILED], 1)


def test_two_models_take_turns_on_a_device_and_lose_nothing(
    workplace: Workplace, models: Models, wait_until: WaitUntil
) -> None:
    done, supervisor = Event(), workplace.supervisor(time_slice=timedelta(seconds=1))
    ticker = workplace.ticker(supervisor)
    long = [models.job(models.version(name), ["train", 150, 0.02, 10]) for name in ("digits", "faces")]
    alone = models.job(models.version("cats"), ["train", 150, 0.02, 10], queue="train")
    work(workplace, supervisor, until=done)

    wait_until(lambda: ticker.tick() or all(workplace.state(job).is_final for job in long), timeout=60)
    wait_until(lambda: workplace.state(alone).is_final, timeout=30)
    done.set()

    assert [workplace.state(job) for job in (*long, alone)] == [JobState.SUCCEEDED] * 3
    for job in long:
        *turns, last = outcomes(workplace, job)
        assert set(turns) == {AttemptOutcome.PREEMPTED}
        assert last == AttemptOutcome.SUCCEEDED
        assert weights(workplace, job) == weights(workplace, alone)
    began: list[list[Any]] = [[one.started_at for one in workplace.attempts(job)] for job in long]
    assert began[0][0] < began[1][0] < began[0][1]
    assert all(later - earlier > timedelta(seconds=1) for times in began for earlier, later in pairwise(times))


def test_a_pause_frees_the_worker_and_a_resume_goes_on_exactly(
    workplace: Workplace, undisturbed: str, wait_until: WaitUntil
) -> None:
    job_id, supervisor = training(workplace), workplace.supervisor()
    running = workplace.background(supervisor.run_next)
    wait_until(lambda: workplace.get(job_id).step > 0)

    workplace.ask(requests.pause, job_id)
    running.join(20)
    other = workplace.job(["steps", 1, 0.0])
    supervisor.run_next()
    paused = workplace.state(job_id)
    workplace.ask(requests.resume, job_id, settings=workplace.settings.jobs)
    supervisor.run_next()

    assert (paused, workplace.state(other)) == (JobState.PAUSED, JobState.SUCCEEDED)
    assert outcomes(workplace, job_id) == [AttemptOutcome.PAUSED, AttemptOutcome.SUCCEEDED]
    assert weights(workplace, job_id) == undisturbed


def test_a_pause_that_is_withdrawn_in_time_only_interrupts(
    workplace: Workplace, undisturbed: str, wait_until: WaitUntil
) -> None:
    job_id, supervisor = training(workplace), workplace.supervisor()
    running = workplace.background(supervisor.run_next)
    wait_until(lambda: workplace.get(job_id).step > 0)
    send = supervisor.device.send

    def withdrawn_at_that_moment(message: dict) -> None:
        if message["type"] == "stop" and workplace.state(job_id) == JobState.PAUSING:
            workplace.ask(requests.resume, job_id, settings=workplace.settings.jobs)
        send(message)

    supervisor.device.send = withdrawn_at_that_moment  # type: ignore[method-assign]
    workplace.ask(requests.pause, job_id)
    running.join(20)
    between = workplace.get(job_id)
    supervisor.run_next()

    assert (between.state, between.interruptions, between.failures) == (JobState.QUEUED, 1, 0)
    assert outcomes(workplace, job_id) == [AttemptOutcome.INTERRUPTED, AttemptOutcome.SUCCEEDED]
    assert weights(workplace, job_id) == undisturbed
