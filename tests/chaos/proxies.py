"""Networks that break: TCP proxies in front of Valkey and PostgreSQL, in one thread of their own.

A ``Proxy`` can cut every connection, or go blind: swallow what both sides send and keep all sockets open, which is what
a failed switch looks like from both ends. A ``PostgresProxy`` can lie about commits besides.
"""

import asyncio
import random
import struct
from collections import Counter
from collections.abc import Awaitable
from contextlib import suppress
from threading import Thread
from typing import TypeVar

_CHUNK = 64 * 1024
_SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104
"""Codes of the two requests that may come before the startup message (PostgreSQL protocol, 55.2.10 and 55.2.11)."""

T = TypeVar("T")


class ProxyLoop:
    """The thread in which all proxies run."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._thread.start()

    def call(self, work: Awaitable[T]) -> T:
        """Run in the loop's thread and wait for the answer."""

        async def run() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def close(self) -> None:
        self.call(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _cancel_all(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class Link:
    """One connection: the client's end, the server's end, and whether it is still carried."""

    def __init__(self, near: "Stream") -> None:
        self.near, self.far = near, Stream(None, None)
        self.blind = False
        self.lying = False

    def abort(self) -> None:
        """RST to both sides."""
        self.near.abort()
        self.far.abort()


class Stream:
    """A reader and a writer; ``abort`` may come at any time."""

    def __init__(self, reader: asyncio.StreamReader | None, writer: asyncio.StreamWriter | None) -> None:
        self.reader, self.writer = reader, writer

    async def read(self) -> bytes:
        return await self.reader.read(_CHUNK) if self.reader else b""

    async def write(self, data: bytes) -> None:
        if self.writer:
            self.writer.write(data)
            await self.writer.drain()

    def abort(self) -> None:
        if self.writer:
            self.writer.transport.abort()


class Proxy:
    """Forwards to a port of this machine."""

    def __init__(self, loop: ProxyLoop, target: int) -> None:
        self._loop, self._target = loop, target
        self._links: set[Link] = set()
        self._blind = False
        self._server: asyncio.Server = loop.call(asyncio.start_server(self._carry, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Reset every connection; new ones work."""
        self._loop.call(self._cut())

    def go_blind(self) -> None:
        """Carry nothing on any connection, old or new, and close none. What is swallowed now is never delivered."""
        self._loop.call(self._set_blind(blind=True))

    def see_again(self) -> None:
        """Carry new connections. The blind ones stay blind: nobody tells their ends."""
        self._loop.call(self._set_blind(blind=False))

    def close(self) -> None:
        self._loop.call(self._close())

    async def _close(self) -> None:
        # In the loop's thread: a connection that ends meanwhile closes the server, too.
        self._server.close()
        await self._cut()

    async def _cut(self) -> None:
        for link in list(self._links):
            link.abort()

    async def _set_blind(self, *, blind: bool) -> None:
        self._blind = blind
        if blind:
            for link in self._links:
                link.blind = True

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(Stream(reader, writer))
        link.blind = self._blind
        self._links.add(link)
        try:
            with suppress(OSError):
                if not link.blind:
                    link.far = Stream(*await asyncio.open_connection("127.0.0.1", self._target))
                await self._both_ways(link)
        finally:
            self._links.discard(link)
            link.abort()

    async def _both_ways(self, link: Link) -> None:
        ways = [self._upstream(link)] + ([self._downstream(link)] if link.far.reader else [])
        tasks = [asyncio.ensure_future(way) for way in ways]
        # When one side closes, so do we; unless we are blind, and nobody learns that the other has gone.
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if link.blind:
            await asyncio.wait(tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _upstream(self, link: Link) -> None:
        await self._pass(link, link.near, link.far)

    async def _downstream(self, link: Link) -> None:
        await self._pass(link, link.far, link.near)

    async def _pass(self, link: Link, source: Stream, sink: Stream) -> None:
        while data := await source.read():
            if not link.blind:
                await sink.write(data)


class PostgresProxy(Proxy):
    """Also lies about commits: a share of them is answered by a broken connection.

    Half of the lies are commits that happened, half are commits that did not; a client cannot tell which.
    """

    def __init__(self, loop: ProxyLoop, target: int, *, seed: int) -> None:
        self._random = random.Random(seed)
        self.lie_share = 0.0
        self.lies = Counter[str]()
        super().__init__(loop, target)

    async def _upstream(self, link: Link) -> None:
        reader = link.near.reader
        if reader is None:
            return
        with suppress(asyncio.IncompleteReadError):
            await self._pass_startup(link, reader)
            while True:
                kind = await reader.readexactly(1)
                length = await reader.readexactly(4)
                body = await reader.readexactly(struct.unpack("!I", length)[0] - 4)
                if kind == b"Q" and body.upper().startswith(b"COMMIT") and not self._may_commit(link):
                    return
                if not link.blind:
                    await link.far.write(kind + length + body)

    async def _pass_startup(self, link: Link, reader: asyncio.StreamReader) -> None:
        while True:
            length = await reader.readexactly(4)
            body = await reader.readexactly(struct.unpack("!I", length)[0] - 4)
            if struct.unpack("!I", body[:4])[0] not in (_SSL_REQUEST, _GSS_REQUEST):
                break
            await link.near.write(b"N")
        if not link.blind:
            await link.far.write(length + body)

    def _may_commit(self, link: Link) -> bool:
        if self._random.random() >= self.lie_share:
            return True
        link.lying = self._random.random() < 0.5
        self.lies["executed" if link.lying else "dropped"] += 1
        return link.lying

    async def _downstream(self, link: Link) -> None:
        # The client waits for the answer to COMMIT, so the server's next bytes are that answer: it was executed.
        while (data := await link.far.read()) and not link.lying:
            if not link.blind:
                await link.near.write(data)
