"""A tenant at the desk: asks for jobs through the real requests, and works on them through the real attempts."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from uuid import UUID

from pydantic import SecretStr
from sqlalchemy import Engine, event, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.database import make_async_engine, make_engine
from shared.ids import uuid7
from shared.jobs import attempts, claims, requests, workers
from shared.jobs.attempts import Claim, NewArtifact
from shared.jobs.rows import Dataset, DatasetState, Job, Tenant
from shared.settings import DatabaseSettings, JobSettings
from shared.wire import TrainRequest

SETTINGS = JobSettings()
TERMS = claims.Terms.of(SETTINGS)
QUEUES = ["train", "generate", "ingest"]

T = TypeVar("T")
"""What a request returns."""


class Desk:
    """A tenant with a dataset; every request is a transaction of its own."""

    def __init__(self, url: str, engine: Engine) -> None:
        self._database = DatabaseSettings(url=SecretStr(url))
        self.url, self.engine = url, engine
        with Session(engine) as session, session.begin():
            tenant = Tenant(name=uuid7().hex)
            session.add(tenant)
            session.flush()
            self.tenant_id = tenant.id
            dataset = Dataset(
                tenant_id=tenant.id, name="digits", state=DatasetState.READY, modality="image", source={},
                info={"shape": [1, 8, 8]},
            )  # fmt: skip
            session.add(dataset)
            session.flush()
            self.dataset_id = dataset.id

    def ask(self, *requests: Callable[[AsyncSession], Awaitable[T]]) -> list[T | BaseException]:
        """All at once."""

        async def one(engine: Any, request: Callable[[AsyncSession], Awaitable[T]]) -> T:
            async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
                return await request(session)

        async def everything() -> list[T | BaseException]:
            engine = make_async_engine(self._database.model_copy(update={"pool_size": 20}), "test")
            try:
                return await asyncio.gather(*(one(engine, each) for each in requests), return_exceptions=True)
            finally:
                await engine.dispose()

        return asyncio.run(everything())

    def do(self, request: Callable[[AsyncSession], Awaitable[T]]) -> T:
        (answer,) = self.ask(request)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def submit(self, *, settings: JobSettings = SETTINGS, **fields: Any) -> Job:
        return self.do(self.submission(settings=settings, **fields))

    def submission(self, *, settings: JobSettings = SETTINGS, **fields: Any) -> Callable[[AsyncSession], Any]:
        spec = {"family": "vae", "dataset": f"ds_{self.dataset_id.hex}", "model": "digits"}
        request = TrainRequest.model_validate({"type": "train", "spec": spec, **fields})
        return lambda session: requests.submit(session, self.tenant_id, request, settings=settings)

    def pause(self, job_id: UUID) -> Job:
        return self.do(lambda session: requests.pause(session, self.tenant_id, job_id))

    def resume(self, job_id: UUID) -> Job:
        return self.do(lambda session: requests.resume(session, self.tenant_id, job_id, settings=SETTINGS))

    def retry(self, job_id: UUID) -> Job:
        job, _ = self.do(lambda session: requests.retry(session, self.tenant_id, job_id, settings=SETTINGS))
        return job

    def work(self, what: Callable[[Session], T]) -> T:
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            return what(session)

    def claim(self, worker: str = "w", queues: list[str] | None = None) -> Claim:
        (claim,) = self.work(lambda s: claims.claim(s, worker=worker, queues=queues or QUEUES, terms=TERMS))
        return claim

    def job(self, job_id: UUID) -> Job:
        return self.work(lambda session: session.get_one(Job, job_id))

    def force(self, job_id: UUID, **columns: Any) -> None:
        self.work(lambda session: session.execute(update(Job).where(col(Job.id) == job_id).values(**columns)))

    def count(self, row: Any, *conditions: Any) -> int:
        return self.work(lambda session: session.scalar(select(func.count()).select_from(row).where(*conditions)) or 0)

    def checkpoint(self, claim: Claim, step: int, **details: Any) -> None:
        said = attempts.Report.of(self.new_checkpoint(claim, step, **details))
        self.work(lambda session: attempts.report(session, claim, [said], lease=TERMS.lease))

    def new_checkpoint(self, claim: Claim, step: int, **details: Any) -> NewArtifact:
        return NewArtifact(
            kind="checkpoint", name=f"{step}", key=f"{claim.job_id}/{claim.fence}/{step}", size_bytes=1, sha256="0",
            media_type="x/y", details={"step": step, **details},
        )  # fmt: skip

    @contextmanager
    def cut_off_after(self, statements: int) -> Iterator[Engine]:
        """An engine whose statements commit each by itself, and that loses its connection after some of them."""
        engine = make_engine(self._database, "test").execution_options(isolation_level="AUTOCOMMIT")
        engine.connect().close()
        left = iter(range(statements))

        def cut(*_: Any) -> None:
            if next(left, None) is None:
                raise ConnectionError

        event.listen(engine, "before_cursor_execute", cut)
        yield engine
        engine.dispose()

    def worker(self, name: str, *queues: str, state: str = "idle") -> None:
        says = {"name": name, "host": "h", "pid": 1, "queues": list(queues), "device": "cpu", "job_id": None}
        self.work(lambda session: workers.sign_in(session, **says, state=state))
