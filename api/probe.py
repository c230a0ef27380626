"""Asks whether storage answers, one question at a time, so that storage that hangs costs one thread."""

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.storage import Storage


class StorageProbe:
    """For readiness checks, which come often and must not pile up."""

    def __init__(self, storage: "Storage") -> None:
        self._storage = storage
        self._asking: asyncio.Future[None] | None = None

    async def ask(self) -> None:
        """Return if storage answers; raises ``StorageError``."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(asyncio.to_thread(self._look))
            # Somebody may have stopped waiting for it.
            self._asking.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
        await asyncio.shield(self._asking)

    def _look(self) -> None:
        next(self._storage.list("readiness/"), None)
