"""Storage that is away for longer than an attempt waits for it: the job goes on afterwards, and nothing is counted."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from shared.jobs.state import AttemptOutcome, JobState
from shared.settings import S3Settings
from shared.storage import Storage
from tests.chaos.objects import Disk
from tests.chaos.s3 import S3Server
from tests.conftest import WaitUntil
from tests.worker.conftest import Workplace
from worker.supervisor import Supervisor

OUTAGES = 3
"""Attempts that find storage away: more than the job may have."""


@pytest.fixture
def s3_server(workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The storage of the runners, which wait a second for it."""
    server = S3Server(Disk(tmp_path / "s3", room_bytes=0), bucket=workplace.settings.s3.bucket, access_key="a")
    server.start()
    monkeypatch.setenv("NOISEMILL_S3_ENDPOINT", server.endpoint)
    monkeypatch.setenv("NOISEMILL_S3_ACCESS_KEY", "a")
    monkeypatch.setenv("SCRIPTED_STORAGE_PATIENCE", "1")
    yield server
    server.stop()


def storage_of(server: S3Server) -> Storage:
    return Storage(
        S3Settings(endpoint=server.endpoint, bucket=server.bucket, access_key="a", secret_key=SecretStr("s"))
    )


@pytest.fixture(params=["up", "down"])
def script(request: pytest.FixtureRequest, s3_server: S3Server) -> list[list[Any]]:
    """What needs storage."""
    if request.param == "up":
        return [["steps", 3, 0.01], ["publish", "sample", "a.txt", "hello"]]
    stored = storage_of(s3_server).put("inputs/a", b"hello", media_type="text/plain")
    return [["fetch", "inputs/a", stored.sha256, stored.size_bytes], ["steps", 3, 0.01]]


def run_until(supervisor: Supervisor, wait_until: WaitUntil, workplace: Workplace, job_id: Any, num: int) -> None:
    def ended() -> bool:
        supervisor.run_next()
        return len([one for one in workplace.attempts(job_id) if one.outcome]) >= num

    wait_until(ended, timeout=120)


@pytest.mark.parametrize("fault", ["error", "reset"])
def test_a_job_outlives_an_outage_of_storage_whatever_number_of_attempts_it_has(
    workplace: Workplace, s3_server: S3Server, script: list[list[Any]], wait_until: WaitUntil, fault: str
) -> None:
    job_id = workplace.job(*script, max_attempts=1)
    supervisor = workplace.supervisor()
    s3_server.faults.begin(fault, share=1)
    run_until(supervisor, wait_until, workplace, job_id, OUTAGES)
    s3_server.faults.end()

    wait_until(lambda: supervisor.run_next() and workplace.state(job_id).is_final, timeout=60)

    ends = [(attempt.outcome, attempt.error_code) for attempt in workplace.attempts(job_id)]
    away = (AttemptOutcome.INTERRUPTED, "storage_unavailable")
    assert ends == [*[away] * OUTAGES, (AttemptOutcome.SUCCEEDED, None)]
    assert (workplace.get(job_id).failures, workplace.get(job_id).losses) == (0, 0)


def test_an_outage_without_end_fails_the_job_by_its_name(
    workplace: Workplace, s3_server: S3Server, wait_until: WaitUntil
) -> None:
    jobs = workplace.settings.jobs.model_copy(update={"storage_patience": timedelta(milliseconds=1)})
    workplace.settings = workplace.settings.model_copy(update={"jobs": jobs})
    job_id = workplace.job(["publish", "sample", "a.txt", "hello"])
    s3_server.faults.begin("error", share=1)

    run_until(workplace.supervisor(), wait_until, workplace, job_id, 2)

    job = workplace.get(job_id)
    assert (job.state, job.error_code) == (JobState.FAILED, "storage_unavailable")


@pytest.mark.parametrize(
    ("script", "code"),
    [([["publish", "sample", "a", "x"]], "upload_failed"), ([["fetch", "k", "0" * 64, 1]], "input_unreadable")],
)
def test_a_refusal_is_not_taken_for_an_outage(
    workplace: Workplace,
    s3_server: S3Server,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
    script: list[list[Any]],
    code: str,
) -> None:
    """Somebody else's key: 403."""
    storage_of(s3_server).put("k", b"x", media_type="text/plain")
    monkeypatch.setenv("NOISEMILL_S3_ACCESS_KEY", "stranger")
    job_id = workplace.job(*script, max_attempts=2)

    run_until(workplace.supervisor(), wait_until, workplace, job_id, 2)

    job = workplace.get(job_id)
    assert (job.state, job.error_code, job.failures) == (JobState.FAILED, code, 2)
