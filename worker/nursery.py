"""Where runners come from: a process that has imported what they need, so that each is there within milliseconds.

A worker opens one before anything else (``worker/__main__.py``); a supervisor to whom none is left opens its own.
What goes on inside is in ``worker/births.py``. Imports little: until it is open nothing else is under way.
"""

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Final

COMMAND: Sequence[str] = (sys.executable, "-m", "worker.runner")
"""How a nursery is started."""

_PREFIX: Final = "noisemill-nursery-"
_LONGEST_PLACE: Final = 70
"""Of a folder for temporary files, if a socket in a folder below it is to have an address: those have 107 bytes."""
_PATIENCE: Final = 5.0
"""Seconds that a nursery has for telling how a runner died."""
_LOOK: Final = 0.25
_WAITING: Final = 16
"""Calls that may wait while it imports."""


def environment() -> dict[str, str]:
    """That of this process, with what a runner and its nursery need beside it."""
    # OpenMP threads that spin while they wait halve the speed of whoever shares the cores.
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}


class Nursery:
    """One that this process has opened: it ends with this process, however that ends, or when it is closed."""

    def __init__(self, command: Sequence[str] | None = None) -> None:
        """Returns at once; who calls before all is imported waits for that.

        Raises:
            OSError: there can be no process, or no folder for its socket.
        """
        place = tempfile.gettempdir()
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place if len(place) < _LONGEST_PLACE else "/tmp"))  # noqa: S108
        self.address = folder / "call"
        opener, self._opener = os.pipe()
        with socket.socket(socket.AF_UNIX) as listener, os.fdopen(opener, "rb"):
            listener.bind(str(self.address))
            listener.listen(_WAITING)
            self._process = subprocess.Popen(
                [*(command or COMMAND), "--calls", str(listener.fileno()), "--opener", str(opener)],
                pass_fds=[listener.fileno(), opener],
                stdin=subprocess.DEVNULL,
                env=environment(),
                start_new_session=True,
            )

    def close(self) -> None:
        """End it; its runners end with those who asked for them."""
        os.close(self._opener)
        self._process.kill()
        self._process.wait()
        with suppress(OSError):
            self.address.unlink()
            self.address.parent.rmdir()


class Call:
    """A runner that was asked for, as long as it is wanted."""

    def __init__(self, address: Path, *, channel: int, lifeline: int, environment: Mapping[str, str]) -> None:
        """Ask the nursery at ``address`` for a runner that gets these descriptors.

        Raises:
            OSError: nobody answers there.
        """
        self._line = socket.socket(socket.AF_UNIX)
        self._lock = Lock()
        self._is_over = False
        self._status: int | None = None
        try:
            self._line.connect(str(address))
            said = json.dumps(environment).encode() + b"\n"
            sent = socket.send_fds(self._line, [said], [channel, lifeline])
            self._line.sendall(said[sent:])
        except OSError:
            self._line.close()
            raise

    @property
    def has_ended(self) -> bool:
        """Whether the runner is dead, or will not be born."""
        with self._lock:
            return self._is_over or bool(select.select([self._line], [], [], 0)[0])

    def end(self, *, wait: bool, is_silent: Callable[[], bool] = lambda: False) -> int | None:
        """It is not wanted any more: have its group killed, and ``wait`` until it is dead. Safe to call again.

        ``is_silent``: whether the runner has closed its channel, as it does by dying. A nursery that tells nothing for
        long after that hangs, and is not waited for.

        Returns:
            Its exit status, as ``subprocess`` has it. None: nobody waited, or its nursery died before it did, or hangs.
        """
        with suppress(OSError):
            self._line.shutdown(socket.SHUT_WR)
        with self._lock:
            if not self._is_over:
                with self._line, suppress(OSError, ValueError):
                    self._status = json.loads(_all_of(self._line, is_silent))["status"] if wait else None
                self._is_over = True
            return self._status


def _all_of(line: socket.socket, is_silent: Callable[[], bool]) -> bytes:
    """What is said until nobody holds the other end any more: neither the nursery nor the runner."""
    patience = _PATIENCE
    while patience > 0 and not select.select([line], [], [], _LOOK)[0]:
        patience -= _LOOK * is_silent()
    line.settimeout(patience or _LOOK)
    return b"".join(iter(lambda: line.recv(4096), b""))


class Nurseries:
    """The nursery that a supervisor was told of, and when nobody answers there, one of its own."""

    def __init__(self, told: Path | None = None) -> None:
        self._told = told
        self._own: Nursery | None = None

    def call(self, *, channel: int, lifeline: int, **variables: str) -> Call:
        """Ask for a runner that gets these descriptors, and environment variables beside our own.

        Raises:
            OSError: there can be no process.
        """
        wants = {"channel": channel, "lifeline": lifeline, "environment": environment() | variables}
        for address in (self._told, self._own and self._own.address):
            with suppress(OSError):
                if address is not None:
                    return Call(address, **wants)
        self.forsake()
        self._own = Nursery()
        return Call(self._own.address, **wants)

    def forsake(self) -> None:
        """Ask none of them again; safe to call twice."""
        own, self._told, self._own = self._own, None, None
        if own is not None:
            own.close()
