"""A strict S3 server over a folder, which fails when it is told to. What it answers is in ``s3_protocol.py``."""

import random
import socket
import struct
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any

from tests.chaos.objects import Bucket, Disk, Refused
from tests.chaos.s3_protocol import Answer, Request, error_answer, failure


class Faults:
    """Which share of the requests goes wrong now, and in which way."""

    KINDS = ("error", "stall", "reset", "truncate", "lie")

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._shares: dict[str, float] = {}
        self._lock = Lock()
        self.lifted = Event()
        self.lifted.set()
        self.hits = Counter[str]()

    def begin(self, kind: str, share: float) -> None:
        """From now on this share of the requests meets this fault, until ``end``."""
        self.lifted.clear()
        self._shares = {kind: share}

    def end(self) -> None:
        self._shares = {}
        self.lifted.set()

    def draw(self, method: str) -> str | None:
        """The fault that this request meets; only downloads can be truncated."""
        with self._lock:
            for kind, share in self._shares.items():
                if (kind != "truncate" or method == "GET") and self._random.random() < share:
                    self.hits[kind] += 1
                    return kind
        return None

    def choose(self) -> bool:
        """One of two ways to fail."""
        with self._lock:
            return self._random.random() < 0.5


class S3Server:
    """One bucket over ``disk``, served by threads of this process."""

    def __init__(self, disk: Disk, *, bucket: str, access_key: str, port: int = 0, seed: int = 0) -> None:
        self.bucket, self.access_key = bucket, access_key
        self.objects = Bucket(disk)
        self.faults = Faults(seed)
        handler = type("BoundHandler", (_Handler,), {"s3": self})
        self._http = _Quiet(("127.0.0.1", port), handler)
        self._thread = Thread(target=self._http.serve_forever, name="s3", daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.faults.end()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(5)


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed in the middle of a request are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    s3: S3Server
    protocol_version = "HTTP/1.1"
    timeout = 90

    def _serve(self) -> None:
        fault = self.s3.faults.draw(self.command)
        self._unread = int(self.headers.get("Content-Length") or 0)
        if fault == "stall":
            self.s3.faults.lifted.wait(60)
            return self._hang_up(rudely=False)
        if fault == "reset" and self.command != "GET":
            self.rfile.read(self._unread // 2)
            return self._hang_up(rudely=True)
        try:
            if fault == "error":
                raise failure(slow_down=self.s3.faults.choose())
            answer = Request(self.command, self.path, dict(self.headers.items()), self.read_body).answer(
                self.s3.objects, bucket=self.s3.bucket, access_key=self.s3.access_key
            )
        except Refused as refused:
            answer = error_answer(refused)
        except OSError as error:  # the disk: MinIO's words for it
            self.s3.faults.hits["disk_full"] += 1
            answer = error_answer(Refused(507, "XMinioStorageFull", error.strerror or "the disk failed"))
        if fault == "lie":
            return self._lie()
        return self._send(answer, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def read_body(self) -> bytes:
        """All of the body; raises ``Refused`` when it is shorter than announced."""
        body = self.rfile.read(self._unread)
        if len(body) != self._unread:
            self.close_connection = True
            raise Refused(400, "IncompleteBody", "You did not provide the number of bytes specified by Content-Length.")
        self._unread = 0
        return body

    def _lie(self) -> None:
        """It was done; say that it was not, or nothing."""
        if self.s3.faults.choose():
            return self._hang_up(rudely=True)
        return self._send(error_answer(failure(slow_down=False)), None)

    def _send(self, answer: Answer, fault: str | None) -> None:
        self.rfile.read(self._unread)  # after an early refusal; it would be taken for the next request
        body, length = answer.body, len(answer.body)
        if fault == "truncate" and self.s3.faults.choose():
            length = len(body) // 2  # quietly: the header agrees with what is sent
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return None
        self.wfile.write(body if fault is None else body[: len(body) // 2])
        return None if fault is None or length != len(body) else self._hang_up(rudely=fault == "reset")

    def _hang_up(self, *, rudely: bool) -> None:
        if rudely:  # closing with a linger of zero sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        """No access log."""
