"""A real API server in a thread, in front of real servers, and tenants with keys of their own."""

import hashlib
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.orm import Session
from sqlmodel import SQLModel

from api.auth import SCOPES
from shared.jobs.rows import ApiKey, Tenant
from shared.settings import Settings
from tests.api.support import Owner, make_settings, serving


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
        clients.append(httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60))
        return Owner(id=tenant_id, key=key, client=clients[-1], engine=engine)

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def owner(make_owner: MakeOwner) -> Owner:
    return make_owner()


@pytest.fixture
def count_rows(engine: Engine) -> Callable[[], dict[str, int]]:
    """How many rows each table has: what a refused request must not change. Leases are of the API's own threads."""

    def count() -> dict[str, int]:
        with Session(engine) as session:
            tables = [table for name, table in SQLModel.metadata.tables.items() if name != "named_leases"]
            return {table.name: session.scalar(select(func.count()).select_from(table)) or 0 for table in tables}

    return count


@pytest.fixture
def stranger(api_url: str) -> Iterator[httpx.Client]:
    """A client without a key."""
    with httpx.Client(base_url=api_url, timeout=60) as client:
        yield client
