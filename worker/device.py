"""The supervisor's handle on its runner: start, talk, kill. One at a time; a dead one is replaced."""

import logging
import os
import socket
import time
from queue import Empty, Queue
from threading import Event, Lock, Thread

from worker.channel import Channel, Message
from worker.nursery import Call, Nurseries
from worker.scratch import Scratch

logger = logging.getLogger(__name__)

GONE: Message = {"type": "gone"}
"""What ``receive`` returns once the runner has died."""

_START_TIMEOUT = 120.0
"""Seconds a runner may take to import its libraries and say that it is ready."""


class Device:
    """A runner process in its own process group, started when first needed and after each death.

    Each finds ``scratch`` empty, and is forked of one of the ``nurseries``.
    """

    def __init__(self, nurseries: Nurseries | None = None, *, scratch: Scratch | None = None) -> None:
        self._nurseries = nurseries or Nurseries()
        self._scratch = scratch
        self.name: str | None = None
        self.num_assigned = 0
        """Jobs that this runner was given."""
        self.model_hits = self.model_misses = 0
        """Models that runners found loaded, and those they had to load."""
        self._call: Call | None = None
        self._channel: Channel | None = None
        self._lifeline: int | None = None
        """Our end of the runner's, which nobody else has: the kernel closes it however this process ends."""
        self._heard: Queue[Message] = Queue()
        self._silent = Event()
        self._killed = self._is_gone = False
        self._lock = Lock()

    def start(self) -> None:
        """Start a runner unless one lives; returns at once."""
        if self._call is not None and not (self._killed or self._is_gone or self._call.has_ended):
            return
        self.kill()
        with self._lock:
            ours, theirs = socket.socketpair()
            lifeline, self._lifeline = os.pipe()
            variables: dict[str, str] = {}
            if self._scratch is not None:
                self._scratch.empty()
                variables["TMPDIR"] = str(self._scratch.folder)
            with theirs, os.fdopen(lifeline, "rb"):
                self._call = self._nurseries.call(channel=theirs.fileno(), lifeline=lifeline, **variables)
            self._channel, self._heard, self._silent, self.name = Channel(ours), Queue(), Event(), None
            self._killed, self._is_gone, self.num_assigned = False, False, 0
            Thread(target=_pump, args=(self._channel, self._heard, self._silent), name="pump", daemon=True).start()

    def ready(self) -> bool:
        """Start a runner if needed and wait until it listens; False if it died or took too long."""
        self.start()
        deadline = time.monotonic() + _START_TIMEOUT
        while self.name is None:
            message = self.receive(max(0.0, deadline - time.monotonic()))
            if message is None or message is GONE:
                logger.error("the runner did not start; its output is above")
                self.kill()
                # Its nursery may hang, and the next one may be better.
                self._nurseries.forsake()
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
            message = self._heard.get(timeout=timeout) if timeout > 0 else self._heard.get_nowait()
        except Empty:
            return None
        self._is_gone |= message is GONE
        return message

    @property
    def is_killed(self) -> bool:
        """Whether the runner was killed, and none has been started since."""
        return self._killed

    def kill(self) -> int | None:
        """End the whole process group now; returns the runner's exit status. Safe to call twice."""
        with self._lock:
            call, channel, was_up, silent = self._call, self._channel, self.name is not None, self._silent
            if call is None or channel is None:
                return None
            self._killed = True
            self._let_go()
        # One that has said nothing yet may be waiting for its nursery, and is nobody to wait for.
        status = call.end(wait=was_up, is_silent=silent.is_set)
        channel.close()
        if call is self._call:
            self.name = None
        if was_up and status is None:  # its nursery is dead, or hangs
            self._nurseries.forsake()
        return status

    def close(self) -> None:
        """End the runner, and what was opened for the sake of it."""
        self.kill()
        self._nurseries.forsake()

    def _let_go(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None


def _pump(channel: Channel, heard: "Queue[Message]", silent: Event) -> None:
    try:
        for message in channel.messages():
            heard.put(message)
    except ValueError as error:
        logger.error("the runner does not speak JSON: %s", error)
    finally:
        silent.set()
        heard.put(GONE)
