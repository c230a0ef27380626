"""The supervisor's handle on its runner: start, talk, kill. One at a time; a dead one is replaced."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, Queue
from threading import Lock, Thread
from typing import Final

from worker.channel import Channel, Message
from worker.scratch import Scratch

logger = logging.getLogger(__name__)

COMMAND: Final = (sys.executable, "-m", "worker.runner")
"""How a runner is started."""

GONE: Message = {"type": "gone"}
"""What ``receive`` returns once the runner has died."""

_START_TIMEOUT = 120.0
"""Seconds a runner may take to import its libraries and say that it is ready."""


class Device:
    """A runner process in its own process group, started when first needed and after each death.

    Each finds ``scratch`` empty.
    """

    def __init__(self, command: Sequence[str] = COMMAND, *, scratch: Scratch | None = None) -> None:
        self._command = list(command)
        self._scratch = scratch
        self.name: str | None = None
        self.num_assigned = 0
        """Jobs that this runner was given."""
        self.model_hits = self.model_misses = 0
        """Models that runners found loaded, and those they had to load."""
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._lifeline: int | None = None
        """Our end of the runner's, which nobody else has: the kernel closes it however this process ends."""
        self._heard: Queue[Message] = Queue()
        self._killed = False
        self._lock = Lock()

    def start(self) -> None:
        """Start a runner unless one lives; returns at once."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self._let_go()
            ours, theirs = socket.socketpair()
            lifeline, self._lifeline = os.pipe()
            if self._scratch is not None:
                self._scratch.empty()
            with theirs, os.fdopen(lifeline, "rb"):
                self._process = subprocess.Popen(
                    [*self._command, "--fd", str(theirs.fileno()), "--lifeline", str(lifeline)],
                    pass_fds=[theirs.fileno(), lifeline],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            self._channel, self._heard, self.name = Channel(ours), Queue(), None
            self._killed, self.num_assigned = False, 0
            Thread(target=_pump, args=(self._channel, self._heard), name="pump", daemon=True).start()

    def ready(self) -> bool:
        """Start a runner if needed and wait until it listens; False if it died or took too long."""
        self.start()
        deadline = time.monotonic() + _START_TIMEOUT
        while self.name is None:
            message = self.receive(max(0.0, deadline - time.monotonic()))
            if message is None or message is GONE:
                logger.error("the runner did not start; its output is above")
                self.kill()
                return False
            self.name = message.get("device")
        return True

    def send(self, message: Message) -> None:
        """Tell the runner something; if it is dead, ``receive`` will say so."""
        self.num_assigned += message["type"] == "run"
        if self._channel is not None:
            self._channel.send(message)

    def receive(self, timeout: float) -> Message | None:
        """The runner's next message, ``GONE``, or None when nothing came in time (seconds)."""
        try:
            return self._heard.get(timeout=timeout) if timeout > 0 else self._heard.get_nowait()
        except Empty:
            return None

    @property
    def is_killed(self) -> bool:
        """Whether the runner was killed, and none has been started since."""
        return self._killed

    def kill(self) -> int | None:
        """End the whole process group now; returns the runner's exit status. Safe to call twice."""
        with self._lock:
            process, channel = self._process, self._channel
            if process is None or channel is None:
                return None
            if not self._killed:
                # Never twice: once it is reaped, its number may be another process group's.
                self._killed = True
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        channel.close()
        with self._lock:
            if process is self._process:
                self._let_go()
        self.name = None
        return status

    def _let_go(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None


def _pump(channel: Channel, heard: "Queue[Message]") -> None:
    try:
        for message in channel.messages():
            heard.put(message)
    except ValueError as error:
        logger.error("the runner does not speak JSON: %s", error)
    finally:
        heard.put(GONE)
