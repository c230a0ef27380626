"""What every archive format must respect: safe member names, and limits counted on bytes really streamed.

Nothing is ever written to a path that comes from an archive; names are labels. Headers may lie, so no limit
relies on a size that an archive declares.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from shared.errors import DatasetInvalid
from shared.media import is_pickle

CHUNK_BYTES: Final = 1 << 18
HEAD_BYTES: Final = 512
MAX_NAME_LENGTH: Final = 1024
MAX_SHOWN_LENGTH: Final = 120

ARCHIVE_MAGICS: Final = (
    (0, b"PK\x03\x04"),
    (0, b"PK\x05\x06"),
    (0, b"\x1f\x8b\x08"),
    (0, b"\xfd7zXZ\x00"),
    (4, b"1AY&SY"),
    (257, b"ustar"),
    (0, b"7z\xbc\xaf\x27\x1c"),
    (0, b"Rar!\x1a\x07"),
)
"""Where each archive or compression format puts which bytes (zip, empty zip, gzip, xz, bzip2, tar, 7z, rar)."""

DRIVE: Final = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large an archive may turn out to be."""

    members: int = 250_000
    """Files and folders together."""
    member_bytes: int = 256 << 20
    total_bytes: int = 32 << 30
    ratio: int = 200
    """Most bytes that may come out of one byte of the archive, or of one byte of a zip's member."""
    ratio_floor_bytes: int = 16 << 20
    """What stays below this may compress as well as it likes: a black image does."""


def shown(name: str) -> str:
    """Quote a name from an upload for a message: one line, printable, short."""
    if len(name) > MAX_SHOWN_LENGTH:
        name = f"{name[: MAX_SHOWN_LENGTH // 2]}…{name[-MAX_SHOWN_LENGTH // 2 :]}"
    # A name that is not valid Unicode could not travel in JSON.
    return repr(name.encode("utf-8", "backslashreplace").decode())


def refuse(name: str, reason: str) -> DatasetInvalid:
    """Build the error for one member of an archive."""
    return DatasetInvalid(f"archive member {shown(name)}: {reason}")


def safe_name(raw: str) -> str:
    """Normalize a member's name to ``a/b/c``.

    Raises:
        DatasetInvalid: the name could point outside the archive, or hides something.
    """
    name = raw.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    problem = (
        ("the name contains a NUL character" if "\0" in name else None)
        or ("the name is longer than 1024 characters" if len(name) > MAX_NAME_LENGTH else None)
        or ("absolute paths are not allowed" if name.startswith("/") else None)
        or ("drive letters are not allowed" if DRIVE.match(name) else None)
        or ("the path climbs out of the archive" if ".." in parts else None)
        or ("the name is not valid UTF-8" if any("\ud800" <= letter <= "\udfff" for letter in name) else None)
    )
    if problem:
        raise refuse(raw, problem)
    return "/".join(parts)


def is_archive(head: bytes) -> bool:
    """Whether bytes begin like an archive or a compressed file."""
    return any(head.startswith(magic, at) for at, magic in ARCHIVE_MAGICS)


class Meter:
    """Counts members and streamed bytes of one archive and refuses what is over the limits."""

    def __init__(self, limits: Limits, archive_bytes: int) -> None:
        self._limits = limits
        self._archive_bytes = archive_bytes
        self._names: set[str] = set()
        self._num_members = 0
        self._total_bytes = 0
        self._member = ""
        self._member_bytes = 0
        self._packed_bytes: int | None = None

    def enter(self, raw_name: str) -> str:
        """Start a member and return its normalized name."""
        self._num_members += 1
        if self._num_members > self._limits.members:
            raise refuse(raw_name, f"the archive has more than {self._limits.members} members")
        self._member = safe_name(raw_name)
        self._member_bytes = 0
        self._packed_bytes = None
        return self._member

    def enter_file(self, raw_name: str, *, packed_bytes: int | None = None) -> str:
        """Start a member that has content; ``packed_bytes`` is its size inside the archive, if it has one."""
        name = self.enter(raw_name)
        if not name:
            raise refuse(raw_name, "the name is empty")
        if name in self._names:
            raise refuse(name, "the name occurs twice")
        self._names.add(name)
        self._packed_bytes = packed_bytes
        return name

    def count(self, num_bytes: int) -> None:
        """Account for bytes that came out of the current member."""
        self._member_bytes += num_bytes
        self._total_bytes += num_bytes
        limits = self._limits
        if self._member_bytes > limits.member_bytes:
            raise refuse(self._member, f"larger than {limits.member_bytes} bytes")
        if self._total_bytes > limits.total_bytes:
            raise refuse(self._member, f"the archive holds more than {limits.total_bytes} bytes")
        if self._packed_bytes is not None and self._is_bomb(self._member_bytes, self._packed_bytes):
            raise refuse(self._member, f"decompression bomb: unpacks to more than {limits.ratio} times its size")
        if self._is_bomb(self._total_bytes, self._archive_bytes):
            raise refuse(
                self._member,
                f"decompression bomb: the archive unpacks to more than {limits.ratio} times its size",
            )

    def _is_bomb(self, unpacked: int, packed: int) -> bool:
        return unpacked > self._limits.ratio_floor_bytes and unpacked > self._limits.ratio * packed


class Member:
    """One file of an archive, read once and in order."""

    def __init__(self, name: str, read: Callable[[int], bytes]) -> None:
        self.name = name
        self._read = read
        self.head = self._read_head()
        """The first bytes of the content."""
        if is_archive(self.head):
            # What torch saves is an archive, too.
            pickled = "a pickle can run code, and is not read"
            raise refuse(name, pickled if is_pickle(name) else "archives inside archives are not read")

    def chunks(self) -> Iterator[bytes]:
        """Stream the content, head included."""
        yield self.head
        while chunk := self._read(CHUNK_BYTES):
            yield chunk

    def _read_head(self) -> bytes:
        head = b""
        while len(head) < HEAD_BYTES and (more := self._read(HEAD_BYTES - len(head))):
            head += more
        return head
