"""A pipe between two processes, as supervisor and runner are: JSON messages, one a line, over a socket.

Either side closing, or dying, is an end of file for the other. Knows nothing of what is said.
"""

import json
import select
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from threading import Lock
from typing import Any

Message = dict[str, Any]


class Channel:
    """One end. ``send`` may be called from several threads, ``messages`` and ``receive`` from one, and not both."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._reader = end.makefile("rb")
        self._lock = Lock()
        self._heard = bytearray()

    @classmethod
    def from_fd(cls, fd: int) -> "Channel":
        """The end that was inherited as file descriptor ``fd``."""
        return cls(socket.socket(fileno=fd))

    def send(self, message: Mapping[str, Any]) -> bool:
        """Returns False if nobody listens any more."""
        line = json.dumps(message, allow_nan=True).encode() + b"\n"
        with self._lock:
            try:
                self._socket.sendall(line)
            except OSError:
                return False
        return True

    def messages(self) -> Iterator[Message]:
        """What the other side says, until it closes or dies (a torn last line is dropped)."""
        try:
            for line in self._reader:
                if line.endswith(b"\n"):
                    yield json.loads(line)
        except OSError:
            return
        finally:
            self._reader.close()
            self._socket.close()

    def receive(self, timeout: float | None = None, *, longest: int = 2**24) -> Message | None:
        """The next message; None if no whole one came in time (seconds), of at most ``longest`` bytes, or none will."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._heard:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                is_there, _, _ = select.select([self._socket], [], [], left)
                part = self._socket.recv(65536) if is_there and len(self._heard) <= longest else b""
            except (OSError, ValueError):  # closed meanwhile
                return None
            if not part:
                return None
            self._heard += part
        line, _, self._heard = self._heard.partition(b"\n")
        return json.loads(line) if len(line) <= longest else None

    def is_over(self, patience: float) -> bool:
        """Whether the other side, which has nothing more to say, closes or has closed within so many seconds."""
        try:
            is_there, _, _ = select.select([self._socket], [], [], patience)
            return bool(is_there) and not self._socket.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def close(self) -> None:
        # Closing a file another thread reads from would wait for that thread; a shutdown wakes it.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Close it where no other thread listens any more."""
        self.close()
        self._reader.close()
        self._socket.close()
