"""The rules of a legal history: a legal one has no violation, and each planted bug is named by its rule."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from shared.ids import public
from shared.jobs.rows import Artifact, Attempt, Event, Job, Model, ModelVersion, Usage
from shared.jobs.state import AttemptOutcome, JobState, JobType
from tests.chaos.checker import Checker
from tests.chaos.history import History
from tests.chaos.load import Ticket

TENANT, JOB, OTHER = UUID(int=1), UUID(int=2), UUID(int=3)
NAME = public("job", JOB)
START = datetime(2026, 1, 1, tzinfo=UTC)
DIGEST = "5a" * 32


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def artifact(name: str, fence: int, kind: str) -> Artifact:
    return Artifact(
        tenant_id=TENANT, job_id=JOB, fence=fence, kind=kind, name=name, key=f"jobs/{NAME}/{fence}/{name}",
        size_bytes=3, sha256=DIGEST, media_type="image/png", details={},
    )  # fmt: skip


def attempt(fence: int, outcome: AttemptOutcome, began: float, ended: float) -> Attempt:
    return Attempt(
        job_id=JOB, fence=fence, worker="w", outcome=outcome, started_at=at(began), ended_at=at(ended)
    )  # fmt: skip


def event(seq: int, kind: str, fence: int, state: str = "") -> Event:
    said = {"state": state, "state_version": seq} if kind == "job.state" else {}
    return Event(job_id=JOB, seq=seq, type=kind, data={"attempt": fence, **said})


def usage(fence: int) -> Usage:
    return Usage(job_id=JOB, fence=fence, tenant_id=TENANT, queue="generate", priority=1, seconds=1.0)


@pytest.fixture
def history() -> History:
    """A job whose first attempt left a checkpoint and was lost, and whose second succeeded."""
    job = Job(
        id=JOB, tenant_id=TENANT, type=JobType.TRAIN, queue="train", spec={}, summary="a job", max_attempts=3,
        state=JobState.SUCCEEDED, fence=2, losses=1, event_seq=7, state_version=9, completed_at=at(20),
    )  # fmt: skip
    artifacts = [artifact("checkpoint", 1, "checkpoint"), artifact("weights", 2, "weights")]
    events = [
        event(1, "job.state", 0, "queued"),
        event(2, "job.state", 1, "running"),
        event(3, "job.progress", 1),
        event(4, "job.state", 1, "queued"),
        event(5, "job.state", 2, "running"),
        event(6, "job.progress", 2),
        event(7, "job.state", 2, "succeeded"),
    ]
    version = ModelVersion(
        model_id=OTHER, version=1, family="vae", spec={}, info={}, metrics={}, job_id=JOB,
        weights={"key": artifacts[1].key, "sha256": DIGEST},
    )  # fmt: skip
    return History(
        jobs=[job],
        attempts=[attempt(1, AttemptOutcome.LOST, 0, 10), attempt(2, AttemptOutcome.SUCCEEDED, 11, 20)],
        events=events,
        artifacts=artifacts,
        usage=[usage(1), usage(2)],
        versions=[version],
        datasets=[],
        objects={one.key: (3, DIGEST) for one in artifacts} | {f"jobs/{NAME}/1/weights": (3, DIGEST)},
    )


def checker(history: History, **told: str) -> Checker:
    ticket = Ticket(job_id=NAME, request="train-0", ends=frozenset({"succeeded"}), told=told)
    return Checker(history, [ticket], {"train-0": {"weights": DIGEST}})


def violations(checker: Checker) -> Iterator[str]:
    for rule in RULES:
        yield from getattr(checker, rule)()


RULES = ("lost", "duplicates", "wrong_bytes", "objects", "endings", "attempts", "events", "usage")


def test_a_legal_history_has_no_violation(history: History) -> None:
    assert list(violations(checker(history))) == []
    assert checker(history).orphans() == 1


def test_housekeeping_leaves_no_object_without_a_row(history: History) -> None:
    (orphan,) = history.objects.keys() - {one.key for one in history.artifacts}
    assert [found.split()[0] for found in checker(history).left_over()] == [orphan]
    del history.objects[orphan]
    assert list(checker(history).left_over()) == []

    removed = history.artifacts[0]
    removed.removed_at = datetime.now(UTC)

    assert [found.split()[0] for found in checker(history).left_over()] == [removed.key]


def plant(rule: str) -> Callable[[Callable[[History], object]], Callable[[History], object]]:
    """Name the rule that must find what the function plants."""

    def register(bug: Callable[[History], object]) -> Callable[[History], object]:
        BUGS[bug.__name__] = (rule, bug)
        return bug

    return register


BUGS: dict[str, tuple[str, Callable[[History], object]]] = {}


@plant("lost")
def the_job_vanished(history: History) -> None:
    history.jobs.clear()


@plant("lost")
def the_job_runs_for_ever(history: History) -> None:
    history.jobs[0].state = JobState.RUNNING


@plant("duplicates")
def a_request_made_two_jobs(history: History) -> None:
    twin = deepcopy(history.jobs[0])
    twin.id = OTHER
    history.jobs.append(twin)


@plant("duplicates")
def both_attempts_succeeded(history: History) -> None:
    history.attempts[0].outcome = AttemptOutcome.SUCCEEDED


@plant("duplicates")
def two_results_are_visible(history: History) -> None:
    history.artifacts.append(artifact("weights", 1, "weights"))


@plant("duplicates")
def two_versions_were_registered(history: History) -> None:
    history.versions.append(deepcopy(history.versions[0]))


@plant("wrong_bytes")
def the_weights_differ_from_the_undisturbed_run(history: History) -> None:
    history.artifacts[1].sha256 = "00" * 32


@plant("wrong_bytes")
def a_result_is_missing(history: History) -> None:
    del history.artifacts[1]


@plant("objects")
def the_object_is_missing(history: History) -> None:
    del history.objects[history.artifacts[1].key]


@plant("objects")
def the_object_is_half(history: History) -> None:
    history.objects[history.artifacts[1].key] = (1, DIGEST)


@plant("objects")
def the_version_names_weights_of_a_dead_attempt(history: History) -> None:
    history.versions[0].weights = {"key": f"jobs/{NAME}/1/weights", "sha256": DIGEST}


@plant("endings")
def the_job_failed(history: History) -> None:
    history.jobs[0].state = JobState.FAILED


@plant("attempts")
def a_fence_was_skipped(history: History) -> None:
    history.jobs[0].fence = history.attempts[1].fence = 3


@plant("attempts")
def two_attempts_ran_at_once(history: History) -> None:
    history.attempts[0].ended_at = at(12)


@plant("attempts")
def an_attempt_never_ended(history: History) -> None:
    history.attempts[0].ended_at = None


@plant("attempts")
def a_dead_attempt_s_result_is_visible(history: History) -> None:
    history.artifacts[1].fence = 1


@plant("attempts")
def a_loss_was_counted_twice(history: History) -> None:
    history.jobs[0].losses = 2


@plant("events")
def an_event_is_missing(history: History) -> None:
    del history.events[2]


@plant("events")
def the_first_attempt_speaks_in_the_second(history: History) -> None:
    history.events[5].data = {"attempt": 1}


@plant("events")
def the_job_ended_twice(history: History) -> None:
    history.events.append(event(8, "job.state", 2, "succeeded"))
    history.jobs[0].event_seq = 8


@plant("events")
def it_succeeded_while_canceling(history: History) -> None:
    history.events[5] = event(6, "job.state", 2, "canceling")


@plant("events")
def the_version_went_back(history: History) -> None:
    history.jobs[0].state_version = 6


@plant("usage")
def an_attempt_was_charged_for_nothing(history: History) -> None:
    history.usage.append(usage(3))


@plant("usage")
def a_lost_attempt_was_not_charged(history: History) -> None:
    del history.usage[0]


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_by_the_rule_meant_for_it(history: History, bug: str) -> None:
    rule, corrupt = BUGS[bug]

    corrupt(history)

    assert list(getattr(checker(history), rule)())


WAITING = UUID(int=4)


def wait(history: History, model: str = "made@1", began: float = 21) -> Checker:
    """Another job that waited for the model which the first makes."""
    history.models = [Model(id=OTHER, tenant_id=TENANT, name="made")]
    history.versions[0].id = UUID(int=9)
    history.jobs.append(
        Job(
            id=WAITING, tenant_id=TENANT, type=JobType.GENERATE, queue="generate", spec={"model": model}, summary="w",
            inputs={"version_id": str(UUID(int=9))}, max_attempts=3, state=JobState.SUCCEEDED, fence=1, event_seq=0,
        )
    )  # fmt: skip
    won = attempt(1, AttemptOutcome.SUCCEEDED, began, began + 5)
    won.job_id = WAITING
    history.attempts.append(won)
    first = Ticket(job_id=NAME, request="train-0", ends=frozenset({"succeeded", "failed"}))
    well = frozenset({"succeeded"})
    return Checker(history, [first, Ticket(job_id=public("job", WAITING), request="x", ends=well, needs=NAME)], {})


def said(checker: Checker) -> str:
    return "; ".join([*checker.waits(), *checker.endings()])


def test_who_waited_runs_after_the_other_on_what_that_made(history: History) -> None:
    assert said(wait(history)) == ""


def test_a_start_before_the_other_had_ended_is_found(history: History) -> None:
    assert "before" in said(wait(history, began=19))


def test_another_version_than_the_one_that_was_made_is_found(history: History) -> None:
    checker = wait(history, model="made@2")
    history.jobs[1].inputs = {"version_id": str(UUID(int=8))}

    assert [found.split()[1] for found in checker.waits()] == ["its", "read"]


def test_who_ran_though_the_other_failed_is_found(history: History) -> None:
    history.jobs[0].state = JobState.FAILED

    found = said(wait(history))

    assert "began" in found and "ended succeeded, not ['failed']" in found


def test_who_ends_with_the_other_says_so(history: History) -> None:
    checker = wait(history)
    history.jobs[0].state, history.jobs[1].state = JobState.FAILED, JobState.FAILED
    history.attempts.pop()
    history.jobs[1].error_code = "timeout"

    assert "failed with timeout, not dependency_failed" in said(checker)
    history.jobs[1].error_code = "dependency_failed"
    assert said(checker) == ""


def test_a_success_after_an_acknowledged_cancel_is_found(history: History) -> None:
    assert list(checker(history, cancel="canceling").endings())
    assert not list(checker(history, cancel="succeeded").endings())


def test_a_cancel_that_no_client_asked_for_is_an_intervention(history: History) -> None:
    assert checker(history).interventions() == 0

    history.jobs[0].cancel_requested_at = at(5)

    assert checker(history).interventions() == 1
    assert checker(history, cancel="succeeded").interventions() == 0
