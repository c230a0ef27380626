"""What becomes of an attempt, whatever happens to its runner, its lease, its storage or SQL."""

import hashlib
import signal
import time
from datetime import timedelta

import psutil
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from shared.jobs import claims, requests, upkeep
from shared.jobs.state import AttemptOutcome, JobState
from shared.settings import JobSettings
from shared.storage import Storage
from tests.worker.conftest import Workplace


def cancel(workplace: Workplace, job_id) -> None:
    workplace.ask(requests.cancel, job_id)


def runners() -> list[psutil.Process]:
    """Living runners of this test."""
    below = psutil.Process().children(recursive=True)
    return [one for one in below if one.name() == "runner" and one.status() != psutil.STATUS_ZOMBIE]


def expire_lease(workplace: Workplace, job_id) -> None:
    with Session(workplace.engine) as session, session.begin():
        session.execute(
            text("UPDATE jobs SET lease_until = clock_timestamp() - interval '1 s' WHERE id = :id"), {"id": job_id}
        )
        upkeep.reap(session)


def test_a_job_that_runs_to_its_end_succeeds_and_shows_its_artifacts(workplace: Workplace) -> None:
    job_id = workplace.job(["steps", 3, 0.01], ["publish", "sample", "a.txt", "hello"])

    assert workplace.supervisor().run_next()

    job = workplace.get(job_id)
    (artifact,) = workplace.artifacts(job_id)
    assert (job.state, job.result and job.result["fence"], job.step) == (JobState.SUCCEEDED, 1, 3)
    assert artifact.sha256 == hashlib.sha256(b"hello").hexdigest()
    assert Storage(workplace.settings.s3).get(artifact.key, sha256=artifact.sha256) == b"hello"


def test_there_is_nothing_to_run_when_nothing_is_queued(workplace: Workplace) -> None:
    assert not workplace.supervisor().run_next()


def test_the_runner_stays_between_two_jobs(workplace: Workplace) -> None:
    first, second = workplace.job(), workplace.job()
    supervisor = workplace.supervisor()

    supervisor.run_next()
    supervisor.run_next()

    assert workplace.get(first).result["pid"] == workplace.get(second).result["pid"]


def test_a_high_priority_is_claimed_before_what_waits_longer(workplace: Workplace) -> None:
    low, high = workplace.job(priority=0), workplace.job(priority=2)

    workplace.supervisor().run_next()

    assert (workplace.state(low), workplace.state(high)) == (JobState.QUEUED, JobState.SUCCEEDED)


def test_events_of_a_job_are_numbered_without_a_gap(workplace: Workplace) -> None:
    job_id = workplace.job(["metrics", 1, {"elbo": -100.0}], ["steps", 30, 0.02], ["publish", "preview", "p", "x"])

    workplace.supervisor().run_next()

    events = workplace.events(job_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert {"job.state", "job.metric", "job.progress", "job.preview"} <= {event.type for event in events}


def test_a_bug_in_the_executor_fails_the_job_without_telling_its_text(workplace: Workplace) -> None:
    job_id = workplace.job(["raise", "secret"])

    workplace.supervisor().run_next()

    job = workplace.get(job_id)
    assert (job.state, job.error_code) == (JobState.FAILED, "internal")
    assert "secret" not in (job.error_message or "")


def test_an_error_that_may_pass_is_tried_again_until_the_attempts_are_spent(workplace: Workplace, wait_until) -> None:
    job_id = workplace.job(["fail", "upload_failed", "no room"])
    supervisor = workplace.supervisor()

    wait_until(lambda: supervisor.run_next() is None or workplace.state(job_id) == JobState.FAILED)

    job = workplace.get(job_id)
    assert [attempt.outcome for attempt in workplace.attempts(job_id)] == [AttemptOutcome.FAILED] * 3
    assert (job.error_code, job.error_message, job.failures) == ("upload_failed", "no room", 3)


def test_an_error_that_cannot_pass_is_not_tried_again(workplace: Workplace) -> None:
    job_id = workplace.job(["fail", "nan_loss", "loss is NaN at step 7"])

    workplace.supervisor().run_next()

    assert (workplace.state(job_id), workplace.get(job_id).fence) == (JobState.FAILED, 1)


def test_running_out_of_memory_has_a_name(workplace: Workplace) -> None:
    job_id = workplace.job(["oom"])

    workplace.supervisor().run_next()

    assert workplace.get(job_id).error_code == "out_of_memory"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_job_that_kills_its_runner_is_tried_again_on_a_new_one(workplace: Workplace, how: signal.Signals) -> None:
    job_id = workplace.job(["die", how])
    after = workplace.job(priority=0)
    supervisor = workplace.supervisor()

    supervisor.run_next()
    (attempt,) = workplace.attempts(job_id)
    with Session(workplace.engine) as session, session.begin():
        session.execute(
            text("UPDATE jobs SET spec = '{\"script\": []}', not_before = NULL WHERE id = :id"), {"id": job_id}
        )
    supervisor.run_next()
    supervisor.run_next()

    assert (attempt.outcome, attempt.error_code) == (AttemptOutcome.FAILED, "worker_lost")
    assert (workplace.state(job_id), workplace.state(after)) == (JobState.SUCCEEDED, JobState.SUCCEEDED)


def test_a_cancel_stops_a_running_job(workplace: Workplace, wait_until) -> None:
    job_id = workplace.job(["steps", 10_000, 0.01])
    running = workplace.background(workplace.supervisor().run_next)
    wait_until(lambda: workplace.get(job_id).step > 0)

    asked = time.monotonic()
    cancel(workplace, job_id)
    running.join(10)

    assert workplace.state(job_id) == JobState.CANCELED
    assert time.monotonic() - asked < 2
    assert workplace.attempts(job_id)[0].outcome == AttemptOutcome.CANCELED


def test_a_cancel_kills_the_process_group_of_a_job_that_does_not_listen(workplace: Workplace, wait_until) -> None:
    job_id = workplace.job(["steps", 1, 0.0], ["hang", 60])
    supervisor = workplace.supervisor()
    running = workplace.background(supervisor.run_next)
    wait_until(lambda: workplace.get(job_id).step > 0)
    runner = runners()

    cancel(workplace, job_id)
    assert workplace.state(job_id) == JobState.CANCELING
    running.join(10)

    assert workplace.state(job_id) == JobState.CANCELED
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in runner)


