"""A little real HTTP server whose answers a test writes, and which can hang up in the middle of one."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a client asked."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the server says. ``cut`` hangs up after so many bytes of the body; -1 before the first of the head."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict[str, str])
    media_type: str = "application/json"
    cut: int | None = None
    counted: bool = True
    """Say the body's length beforehand, so that hanging up shows; else hanging up looks like the end."""
    held: bool = False
    """Stay silent after the body until the client hangs up."""


App = Callable[[Request], Answer]


class LittleServer:
    """Answers by ``app``, which a test may replace at any time, and remembers what it was asked."""

    def __init__(self, port: int = 0) -> None:
        self.requests: list[Request] = []
        self.app: App = lambda request: Answer(status=404)
        self._connections: set[socket.socket] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet, or each answer waits for a delayed acknowledgement

            def setup(self) -> None:
                super().setup()
                outer._connections.add(self.connection)

            def log_message(self, format: str, *arguments: object) -> None:
                """Say nothing."""

            def do_GET(self) -> None:
                with suppress(ConnectionError):
                    self._answer()

            do_POST = do_PUT = do_DELETE = do_GET

            def _answer(self) -> None:
                target = urlsplit(self.path)
                request = Request(
                    method=self.command,
                    path=target.path,
                    query={name: values[0] for name, values in parse_qs(target.query).items()},
                    headers={name.lower(): value for name, value in self.headers.items()},
                    body=self._body(),
                )
                outer.requests.append(request)
                self._send(outer.app(request))

            def _body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def _send(self, answer: Answer) -> None:
                if answer.cut == -1:
                    self._hang_up()
                    return
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.media_type)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if answer.counted:
                    self.send_header("Content-Length", str(len(answer.body)))
                else:
                    self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(answer.body[: answer.cut])
                if answer.held:
                    self.wfile.flush()
                    self.connection.recv(1)
                if answer.cut is not None:
                    self._hang_up()

            def _hang_up(self) -> None:
                self.close_connection = True
                self.wfile.flush()
                with suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def running(self) -> Iterator["LittleServer"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            # Kept-alive connections would go on being answered.
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
