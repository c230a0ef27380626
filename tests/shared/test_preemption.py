"""Who gives way to whom, and when nobody does."""

import pytest

from shared.jobs import attempts, upkeep
from shared.jobs.attempts import Claim
from shared.jobs.rows import Attempt
from shared.jobs.state import AttemptOutcome, JobState, Priority
from tests.shared.desk import TERMS, Desk


@pytest.fixture
def training(desk: Desk) -> Claim:
    desk.submit(priority="normal")
    desk.worker("w1", "train", "generate", state="busy")
    return desk.claim("w1")


def wait(desk: Desk, priority: Priority = Priority.HIGH) -> None:
    """Have a job wait that is not a training."""
    job = desk.submit(priority="normal")
    desk.force(job.id, type="export", queue="generate", priority=priority.rank)


def test_a_training_gives_way_to_an_urgent_job_that_nobody_else_can_take(desk: Desk, training: Claim) -> None:
    wait(desk)

    assert desk.work(upkeep.preempt) == [training.job_id]
    assert desk.work(upkeep.preempt) == []
    assert desk.work(lambda s: attempts.heartbeat(s, training.job_id, 1, lease=TERMS.lease)).preempt
    ended = desk.work(lambda s: attempts.hand_back(s, training.job_id, 1, preempted=True))
    assert ended == JobState.QUEUED
    assert desk.work(lambda s: s.get_one(Attempt, (training.job_id, 1))).outcome == AttemptOutcome.PREEMPTED
    assert desk.job(training.job_id).interruptions == 1


def test_the_next_attempt_need_not_give_way(desk: Desk, training: Claim) -> None:
    wait(desk)
    desk.work(upkeep.preempt)
    desk.work(lambda s: attempts.hand_back(s, training.job_id, 1, preempted=True))
    desk.claim("w1")
    desk.claim("w2")

    assert not desk.work(lambda s: attempts.heartbeat(s, training.job_id, 2, lease=TERMS.lease)).preempt


@pytest.mark.parametrize("priority", [Priority.LOW, Priority.NORMAL])
def test_nobody_gives_way_to_what_is_not_urgent(desk: Desk, training: Claim, priority: Priority) -> None:
    wait(desk, priority)

    assert desk.work(upkeep.preempt) == []


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_nobody_gives_way_while_another_worker_can_take_it(desk: Desk, training: Claim, state: str) -> None:
    wait(desk)
    desk.worker("w2", "generate", state=state)

    assert desk.work(upkeep.preempt) == []


@pytest.mark.parametrize(("queue", "state"), [("train", "idle"), ("generate", "stopped"), ("generate", "draining")])
def test_a_worker_that_cannot_take_it_changes_nothing(desk: Desk, training: Claim, queue: str, state: str) -> None:
    wait(desk)
    desk.worker("w2", queue, state=state)

    assert desk.work(upkeep.preempt) == [training.job_id]


def test_an_urgent_training_does_not_give_way(desk: Desk, training: Claim) -> None:
    desk.force(training.job_id, priority=Priority.HIGH.rank)
    wait(desk)

    assert desk.work(upkeep.preempt) == []


def test_of_two_trainings_the_less_urgent_gives_way_and_one_is_enough(desk: Desk, training: Claim) -> None:
    desk.worker("w2", "train", "generate", state="busy")
    low = desk.submit(priority="low")
    desk.claim("w2")
    wait(desk)

    assert desk.work(upkeep.preempt) == [low.id]
    assert desk.work(upkeep.preempt) == []
