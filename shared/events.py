"""The bell of the event log: tells listeners that a job has news. The news itself is read from SQL.

A lost ring costs a listener one poll interval, never an event.
"""

import logging
import time
from typing import Any, Final
from uuid import UUID

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.settings import BrokerSettings

logger = logging.getLogger(__name__)

_OPTIONS: Final[dict[str, Any]] = {
    "socket_timeout": 5,
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 5,
}


BEGINNING: Final = b"begins"
"""What a bell says when an attempt begins, which is no news for those who wait for the end."""


def channel(settings: BrokerSettings, job_id: UUID) -> str:
    """Where the bell of a job rings."""
    return f"{settings.prefix}events:{job_id.hex}"


def connect(settings: BrokerSettings, *, retries: int = 0) -> "redis.Redis":
    """A client for rings and health checks; connects on first use, and tries again at once, so many times."""
    return redis.Redis.from_url(settings.url.get_secret_value(), retry=Retry(NoBackoff(), retries), **_OPTIONS)  # pyright: ignore[reportUnknownMemberType]


def connect_async(settings: BrokerSettings) -> "redis.asyncio.Redis":
    """The same for asyncio."""
    return redis.asyncio.Redis.from_url(settings.url.get_secret_value(), **_OPTIONS)  # pyright: ignore[reportUnknownMemberType]


_REST_SECONDS: Final = 10.0
"""After a failed ring none is tried for so long, lest each wait for the same time-out."""


class EventBell:
    """Rings after a commit. Never raises, never blocks for long: SQL has the event already."""

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._client = connect(settings)
        self._rests_until = 0.0

    def ring(self, job_id: UUID, *, begins: bool = False) -> None:
        if time.monotonic() < self._rests_until:
            return
        try:
            self._client.publish(channel(self._settings, job_id), BEGINNING if begins else b"news")  # pyright: ignore[reportUnknownMemberType]
        except (redis.RedisError, OSError) as error:
            self._rests_until = time.monotonic() + _REST_SECONDS
            logger.debug("bell of job %s not rung: %s", job_id, error)
