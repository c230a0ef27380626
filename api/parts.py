"""What one API process is made of: its engines, storage, and the threads and tasks beside the requests.

Built by the app's lifespan, handed to routes as a dependency. Routes open short transactions; none is held while
waiting for anything but SQL.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from api.news import News
from api.probe import StorageProbe
from api.relay import RelayThread
from api.upkeep import UpkeepThread
from shared.settings import Settings

if TYPE_CHECKING:
    from shared.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a running API."""

    settings: Settings
    engine: AsyncEngine
    thread_engine: Engine
    """For what is answered for several requests at once (``together.py``)."""
    metrics_engine: Engine
    storage: "Storage"
    storage_probe: StorageProbe
    broker: Any
    """An asyncio Redis client, for health checks."""
    news: News
    relay: RelayThread
    upkeep: UpkeepThread

    @staticmethod
    async def of(request: Request) -> "Parts":
        """The dependency. Like all that await nothing it is async, because FastAPI has threads call the others."""
        return request.app.state.parts

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """A session whose work is committed at the end, or not at all."""
        async with AsyncSession(self.engine, expire_on_commit=False) as session, session.begin():
            yield session
