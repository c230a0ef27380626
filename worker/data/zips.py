"""Zip files, read member by member. Only stored and deflated members, never encrypted ones, never links."""

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

from shared.errors import DatasetInvalid
from worker.data.members import Limits, Member, Meter, refuse

DIRECTORY_ENTRY: Final = b"PK\x01\x02"
MAX_DIRECTORY_BYTES: Final = 128 << 20
ENCRYPTED: Final = 0x1 | 0x40 | 0x2000
"""Flag bits: encrypted, strongly encrypted, encrypted central directory."""
METHODS: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

UNREADABLE: Final = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)
"""What ``zipfile`` raises on damaged input."""


class _CountedDirectory(io.FileIO):
    """``zipfile`` makes an object of every directory entry before anybody can count them; this counts first."""

    def __init__(self, path: Path, max_entries: int) -> None:
        super().__init__(path)
        self._max_entries = max_entries

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise DatasetInvalid(f"the zip's directory is larger than {MAX_DIRECTORY_BYTES} bytes")
        data = super().read(size)
        if data.count(DIRECTORY_ENTRY) > self._max_entries:
            raise DatasetInvalid(f"the archive has more than {self._max_entries} members")
        return data


def read_zip(path: Path, limits: Limits) -> Iterator[Member]:
    """Yield the files of a zip in directory order; each must be read before the next is asked for."""
    meter = Meter(limits, path.stat().st_size)
    with _CountedDirectory(path, limits.members) as file:
        try:
            archive = zipfile.ZipFile(file)
        except UNREADABLE as error:
            raise DatasetInvalid(f"the zip is truncated or damaged: {error}") from error
        for info in archive.infolist():
            if _is_file(info, meter):
                with _opened(archive, info) as stream:
                    yield Member(info.filename, _counted(stream, info, meter))


def zip_names(path: Path, limits: Limits) -> list[str]:
    """Names in a zip's directory, unchecked: good for guessing what it holds, for nothing else."""
    with _CountedDirectory(path, limits.members) as file:
        try:
            return zipfile.ZipFile(file).namelist()
        except UNREADABLE as error:
            raise DatasetInvalid(f"the zip is truncated or damaged: {error}") from error


def _is_file(info: zipfile.ZipInfo, meter: Meter) -> bool:
    # zipfile cuts ``filename`` at a NUL; ``orig_filename`` is what the archive really says.
    raw_name = info.orig_filename
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise refuse(raw_name, "links are not allowed" if kind == stat.S_IFLNK else "special files are not allowed")
    if info.flag_bits & ENCRYPTED:
        raise refuse(raw_name, "encrypted")
    if raw_name.endswith("/"):
        meter.enter(raw_name)
        return False
    if info.compress_type not in METHODS:
        raise refuse(raw_name, f"compression method {info.compress_type} is not supported; use deflate or store")
    info.filename = meter.enter_file(raw_name, packed_bytes=info.compress_size)
    return True


def _opened(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    try:
        return archive.open(info)
    except UNREADABLE as error:
        raise refuse(info.filename, f"damaged ({error})") from error


def _counted(stream: IO[bytes], info: zipfile.ZipInfo, meter: Meter) -> Callable[[int], bytes]:
    num_read = 0

    def read(size: int) -> bytes:
        nonlocal num_read
        try:
            data = stream.read(size)
        except UNREADABLE as error:
            raise refuse(info.filename, f"truncated or damaged ({error})") from error
        num_read += len(data)
        meter.count(len(data))
        if not data and num_read != info.file_size:
            raise refuse(info.filename, f"declares {info.file_size} bytes and holds {num_read}")
        return data

    return read
