"""A workplace: real SQL, storage and broker, jobs whose spec is a script, and supervisors that run them."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar
from uuid import UUID

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.database import make_async_engine, make_engine
from shared.ids import uuid7
from shared.jobs.rows import Artifact, Attempt, Bell, Event, Job, Model, ModelVersion, Tenant
from shared.jobs.state import QUEUES, JobState, JobType
from shared.settings import BrokerSettings, DatabaseSettings, JobSettings, S3Settings, Settings, WorkerSettings
from tests.worker.house import House
from tests.worker.scripted import SCRIPTED
from worker import nursery
from worker.device import Device
from worker.supervisor import Supervisor
from worker.ticker import Ticker

T = TypeVar("T")
REPOSITORY = Path(__file__).parents[2]


class Workplace:
    """One database, bucket and broker; makes jobs and supervisors in them."""

    def __init__(self, settings: Settings, folder: Path, stack: ExitStack) -> None:
        self.settings = settings
        self.folder = folder
        self.engine = make_engine(settings.database, "test", ping=False)
        self._stack = stack
        stack.callback(self.engine.dispose)
        with Session(self.engine) as session, session.begin():
            tenant = Tenant(name="test")
            session.add(tenant)
            session.flush()
            self.tenant_id = tenant.id

    def job(self, *script: list[Any], **columns: Any) -> UUID:
        """Queue a job that plays ``script``."""
        # Of a type whose inputs nobody looks up, in the queue that most workers of these tests serve.
        kind = columns.pop("type", JobType.EXPORT)
        queue = "generate" if kind == JobType.EXPORT else QUEUES[kind]
        job = Job(
            id=uuid7(), tenant_id=self.tenant_id, type=kind, event_seq=1,
            spec={"script": list(script), "model": "scripted", "family": "vae", "num_samples": 1}, summary="scripted",
            **{"queue": queue, "inputs": {}, "state": JobState.QUEUED, "max_attempts": 3} | columns,
        )  # fmt: skip
        job_id = job.id
        with Session(self.engine) as session, session.begin():
            session.add(job)
            session.flush()
            session.add(Event(job_id=job_id, seq=1, type="job.state", data={"state": "queued"}))
            session.add(Bell(job_id=job_id))
        return job_id

    def supervisor(self, name: str = "w1", *, engine: Engine | None = None, **worker: Any) -> Supervisor:
        """A supervisor with a scripted runner; its process group ends with the test."""
        about = self.settings.worker.model_copy(update={"name": name, "queues": "generate,train"} | worker)
        settings = self.settings.model_copy(update={"worker": about})
        lock_file = self.folder / f"{name}.lock"
        supervisor = Supervisor(settings, engine or self.engine, Device(), lock_file=lock_file)
        self._stack.callback(supervisor.device.close)
        return supervisor

    def background(self, work: Callable[[], Any]) -> Thread:
        thread = Thread(target=work, daemon=True)
        thread.start()
        self._stack.callback(thread.join, 20)
        return thread

    def rows(self, row: type[T]) -> list[T]:
        with Session(self.engine) as session:
            return list(session.scalars(select(row)))

    def ask(self, request: Callable[..., Coroutine[Any, Any, Job]], job_id: UUID, **how: Any) -> Job:
        """Do what a client asks for: one of ``shared/jobs/requests.py``."""

        async def ask() -> Job:
            engine = make_async_engine(self.settings.database, "test client")
            async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
                job = await request(session, self.tenant_id, job_id, **how)
            await engine.dispose()
            return job

        return asyncio.run(ask())

    def ticker(self, supervisor: Supervisor) -> Ticker:
        """This supervisor's share in the housekeeping; a test calls ``tick``."""
        return Ticker(supervisor.settings, self.engine, supervisor, host="here")

    def get(self, job_id: UUID) -> Job:
        with Session(self.engine) as session:
            return session.get_one(Job, job_id)

    def state(self, job_id: UUID) -> JobState:
        return self.get(job_id).state

    def attempts(self, job_id: UUID) -> list[Attempt]:
        return self._all(Attempt, col(Attempt.job_id) == job_id, col(Attempt.fence))

    def artifacts(self, job_id: UUID) -> list[Artifact]:
        return self._all(Artifact, col(Artifact.job_id) == job_id, col(Artifact.id))

    def events(self, job_id: UUID) -> list[Event]:
        return self._all(Event, col(Event.job_id) == job_id, col(Event.seq))

    def _all(self, row: Any, condition: Any, order: Any) -> list[Any]:
        with Session(self.engine) as session:
            return list(session.scalars(select(row).where(condition).order_by(order)))


@pytest.fixture
def settings(database: str, broker: str, s3: Any, tmp_path: Path) -> Settings:
    return Settings(
        database=DatabaseSettings(url=SecretStr(database)),
        broker=BrokerSettings(url=SecretStr(broker)),
        s3=S3Settings(
            endpoint=s3.endpoint, bucket=s3.bucket, access_key=s3.access_key, secret_key=SecretStr(s3.secret_key)
        ),
        jobs=JobSettings(lease=timedelta(seconds=4), retry_backoff=timedelta(milliseconds=1)),
        worker=WorkerSettings(
            cache_dir=tmp_path / "cache", beat=timedelta(seconds=0.1), cancel_grace=timedelta(seconds=1)
        ),
    )


@pytest.fixture
def workplace(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workplace]:
    # Runners are processes of their own: they read the same settings from the environment.
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(nursery, "COMMAND", SCRIPTED)
    with ExitStack() as stack:
        yield Workplace(settings, tmp_path, stack)


def environment(settings: Settings) -> dict[str, str]:
    """The variables that give another process these settings."""
    return {
        "NOISEMILL_DATABASE_URL": settings.database.url.get_secret_value(),
        "NOISEMILL_BROKER_URL": settings.broker.url.get_secret_value(),
        "NOISEMILL_S3_ENDPOINT": settings.s3.endpoint or "",
        "NOISEMILL_S3_BUCKET": settings.s3.bucket,
        "NOISEMILL_S3_ACCESS_KEY": settings.s3.access_key,
        "NOISEMILL_S3_SECRET_KEY": settings.s3.secret_key.get_secret_value(),
        "NOISEMILL_WORKER_CACHE_DIR": str(settings.worker.cache_dir),
        "NOISEMILL_JOBS_LEASE": str(settings.jobs.lease.total_seconds()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


@pytest.fixture
def house(database: str, s3: Any) -> Iterator[House]:
    house = House(database, s3)
    yield house
    house.engine.dispose()


class Models:
    """Versions of a model, and generate jobs that ask something of one."""

    def __init__(self, workplace: Workplace) -> None:
        self._workplace = workplace

    def version(self, name: str = "digits") -> str:
        with Session(self._workplace.engine) as session, session.begin():
            model = Model(tenant_id=self._workplace.tenant_id, name=name, latest=1)
            session.add(model)
            session.flush()
            trained = self._workplace.job(type=JobType.EXPORT, state=JobState.CANCELED, completed_at="now()", queue="x")
            nothing: dict[str, Any] = {"family": "vae", "spec": {}, "info": {}, "metrics": {}, "weights": {}}
            version = ModelVersion(model_id=model.id, version=1, job_id=trained, **nothing)
            session.add(version)
            session.flush()
            return str(version.id)

    def job(self, version: str, *script: list[Any], **columns: Any) -> UUID:
        return self._workplace.job(*script, type=JobType.GENERATE, inputs={"version_id": version}, **columns)


@pytest.fixture
def models(workplace: Workplace) -> Models:
    return Models(workplace)
