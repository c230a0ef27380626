"""Reading JSON bodies: bounded, and stricter than Python's parser. Runs after authentication.

Refused although Python accepts it: NaN and Infinity, numbers that overflow to infinity, one key twice, text that
is not Unicode or holds NUL (neither can be stored), and nesting without end.
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

from fastapi import Request
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect

from api.errors import FieldsRefused, MalformedBody
from api.parts import Parts
from api.pointers import field_error, pointer
from shared.errors import TooLarge, TooSlow, UnsupportedMedia
from shared.wire import FieldError

MAX_DEPTH: Final = 32
_DRAIN_BYTES: Final = 16 * 1024 * 1024
_DRAIN_SECONDS: Final = 2.0
_SILENCE_SECONDS: Final = 20.0
"""A client that sends nothing for so long is cut off; otherwise idle ones would use up the connections."""

T = TypeVar("T")


class JsonBody(Generic[T]):
    """A dependency: the request's body as a ``kind``, and as the plain JSON it was."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self._adapter: TypeAdapter[T] = TypeAdapter(kind)

    async def __call__(self, request: Request) -> T:
        require_media_type(request, "application/json")
        parts = await Parts.of(request)
        raw = await read(request, parts.settings.api.max_body)
        request.state.body = body = parse(raw)
        try:
            # Strict: "10" is no number. From JSON again, where lists may become tuples.
            return self._adapter.validate_json(raw, strict=True)
        except ValidationError as error:
            raise FieldsRefused([field_error(wrong, body) for wrong in error.errors(include_url=False)]) from error


def media_type(request: Request) -> str:
    """The content type without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def require_media_type(request: Request, *accepted: str) -> str:
    """The request's content type, if it is one of ``accepted`` and the body is not encoded.

    Raises:
        UnsupportedMedia: it is not.
    """
    given = media_type(request)
    if given not in accepted:
        raise UnsupportedMedia(f"the content type must be {' or '.join(accepted)}, not {given or 'missing'}")
    if encoding := request.headers.get("content-encoding"):
        raise UnsupportedMedia(f"the body must not be encoded ({encoding[:40]})")
    return given


async def read(request: Request, limit: int) -> bytes:
    """The whole body; raises ``TooLarge`` as soon as it is above ``limit`` bytes."""
    return b"".join([chunk async for chunk in stream(request, limit)])


async def stream(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body in chunks, counted: what ``Content-Length`` says is believed only when it is too much.

    Raises:
        TooLarge: there are more than ``limit`` bytes.
        TooSlow: the client stopped sending.
    """
    declared = request.headers.get("content-length", "")
    chunks = _chunks(request)
    received = 0
    too_large = declared.isdecimal() and int(declared[:20]) > limit
    while not too_large:
        if (chunk := await anext(chunks, None)) is None:
            return
        received += len(chunk)
        if received <= limit:
            yield chunk
        too_large = received > limit
    await _drain(chunks)
    raise TooLarge(f"the body is above the limit of {limit} bytes")


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    """``request.stream()``, which waits for no chunk for ever."""
    more = True
    while more:
        try:
            async with asyncio.timeout(_SILENCE_SECONDS):
                message = await request.receive()
        except TimeoutError:
            raise TooSlow(f"nothing more of the body came for {_SILENCE_SECONDS:.0f} s") from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more = message.get("more_body", False)
        yield message.get("body", b"")


async def _drain(chunks: AsyncIterator[bytes]) -> None:
    """Read on for a moment: a client that is cut off while it sends would not see the answer."""
    left = _DRAIN_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for chunk in chunks:
                left -= len(chunk)
                if left < 0:
                    return


def parse(raw: bytes) -> Any:
    """JSON as RFC 8259 has it.

    Raises:
        MalformedBody: it is not JSON.
        FieldsRefused: a value cannot be used whatever the field is.
    """
    try:
        body = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise MalformedBody("the body is nested too deep") from None
    except json.JSONDecodeError as error:
        raise MalformedBody(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else "a number has too many digits"
        raise MalformedBody(f"the body is not JSON: {reason}") from None
    wrong = list(_unusable(body, ()))
    if wrong:
        raise FieldsRefused(wrong)
    return body


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise MalformedBody("the body is not JSON: an object has the same key twice")
    return made


def _unusable(value: Any, path: tuple[str | int, ...]) -> Iterator[FieldError]:
    """What is wrong with a value whatever field it is for, and with everything in it."""
    if len(path) > MAX_DEPTH:
        raise MalformedBody("the body is nested too deep")
    if isinstance(value, float) and not math.isfinite(value):
        yield FieldError(pointer=pointer(path), detail="Input should be a finite number")
    elif isinstance(value, str) and not is_text(value):
        yield FieldError(pointer=pointer(path), detail="the text holds NUL or half of a character")
    for key, item in _items(value):
        if isinstance(key, str) and not is_text(key):
            yield FieldError(pointer=pointer(path), detail="the name of a field holds NUL or half of a character")
        else:
            yield from _unusable(item, (*path, key))


def _items(value: Any) -> Iterable[tuple[str | int, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


def is_text(value: str) -> bool:
    """Whether text can be stored: no NUL, and no lone surrogates, which JSON escapes can make."""
    if value.isascii():
        return "\0" not in value
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)
