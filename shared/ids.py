"""Identifiers: UUIDv7 inside, ``job_0198…`` outside. The prefix says what the thing is."""

import os
import time
from typing import Final, Literal
from uuid import UUID

from shared.errors import NotFound

Kind = Literal["job", "ds", "mdl", "ver", "art", "key", "ten"]

_HEX_LENGTH: Final = 32


def uuid7() -> UUID:
    """A time-ordered UUID (RFC 9562 section 5.7): 48 bits of milliseconds, 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10))
    value = (milliseconds & (2**48 - 1)) << 80
    value |= 0x7 << 76
    value |= (random >> 68 & 0xFFF) << 64
    value |= 0b10 << 62
    value |= random & (2**62 - 1)
    return UUID(int=value)


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
