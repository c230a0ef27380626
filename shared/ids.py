"""Identifiers: UUIDv7 inside, ``job_0198…`` outside. The prefix says what the thing is."""

import os
import threading
import time
from typing import Final, Literal
from uuid import UUID

from shared.errors import NotFound

Kind = Literal["job", "ds", "mdl", "ver", "art", "key", "ten", "mov"]

_HEX_LENGTH: Final = 32


class _Clock:
    """Time in 1/4096 ms since 1970 that never repeats and never runs backwards within a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest = 0

    def tick(self) -> int:
        with self._lock:
            self._latest = max(time.time_ns() * 4096 // 1_000_000, self._latest + 1)
            return self._latest


_CLOCK: Final = _Clock()


def uuid7() -> UUID:
    """A time-ordered UUID (RFC 9562 section 6.2, method 3): 48 bits of milliseconds, 12 of their fraction, 62 random.

    Those made by one process are in the order of their making, so that lists by id are in that order, too.
    """
    tick = _CLOCK.tick()
    random = int.from_bytes(os.urandom(8)) & (2**62 - 1)
    value = (tick >> 12 & (2**48 - 1)) << 80
    value |= 0x7 << 76
    value |= (tick & 0xFFF) << 64
    value |= 0b10 << 62
    return UUID(int=value | random)


def public(kind: Kind, value: UUID) -> str:
    """The outside form of an id."""
    return f"{kind}_{value.hex}"


def parse(kind: Kind, text: str) -> UUID:
    """The inside form of an id.

    Raises:
        NotFound: the text is no id of this kind, so nothing can have it.
    """
    prefix, _, digits = text.partition("_")
    if prefix != kind or len(digits) != _HEX_LENGTH:
        raise NotFound(f"no such {kind}: {text[:64]!r}")
    try:
        return UUID(hex=digits)
    except ValueError:
        raise NotFound(f"no such {kind}: {text[:64]!r}") from None
