"""Load for HTTP servers: one client process, connections that stay open, the same for every server it is put upon.

``saturate`` keeps every connection busy and counts answers. ``offer`` sends at moments that were drawn before, whatever
the server does, and measures from those moments: a server that falls behind is not asked less often.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import uvloop

_SLACK_SECONDS: Final = 60.0
"""How long an answer may take before the measurement is given up."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go, and what they are: ``body(n)`` is the JSON of the n-th, ``headers(n)`` its headers."""

    port: int
    path: str
    body: Callable[[int], Mapping[str, Any]]
    headers: Callable[[int], Mapping[str, str]] = lambda number: {}
    expects: int = 202

    def request(self, number: int) -> bytes:
        content = json.dumps(self.body(number)).encode()
        lines = {
            "Host": f"127.0.0.1:{self.port}",
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **self.headers(number),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"POST {self.path} HTTP/1.1\r\n{head}\r\n".encode() + content


@dataclass(kw_only=True)
class Load:
    """What came of it."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list[float])
    """Of each answer, in seconds."""

    @property
    def per_second(self) -> float:
        return len(self.latencies) / self.seconds

    def quantile_ms(self, share: float) -> float:
        return 1000 * statistics.quantiles(self.latencies, n=1000, method="inclusive")[round(share * 1000) - 1]


class RequestFailed(Exception):
    """An answer was not the expected one: then nothing is measured."""


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._received = b""
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(RequestFailed("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or self._answer is None:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if len(body) >= length:
            self._received = b""
            self._answer.set_result((int(head[9:12]), body))

    async def send(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        self._transport.close()


async def connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


def saturate(target: Target, *, connections: int, seconds: float, warm_up: float) -> Load:
    """Closed loop: each connection sends its next request once the last is answered. All answers are accounted for."""
    return uvloop.run(_saturate(target, connections, seconds, warm_up))


async def _saturate(target: Target, connections: int, seconds: float, warm_up: float) -> Load:
    begins = time.perf_counter() + warm_up
    ends = begins + seconds
    numbers, load = _numbers(), Load(seconds=seconds)

    async def work(connection: Connection) -> None:
        while (sent := time.perf_counter()) < ends:
            await _post(connection, target, next(numbers))
            if begins <= (now := time.perf_counter()) < ends:
                load.latencies.append(now - sent)

    async with _Connections(target.port, connections) as open_connections:
        await asyncio.gather(*(work(connection) for connection in open_connections))
    return load


def offer(target: Target, *, per_second: float, connections: int, seconds: float, seed: int) -> Load:
    """Open loop: Poisson arrivals at this rate; what finds no free connection waits for one, and that counts."""
    return uvloop.run(_offer(target, per_second, connections, seconds, seed))


async def _offer(target: Target, per_second: float, connections: int, seconds: float, seed: int) -> Load:
    load, arrivals = Load(seconds=seconds), _arrivals(per_second, seconds, seed)
    waiting: asyncio.Queue[tuple[int, float] | None] = asyncio.Queue()

    async def work(connection: Connection) -> None:
        while (due := await waiting.get()) is not None:
            number, moment = due
            await _post(connection, target, number)
            load.latencies.append(time.perf_counter() - moment)

    async with (
        _Connections(target.port, connections) as open_connections,
        asyncio.timeout(seconds + _SLACK_SECONDS),
        asyncio.TaskGroup() as group,
    ):
        for connection in open_connections:
            group.create_task(work(connection))
        begin = time.perf_counter()
        for number, arrival in zip(_numbers(), arrivals, strict=False):
            await asyncio.sleep(max(0.0, begin + arrival - time.perf_counter()))
            waiting.put_nowait((number, begin + arrival))
        for _ in open_connections:
            waiting.put_nowait(None)
    return load


def _arrivals(per_second: float, seconds: float, seed: int) -> Sequence[float]:
    draw, moment, moments = random.Random(seed), 0.0, list[float]()
    while (moment := moment + draw.expovariate(per_second)) < seconds:
        moments.append(moment)
    return moments


@dataclass(frozen=True, kw_only=True)
class Trip:
    """One request of a lone client."""

    sent_at: float
    """By the machine's clock."""
    seconds: float
    answer: Mapping[str, Any]


def one_by_one(target: Target, *, times: int, pause: float) -> list[Trip]:
    """Requests that come into an idle service, ``pause`` seconds after the last was answered."""
    return uvloop.run(_one_by_one(target, times, pause))


async def _one_by_one(target: Target, times: int, pause: float) -> list[Trip]:
    trips: list[Trip] = []
    async with _Connections(target.port, 1) as (connection,):
        for number, _ in zip(_numbers(), range(times), strict=False):
            await asyncio.sleep(pause)
            sent_at, sent = time.time(), time.perf_counter()
            body = await _post(connection, target, number)
            trips.append(Trip(sent_at=sent_at, seconds=time.perf_counter() - sent, answer=json.loads(body)))
    return trips


async def _post(connection: Connection, target: Target, number: int) -> bytes:
    status, body = await connection.send(target.request(number))
    if status != target.expects:
        raise RequestFailed(f"{target.path}: {status} {body[:500].decode(errors='replace')}")
    return body


_sent = 0


def _numbers() -> Iterator[int]:
    """Of requests; never the same twice in one process."""
    global _sent  # noqa: PLW0603  (idempotency keys are made of them)
    while True:
        _sent += 1
        yield _sent


class _Connections:
    """Open for a while."""

    def __init__(self, port: int, count: int) -> None:
        self._port, self._count = port, count
        self._open: list[Connection] = []

    async def __aenter__(self) -> list[Connection]:
        self._open = [await connect(self._port) for _ in range(self._count)]
        return self._open

    async def __aexit__(self, *_: object) -> None:
        for connection in self._open:
            connection.close()
