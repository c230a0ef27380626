"""What counts as life while an attempt does no step: bytes that move, however slowly, and nothing else."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest

from shared.jobs.state import JobState
from shared.storage import Storage
from tests.chaos.proxies import Link, Proxy, ProxyLoop, Stream
from tests.worker.conftest import Workplace

SIZE = 14_000_000
RATE = 2_000_000
"""Bytes a second."""
BOUND = timedelta(seconds=4)
"""Less than the transfer takes, and more than passes between two signs of life: what lies in the sender's buffers, some
megabytes, has moved for it."""


class SlowProxy(Proxy):
    """Carries ``RATE``, until so many bytes have passed; then it stands still."""

    def __init__(self, loop: ProxyLoop, target: int, *, most: float) -> None:
        self._left = most
        super().__init__(loop, target)
        # Else some megabytes more would lie there.
        self._server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)

    async def _pass(self, link: Link, source: Stream, sink: Stream) -> None:
        while data := await source.read():
            self._left -= len(data)
            if self._left < 0:
                await asyncio.Event().wait()
            await asyncio.sleep(len(data) / RATE)
            await sink.write(data)


MakeSlow = Callable[[float], None]


@pytest.fixture
def slow(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeSlow]:
    """Put a slow network between runners and storage."""
    loop = ProxyLoop()
    proxies: list[SlowProxy] = []

    def make(most: float) -> None:
        proxies.append(proxy := SlowProxy(loop, urlsplit(workplace.settings.s3.endpoint).port, most=most))
        monkeypatch.setenv("NOISEMILL_S3_ENDPOINT", f"http://127.0.0.1:{proxy.port}")

    yield make
    for proxy in proxies:
        proxy.close()
    loop.close()


@pytest.fixture(params=["up", "down"])
def transfer(request: pytest.FixtureRequest, workplace: Workplace) -> list[Any]:
    """The act of a script that moves ``SIZE`` bytes."""
    if request.param == "up":
        return ["store", SIZE]
    stored = Storage(workplace.settings.s3).put("inputs/large", bytes(SIZE), media_type="application/octet-stream")
    return ["obtain", stored.key, stored.sha256, SIZE]


def test_a_transfer_that_takes_longer_than_the_bound_on_stalls_is_not_killed(
    workplace: Workplace, transfer: list[Any], slow: MakeSlow
) -> None:
    slow(float("inf"))
    job_id = workplace.job(transfer, max_attempts=1)

    workplace.supervisor(stall=BOUND).run_next()

    job = workplace.get(job_id)
    assert (job.state, job.error_code) == (JobState.SUCCEEDED, None)


def test_a_transfer_that_stands_still_ends_as_stalled(
    workplace: Workplace, transfer: list[Any], slow: MakeSlow
) -> None:
    slow(SIZE / 8)
    job_id = workplace.job(transfer, max_attempts=1)

    workplace.supervisor(stall=BOUND).run_next()

    job = workplace.get(job_id)
    assert (job.state, job.error_code) == (JobState.FAILED, "timeout")
