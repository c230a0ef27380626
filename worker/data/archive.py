"""One way to read any accepted archive: member by member, as streams, within limits, without extracting.

Refused, by a ``DatasetInvalid`` that names the member and the reason: links, devices, absolute paths, ``..``,
drive letters, NUL in names, names that occur twice, encrypted members, archives inside archives, anything above
the limits, anything truncated or damaged. One bad member refuses the whole archive.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from worker.data.members import HEAD_BYTES, Limits, Member, is_archive
from worker.data.tars import read_tar
from worker.data.zips import read_zip

ZIP_MAGICS: Final = (b"PK\x03\x04", b"PK\x05\x06")
CLUTTER: Final = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})
"""What operating systems leave in archives without being asked."""

__all__ = ["Limits", "Member", "is_archive_file", "is_clutter", "is_zip_file", "read_members"]


def is_archive_file(path: Path) -> bool:
    """Whether the content (not the name) begins like an archive or a compressed file."""
    return is_archive(head_of(path))


def is_zip_file(path: Path) -> bool:
    """Whether the content (not the name) begins like a zip."""
    return head_of(path).startswith(ZIP_MAGICS)


def head_of(path: Path) -> bytes:
    """The first bytes of a file."""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def read_members(path: Path, limits: Limits = Limits()) -> Iterator[Member]:  # noqa: B008 (immutable)
    """Yield every file of a zip or tar(.gz, .bz2, .xz), in the archive's order.

    Each member is read before the next is asked for; its content is valid only until then.

    Raises:
        DatasetInvalid: the archive is refused; the message names the member and the reason.
    """
    return read_zip(path, limits) if is_zip_file(path) else read_tar(path, limits)


def is_clutter(name: str) -> bool:
    """Whether a member is a hidden file or something an operating system left behind."""
    return any(part.startswith(".") or part in CLUTTER for part in name.split("/"))
