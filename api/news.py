"""Tells requests that wait for a job that there is news of it. The news itself is in SQL.

One Redis subscription per process serves every waiting request. When it breaks, waiting requests look into SQL
more often; a lost ring costs a waiter one poll, never an event.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final
from uuid import UUID

from shared.settings import BrokerSettings

logger = logging.getLogger(__name__)

POLL_RINGING: Final = 5.0
"""Seconds between looks into SQL while the bell works."""
POLL_DEAF: Final = 1.0
"""The same while Redis is away."""
_RETRY_SECONDS: Final = 1.0


class Listener:
    """One waiting request."""

    def __init__(self, news: "News", *, only_ends: bool) -> None:
        self._news = news
        self.only_ends = only_ends
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self._rung.set()

    async def wait(self, longest: float) -> None:
        """Return when there may be news: the bell rang, or it is time to look, or ``longest`` seconds have passed."""
        poll = POLL_RINGING if self._news.hears else POLL_DEAF
        with suppress(TimeoutError):
            async with asyncio.timeout(min(poll, longest)):
                await self._rung.wait()
        self._rung.clear()

    async def chances(self, seconds: float) -> AsyncIterator[None]:
        """Yield whenever there may be news, until ``seconds`` have passed or the process ends."""
        deadline = asyncio.get_running_loop().time() + seconds
        while (left := deadline - asyncio.get_running_loop().time()) > 0 and not self._news.closing:
            await self.wait(left)
            yield


class News:
    """The bells of all jobs, heard once and handed to whoever waits."""

    def __init__(self, redis: Any, settings: BrokerSettings) -> None:
        self._redis = redis
        self._prefix = f"{settings.prefix}events:"
        self._listeners: dict[UUID, set[Listener]] = {}
        self.hears = False
        """Whether the subscription stands."""
        self.closing = False
        """Whether the process is about to end: nobody should wait any more."""

    @contextmanager
    def of(self, job_id: UUID, *, only_ends: bool = False) -> Iterator[Listener]:
        """Listen to a job. Open before looking into SQL, so that nothing falls in between.

        ``only_ends``: what may be news of its end alone."""
        listener = Listener(self, only_ends=only_ends)
        self._listeners.setdefault(job_id, set()).add(listener)
        try:
            yield listener
        finally:
            self._listeners[job_id].discard(listener)
            if not self._listeners[job_id]:
                del self._listeners[job_id]

    def close(self) -> None:
        """Wake everybody for the last time."""
        self.closing = True
        self._ring_all()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hear bells in the background."""
        task = asyncio.create_task(self._run(), name="news")
        try:
            yield
        finally:
            self.close()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        from redis.exceptions import RedisError  # noqa: PLC0415  (slow to import, and only a running app needs it)

        # Asked besides being canceled: where a time-out comes at the same moment, a library may take one for the other.
        while not self.closing:
            try:
                await self._hear()
            except (RedisError, OSError) as error:
                if self.hears:
                    logger.warning("event bells are not heard, SQL is polled instead: %s", type(error).__name__)
                    self.hears = False
                    self._ring_all()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _hear(self) -> None:
        from shared.events import BEGINNING  # noqa: PLC0415  (as above)

        async with self._redis.pubsub() as subscription:
            await subscription.psubscribe(f"{self._prefix}*")
            while not self.closing:
                message = await subscription.get_message(timeout=1.0)
                if message is None:
                    # Answers only while the connection lives.
                    await subscription.ping()
                elif message["type"] == "psubscribe":
                    self.hears = True
                    self._ring_all()
                elif message["type"] == "pmessage":
                    self._ring(message["channel"], is_beginning=message["data"] == BEGINNING)

    def _ring(self, channel: bytes, *, is_beginning: bool) -> None:
        with suppress(ValueError):
            job_id = UUID(hex=channel.decode().removeprefix(self._prefix))
            for listener in self._listeners.get(job_id, ()):
                if not (is_beginning and listener.only_ends):
                    listener.ring()

    def _ring_all(self) -> None:
        for listeners in self._listeners.values():
            for listener in listeners:
                listener.ring()
