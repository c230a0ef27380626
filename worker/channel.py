"""The pipe between supervisor and runner: JSON messages, one a line, over a socket pair.

Either side closing, or dying, is an end of file for the other. Knows nothing of what is said.
"""

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from threading import Lock
from typing import Any

Message = dict[str, Any]


class Channel:
    """One end. ``send`` may be called from several threads, ``messages`` from one."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._reader = end.makefile("rb")
        self._lock = Lock()

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

    def close(self) -> None:
        # Closing a file another thread reads from would wait for that thread; a shutdown wakes it.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
