"""Other hosts that help with trainings, as the worker sees them that leads: it listens, and members dial in and wait.

A member (``worker/member.py``) is asked once: it fetches the data itself, starts its processes, and its connection is
closed when the training is over; then it dials anew. Both sides prove that they know the secret (HMAC of each other's
nonce, RFC 2104) before anything is said; nothing is encrypted. Knows no torch.
"""

import hmac
import logging
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from threading import BoundedSemaphore, Lock, Thread
from typing import Any, Final, NamedTuple

from worker.channel import Channel, Message

logger = logging.getLogger(__name__)

INTRODUCTION: Final = 5.0
"""Seconds within which both sides must have said who they are."""
SILENCE: Final = 10.0
"""Seconds without a word after which a member that was asked is given up."""
PREPARATION: Final = 240.0
"""Seconds after which a training begins without members that are not ready."""
_LONGEST_LINE: Final = 4096
_MOST_STRANGERS: Final = 32
"""Connections at one time that have not said yet who they are."""
_LOOK_EVERY: Final = 0.1


class Refused(Exception):
    """The other side is not who it should be, or does not run what it should."""


class Hello(NamedTuple):
    """What a member tells of itself."""

    host: str
    num_processes: int
    kind: str
    """Of its devices, as torch names it: ``cpu``, ``cuda``."""
    versions: Mapping[str, str]
    """Of all that decides what is computed; the same on all hosts."""


class Member:
    """A host that has dialled in."""

    def __init__(self, channel: Channel, hello: Hello) -> None:
        self.channel, self.hello = channel, hello
        self.num_processes = hello.num_processes

    def prepare(self, wanted: Mapping[str, Any], deadline: float) -> bool:
        """Have it fetch what it needs; False if it cannot, or is too slow."""
        self.channel.send({"type": "prepare", **wanted})
        while (message := self.channel.receive(min(SILENCE, deadline - time.monotonic()))) is not None:
            if message["type"] == "ready":
                return True
            if message["type"] == "failed":
                logger.warning("%s cannot help: %s", self.hello.host, message["why"])
                return False
        return False

    def join(self, **where: Any) -> None:
        """Have its processes meet the others."""
        self.channel.send({"type": "join", **where})

    def has_left(self, patience: float) -> bool:
        """Whether it is gone, or one of its processes, within so many seconds."""
        return self.channel.is_over(patience)


class Gathering:
    """Where members wait, at ``address`` (host:port); nobody comes without one."""

    def __init__(self, address: str | None = None, secret: str = "", *, expected: int = 0) -> None:
        """``expected``: so many members a training waits for, at most as long as for one that was asked."""
        self.address, self._secret, self._expected = address, secret.encode(), expected
        self._waiting: list[Member] = []
        self._strangers = BoundedSemaphore(_MOST_STRANGERS)
        self._lock = Lock()
        if address is not None:
            Thread(target=self._listen, args=(split(address),), name="gather", daemon=True).start()

    @property
    def host(self) -> str:
        """By which members reach this one."""
        return split(self.address)[0] if self.address is not None else ""

    @property
    def num_waiting(self) -> int:
        """Members that have dialled in and were not asked yet."""
        return len(self._waiting)

    @contextmanager
    def asked(
        self, most: int, kind: str, wanted: Mapping[str, Any], versions: Mapping[str, str], *, still: Callable[[], None]
    ) -> Iterator[Sequence[Member]]:
        """Members with ``most`` processes in all, ready for a training; they are let go with the end of the block.

        Args:
            kind: of the devices that they must have.
            wanted: what a member needs to prepare itself, as JSON.
            versions: what it must run.
            still: called again and again while they are waited for; what it raises ends that.
        """
        members: list[Member] = []
        try:
            if self.address is not None and most > 0:
                members += self._found(most, kind, versions, still)
                ready = _prepared(members, wanted, still)
                for member in members:
                    if member not in ready:
                        member.channel.release()
                members[:] = ready
            yield members
        finally:
            for member in members:
                member.channel.release()

    def _found(self, most: int, kind: str, versions: Mapping[str, str], still: Callable[[], None]) -> Sequence[Member]:
        patience = time.monotonic() + SILENCE
        while self.num_waiting < self._expected and time.monotonic() < patience:
            still()
            time.sleep(_LOOK_EVERY)
        with self._lock:
            waiting, self._waiting = self._waiting, []
        found: list[Member] = []
        for member in waiting:
            if trouble := _unfit(member.hello, kind, versions):
                logger.warning("%s cannot help: %s", member.hello.host, trouble)
                member.channel.send({"type": "refused", "why": trouble})
                member.channel.release()
            elif most > 0 and not member.has_left(0):
                member.num_processes = min(most, member.num_processes)
                most -= member.num_processes
                found.append(member)
            else:
                member.channel.release()  # it dials anew, if it is there
        return found

    def _listen(self, address: tuple[str, int]) -> None:
        listener, told = None, ""
        while listener is None:
            try:
                listener = socket.create_server(address)
            except OSError as error:  # the runner before this one may not be quite dead
                if told != (told := str(error)):
                    logger.warning("cannot listen at %s, trying on: %s", self.address, error)
                time.sleep(1)
        while True:
            end, _ = listener.accept()
            if not self._strangers.acquire(blocking=False):
                end.close()
                continue
            Thread(target=self._introduce, args=(end,), daemon=True).start()

    def _introduce(self, end: socket.socket) -> None:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        channel = Channel(end)
        try:
            member = Member(channel, _met(channel, self._secret))
        except Exception as error:  # noqa: BLE001  (whatever a stranger says, it ends nothing but its own call)
            logger.warning("somebody at %s is no member: %s", self.address, error)
            channel.release()
        else:
            with self._lock:
                here = [one for one in self._waiting if not one.has_left(0)]
                for gone in set(self._waiting) - set(here):
                    gone.channel.release()
                self._waiting = [*here, member]
        finally:
            self._strangers.release()


