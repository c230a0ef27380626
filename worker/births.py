"""What goes on in a nursery: the process that has imported what runners need, and forks one whenever it is asked to.

It has one thread and nothing of CUDA: only such a process can be forked safely. Each runner leads a session and a
process group of its own, which is killed when the runner dies, or when whoever asked for it no longer wants it. Knows
nothing of what runners do.
"""

import fcntl
import json
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

logger = logging.getLogger(__name__)

_PATIENCE: Final = 10.0
"""Seconds within which somebody who calls must have said what is wanted."""


class Birth(NamedTuple):
    """What a new runner begins with."""

    channel: int
    """File descriptor of its socket to the supervisor."""
    lifeline: int
    """File descriptor of a pipe that ends with the supervisor."""
    call: socket.socket
    """The call by which it was asked for. Kept open as long as it lives: by that its supervisor sees that it does, also
    without a nursery."""


@dataclass
class _Runner:
    pid: int
    call: socket.socket
    is_unwanted: bool = False


class Births:
    """Answers calls at ``listener`` until ``opener``, a pipe, ends; then removes the folder that the listener is in."""

    def __init__(self, *, listener: int, opener: int) -> None:
        self._listener = socket.socket(fileno=listener)
        self._opener = opener
        self._runners: list[_Runner] = []
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        # Ctrl-C and docker stop are for those who ask.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _call_oneself("nursery")

    def next(self) -> Birth:
        """Returns once in each runner, and never in the nursery."""
        while True:
            calls = {runner.call: runner for runner in self._runners if not runner.is_unwanted}
            readable, _, _ = select.select([self._opener, self._woken, self._listener, *calls], [], [])
            if self._opener in readable:
                self._close()
            for call in calls.keys() & set(readable):
                # Nothing is ever said but that it is not wanted any more.
                calls[call].is_unwanted = True
                _kill(calls[call].pid)
            if self._woken in readable:
                self._bury()
            if self._listener in readable and (birth := self._answer()) is not None:
                return birth

    def _answer(self) -> Birth | None:
        """A birth in the new runner, None in the nursery."""
        call, _ = self._listener.accept()
        wanted = _hear(call)
        if wanted is None:
            call.close()
            return None
        environment, channel, lifeline = wanted
        if self._is_nursery_after_fork(call):
            os.close(channel)
            os.close(lifeline)
            return None
        self._leave(environment)
        return Birth(channel, lifeline, call)

    def _is_nursery_after_fork(self, call: socket.socket) -> bool:
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid = os.fork()
        except OSError:
            logger.exception("no runner could be started")
            call.close()
            return True
        if pid:
            self._runners.append(_Runner(pid, call))
        return bool(pid)

    def _leave(self, environment: Mapping[str, str]) -> None:
        """Become a process as if nobody had been there before."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (self._woken, self._wake, self._opener):
            os.close(descriptor)
        self._listener.close()
        for runner in self._runners:
            runner.call.close()
        os.environ.clear()
        os.environ.update(environment)
        _call_oneself("runner")

    def _bury(self) -> None:
        """Tell how those died who have, and let nothing live on that they started."""
        os.read(self._woken, 4096)
        for runner in list(self._runners):
            if os.waitid(os.P_PID, runner.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            # Until it is reaped, its number is nobody else's.
            _kill(runner.pid)
            _, status = os.waitpid(runner.pid, 0)
            with runner.call, suppress(OSError):
                runner.call.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode())
            self._runners.remove(runner)

    def _close(self) -> None:
        for runner in self._runners:
            _kill(runner.pid)
        path = Path(self._listener.getsockname())
        with suppress(OSError):
            path.unlink()
            path.parent.rmdir()
        os._exit(0)


def _hear(call: socket.socket) -> tuple[Mapping[str, str], int, int] | None:
    """The environment and the descriptors of a runner that is wanted; None if it is not, or not any more."""
    descriptors: list[int] = []
    said = b""
    call.settimeout(_PATIENCE)
    try:
        while not said.endswith(b"\n"):
            more, sent, _, _ = socket.recv_fds(call, 65536, 2)
            descriptors += sent
            said += more
            if not more:
                raise ConnectionError("it hung up")
        call.settimeout(None)
        if select.select([call], [], [], 0)[0]:
            raise ConnectionError("it hung up")
        channel, lifeline = descriptors
        environment = json.loads(said)
    except (OSError, ValueError):
        for descriptor in descriptors:
            os.close(descriptor)
        return None
    for descriptor in descriptors:
        fcntl.fcntl(descriptor, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    return environment, channel, lifeline


def _kill(leader: int) -> None:
    """A process and its group; it may have no group yet."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        with suppress(ProcessLookupError):
            os.kill(leader, signal.SIGKILL)


def _call_oneself(name: str) -> None:
    """The name that ``ps`` and ``top`` show, where the system lets it be told."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name)