def test_a_canceled_job_never_succeeds_although_its_runner_was_done(workplace: Workplace, wait_until) -> None:
    job_id = workplace.job(["steps", 1, 0.0], ["hang", 0.5], ["publish", "sample", "a", "x"])
    running = workplace.background(workplace.supervisor(cancel_grace=timedelta(seconds=5)).run_next)
    wait_until(lambda: workplace.get(job_id).step > 0)

    cancel(workplace, job_id)
    running.join(10)

    assert workplace.state(job_id) == JobState.CANCELED
    assert not workplace.artifacts(job_id)


def test_a_drained_worker_hands_its_job_back_with_a_checkpoint(workplace: Workplace, wait_until) -> None:
    job_id = workplace.job(["steps", 10_000, 0.01])
    supervisor = workplace.supervisor()
    running = workplace.background(supervisor.run_next)
    wait_until(lambda: workplace.get(job_id).step > 0)

    supervisor.drain()
    running.join(10)

    job = workplace.get(job_id)
    assert (job.state, job.interruptions, job.failures, job.losses) == (JobState.QUEUED, 1, 0, 0)
    assert [artifact.kind for artifact in workplace.artifacts(job_id)] == ["checkpoint"]
    assert not supervisor.run_next()


def test_a_worker_that_lost_its_attempt_kills_its_runner_and_changes_nothing(workplace: Workplace, wait_until) -> None:
    job_id = workplace.job(["steps", 10_000, 0.01], ["publish", "sample", "a", "late"])
    running = workplace.background(workplace.supervisor("w1").run_next)
    wait_until(lambda: workplace.get(job_id).step > 0)
    (old,) = runners()

    expire_lease(workplace, job_id)
    with Session(workplace.engine) as session, session.begin():
        (claim,) = claims.claim(session, worker="w2", queues=["generate"], terms=claims.Terms.of(JobSettings()))
    running.join(10)

    job = workplace.get(job_id)
    assert not old.is_running()
    assert (job.state, job.worker, job.fence, claim.fence) == (JobState.RUNNING, "w2", 2, 2)
    assert [attempt.outcome for attempt in workplace.attempts(job_id)] == [AttemptOutcome.LOST, None]


@pytest.mark.parametrize("chatter", [[], ["chatter", 0.05]], ids=["silent", "while another thread talks"])
def test_an_attempt_without_a_step_ends_as_stalled_and_is_tried_again(workplace: Workplace, chatter: list) -> None:
    job_id = workplace.job(*[chatter] if chatter else [], ["steps", 1, 0.0], ["hang", 60])

    workplace.supervisor(stall=timedelta(seconds=0.5)).run_next()

    (attempt,) = workplace.attempts(job_id)
    assert (attempt.outcome, attempt.error_code) == (AttemptOutcome.FAILED, "timeout")
    assert (workplace.state(job_id), workplace.get(job_id).failures) == (JobState.QUEUED, 1)


