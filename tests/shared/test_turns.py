"""Who gives way to whom, and when nobody does."""

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func

from shared.jobs import attempts, turns
from shared.jobs.attempts import Claim
from shared.jobs.rows import Attempt, Share
from shared.jobs.state import AttemptOutcome, JobState, Priority
from tests.shared.desk import SETTINGS, TERMS, Desk


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

    assert desk.work(turns.preempt) == [training.job_id]
    assert desk.work(turns.preempt) == []
    assert desk.work(lambda s: attempts.heartbeat(s, training.job_id, 1, lease=TERMS.lease)).preempt
    ended = desk.work(lambda s: attempts.hand_back(s, training.job_id, 1, preempted=True))
    assert ended == JobState.QUEUED
    assert desk.work(lambda s: s.get_one(Attempt, (training.job_id, 1))).outcome == AttemptOutcome.PREEMPTED
    assert desk.job(training.job_id).interruptions == 1


def test_the_next_attempt_need_not_give_way(desk: Desk, training: Claim) -> None:
    wait(desk)
    desk.work(turns.preempt)
    desk.work(lambda s: attempts.hand_back(s, training.job_id, 1, preempted=True))
    desk.claim("w1")
    desk.claim("w2")

    assert not desk.work(lambda s: attempts.heartbeat(s, training.job_id, 2, lease=TERMS.lease)).preempt


@pytest.mark.parametrize("priority", [Priority.LOW, Priority.NORMAL])
def test_nobody_gives_way_to_what_is_not_urgent(desk: Desk, training: Claim, priority: Priority) -> None:
    wait(desk, priority)

    assert desk.work(turns.preempt) == []


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_nobody_gives_way_while_another_worker_can_take_it(desk: Desk, training: Claim, state: str) -> None:
    wait(desk)
    desk.worker("w2", "generate", state=state)

    assert desk.work(turns.preempt) == []


@pytest.mark.parametrize(("queue", "state"), [("train", "idle"), ("generate", "stopped"), ("generate", "draining")])
def test_a_worker_that_cannot_take_it_changes_nothing(desk: Desk, training: Claim, queue: str, state: str) -> None:
    wait(desk)
    desk.worker("w2", queue, state=state)

    assert desk.work(turns.preempt) == [training.job_id]


def test_an_urgent_training_does_not_give_way(desk: Desk, training: Claim) -> None:
    desk.force(training.job_id, priority=Priority.HIGH.rank)
    wait(desk)

    assert desk.work(turns.preempt) == []


def test_of_two_trainings_the_less_urgent_gives_way_and_one_is_enough(desk: Desk, training: Claim) -> None:
    desk.worker("w2", "train", "generate", state="busy")
    low = desk.submit(priority="low")
    desk.claim("w2")
    wait(desk)

    assert desk.work(turns.preempt) == [low.id]
    assert desk.work(turns.preempt) == []


