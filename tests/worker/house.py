"""A house that can be kept: real SQL and a real bucket, with attempts that write into both as runners do."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

from pydantic import SecretStr
from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.orm import Session
from sqlmodel import SQLModel, col

from shared.database import make_engine
from shared.ids import public, uuid7
from shared.jobs import attempts, claims, upkeep
from shared.jobs.attempts import Claim, NewArtifact
from shared.jobs.keys import artifact_key
from shared.jobs.rows import Artifact, Dataset, Job, ModelVersion, Tenant
from shared.jobs.state import HELD, QUEUES, JobState, JobType
from shared.settings import BrokerSettings, DatabaseSettings, JobSettings, S3Settings, Settings, WorkerSettings
from shared.storage import Storage
from worker.chores import Chore, chores

T = TypeVar("T")

NOTHING = timedelta(0)
TERMS = claims.Terms.of(JobSettings())


class House:
    """Nothing waits in it for anything: no grace, no second look later, unless the settings say so."""

    def __init__(self, database: str, s3: Any) -> None:
        self.settings = Settings(
            database=DatabaseSettings(url=SecretStr(database)),
            broker=BrokerSettings(url=SecretStr("redis://127.0.0.1:1/0")),
            s3=S3Settings(
                endpoint=s3.endpoint, bucket=s3.bucket, access_key=s3.access_key, secret_key=SecretStr(s3.secret_key)
            ).model_copy(update={"link_lifetime": NOTHING}),
            jobs=JobSettings().model_copy(update={"orphan_grace": NOTHING}),
            worker=WorkerSettings().model_copy(update={"collect": NOTHING}),
        )
        self.engine = make_engine(self.settings.database, "test")
        self.storage = Storage(self.settings.s3)
        self.tenant_id = self.add(Tenant(name="test"))

    def transact(self, work: Callable[[Session], T], /) -> T:
        with Session(self.engine) as session, session.begin():
            return work(session)

    def add(self, row: Any) -> UUID:
        """Commit a row; returns its id."""
        self.transact(lambda s: s.add(row))
        with Session(self.engine) as session:
            return session.merge(row, load=False).id

    def change(self, row: type[SQLModel], *conditions: Any, **values: Any) -> None:
        self.transact(lambda s: s.execute(update(row).where(*conditions).values(**values)))

    def chore(self, name: str, **jobs: Any) -> Chore:
        """One chore; ``jobs`` are settings that differ."""
        settings = self.settings.model_copy(update={"jobs": self.settings.jobs.model_copy(update=jobs)})
        (found,) = (each for each in chores(settings, self.storage, self.transact) if each.name == name)
        return found

    def job(self, kind: JobType = JobType.EXPORT, **columns: Any) -> UUID:
        row = Job(
            id=uuid7(), tenant_id=self.tenant_id, type=kind, queue=QUEUES[kind], summary="test",
            **{"spec": {}, "inputs": {}, "state": JobState.QUEUED, "event_seq": 1, "max_attempts": 5} | columns,
        )  # fmt: skip
        return self.add(row)

    def ended_job(self, *, ago: timedelta = NOTHING, **columns: Any) -> UUID:
        """One whose only attempt succeeded."""
        ended = {"state": JobState.SUCCEEDED, "fence": 1, "completed_at": func.clock_timestamp() - ago}
        return self.job(**ended | columns)

    def running_job(self, **columns: Any) -> tuple[UUID, Claim]:
        """A job, and the attempt that holds it."""
        job_id = self.job(**columns)
        (claim,) = self.transact(
            lambda s: claims.claim(s, worker="w", queues=list(set(QUEUES.values())), terms=TERMS, limit=1)
        )
        assert claim.job_id == job_id
        return job_id, claim

    def upload(self, job_id: UUID, fence: int, name: str, **details: Any) -> NewArtifact:
        """What a runner does first: the object, without a row."""
        stored = self.storage.put(artifact_key(public("job", job_id), fence, name), name.encode(), media_type="x/y")
        return NewArtifact(
            kind=name.partition("-")[0],
            name=name,
            key=stored.key,
            size_bytes=stored.size_bytes,
            sha256=stored.sha256,
            media_type="x/y",
            details=details,
        )

    def artifact(self, job_id: UUID, name: str, **columns: Any) -> UUID:
        """An object with its row; its kind is the first word of its name."""
        new = self.upload(job_id, 1, name)
        about = {"tenant_id": self.tenant_id, "job_id": job_id, "fence": 1, **vars(new)}
        return self.add(Artifact(**about | columns))

    def lose(self, job_id: UUID) -> None:
        """Its lease runs out, and somebody notices."""
        held = (col(Job.id) == job_id, col(Job.state).in_(HELD))
        self.change(Job, *held, lease_until=func.clock_timestamp() - timedelta(seconds=1))
        self.transact(upkeep.reap)

    def record(self, claim: Claim, artifact: NewArtifact) -> bool:
        """Make it visible while its job runs; False: the attempt is over."""
        told = [attempts.Report.of(artifact)]
        return self.transact(lambda s: attempts.report(s, claim, told, lease=TERMS.lease)) is not None

    def succeed(self, claim: Claim, *artifacts: NewArtifact, result: dict[str, Any] | None = None) -> JobState | None:
        how = {"result": result or {}, "artifacts": artifacts, "timings": {}, "steps": 1}
        return self.transact(lambda s: attempts.succeed(s, claim, **how))

    def keys(self) -> set[str]:
        """What is in the bucket."""
        return {listed.key for listed in self.storage.list("")}

    def names(self) -> set[str]:
        """The last parts of the keys in the bucket."""
        return {key.rpartition("/")[2] for key in self.keys()}

    def named(self, engine: Engine | None = None) -> set[str]:
        """Keys that committed rows name, read row by row."""
        with Session(engine or self.engine) as session:
            artifacts = session.scalars(select(col(Artifact.key)).where(col(Artifact.removed_at).is_(None))).all()
            weights = session.scalars(select(col(ModelVersion.weights))).all()
            datasets = session.scalars(select(Dataset)).all()
            sources = {each.source["key"] for each in datasets if "key" in each.source}
            files = {file["key"] for each in datasets for file in each.files}
        return {*artifacts, *(each["key"] for each in weights), *sources, *files}

    def everything(self) -> dict[str, Any]:
        """Every row of every table, and the bucket."""
        with Session(self.engine) as session:
            tables = {
                name: sorted(map(repr, session.execute(text(f"SELECT * FROM {name}")).all()))
                for name in SQLModel.metadata.tables
            }
        return tables | {"bucket": sorted(self.storage.list("")), "uploads": sorted(self.storage.unfinished(""))}
