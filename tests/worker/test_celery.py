"""The worker as it is deployed: a Celery process, its supervising child and its runner, by their signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import psutil
import pytest
from celery import Celery
from celery.worker.consumer import Consumer
from celery.worker.consumer.heart import Heart
from kombu import Connection
from sqlalchemy import delete

from shared.jobs.rows import Bell
from shared.jobs.state import AttemptOutcome, JobState
from shared.queue import make_celery
from shared.relay import Bells, Relay
from tests.worker.conftest import REPOSITORY, Workplace, environment
from worker.parent import EventsLater, connect

StartWorker = Callable[..., subprocess.Popen[bytes]]
MARK = "started-by-an-unpickled-message"


@pytest.fixture
def start_worker(workplace: Workplace, tmp_path: Path) -> Iterator[StartWorker]:
    """Start a Celery worker whose runner plays scripts; it is killed with all its processes afterwards."""
    with ExitStack() as stack:

        def start(name: str = "w1", *, queues: str = "generate", **variables: str) -> subprocess.Popen[bytes]:
            log = stack.enter_context((tmp_path / f"{name}.log").open("wb"))
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.worker.scripted_app",
                    "-Q",
                    queues,
                    "-n",
                    f"{name}@%h",
                ],
                env=os.environ | environment(workplace.settings) | variables,
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            stack.callback(kill_tree, process)
            return process

        yield start


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    tree = family(process)
    for member in tree:
        if member.is_running():
            member.kill()
    psutil.wait_procs(tree, timeout=5)
    process.wait()


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        parent = psutil.Process(process.pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []


def supervisor(worker: subprocess.Popen[bytes]) -> psutil.Process:
    """The pool's child of a worker."""
    [found] = [member for member in family(worker) if "billiard.spawn" in " ".join(member.cmdline())]
    return found


def test_a_rung_bell_runs_the_job(workplace: Workplace, start_worker: StartWorker, wait_until) -> None:
    job_id = workplace.job(["steps", 3, 0.01])

    start_worker(NOISEMILL_WORKER_POLL="3600")
    Relay(workplace.engine, Bells(workplace.settings.broker)).run_once()

    wait_until(lambda: workplace.state(job_id) == JobState.SUCCEEDED, timeout=30)


def test_monitors_are_told_of_a_task_from_its_arrival_to_its_end(
    workplace: Workplace, start_worker: StartWorker
) -> None:
    """As Flower shows it (``worker/parent.py`` lets it wait for a moment)."""
    told: list[str] = []
    app: Any = make_celery(workplace.settings.broker)
    give_up = time.monotonic() + 60

    def hear(event: Any) -> None:
        told.append(event["type"])
        if event["type"] == "worker-online":
            workplace.job(["steps", 3, 0.0])
            Relay(workplace.engine, Bells(workplace.settings.broker)).run_once()
        receiver.should_stop = event["type"] == "task-succeeded" or time.monotonic() > give_up

    with app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": hear})
        start_worker()
        with suppress(TimeoutError):
            receiver.capture(limit=None, timeout=20, wakeup=False)

    assert [kind for kind in told if kind.startswith("task-")] == ["task-received", "task-started", "task-succeeded"]


@pytest.mark.parametrize("seed", range(10))
def test_the_last_that_monitors_are_told_of_a_worker_is_that_it_ended(seed: int) -> None:
    """Flower would take it for alive again. Celery starts its steps in an order of their addresses, as far as it may,
    and stops them the other way round."""
    app: Any = Celery()
    connect(app)
    blueprint: Any = Consumer.Blueprint(steps=app.steps["consumer"])
    steps = list(blueprint.claim_steps().items())
    Random(seed).shuffle(steps)
    blueprint.steps = dict(steps)

    order = list(blueprint._finalize_steps(blueprint.steps))

    assert order.index(EventsLater) > order.index(Heart)


def test_a_job_runs_although_every_bell_was_lost(
    workplace: Workplace, start_worker: StartWorker, wait_until, broker: str
) -> None:
    job_id = workplace.job(["steps", 3, 0.01])
    Relay(workplace.engine, Bells(workplace.settings.broker)).run_once()
    with Connection(broker, transport_options={"global_keyprefix": workplace.settings.broker.prefix}) as connection:
        connection.default_channel.client.flushall()  # pyright: ignore

    start_worker()

    wait_until(lambda: workplace.state(job_id) == JobState.SUCCEEDED, timeout=30)


def test_a_worker_that_starts_takes_what_waits_without_a_bell(
    workplace: Workplace, start_worker: StartWorker, wait_until
) -> None:
    job_id = workplace.job(["steps", 3, 0.01])
    with workplace.engine.begin() as connection:
        connection.execute(delete(Bell))

    start_worker(NOISEMILL_WORKER_POLL="3600", NOISEMILL_JOBS_REDISPATCH_AFTER="3600")

    wait_until(lambda: workplace.state(job_id) == JobState.SUCCEEDED, timeout=30)


