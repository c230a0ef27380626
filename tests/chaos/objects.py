"""A bucket's objects and unfinished uploads as files in one folder, on a disk that can be full.

Each object is one file, written beside its place and renamed, so that a reader sees all of it or the one before.
Knows nothing of HTTP.
"""

import errno
import hashlib
import json
import os
import secrets
import subprocess
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

LEAST_PART = 5 * 1024 * 1024
"""Bytes that every part but the last must have (S3 API)."""
_BALLAST = "ballast"


class Refused(Exception):
    """S3 says no: an error code of its API, with the HTTP status that belongs to it."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is known of an object besides its bytes."""

    key: str
    size: int
    etag: str
    sha256: str
    modified: str
    """RFC 3339."""
    media_type: str = "binary/octet-stream"
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    checksums: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Condition:
    """``If-None-Match`` and ``If-Match`` of a request."""

    none_match: str | None
    match: str | None

    def check(self, there: Description | None) -> None:
        """Raises ``Refused`` (412) unless what is ``there`` is as the client wants it; for a write."""
        if self.match is not None and there is None:
            raise Refused(404, "NoSuchKey", "The specified key does not exist.")
        hit = there is not None and self.none_match in ("*", there.etag)
        missed = self.match is not None and there is not None and self.match not in ("*", there.etag)
        if (self.none_match is not None and hit) or missed:
            raise Refused(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold.")


@dataclass(frozen=True, kw_only=True)
class About:
    """What the client says of what it stores."""

    media_type: str
    metadata: Mapping[str, str]
    checksums: Mapping[str, str]
    only_if: Condition | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of an unfinished upload."""

    number: int
    etag: str
    path: Path


class Disk:
    """A folder with little room: a small tmpfs where one may be mounted, else a quota counted by us."""

    def __init__(self, folder: Path, *, room_bytes: int, mounted: bool = False) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._limit: int | None = None
        options = ["-t", "tmpfs", "-o", f"size={room_bytes},mode=700", "noisemill-chaos", str(folder)]
        self.is_mounted = (
            mounted and subprocess.run(["mount", *options], check=False, capture_output=True).returncode == 0
        )

    def write(self, path: Path, *pieces: bytes) -> None:
        """Write and rename into place; raises ``OSError`` (ENOSPC) half way when there is no room."""
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with partial.open("wb") as file:
                for piece in pieces:
                    self._write(file.fileno(), piece)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def fill(self) -> None:
        """Leave no room."""
        if not self.is_mounted:
            self._limit = self._used()
            return
        with suppress(OSError), (self.folder / _BALLAST).open("ab", buffering=0) as ballast:
            while ballast.write(bytes(64 * 1024)):
                pass

    def free(self) -> None:
        """Give the room back."""
        self._limit = None
        (self.folder / _BALLAST).unlink(missing_ok=True)

    def close(self) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def _write(self, descriptor: int, piece: bytes) -> None:
        room = len(piece) if self._limit is None else max(0, self._limit - self._used())
        view = memoryview(piece)[:room]
        while view:
            view = view[os.write(descriptor, view) :]
        if room < len(piece):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _used(self) -> int:
        used = 0
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                used += path.stat().st_size
        return used


class Bucket:
    """Objects by key. Safe to share between threads."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._objects: dict[str, Description] = {}
        self._uploads: dict[str, tuple[str, About, dict[int, Part]]] = {}
        self._lock = Lock()

    def put(self, key: str, body: bytes, about: About) -> Description:
        """Store, unless the condition on what is there fails (412)."""
        etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
        return self._store(key, body, etag, about)

    def describe(self, key: str) -> Description:
        """Raises ``Refused`` (404 NoSuchKey)."""
        with self._lock:
            found = self._objects.get(key)
        if found is None:
            raise Refused(404, "NoSuchKey", "The specified key does not exist.")
        return found

    def read(self, key: str) -> tuple[Description, bytes]:
        with self._lock:  # so that the bytes are those of the description
            found = self._objects.get(key)
            if found is not None:
                return found, self._path(key).read_bytes().split(b"\n", 1)[1]
        raise Refused(404, "NoSuchKey", "The specified key does not exist.")

    def delete(self, key: str) -> None:
        """Missing ones do not matter."""
        with self._lock:
            if self._objects.pop(key, None) is not None:
                self._path(key).unlink()

    def all(self) -> list[Description]:
        """Every object, by key."""
        with self._lock:
            return sorted(self._objects.values(), key=lambda found: found.key.encode())

    # Uploads in parts

    def begin(self, key: str, about: About) -> str:
        upload = secrets.token_urlsafe(24)
        self._uploads[upload] = (key, about, {})
        return upload

    def uploads(self) -> Iterator[tuple[str, str]]:
        """Key and id of every upload that was neither completed nor aborted."""
        return iter([(key, upload) for upload, (key, _, _) in self._uploads.items()])

    def put_part(self, key: str, upload: str, number: int, body: bytes) -> str:
        parts = self._parts(key, upload)
        etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
        path = self.disk.folder / f"part-{upload}-{number}"
        self.disk.write(path, body)
        parts[number] = Part(number=number, etag=etag, path=path)
        return etag

    def parts(self, key: str, upload: str) -> list[Part]:
        return [part for _, part in sorted(self._parts(key, upload).items())]

    def complete(self, key: str, upload: str, listed: list[tuple[int, str]], only_if: Condition | None) -> Description:
        """Make one object of exactly the listed parts, in their order."""
        parts, numbers = self._parts(key, upload), [number for number, _ in listed]
        if not listed or numbers != sorted(set(numbers)):
            raise Refused(400, "InvalidPartOrder" if listed else "MalformedXML", "The list of parts was not in order.")
        if any(number not in parts or parts[number].etag != etag for number, etag in listed):
            raise Refused(400, "InvalidPart", "One or more of the specified parts could not be found.")
        if any(parts[number].path.stat().st_size < LEAST_PART for number in numbers[:-1]):
            raise Refused(400, "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed size.")
        digests = b"".join(bytes.fromhex(etag) for _, etag in listed)
        etag = f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(listed)}"
        about = replace(self._uploads[upload][1], only_if=only_if)
        made = self._store(key, b"".join(parts[number].path.read_bytes() for number in numbers), etag, about)
        self.abort(key, upload)
        return made

    def abort(self, key: str, upload: str) -> None:
        for part in self._parts(key, upload).values():
            part.path.unlink(missing_ok=True)
        del self._uploads[upload]

    # Beneath

    def _parts(self, key: str, upload: str) -> dict[int, Part]:
        known = self._uploads.get(upload)
        if known is None or known[0] != key:
            raise Refused(404, "NoSuchUpload", "The specified multipart upload does not exist.")
        return known[2]

    def _store(self, key: str, body: bytes, etag: str, about: About) -> Description:
        made = Description(
            key=key,
            size=len(body),
            etag=f'"{etag}"',
            sha256=hashlib.sha256(body).hexdigest(),
            modified=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            media_type=about.media_type,
            metadata=about.metadata,
            checksums=about.checksums,
        )
        with self._lock:
            if about.only_if is not None:
                about.only_if.check(self._objects.get(key))
            self.disk.write(self._path(key), json.dumps(asdict(made)).encode() + b"\n", body)
            self._objects[key] = made
        return made

    def _path(self, key: str) -> Path:
        return self.disk.folder / hashlib.sha256(key.encode()).hexdigest()


def digest_of(algorithm: str, body: bytes) -> str:
    """Base64 of the digest, as in ``Content-MD5`` and ``x-amz-checksum-sha256``."""
    return b64encode(hashlib.new(algorithm, body, usedforsecurity=False).digest()).decode()
