"""A real API server in a thread, in front of real servers, and tenants with keys of their own."""

import hashlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
import pytest
import uvicorn
from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.orm import Session
from sqlmodel import SQLModel

from api.app import create_app
from api.auth import SCOPES
from shared.ids import parse, public
from shared.jobs.rows import ApiKey, Dataset, DatasetState, Model, ModelVersion, Tenant
from shared.settings import Settings


def make_settings(database: str, broker: str, bucket: Any, **api: Any) -> Settings:
    """Settings as the environment would give them."""
    return Settings.model_validate(
        {
            "database": {"url": database, "pool_size": 10},
            "broker": {"url": broker, "prefix": f"test-{secrets.token_hex(4)}:"},
            "s3": vars(bucket),
            "api": {"max_body": 64 * 1024, "max_upload": 1024 * 1024, **api},
        }
    )


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """Run the API on a free port; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(create_app(settings), log_config=None, lifespan="on", timeout_graceful_shutdown=3)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.01)
    assert server.started
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def settings(module_database: str, valkey: str, module_s3: Any) -> Settings:
    return make_settings(module_database, valkey, module_s3)


@pytest.fixture(scope="module")
def api_url(settings: Settings) -> Iterator[str]:
    with serving(settings) as url:
        yield url


@pytest.fixture(scope="module")
def engine(settings: Settings) -> Iterator[Engine]:
    engine = create_engine(settings.database.url.get_secret_value())
    yield engine
    engine.dispose()


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
            info = {"shape": [1, 28, 28]}
            dataset = Dataset(
                tenant_id=self.id, name="digits", state=state, modality=modality, info=info, source=source, **fields
            )
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


MakeOwner = Callable[..., Owner]


@pytest.fixture
def make_owner(api_url: str, engine: Engine) -> Iterator[MakeOwner]:
    clients: list[httpx.Client] = []

    def make(scopes: tuple[str, ...] = SCOPES, *, url: str = api_url, engine: Engine = engine, **fields: Any) -> Owner:
        key = secrets.token_urlsafe(24)
        with Session(engine) as session, session.begin():
            tenant = Tenant(name=secrets.token_hex(8))
            session.add(tenant)
            session.flush()
            digest = hashlib.sha256(key.encode()).digest()
            session.add(ApiKey(tenant_id=tenant.id, digest=digest, hint=key[:4], scopes=list(scopes), **fields))
            tenant_id = tenant.id
        clients.append(httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=20))
        return Owner(id=tenant_id, key=key, client=clients[-1], engine=engine)

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def owner(make_owner: MakeOwner) -> Owner:
    return make_owner()


@pytest.fixture
def count_rows(engine: Engine) -> Callable[[], dict[str, int]]:
    """How many rows each table has: what a refused request must not change."""

    def count() -> dict[str, int]:
        with Session(engine) as session:
            tables = SQLModel.metadata.tables.values()
            return {table.name: session.scalar(select(func.count()).select_from(table)) or 0 for table in tables}

    return count


@pytest.fixture
def stranger(api_url: str) -> Iterator[httpx.Client]:
    """A client without a key."""
    with httpx.Client(base_url=api_url, timeout=20) as client:
        yield client
