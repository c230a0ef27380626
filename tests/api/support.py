"""What the tests of the API are made with: a server in a thread, a tenant with its key, and a worker played by SQL."""

import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import uvicorn
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from api.app import create_app
from shared.errors import JobError
from shared.ids import parse, public
from shared.jobs import attempts, claims
from shared.jobs.attempts import Claim, NewArtifact
from shared.jobs.rows import Dataset, DatasetState, Model, ModelVersion
from shared.settings import JobSettings, Settings

LEASE = timedelta(seconds=60)
TERMS = claims.Terms.of(JobSettings())


def make_settings(
    database: str, broker: str, bucket: Any, *, jobs: dict[str, Any] | None = None, **api: Any
) -> Settings:
    """Settings as the environment would give them."""
    return Settings.model_validate(
        {
            # Patient: how long a crowd waits for connections is up to the machine.
            "database": {"url": database, "pool_size": 10, "pool_timeout": 60},
            "broker": {"url": broker, "prefix": f"test-{secrets.token_hex(4)}:"},
            "s3": vars(bucket),
            "jobs": jobs or {},
            "api": {"max_body": 64 * 1024, "max_upload": 1024 * 1024, **api},
        }
    )


def environment(settings: Settings) -> dict[str, str]:
    """The variables that make a process read these settings."""
    return {
        "NOISEMILL_DATABASE_URL": settings.database.url.get_secret_value(),
        "NOISEMILL_BROKER_URL": settings.broker.url.get_secret_value(),
        "NOISEMILL_BROKER_PREFIX": settings.broker.prefix,
        "NOISEMILL_S3_ENDPOINT": settings.s3.endpoint or "",
        "NOISEMILL_S3_BUCKET": settings.s3.bucket,
        "NOISEMILL_S3_ACCESS_KEY": settings.s3.access_key,
        "NOISEMILL_S3_SECRET_KEY": settings.s3.secret_key.get_secret_value(),
    }


@contextmanager
def serving(settings: Settings, **options: Any) -> Iterator[str]:
    """Run the API on a free port, with ``options`` of uvicorn's; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    how: dict[str, Any] = {"log_config": None, "lifespan": "on", "timeout_graceful_shutdown": 3, **options}
    server = uvicorn.Server(uvicorn.Config(create_app(settings), **how))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.01)
    assert server.started
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive()


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A tenant, with a client that holds its key."""

    id: UUID
    key: str
    client: httpx.Client
    engine: Engine

    def add_dataset(self, *, state: DatasetState = DatasetState.READY, modality: str = "image", **fields: Any) -> str:
        with Session(self.engine) as session, session.begin():
            source = {"filename": "a.zip", "key": "k", "size_bytes": 1, "sha256": "0"}
            known = {"name": "digits", "info": {"shape": [1, 28, 28]}, "source": source}
            dataset = Dataset(tenant_id=self.id, state=state, modality=modality, **(known | fields))
            session.add(dataset)
            session.flush()
            return public("ds", dataset.id)

    def add_model(self, name: str = "digits", *, job_id: str, version: int = 1) -> str:
        with Session(self.engine) as session, session.begin():
            model = Model(tenant_id=self.id, name=name, latest=version)
            session.add(model)
            session.flush()
            weights = {"key": "w", "sha256": "0" * 64, "size_bytes": 10}
            job = parse("job", job_id)
            info = {"shape": [1, 28, 28]}
            session.add(
                ModelVersion(
                    model_id=model.id,
                    version=version,
                    family="vae",
                    spec={},
                    info=info,
                    metrics={},
                    weights=weights,
                    job_id=job,
                )
            )
        return f"{name}@{version}"

    def train(self, **fields: Any) -> dict[str, Any]:
        """Submit a training job on a dataset of one's own."""
        answer = self.client.post("/v1/jobs", json=train_request(self.add_dataset(), **fields))
        assert answer.status_code == 202, answer.text
        return answer.json()


def train_request(
    dataset: str, *, labels: dict[str, str] | None = None, priority: str = "normal", **spec: Any
) -> dict[str, Any]:
    return {
        "type": "train",
        "spec": {"family": "vae", "dataset": dataset, "model": "digits", "steps": 100, **spec},
        "labels": labels or {},
        "priority": priority,
    }


def claim(engine: Engine, job_id: str) -> Claim:
    """Start an attempt at this job, as a worker would that finds it alone in its queue."""
    row = {"id": parse("job", job_id)}
    with Session(engine) as session, session.begin():
        queue = session.execute(text("SELECT queue FROM jobs WHERE id = :id"), row).scalar_one()
        change = text("UPDATE jobs SET queue = :queue WHERE id = :id")
        session.execute(change, row | {"queue": job_id})
        (found,) = claims.claim(session, worker="w1", queues=[job_id], terms=TERMS)
        session.execute(change, row | {"queue": queue})
    assert found.job_id == row["id"]
    return found


def succeed(
    engine: Engine, claimed: Claim, artifacts: tuple[NewArtifact, ...] = (), shape: Sequence[int] = (1, 28, 28)
) -> None:
    """End the attempt well; if it trained a model, one of samples of this shape."""
    result = {"metrics": {"loss": 1.0}, "info": {"shape": shape}}
    result["weights"] = {"key": "w", "sha256": "0" * 64, "size_bytes": 10}
    timings = {"load_ms": 5, "execution_ms": 20, "upload_ms": 3}
    with Session(engine) as session, session.begin():
        assert attempts.succeed(session, claimed, result=result, artifacts=artifacts, timings=timings, steps=100)


def fail(engine: Engine, claimed: Claim, error: JobError) -> None:
    """End the attempt badly; what may be tried again may be so at once."""
    with Session(engine) as session, session.begin():
        assert attempts.fail(session, claimed.job_id, claimed.fence, error, backoff=timedelta(0))


def hand_back(engine: Engine, claimed: Claim) -> None:
    """End the attempt as a worker does that was told to stop."""
    with Session(engine) as session, session.begin():
        assert attempts.hand_back(session, claimed.job_id, claimed.fence)


def note(engine: Engine, claimed: Claim, message: str) -> None:
    """Add a log event."""
    with Session(engine) as session, session.begin():
        said = attempts.Report(type="job.log", data={"message": message})
        attempts.report(session, claimed, [said], lease=TERMS.lease)


def new_artifact(key: str, **fields: Any) -> NewArtifact:
    """An artifact that is said to lie in storage."""
    known = {
        "kind": "sample",
        "name": key.rpartition("/")[2],
        "size_bytes": 3,
        "sha256": "0" * 64,
        "media_type": "image/png",
    }
    return NewArtifact(key=key, **{**known, **fields})


def is_up(owner: Owner) -> bool:
    try:
        return owner.client.get("/healthz").is_success
    except httpx.TransportError:
        return False
