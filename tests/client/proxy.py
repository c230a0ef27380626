"""A real network that breaks: a TCP proxy that forwards, and hangs up when a test says."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from urllib.parse import urlsplit


class BreakingProxy:
    """Forwards to ``url``; the next connection gets the next number of ``cuts`` as its limit of answered bytes."""

    def __init__(self, url: str, cuts: Iterator[int | None]) -> None:
        target = urlsplit(url)
        self._target = (target.hostname or "", target.port or 80)
        self._cuts = cuts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[Thread] = []
        self._ends: list[socket.socket] = []
        self.num_connections = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @contextmanager
    def running(self) -> Iterator["BreakingProxy"]:
        self._start(self._accept)
        try:
            yield self
        finally:
            for end in [self._listener, *self._ends]:
                _shut(end)
            for thread in self._threads:
                thread.join(5)
            for end in [self._listener, *self._ends]:
                end.close()

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        thread = Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._ends += [near, far]
                self.num_connections += 1
                self._start(_forward, near, far, None)
                self._start(_forward, far, near, next(self._cuts, None))


def _forward(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
    passed = 0
    with suppress(OSError):
        while (limit is None or passed < limit) and (chunk := source.recv(4096)):
            sink.sendall(chunk if limit is None else chunk[: limit - passed])
            passed += len(chunk)
    _shut(source)
    _shut(sink)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
