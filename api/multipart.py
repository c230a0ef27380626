"""Reading a form with one file (RFC 7578): streamed to a temporary file, bounded in every direction.

Parsing and writing happen in a thread, so that a large upload does not hold up other requests.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Final

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api import body
from api.errors import FieldsRefused, MalformedBody
from api.pointers import pointer
from shared.wire import FieldError

FILE_FIELD: Final = "file"
_MAX_FIELDS: Final = 20
_MAX_FIELD_BYTES: Final = 4096
_BATCH_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class FilePart:
    """The file of a form, on disk until the form is closed."""

    filename: str
    content_type: str | None
    path: Path
    size_bytes: int


@dataclass(kw_only=True)
class Form:
    """What was sent."""

    fields: dict[str, str] = field(default_factory=dict[str, str])
    file: FilePart | None = None


@asynccontextmanager
async def read_form(request: Request, limit: int) -> AsyncIterator[Form]:
    """The request's form; its file is deleted at the end.

    Raises:
        TooLarge: the body is above ``limit`` bytes, whatever its headers say.
        MalformedBody: it is not a form.
        FieldsRefused: a field comes twice, or is too long.
    """
    _, options = parse_options_header(request.headers.get("content-type", ""))
    if not (boundary := options.get(b"boundary")):
        raise MalformedBody("the content type names no boundary")
    with tempfile.NamedTemporaryFile(prefix="noisemill-upload-") as spool:
        reader = _Reader(boundary, spool)
        batch: list[bytes] = []
        async for chunk in body.stream(request, limit):
            batch.append(chunk)
            if sum(map(len, batch)) >= _BATCH_BYTES:
                await asyncio.to_thread(reader.write, b"".join(batch))
                batch.clear()
        await asyncio.to_thread(reader.write, b"".join(batch))
        yield await asyncio.to_thread(reader.finish)


class _Reader:
    """Takes the events of the parser. One part is open at a time."""

    def __init__(self, boundary: bytes, spool: IO[bytes]) -> None:
        self._spool = spool
        self._form = Form()
        self._ended = False
        self._headers: dict[bytes, bytes] = {}
        self._header_name, self._header_value = b"", b""
        self._name, self._filename = "", None
        self._text = b""
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise MalformedBody(f"the body is not a form: {error}") from None

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise MalformedBody(f"the body is not a form: {error}") from None

    def finish(self) -> Form:
        if not self._ended:
            raise MalformedBody("the form ends too early")
        self._spool.flush()
        return self._form

    def _on_part_begin(self) -> None:
        self._headers, self._text, self._filename = {}, b"", None

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name, self._header_value = b"", b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise MalformedBody("a part of the form has no name")
        self._name = _text(options[b"name"], "")
        if self._name in self._form.fields or (self._name == FILE_FIELD and self._form.file):
            raise _wrong(self._name, "the field comes twice")
        if b"filename" in options:
            if self._name != FILE_FIELD:
                raise _wrong(self._name, f"a file can only be sent as {FILE_FIELD!r}")
            self._filename = _basename(_text(options[b"filename"], FILE_FIELD))
        elif self._name == FILE_FIELD:
            raise _wrong(FILE_FIELD, "this must be a file: the part has no filename")
        if len(self._form.fields) >= _MAX_FIELDS:
            raise _wrong(self._name, f"the form has more than {_MAX_FIELDS} fields")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._filename is not None:
            self._spool.write(data[start:end])
        elif len(self._text) + end - start > _MAX_FIELD_BYTES:
            raise _wrong(self._name, f"the field is longer than {_MAX_FIELD_BYTES} bytes")
        else:
            self._text += data[start:end]

    def _on_part_end(self) -> None:
        if self._filename is None:
            self._form.fields[self._name] = _text(self._text, self._name)
            return
        content_type = self._headers.get(b"content-type")
        self._form.file = FilePart(
            filename=self._filename,
            content_type=None if content_type is None else content_type.decode("latin-1").strip(),
            path=Path(self._spool.name),
            size_bytes=self._spool.tell(),
        )

    def _on_end(self) -> None:
        self._ended = True


def _basename(filename: str) -> str:
    """Without folders, which some clients send; the name is only a label and tells the format."""
    return PurePosixPath(filename.replace("\\", "/")).name


def _text(raw: bytes, field: str) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _wrong(field, "the text is not UTF-8") from None
    if not body.is_text(text):
        raise _wrong(field, "the text holds NUL")
    return text


def _wrong(field: str, detail: str) -> FieldsRefused:
    return FieldsRefused([FieldError(pointer=pointer([field]) if field else "", detail=detail)])
