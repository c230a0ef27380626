"""Send a dataset: through the API when small, straight to storage by presigned URL when large."""

import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import httpx

from noisemill.downloads import OnBytes
from noisemill.errors import InvalidInput, TransferFailed
from noisemill.transport import backoff
from shared import media

DIRECT_ABOVE_BYTES: Final = 32 * 1024 * 1024
"""Larger files go straight to storage, so that the API does not have to pass them on."""

_CHUNK: Final = 1024 * 1024
_TRIES: Final = 4


@contextmanager
def as_file(path: Path, modality: str | None = None) -> Iterator[Path]:
    """``path`` itself, or for a folder a zip of what is in it; of a ``model`` the files that are read.

    Raises:
        InvalidInput: there is nothing to send.
    """
    if not path.exists():
        raise InvalidInput(
            f"{path} does not exist: give a .zip, .tar, .npz, .png, .jpg, .webp, .txt or .jsonl, or a folder."
        )
    if path.is_file():
        if not path.stat().st_size:
            raise InvalidInput(f"{path} is empty: there is nothing to upload.")
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="noisemill-") as folder:
        packed = Path(folder) / f"{path.resolve().name or 'dataset'}.zip"
        _pack(path, _model_files(path) if modality == "model" else _visible_files(path), packed)
        yield packed


def _visible_files(folder: Path) -> list[Path]:
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not visible:
        raise InvalidInput(f"{folder} holds no files: there is nothing to upload.")
    return visible


def _model_files(folder: Path) -> list[Path]:
    names = _visible_files(folder)
    if not any(media.is_weights(name.name) for name in names):
        unsafe = next((name for name in names if media.is_pickle(name.name)), None)
        known = f"{unsafe} can run code when it is opened, and is not read" if unsafe else "there are no weights"
        raise InvalidInput(f"{folder} holds no {media.WEIGHTS}: {known}. Save the model as safetensors.")
    return [name for name in names if media.is_of_model(name.name)]


def _pack(folder: Path, names: Iterable[Path], packed: Path) -> None:
    # Stored, not deflated: images and sounds are compressed already. Dates before 1980 do not fit a zip.
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
        for name in names:
            archive.write(folder / name, name.as_posix())


class Counted:
    """A file that tells how much of it has been read. Reading it again from the start takes that back."""

    def __init__(self, file: BinaryIO, on_bytes: OnBytes | None) -> None:
        self._file = file
        self._on_bytes = on_bytes or (lambda count: None)

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        self._on_bytes(len(chunk))
        return chunk

    def fileno(self) -> int:
        return self._file.fileno()

    def seek(self, offset: int, whence: int = 0) -> int:
        before = self._file.tell()
        after = self._file.seek(offset, whence)
        self._on_bytes(after - before)
        return after

    def tell(self) -> int:
        return self._file.tell()

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self.read(_CHUNK):
            yield chunk


def put(http: httpx.Client, upload: dict[str, Any], path: Path, on_bytes: OnBytes | None) -> None:
    """Send the file to where ``upload`` (of a dataset's view) says, a few times if need be.

    Raises:
        TransferFailed: storage refused it, or the connection broke every time.
    """
    headers = {**(upload.get("headers") or {}), "Content-Length": str(path.stat().st_size)}
    reason = ""
    with path.open("rb") as file:
        content = Counted(file, on_bytes)
        for tries in range(_TRIES):
            content.seek(0)
            try:
                response = http.request(upload["method"], upload["url"], headers=headers, content=content)
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            else:
                if response.is_success:
                    return
                reason = f"storage answered {response.status_code} {response.reason_phrase}"
                if response.status_code < 500 and response.status_code != 429:
                    break
            time.sleep(backoff(tries))
    raise TransferFailed(f"{path} could not be uploaded ({reason}): try again.")