class Drawing:
    """Generate jobs of a tenant: some on a device, some in line."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def wait(self, model: str, *, seconds: float = 5.0, priority: Priority = Priority.NORMAL, **columns: Any) -> UUID:
        """One has been waiting for so long."""
        job = self.desk.submit()
        since = func.clock_timestamp() - timedelta(seconds=seconds)
        about = {"type": "generate", "queue": "generate", "inputs": {"version_id": model}, "priority": priority.rank}
        self.desk.force(job.id, queued_at=since, **(about | columns))
        return job.id

    def run(self, model: str, worker: str = "w1", **columns: Any) -> Claim:
        """One has begun."""
        job = self.desk.submit()
        # Nobody looks for a model as it is claimed.
        self.desk.force(job.id, type="export", queue=job.id.hex)
        claim = self.desk.claim(worker, [job.id.hex])
        about = {"type": "generate", "queue": "generate", "inputs": {"version_id": model}}
        self.desk.force(job.id, **(about | columns))
        self.desk.worker(worker, "generate", state="busy")
        return claim

    def had(self, seconds: float) -> None:
        """Its tenant has had so much of the devices."""
        self.desk.work(lambda session: session.merge(Share(tenant_id=self.desk.tenant_id, attained=seconds)))


def end_slices(desk: Desk, after: float = 0.0) -> list[str]:
    return desk.work(lambda s: turns.end_slices(s, time_slice=timedelta(seconds=after), terms=TERMS))


@pytest.fixture
def mine(desk: Desk) -> Drawing:
    return Drawing(desk)


@pytest.fixture
def theirs(desk: Desk) -> Drawing:
    return Drawing(Desk(desk.url, desk.engine))


def is_asked(claim: Claim, desk: Desk) -> bool:
    return desk.work(lambda s: attempts.heartbeat(s, claim.job_id, claim.fence, lease=TERMS.lease)).preempt


def test_after_its_slice_a_company_gives_way_to_another_model_and_goes_behind_it(mine: Drawing, desk: Desk) -> None:
    long_ago = func.clock_timestamp() - timedelta(minutes=1)
    both = [mine.run("digits", queued_at=long_ago), mine.run("digits", queued_at=long_ago)]
    other = mine.wait("faces")

    assert end_slices(desk, after=60) == []
    assert end_slices(desk) == ["w1"]
    assert end_slices(desk) == []
    assert [is_asked(claim, desk) for claim in both] == [True, True]
    ended = [desk.work(lambda s, one=one: attempts.hand_back(s, one.job_id, 1, preempted=True)) for one in both]
    assert ended == [JobState.QUEUED] * 2
    queued_at = [desk.job(one).queued_at for one in (other, *(claim.job_id for claim in both))]
    assert queued_at == sorted(queued_at)


def test_a_training_that_gives_way_keeps_its_place(desk: Desk, training: Claim) -> None:
    before = desk.job(training.job_id).queued_at

    desk.work(lambda s: attempts.hand_back(s, training.job_id, 1, preempted=True))

    assert desk.job(training.job_id).queued_at == before


def test_what_can_share_the_device_ends_no_slice(mine: Drawing, desk: Desk) -> None:
    mine.run("digits")
    mine.wait("digits")

    assert end_slices(desk) == []


@pytest.mark.parametrize("alone", ["who runs", "who waits"])
def test_who_is_to_be_tried_alone_shares_nothing(mine: Drawing, desk: Desk, alone: str) -> None:
    mine.run("digits", alone=alone == "who runs")
    mine.wait("digits", alone=alone == "who waits")

    assert end_slices(desk) == ["w1"]


def test_a_job_behind_those_that_could_join_ends_the_slice_as_well(mine: Drawing, desk: Desk) -> None:
    mine.run("digits")
    for _ in range(20):
        mine.wait("digits", seconds=9)
    mine.wait("faces")

    assert end_slices(desk) == ["w1"]


@pytest.mark.parametrize(("model", "had", "asked"), [
    ("faces", 50, []), ("faces", 10, ["w1"]), ("digits", 10, ["w1"]), ("digits", 50, []),
])  # fmt: skip
def test_another_tenant_gets_its_turn_when_it_has_had_less(
    mine: Drawing, theirs: Drawing, desk: Desk, model: str, had: float, asked: list[str]
) -> None:
    mine.run("digits")
    theirs.wait(model)
    mine.had(30)
    theirs.had(had)

    assert end_slices(desk) == asked


def test_the_quantum_of_who_runs_decides_nothing(mine: Drawing, theirs: Drawing, desk: Desk) -> None:
    """It is not counted any more once the job is handed back, which would then be claimed again at once."""
    mine.run("digits")
    theirs.wait("faces")
    theirs.had(SETTINGS.quantum.total_seconds() / 2)

    assert end_slices(desk) == []


@pytest.mark.parametrize(("priority", "asked"), [(Priority.LOW, []), (Priority.HIGH, ["w1"])])
def test_urgency_goes_before_what_tenants_have_had(
    mine: Drawing, theirs: Drawing, desk: Desk, priority: Priority, asked: list[str]
) -> None:
    mine.run("digits")
    theirs.wait("faces", priority=priority)
    (theirs if priority == Priority.HIGH else mine).had(1000)

    assert end_slices(desk) == asked


@pytest.mark.parametrize("state", ["idle", "leaving"])
def test_no_slice_ends_while_somebody_else_takes_it(mine: Drawing, desk: Desk, state: str) -> None:
    mine.run("digits")
    mine.wait("faces")
    if state == "leaving":
        mine.run("digits", "w2", state=JobState.CANCELING)
    desk.worker("w2", "generate", state="idle" if state == "idle" else "busy")

    assert end_slices(desk) == []


def test_who_has_had_the_device_for_longest_gives_way_and_one_is_enough(mine: Drawing, desk: Desk) -> None:
    mine.run("digits", "w2")
    mine.run("faces", "w1")
    mine.wait("cats")
    mine.wait("dogs")

    assert end_slices(desk) == ["w2"]
    assert end_slices(desk) == []


def test_who_came_only_now_may_find_an_idle_worker(mine: Drawing, desk: Desk) -> None:
    mine.run("digits")
    mine.wait("faces", seconds=0)

    assert end_slices(desk) == []


@pytest.mark.parametrize("columns", [{"queue": "train"}, {"not_before": func.clock_timestamp() + timedelta(hours=1)}])
def test_who_cannot_start_there_now_ends_no_slice(mine: Drawing, desk: Desk, columns: dict[str, Any]) -> None:
    mine.run("digits")
    mine.wait("faces", **columns)

    assert end_slices(desk) == []


def test_a_training_has_no_slices(desk: Desk, mine: Drawing, training: Claim) -> None:
    mine.wait("faces")

    assert end_slices(desk) == []
    assert not is_asked(training, desk)
