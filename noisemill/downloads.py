"""Fetch objects by presigned URL: verified, resumed where the connection broke, visible only when whole."""

import hashlib
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

import httpx

from noisemill.errors import TransferFailed, UnsafeName
from noisemill.transport import backoff
from shared.wire import ArtifactView

OnBytes = Callable[[int], None]
"""Told how many more bytes have gone through."""

_TRIES_WITHOUT_PROGRESS: Final = 5
_RESERVED: Final = frozenset({"", ".", ".."})
# Refused on every system, so that a name means the same file everywhere.
_FORBIDDEN: Final = frozenset('\\:*?"<>|') | frozenset(map(chr, range(32)))


class Refused(Exception):
    """Storage said no; a fresh URL may help."""


def target(artifact: ArtifactView, path: Path) -> Path:
    """The file to write: ``path`` itself, or the artifact's name inside it if it is a folder.

    Raises:
        UnsafeName: the name would leave the folder.
    """
    if not path.is_dir():
        return path
    return path / safe_name(artifact.name)


def safe_name(name: str) -> Path:
    """``name`` as a relative path that stays below the folder it is joined to."""
    parts = name.split("/")
    if any(part in _RESERVED or _FORBIDDEN & set(part) or len(part.encode()) > 255 for part in parts):
        raise UnsafeName(f"The artifact is named {name!r}, which is no safe file name: give a path to write it to.")
    return Path(*parts)


def is_whole(path: Path, artifact: ArtifactView) -> bool:
    """Whether the file at ``path`` holds exactly the artifact's bytes."""
    if not path.is_file() or path.stat().st_size != artifact.size_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == artifact.sha256


class Download:
    """One artifact on its way into one file. ``renew`` fetches the artifact again for a fresh URL."""

    def __init__(
        self,
        http: httpx.Client,
        artifact: ArtifactView,
        *,
        renew: Callable[[], ArtifactView],
        on_bytes: OnBytes | None = None,
    ) -> None:
        self._http = http
        self._artifact = artifact
        self._renew = renew
        self._on_bytes = on_bytes or (lambda count: None)

    def into(self, path: Path) -> Path:
        """Write the file; nothing is ever seen at ``path`` but all of it.

        Raises:
            TransferFailed: the bytes did not arrive, or are not those that the job made.
        """
        if is_whole(path, self._artifact):
            self._on_bytes(self._artifact.size_bytes)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.parent / f".{path.name[:100]}.{secrets.token_hex(6)}.part"
        try:
            with partial.open("xb") as file:
                self._fill(file)
            if not is_whole(partial, self._artifact):
                raise TransferFailed(
                    f"{self._artifact.id} arrived damaged: its SHA-256 is not {self._artifact.sha256}. Download it "
                    "again; if that does not help, the object in storage was changed."
                )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def _fill(self, file: BinaryIO) -> None:
        failures = 0
        reason: Exception | None = None
        while (before := file.tell()) < self._artifact.size_bytes:
            try:
                self._continue(file)
            except (httpx.TransportError, Refused) as error:
                reason = error
            failures = 0 if file.tell() > before else failures + 1
            if failures >= _TRIES_WITHOUT_PROGRESS:
                why = str(reason) or type(reason).__name__
                raise TransferFailed(f"{self._artifact.id} could not be downloaded ({why}): try again.") from reason
            if file.tell() < self._artifact.size_bytes:
                time.sleep(backoff(failures))

    def _continue(self, file: BinaryIO) -> None:
        offset = file.tell()
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={offset}-"} if offset else {})}
        with self._http.stream("GET", self._artifact.url, headers=headers) as response:
            if response.status_code not in (200, 206):
                self._artifact = self._renew()  # perhaps the URL has expired
                raise Refused(f"storage answered {response.status_code} {response.reason_phrase}")
            if response.status_code == 200 or not _continues_at(response, offset):
                self._on_bytes(-offset)
                file.seek(0)
            if response.status_code == 206 and file.tell() != offset:
                raise Refused("storage sent another part than asked for")
            self._take(file, response)

    def _take(self, file: BinaryIO, response: httpx.Response) -> None:
        for chunk in response.iter_raw():
            if file.tell() + len(chunk) > self._artifact.size_bytes:
                raise TransferFailed(
                    f"{self._artifact.id} in storage is longer than its {self._artifact.size_bytes} bytes."
                )
            file.write(chunk)
            self._on_bytes(len(chunk))


def _continues_at(response: httpx.Response, offset: int) -> bool:
    with suppress(LookupError, ValueError):
        unit, _, span = response.headers["Content-Range"].partition(" ")
        return unit == "bytes" and int(span.partition("-")[0]) == offset
    return False
