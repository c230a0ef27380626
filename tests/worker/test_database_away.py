"""What an attempt does while SQL is away, and how much it says to SQL while it is there."""

import re
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import event, make_url, text

from noisemill.local.servers import Postgres
from shared.database import make_engine
from shared.jobs import products
from shared.jobs.state import AttemptOutcome, JobState, JobType
from shared.settings import DatabaseSettings, JobSettings, Settings
from tests.chaos.proxies import Proxy, ProxyLoop
from tests.shared.failover import read_only
from tests.worker.conftest import Workplace


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"jobs": JobSettings(lease=timedelta(seconds=12))})


@pytest.fixture
def proxy(postgres: Postgres) -> Iterator[Proxy]:
    loop = ProxyLoop()
    proxy = Proxy(loop, postgres.port)
    yield proxy
    proxy.close()
    loop.close()


def test_an_attempt_leaves_a_checkpoint_before_its_lease_ends_and_goes_on_after_the_outage(
    workplace: Workplace, proxy: Proxy, database: str, wait_until
) -> None:
    url = make_url(database).set(port=proxy.port).render_as_string(hide_password=False)
    engine = make_engine(DatabaseSettings(url=SecretStr(url)), "behind the proxy", ping=False)
    supervisor = workplace.supervisor(engine=engine)
    job_id = workplace.job(
        ["publish", "preview", "p", "x"], ["train", 2000, 0.01, 100_000], type=JobType.TRAIN, max_attempts=1
    )
    running = workplace.background(supervisor.run_next)
    wait_until(lambda: workplace.get(job_id).step > 0, timeout=30)

    proxy.go_blind()
    proxy.cut()
    away = time.monotonic()
    time.sleep(14)  # longer than the lease
    proxy.see_again()
    running.join(30)
    handed_back = workplace.get(job_id)
    supervisor.run_next()
    engine.dispose()

    assert (handed_back.state, handed_back.interruptions, handed_back.losses) == (JobState.QUEUED, 1, 0)
    outcomes = [attempt.outcome for attempt in workplace.attempts(job_id)]
    assert outcomes == [AttemptOutcome.INTERRUPTED, AttemptOutcome.SUCCEEDED]
    assert 0 < (workplace.get(job_id).result or {})["first"] < (time.monotonic() - away) / 0.01


def test_a_job_goes_on_through_a_failover_to_a_server_that_may_not_be_written_to_yet(
    workplace: Workplace, database: str, wait_until, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = workplace.job(["steps", 60, 0.05], max_attempts=1)
    running = workplace.background(workplace.supervisor().run_next)
    wait_until(lambda: workplace.get(job_id).step > 0, timeout=30)

    with read_only(database):
        wait_until(lambda: caplog.text.count("heartbeat failed") >= 4)
    running.join(30)

    assert [attempt.outcome for attempt in workplace.attempts(job_id)] == [AttemptOutcome.SUCCEEDED]


def test_a_finished_job_is_recorded_though_its_worker_was_stopped_in_the_middle_of_that(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, wait_until
) -> None:
    """For longer than a session may do nothing in a transaction, and shorter than its lease."""
    # Its end has a middle, as that of a job which makes rows; else it is one statement.
    monkeypatch.setattr(products, "shows_as_it_is", lambda *_: False)
    job_id = workplace.job(["steps", 1, 0.0], max_attempts=1)
    supervisor = workplace.supervisor()
    stopped: list[int] = []

    def lives(pid: int) -> Any:
        with workplace.engine.connect() as connection:
            return connection.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid"), {"pid": pid})

    def stop(connection: Any, *about: Any) -> None:
        if "UPDATE jobs" in about[1] and "succeeded" in str(about[2]) and not stopped:
            connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 50")
            stopped.append(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
            wait_until(lambda: not lives(stopped[0]))

    event.listen(workplace.engine, "after_cursor_execute", stop)
    supervisor.run_next()

    assert stopped
    assert [attempt.outcome for attempt in workplace.attempts(job_id)] == [AttemptOutcome.SUCCEEDED]


def test_what_a_stopped_worker_keeps_locked_is_free_long_before_its_lease_runs_out(workplace: Workplace) -> None:
    """Its tenant's account, for one: meanwhile no other job of the tenant's could end."""
    job_id = workplace.job(["steps", 1, 0.0])
    others = make_engine(workplace.settings.database, "another worker", lock_timeout=timedelta(seconds=7.5))
    try:
        with workplace.engine.connect() as stopped, others.begin() as other:
            stopped.execute(text("SELECT FROM jobs WHERE id = :id FOR UPDATE"), {"id": job_id})
            other.execute(text("SELECT FROM jobs WHERE id = :id FOR UPDATE"), {"id": job_id})
            stopped.invalidate()
    finally:
        others.dispose()


STATEMENT = re.compile(r"LOG:  (?:statement|execute [^:]*): ")


@pytest.mark.timeout(180)
def test_a_running_attempt_costs_less_than_two_statements_a_second(
    workplace: Workplace, postgres: Postgres, wait_until
) -> None:
    """By the server's own log, BEGIN and COMMIT included, for a job that reports all the time."""
    acts = [
        act
        for n in range(40)
        for act in (["metrics", n, {"loss": 1.0}], ["publish", "preview", f"p{n}", "x"], ["steps", 50, 0.01])
    ]
    job_id = workplace.job(*acts)
    with workplace.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        name = connection.scalar(text("SELECT current_database()"))
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET log_statement = 'all'")
    workplace.engine.dispose()  # the setting is read when a session begins
    log = postgres.folder.parent / "logs" / "postgres.log"
    running = workplace.background(workplace.supervisor(beat=timedelta(seconds=0.75)).run_next)
    wait_until(lambda: workplace.get(job_id).step > 0, timeout=30)

    before, began = log.read_text(errors="replace"), time.monotonic()
    time.sleep(20)
    statements = STATEMENT.findall(log.read_text(errors="replace")[len(before) :])
    rate = len(statements) / (time.monotonic() - began)
    running.join(60)

    assert 0.5 < rate < 2
    assert [event.type for event in workplace.events(job_id)].count("job.preview") == 40
