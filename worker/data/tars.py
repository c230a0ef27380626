"""Tar files (plain, gzip, bzip2, xz), read member by member.

``tarfile`` is used for one thing only, parsing a 512-byte header: its extraction filters and its handling of
extended headers have had holes (CVE-2025-4517, CVE-2025-8194), and it reads extended headers into memory
however large they claim to be.
"""

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol

from shared.errors import DatasetInvalid
from worker.data.members import CHUNK_BYTES, Limits, Member, Meter, refuse

BLOCK: Final = 512
MAX_EXTENDED_BYTES: Final = 1 << 16
XZ_MEMORY_BYTES: Final = 128 << 20
"""``xz -9`` needs 65 MiB to unpack; a header can ask for 4 GiB."""

REGULAR: Final = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
EXTENDED: Final = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
REFUSED: Final = {
    tarfile.LNKTYPE: "hard links are not allowed",
    tarfile.SYMTYPE: "links are not allowed",
    tarfile.CHRTYPE: "devices are not allowed",
    tarfile.BLKTYPE: "devices are not allowed",
    tarfile.FIFOTYPE: "FIFOs are not allowed",
    tarfile.GNUTYPE_SPARSE: "sparse files are not read",
}


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _XzStream:
    """An xz file, unpacked as a stream in bounded memory (``lzma.open`` has no memory limit)."""

    def __init__(self, file: _Readable) -> None:
        self._file = file
        self._unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES)

    def read(self, size: int, /) -> bytes:
        while not self._unpacker.eof:
            packed = self._file.read(CHUNK_BYTES) if self._unpacker.needs_input else b""
            if self._unpacker.needs_input and not packed:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            if data := self._unpacker.decompress(packed, size):
                return data
        return b""


class _Stream:
    """Unpacked bytes of a tar, counted."""

    def __init__(self, file: _Readable, meter: Meter) -> None:
        self._file = file
        self._meter = meter

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end."""
        parts: list[bytes] = []
        while size > 0 and (data := self._some(size)):
            parts.append(data)
            size -= len(data)
        return b"".join(parts)

    def exactly(self, size: int) -> bytes:
        data = self.read(size)
        if len(data) < size:
            raise DatasetInvalid("the tar archive is truncated")
        return data

    def drain(self) -> None:
        """Read to the end, so that a compressed stream checks its own checksum."""
        while self._some(CHUNK_BYTES):
            pass

    def _some(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except EOFError as error:
            raise DatasetInvalid(f"the archive is truncated ({error})") from error
        except (OSError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise DatasetInvalid(f"the archive is damaged ({error})") from error
        self._meter.count(len(data))
        return data


def read_tar(path: Path, limits: Limits) -> Iterator[Member]:
    """Yield the files of a tar in order; what the caller leaves unread of one is skipped."""
    meter = Meter(limits, path.stat().st_size)
    with path.open("rb") as file:
        yield from _members(_Stream(_unpacked(file), meter), meter)


def _unpacked(file: io.BufferedReader) -> _Readable:
    head = file.peek(8)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if head.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if head.startswith(b"\xfd7zXZ"):
        return _XzStream(file)
    return file


def _members(stream: _Stream, meter: Meter) -> Iterator[Member]:
    extended: dict[str, str] = {}
    while (header := _next_header(stream)) is not None:
        if header.type in (*EXTENDED, tarfile.XGLTYPE):
            records = _records(_extension(stream, header))
            # A global header speaks of all members; none of what it may say here is of use to us.
            extended |= records if header.type in EXTENDED else {}
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            extended["path"] = _extension(stream, header).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif header.type == tarfile.GNUTYPE_LONGLINK:
            _extension(stream, header)
        else:
            yield from _entry(stream, meter, header, extended)
            extended = {}
    stream.drain()


def _next_header(stream: _Stream) -> tarfile.TarInfo | None:
    block = stream.exactly(BLOCK)
    if not any(block):
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise DatasetInvalid(f"the tar archive is damaged, or not a tar archive ({error})") from error
    if header.size < 0:
        raise refuse(header.name, "the size is negative")
    return header


def _entry(stream: _Stream, meter: Meter, header: tarfile.TarInfo, extended: dict[str, str]) -> Iterator[Member]:
    raw_name = extended.get("path", header.name)
    if header.isdir():
        meter.enter(raw_name)
        return
    if header.type not in REGULAR:
        raise refuse(raw_name, REFUSED.get(header.type, f"unknown type {header.type!r}"))
    if any(key.startswith("GNU.sparse") for key in extended):
        raise refuse(raw_name, REFUSED[tarfile.GNUTYPE_SPARSE])
    size = _size(raw_name, header, extended)
    name = meter.enter_file(raw_name)
    read = _content(stream, name, size)
    yield Member(name, read)
    while read(CHUNK_BYTES):
        pass
    stream.exactly(-size % BLOCK)


def _content(stream: _Stream, name: str, size: int) -> Callable[[int], bytes]:
    left = size

    def read(wanted: int) -> bytes:
        nonlocal left
        data = stream.read(min(wanted, left))
        if left and not data:
            raise refuse(name, f"truncated: {left} of {size} bytes are missing")
        left -= len(data)
        return data

    return read


def _size(name: str, header: tarfile.TarInfo, extended: dict[str, str]) -> int:
    size = extended.get("size")
    if size is None:
        return header.size
    if not (size.isascii() and size.isdigit() and len(size) < 20):
        raise refuse(name, "the size is not a number")
    return int(size)


def _extension(stream: _Stream, header: tarfile.TarInfo) -> bytes:
    if header.size > MAX_EXTENDED_BYTES:
        raise refuse(header.name, f"an extended header is larger than {MAX_EXTENDED_BYTES} bytes")
    data = stream.exactly(header.size)
    stream.exactly(-header.size % BLOCK)
    return data


def _records(data: bytes) -> dict[str, str]:
    """Parse ``"<length> <key>=<value>\\n"`` records (POSIX.1-2001, pax)."""
    records: dict[str, str] = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 8)
        length = data[at:space]
        end = at + int(length) if space > at and length.isdigit() else 0
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end <= space + 2 or data[end - 1 : end] != b"\n" or not equals:
            raise DatasetInvalid("the tar archive is damaged (an extended header cannot be read)")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at = end
    return records