def test_the_worker_answers_while_its_device_is_busy(
    workplace: Workplace, start_worker: StartWorker, wait_until
) -> None:
    job_id = workplace.job(["steps", 1, 0.0], ["hang", 60])
    start_worker()
    wait_until(lambda: workplace.get(job_id).step == 1, timeout=30)

    app = make_celery(workplace.settings.broker)
    answers = app.control.inspect(timeout=5).ping()
    app.close()

    assert [name.split("@")[0] for name in answers or {}] == ["w1"]


def test_a_job_survives_the_kill_of_its_worker(workplace: Workplace, start_worker: StartWorker, wait_until) -> None:
    job_id = workplace.job(["steps", 400, 0.01], ["publish", "sample", "a", "x"])
    first = start_worker("w1")
    wait_until(lambda: workplace.get(job_id).step > 0, timeout=30)
    members = family(first)

    os.kill(first.pid, signal.SIGKILL)
    start_worker("w2")

    wait_until(lambda: workplace.state(job_id) == JobState.SUCCEEDED, timeout=40)
    assert [attempt.outcome for attempt in workplace.attempts(job_id)] == [
        AttemptOutcome.LOST,
        AttemptOutcome.SUCCEEDED,
    ]
    assert [artifact.fence for artifact in workplace.artifacts(job_id)] == [2]
    assert not [member for member in members if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("does", ["hang", "seize"])
def test_a_runner_and_its_group_end_with_their_supervisor_whatever_they_do(
    workplace: Workplace, start_worker: StartWorker, wait_until, does: str
) -> None:
    job_id = workplace.job(["fork"], [does, 600], max_attempts=1)
    worker = start_worker()
    said = wait_until(lambda: [e.data["message"] for e in workplace.events(job_id) if e.type == "job.log"], timeout=60)
    runner, forked = (psutil.Process(int(pid)) for pid in said[0].split()[1:])
    group = [runner, *runner.children(recursive=True)]
    assert forked in group

    supervisor(worker).kill()

    _, left = psutil.wait_procs(group, timeout=3)
    assert not left


def test_a_worker_that_slept_past_its_lease_changes_nothing(
    workplace: Workplace, start_worker: StartWorker, wait_until
) -> None:
    job_id = workplace.job(["steps", 300, 0.02], ["publish", "sample", "a", "x"])
    first = start_worker("w1")
    wait_until(lambda: workplace.get(job_id).step > 0, timeout=30)
    sleepers = family(first)
    for member in sleepers:
        member.suspend()
    start_worker("w2")
    wait_until(lambda: workplace.get(job_id).fence == 2, timeout=30)

    for member in sleepers:
        with suppress(psutil.NoSuchProcess):  # the first that wakes kills the runner, if it is quick
            member.resume()
    wait_until(lambda: workplace.state(job_id) == JobState.SUCCEEDED, timeout=40)

    assert [attempt.outcome for attempt in workplace.attempts(job_id)] == [
        AttemptOutcome.LOST,
        AttemptOutcome.SUCCEEDED,
    ]
    assert [artifact.fence for artifact in workplace.artifacts(job_id)] == [2]


def test_sigterm_hands_the_job_back_without_counting_a_failure(
    workplace: Workplace, start_worker: StartWorker, wait_until
) -> None:
    job_id = workplace.job(["steps", 10_000, 0.01])
    worker = start_worker()
    wait_until(lambda: workplace.get(job_id).step > 0, timeout=30)

    worker.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    worker.wait(40)

    job = workplace.get(job_id)
    assert (job.state, job.interruptions, job.failures, job.losses) == (JobState.QUEUED, 1, 0, 0)
    assert [artifact.kind for artifact in workplace.artifacts(job_id)] == ["checkpoint"]
    assert time.monotonic() - asked < 10


def test_what_a_killed_runner_wrote_in_passing_is_gone_when_the_next_one_starts(
    workplace: Workplace, start_worker: StartWorker, wait_until
) -> None:
    job_id = workplace.job(["spill", 1000], ["hang", 600], max_attempts=1)
    worker = start_worker()
    said = wait_until(lambda: [e.data["message"] for e in workplace.events(job_id) if e.type == "job.log"], timeout=60)
    spilt = Path(said[0])
    assert spilt.is_relative_to(workplace.settings.worker.cache_dir / "scratch")
    assert spilt.exists()

    [runner] = [member for member in family(worker) if member.name() == "runner"]
    runner.kill()

    wait_until(lambda: not spilt.parent.exists(), timeout=30)


def test_a_pickled_message_is_refused_and_not_executed(
    workplace: Workplace, start_worker: StartWorker, wait_until, tmp_path: Path
) -> None:
    settings = workplace.settings.broker
    with (
        Connection(
            settings.url.get_secret_value(), transport_options={"global_keyprefix": settings.prefix}
        ) as connection,
        connection.SimpleQueue("generate") as queue,
    ):
        queue.put({"id": "1", "task": "generate", "args": [_Trap(tmp_path / MARK)]}, serializer="pickle")
    job_id = workplace.job(["steps", 1, 0.0])

    start_worker()

    wait_until(lambda: workplace.state(job_id) == JobState.SUCCEEDED, timeout=30)
    wait_until(lambda: "ContentDisallowed" in (tmp_path / "w1.log").read_text(), timeout=10)
    assert not (tmp_path / MARK).exists()


class _Trap:
    """Makes a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self._path),)


def test_a_job_whose_dataset_is_gone_fails_by_name(workplace: Workplace) -> None:
    from shared.ids import uuid7
    from shared.jobs.state import JobType

    job_id = workplace.job(type=JobType.TRAIN, inputs={"dataset_id": str(uuid7())})
    behind = workplace.job()
    supervisor = workplace.supervisor()

    supervisor.run_next()
    supervisor.run_next()

    assert (workplace.get(job_id).error_code, workplace.state(behind)) == ("input_gone", JobState.SUCCEEDED)


def test_sigterm_ends_a_worker_whose_runner_does_not_listen_within_its_grace_and_five_seconds(
    workplace: Workplace, start_worker: StartWorker, wait_until
) -> None:
    job_id = workplace.job(["steps", 1, 0.0], ["hang", 600])
    worker = start_worker(NOISEMILL_WORKER_DRAIN_GRACE="5")
    wait_until(lambda: workplace.get(job_id).step > 0, timeout=30)
    members = family(worker)

    worker.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    worker.wait(40)

    assert time.monotonic() - asked < 5 + 5
    job = workplace.get(job_id)
    assert (job.state, job.interruptions, job.failures, job.losses) == (JobState.QUEUED, 1, 0, 0)
    _, left = psutil.wait_procs(members, timeout=3)
    assert not left


@pytest.mark.parametrize("moment", ["make_engine", "Ticker"])
def test_sigterm_while_the_worker_starts_leaves_it_without_a_job(
    workplace: Workplace, start_worker: StartWorker, wait_until, tmp_path: Path, moment: str
) -> None:
    """Before its child can hear of it, and when the child can hear and has not begun to look for work.

    Both times the child would have seconds to take the job, before it is told by Celery to end: its runner is up.
    """
    app = make_celery(workplace.settings.broker)
    job_id = workplace.job(["steps", 10_000, 0.01])
    Relay(workplace.engine, Bells(workplace.settings.broker)).run_once()
    slow = {"DWELL_IN": moment, "DWELL": "3", "DWELL_BEFORE_TASKS": "5"}
    worker = start_worker(**slow, NOISEMILL_WORKER_POLL="0.05", TMPDIR=str(tmp_path))
    # The parent takes bells by now, and passes them on to a child that is not up yet.
    wait_until(lambda: app.control.inspect(timeout=0.5).ping(), timeout=30)
    app.close()
    if moment == "Ticker":
        wait_until(lambda: [*tmp_path.glob("noisemill-worker-*/busy")], timeout=30, every=0.001)

    worker.send_signal(signal.SIGTERM)
    worker.wait(30)

    assert counts(workplace, job_id) == (JobState.QUEUED, 0, 0)


@pytest.mark.slow
def test_sigterm_at_any_moment_of_the_start_counts_nothing(workplace: Workplace, start_worker: StartWorker) -> None:
    job_id = workplace.job(["steps", 10_000, 0.01])

    for moment in range(24):
        worker = start_worker(f"w{moment}", NOISEMILL_WORKER_POLL="0.05")
        time.sleep(moment * 0.25)
        worker.send_signal(signal.SIGTERM)
        worker.wait(40)

    assert counts(workplace, job_id) == (JobState.QUEUED, 0, 0)


def counts(workplace: Workplace, job_id: UUID) -> tuple[JobState, int, int]:
    job = workplace.get(job_id)
    return job.state, job.failures, job.losses


@pytest.mark.parametrize("option", ["--detach", "-D"])
def test_a_worker_refuses_to_detach(workplace: Workplace, option: str) -> None:
    """Celery would start a worker of its own in its place."""
    command = [sys.executable, "-m", "tests.worker.scripted_app", "-Q", "generate", option]
    environ = os.environ | environment(workplace.settings)

    ended = subprocess.run(
        command, env=environ, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )

    assert (ended.returncode, "--detach: a Noisemill worker stays in the foreground" in ended.stderr) == (2, True)