def test_an_attempt_that_gets_on_is_not_stalled_however_long_it_runs(workplace: Workplace) -> None:
    job_id = workplace.job(["steps", 20, 0.1])

    workplace.supervisor(stall=timedelta(seconds=1)).run_next()

    assert workplace.state(job_id) == JobState.SUCCEEDED


def test_an_attempt_may_not_run_longer_than_its_timeout(workplace: Workplace) -> None:
    job_id = workplace.job(["steps", 10_000, 0.01], timeout_seconds=1)

    workplace.supervisor().run_next()

    job = workplace.get(job_id)
    assert (job.state, job.error_code, job.fence) == (JobState.FAILED, "timeout", 1)


@pytest.mark.parametrize(
    ("death", "cause"),
    [
        (["die", signal.SIGKILL], "killed by SIGKILL, as the kernel does when memory runs out"),
        (["die", signal.SIGSEGV], "killed by SIGSEGV"),
        (["exit", 137], "exit status 137"),
    ],
    ids=["SIGKILL", "SIGSEGV", "137"],
)
def test_a_poison_job_stops_after_its_attempts_and_lists_the_causes(
    workplace: Workplace, death: list, cause: str, wait_until
) -> None:
    poison, neighbour = workplace.job(death, priority=2), workplace.job()
    supervisor = workplace.supervisor()

    wait_until(lambda: supervisor.run_next() is None or workplace.state(poison) == JobState.FAILED, timeout=60)
    supervisor.run_next()

    attempts = workplace.attempts(poison)
    assert [attempt.error_code for attempt in attempts] == ["worker_lost"] * 3
    assert all(cause in (attempt.error_message or "") for attempt in attempts)
    assert workplace.get(poison).error_code == "worker_lost"
    assert workplace.attempts(neighbour)[0].outcome == workplace.state(neighbour) == JobState.SUCCEEDED


def test_a_job_goes_on_while_sql_is_away_for_less_than_its_lease(workplace: Workplace, wait_until, postgres) -> None:
    patient = workplace.settings.jobs.model_copy(update={"lease": timedelta(seconds=20)})
    workplace.settings = workplace.settings.model_copy(update={"jobs": patient})
    job_id = workplace.job(["steps", 150, 0.01], ["publish", "sample", "a", "x"])
    running = workplace.background(workplace.supervisor().run_next)
    wait_until(lambda: workplace.get(job_id).step > 0)

    # By a connection that is not of the pool whose connections it ends.
    with psycopg.connect(postgres.url_of(workplace.engine.url.database).replace("+psycopg", "")) as connection:
        connection.autocommit = True
        for _ in range(10):
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            time.sleep(0.1)
    wait_until(lambda: not running.is_alive(), timeout=60)
    workplace.engine.dispose()  # what lies in its pool may have been ended, too

    assert (workplace.state(job_id), workplace.get(job_id).fence) == (JobState.SUCCEEDED, 1)


def test_an_input_whose_bytes_changed_is_refused(workplace: Workplace) -> None:
    stored = Storage(workplace.settings.s3).put("inputs/a", b"good", media_type="text/plain")
    Storage(workplace.settings.s3).put("inputs/a", b"evil", media_type="text/plain")
    job_id = workplace.job(["fetch", "inputs/a", stored.sha256, 4], max_attempts=1)

    workplace.supervisor().run_next()

    job = workplace.get(job_id)
    assert job.error_code == "input_unreadable"
    assert "SHA-256" in (job.error_message or "")


def test_an_input_whose_object_is_missing_is_not_waited_for(workplace: Workplace) -> None:
    job_id = workplace.job(["fetch", "inputs/gone", "0" * 64, 4])

    workplace.supervisor().run_next()

    assert (workplace.get(job_id).error_code, workplace.get(job_id).fence) == ("input_gone", 1)


def test_a_runner_dies_with_its_supervisor(workplace: Workplace, wait_until) -> None:
    supervisor = workplace.supervisor()
    assert supervisor.device.ready()
    (runner,) = runners()

    supervisor.device._channel.close()

    wait_until(lambda: not runner.is_running() or runner.status() == psutil.STATUS_ZOMBIE)
