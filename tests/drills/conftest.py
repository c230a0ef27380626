"""Drills: one fault each, on real processes, against the bound that is promised for it.

Each prints one line of JSON. The runner plays scripts (``tests/worker/scripted_runner.py``), all else is the product:
servers, API, Celery workers with their supervisors.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import SecretStr
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.jobs.rows import Job
from shared.jobs.state import HELD
from shared.settings import BrokerSettings, DatabaseSettings, JobSettings, S3Settings, Settings, WorkerSettings
from tests.chaos.servers import Installation, Setup, WorkerProcesses, worker_processes
from tests.worker.conftest import Workplace

LEASE_SECONDS = 15.0
Report = Callable[..., None]


class Site(Workplace):
    """A whole installation, and straight access to its database and its broker."""

    def __init__(self, installation: Installation, folder: Path, stack: ExitStack) -> None:
        self.installation = installation
        s3 = installation.wiring.s3
        settings = Settings(
            database=DatabaseSettings(url=SecretStr(installation.postgres.url)),
            broker=BrokerSettings(url=SecretStr(installation.valkey.url)),
            s3=S3Settings(
                endpoint=s3.endpoint, bucket=s3.bucket, access_key=s3.access_key, secret_key=SecretStr(s3.secret_key)
            ),
            jobs=JobSettings(lease=timedelta(seconds=LEASE_SECONDS)),
            worker=WorkerSettings(cache_dir=folder / "cache"),
        )
        super().__init__(settings, folder, stack)

    def processes(self, name: str) -> WorkerProcesses | None:
        """The processes of a worker, if all of them are up."""
        pid = self.installation.pid(name)
        with suppress(psutil.Error):
            if pid is not None:
                return worker_processes(name, psutil.Process(pid))
        return None

    def rest(self) -> None:
        """Wait until nothing runs, and no worker looks for more, as each does after a job, without any bell."""
        while self.busy():
            time.sleep(0.1)
        time.sleep(2)

    def busy(self) -> bool:
        """Whether some attempt runs."""
        with Session(self.engine) as session:
            return bool(session.scalar(select(func.count()).where(col(Job.state).in_(HELD))))


@contextmanager
def site(monkeypatch: pytest.MonkeyPatch, setup: Setup, **variables: str) -> Iterator[Site]:
    for name, value in variables.items():
        monkeypatch.setattr(Installation, "_env", _with(Installation._env, {name: value}))
    with ExitStack() as stack:
        installation = stack.enter_context(Installation(setup).running())
        yield Site(installation, setup.folder, stack)


def _with(env: Callable[..., dict[str, str]], more: dict[str, str]) -> Callable[..., dict[str, str]]:
    return lambda installation, name: env(installation, name) | more


StartSite = Callable[..., Site]


@pytest.fixture
def start_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartSite]:
    """Start an installation; ``variables`` are added to every process's environment."""
    with ExitStack() as stack:

        def start(
            *, workers: int = 2, app: str = "tests.worker.scripted_app", database_proxied: bool = True, **variables: str
        ) -> Site:
            setup = Setup(
                folder=tmp_path, workers=workers, lease=LEASE_SECONDS, app=app, database_proxied=database_proxied
            )
            return stack.enter_context(site(monkeypatch, setup, **variables))

        yield start


@pytest.fixture
def report(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Report:
    """Print one line of JSON with what was measured, how busy the machine was, and what its host kept of it."""
    before = psutil.cpu_times()

    def write(**figures: Any) -> None:
        load = round(os.getloadavg()[0], 1)
        now = psutil.cpu_times()
        stolen = round((now.steal - before.steal) / (sum(now) - sum(before)), 3)
        machine = {"load": load, "stolen": stolen, "cores": os.cpu_count()}
        line = {"drill": request.node.name.removeprefix("test_"), **figures, **machine}
        with capsys.disabled():
            sys.stdout.write("\n" + json.dumps(line) + "\n")

    return write
