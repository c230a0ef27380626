"""Server-sent events as they come off the wire (WHATWG HTML §9.2). Knows nothing of jobs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Message:
    """One dispatched event. A comment, which keeps the connection alive, is a message without data."""

    id: str = ""
    event: str = "message"
    data: str = ""


def messages(chunks: Iterable[bytes]) -> Iterator[Message]:
    """Split a byte stream into messages; one that was cut off before its blank line is dropped."""
    fields: dict[str, str] = {}
    data: list[str] = []
    for line in _lines(chunks):
        if not line:
            if data:
                yield Message(data="\n".join(data), **fields)
            fields, data = {}, []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name in ("id", "event"):
            fields[name] = value
        elif not name:
            yield Message()


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    # Not str.splitlines, which also splits at characters that JSON may hold, like U+2028.
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode(errors="replace")
