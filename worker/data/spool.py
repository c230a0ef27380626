"""The interesting members of an upload, one after another in one scratch file.

A tar can be read only once and in its own order; from the spool, members can be read again, and sorted by name,
so that the order in an archive changes nothing. The scratch file is the only file that upload bytes reach.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.errors import DatasetInvalid
from worker.data.members import CHUNK_BYTES, shown


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one member lies in the spool."""

    name: str
    offset: int
    size: int

    @property
    def folder(self) -> str:
        """Everything before the last ``/``; empty at the top."""
        return self.name.rpartition("/")[0]

    @property
    def suffix(self) -> str:
        """The file name's ending in lower case, with its dot; empty without one."""
        stem, dot, ending = self.name.rpartition("/")[2].rpartition(".")
        return f".{ending.lower()}" if stem and dot else ""


class Spool:
    """An append-only scratch file that remembers where each member begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w+b")
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, chunks: Iterable[bytes]) -> Entry:
        """Copy a member's content to the end of the spool."""
        offset = self._end
        self._file.seek(offset)
        for chunk in chunks:
            self._end += self._file.write(chunk)
        self._file.flush()
        return Entry(name=name, offset=offset, size=self._end - offset)

    def chunks(self, entry: Entry) -> Iterator[bytes]:
        """Stream a member's content."""
        at, end = entry.offset, entry.offset + entry.size
        while at < end:
            self._file.seek(at)
            chunk = self._file.read(min(CHUNK_BYTES, end - at))
            at += len(chunk)
            yield chunk

    def read(self, entry: Entry, *, at_most: int) -> bytes:
        """Return a member's whole content, if it is small enough to be held in memory."""
        if entry.size > at_most:
            raise DatasetInvalid(f"{shown(entry.name)} is larger than {at_most} bytes")
        return b"".join(self.chunks(entry))
