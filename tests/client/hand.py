"""A worker played by hand: it claims, reports and finishes through the real domain code, in real SQL and storage."""

from contextlib import ExitStack
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from shared.database import make_engine
from shared.errors import JobError
from shared.events import EventBell
from shared.jobs import attempts, claims
from shared.jobs.attempts import Claim, NewArtifact
from shared.settings import JobSettings, Settings
from shared.storage import Storage

LEASE = timedelta(minutes=1)
TERMS = claims.Terms.of(JobSettings())


class Hand:
    """Works on one job at a time."""

    def __init__(self, settings: Settings, stack: ExitStack) -> None:
        self._engine = make_engine(settings.database, "hand")
        stack.callback(self._engine.dispose)
        self._bell = EventBell(settings.broker)
        stack.callback(self._bell._client.close)
        self._storage = Storage(settings.s3)

    def claim(self, *queues: str) -> Claim:
        """Start an attempt at the job that waits."""
        with Session(self._engine) as session, session.begin():
            found = claims.claim(session, worker="hand", queues=queues or ("ingest", "train", "generate"), terms=TERMS)
        self._bell.ring(found[0].job_id)
        return found[0]

    def step(self, claim: Claim, step: int, steps: int, **figures: float) -> None:
        where = attempts.Progress(step=step, steps=steps, phase="training", figures=figures)
        with Session(self._engine) as session, session.begin():
            attempts.report(session, claim, [where.as_report()], where=where, lease=LEASE)
        self._bell.ring(claim.job_id)

    def log(self, claim: Claim, message: str) -> None:
        said = attempts.Report(type="job.log", data={"message": message})
        with Session(self._engine) as session, session.begin():
            attempts.report(session, claim, [said], lease=LEASE)
        self._bell.ring(claim.job_id)

    def succeed(self, claim: Claim, artifacts: dict[str, bytes] | None = None, **result: Any) -> None:
        stored = [self._store(claim, name, body) for name, body in (artifacts or {}).items()]
        with Session(self._engine) as session, session.begin():
            attempts.succeed(session, claim, result=result, artifacts=stored, timings={}, steps=0)
        self._bell.ring(claim.job_id)

    def fail(self, claim: Claim, error: JobError, *, backoff: timedelta = timedelta(seconds=1)) -> None:
        with Session(self._engine) as session, session.begin():
            attempts.fail(session, claim.job_id, claim.fence, error, backoff=backoff)
        self._bell.ring(claim.job_id)

    def hand_back(self, claim: Claim) -> None:
        with Session(self._engine) as session, session.begin():
            attempts.hand_back(session, claim.job_id, claim.fence)
        self._bell.ring(claim.job_id)

    def ingest(self) -> None:
        """Say that the upload that waits is ten images."""
        self.succeed(
            self.claim("ingest"), modality="image", count=10, digest="0" * 64, info={"shape": [1, 8, 8]}, files=[]
        )

    def train(self, claim: Claim, weights: bytes = b"weights") -> None:
        """Say that the training went well."""
        stored = self._store(claim, "model.safetensors", weights)
        where = {"key": stored.key, "sha256": stored.sha256, "size_bytes": stored.size_bytes}
        self.succeed(
            claim, {"model.safetensors": weights}, metrics={"elbo": -1.5}, weights=where, info={"shape": [1, 8, 8]}
        )

    def _store(self, claim: Claim, name: str, body: bytes) -> NewArtifact:
        stored = self._storage.put(f"jobs/{claim.job_id.hex}/{claim.fence}/{name}", body, media_type="image/png")
        return NewArtifact(
            kind="sample",
            name=name,
            key=stored.key,
            size_bytes=stored.size_bytes,
            sha256=stored.sha256,
            media_type="image/png",
        )


def job_of(claim: Claim) -> str:
    """The public id of the claimed job."""
    identifier: UUID = claim.job_id
    return f"job_{identifier.hex}"