def _met(channel: Channel, secret: bytes) -> Hello:
    """Who dialled; raises Refused for a stranger."""
    deadline, nonce = time.monotonic() + INTRODUCTION, secrets.token_hex(16)
    channel.send({"type": "challenge", "nonce": nonce})
    answer = _heard(channel, deadline)
    if not hmac.compare_digest(str(answer["digest"]), proof(secret, "member", nonce)):
        raise Refused("it does not know the secret")
    hello = Hello(**answer["hello"])
    if not (isinstance(hello.num_processes, int) and hello.num_processes > 0):
        raise Refused("it has no processes")
    channel.send({"type": "welcome", "digest": proof(secret, "leader", str(answer["nonce"]))})
    return hello


def dial(address: str, secret: str, hello: Hello) -> Channel:
    """A member's connection to its leader.

    Raises:
        OSError: nobody is there.
        Refused: the leader does not know the secret, or says that we do not.
    """
    end = socket.create_connection(split(address), timeout=INTRODUCTION)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    end.settimeout(None)
    channel, deadline, nonce = Channel(end), time.monotonic() + INTRODUCTION, secrets.token_hex(16)
    try:
        challenge = _heard(channel, deadline)
        digest = proof(secret.encode(), "member", str(challenge["nonce"]))
        channel.send({"type": "answer", "digest": digest, "nonce": nonce, "hello": hello._asdict()})
        welcome = _heard(channel, deadline)
        if not hmac.compare_digest(str(welcome["digest"]), proof(secret.encode(), "leader", nonce)):
            raise Refused("the leader does not know the secret")
    except BaseException:
        channel.release()
        raise
    return channel


def _heard(channel: Channel, deadline: float) -> Message:
    message = channel.receive(deadline - time.monotonic(), longest=_LONGEST_LINE)
    if message is None:
        raise Refused("the other side hung up, or said nothing")
    return message


def proof(secret: bytes, role: str, nonce: str) -> str:
    """That whoever has this ``role`` knows the secret."""
    return hmac.new(secret, f"noisemill {role} {nonce}".encode(), sha256).hexdigest()


def split(address: str) -> tuple[str, int]:
    """Host and port."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _unfit(hello: Hello, kind: str, versions: Mapping[str, str]) -> str | None:
    if hello.kind != kind:
        return f"its devices are {hello.kind}, and {kind} is needed"
    for name, version in versions.items():
        if hello.versions.get(name) != version:
            return f"it has {name} {hello.versions.get(name)}, and {version} is needed"
    return None


def _prepared(members: Sequence[Member], wanted: Mapping[str, Any], still: Callable[[], None]) -> list[Member]:
    """Those that are ready in time."""
    if not members:
        return []
    deadline = time.monotonic() + PREPARATION
    with ThreadPoolExecutor(len(members), "prepare") as pool:
        asked = [(member, pool.submit(partial(member.prepare, wanted, deadline))) for member in members]
        try:
            while not all(answer.done() for _, answer in asked):
                still()
                time.sleep(_LOOK_EVERY)
        except BaseException:
            for member in members:  # so that no thread waits for one
                with suppress(OSError):
                    member.channel.close()
            raise
    return [member for member, answer in asked if answer.result()]
