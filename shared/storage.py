"""S3-compatible storage through boto3: immutable objects, each known by its SHA-256.

Nothing here trusts the service: sizes and digests are checked by us, never by ETag.
"""

# boto3 ships no types; what it returns is Any here and typed by our own signatures.
# pyright: reportMissingTypeStubs=false

import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, cast

from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
from botocore.exceptions import ConnectionError as NoConnection

from shared.errors import StorageAway, StorageError, TransferFailed
from shared.settings import S3Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    Moved = Callable[[], None]

_CHUNK: Final = 1024 * 1024
_NOT_FOUND: Final = 404
_SERVER_ERROR: Final = 500
_NOT_IMPLEMENTED: Final = 501
_AWAY_STATUS: Final = frozenset({408, 425, 429})
_AWAY: Final = frozenset({"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"})
"""Refusals of any request, whatever it asks."""
_AGAIN_STATUS: Final = frozenset({409})
_AGAIN: Final = frozenset(
    {"BadDigest", "IncompleteBody", "InvalidPart", "NoSuchUpload"}
    | {"XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}
)
"""Refusals of one request and not of what it asks: it was damaged on its way, or was an upload whose end was executed
and not confirmed, so that its second try finds nothing left to end. One that lasts is no outage."""
_BROKEN_OFF: Final = (HTTPClientError, NoConnection, IncompleteReadError)
_DELETE_BATCH: Final = 1000
"""Most keys that one DeleteObjects request may name (S3 API)."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An object that is in storage."""

    key: str
    sha256: str
    size_bytes: int


class Listed(NamedTuple):
    """An object as a listing shows it."""

    key: str
    size_bytes: int
    modified_at: datetime
    """By the service's clock."""


class Unfinished(NamedTuple):
    """An upload in parts that was begun, and neither completed nor aborted."""

    key: str
    upload_id: str
    begun_at: datetime
    """By the service's clock."""


def _unheard() -> None:
    """For who does not ask whether bytes move."""


class ObjectMissing(StorageError):
    """There is no object under this key."""


class DigestMismatch(StorageError):
    """Storage returned a whole object whose bytes are not those that were stored."""

    def __init__(self, key: str, *, found: str, expected: str) -> None:
        super().__init__(f"{key}: the stored bytes have the SHA-256 {found}, not {expected}")
        self.found, self.expected = found, expected


class Storage:
    """One bucket. Safe to share between threads."""

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self.bucket = settings.bucket
        self._client = _client(settings, settings.endpoint)
        public = settings.public_endpoint
        self._public: Any = _client(settings, public) if public else self._client
        self._transfer = TransferConfig(
            multipart_threshold=settings.multipart_threshold,
            multipart_chunksize=max(settings.multipart_threshold // 4, 5 * 1024 * 1024),
            max_concurrency=4,
        )

    def ensure_bucket(self) -> None:
        """Create the bucket unless it is there."""
        try:
            self._call(self._client.head_bucket, Bucket=self.bucket)
        except ObjectMissing:
            self._call(self._client.create_bucket, Bucket=self.bucket)

    def put(self, key: str, body: bytes | Path, *, media_type: str, moved: "Moved" = _unheard) -> Stored:
        """Upload, in parts above the configured size. Safe to repeat: the same bytes go under the same key.

        ``moved`` is called again and again while bytes are sent, from several threads; not for what is small.

        Raises:
            TransferFailed: it did not arrive whole, or nobody said that it did.
            StorageError: the service refused.
        """
        digest, size = _digest(body)
        extra = {"ContentType": media_type, "Metadata": {"sha256": digest}}

        def sent(num_bytes: int) -> None:
            if num_bytes > 0:  # negative: taken back, to be sent again
                moved()

        how: dict[str, Any] = {"ExtraArgs": extra, "Config": self._transfer, "Callback": sent}
        if isinstance(body, Path):
            self._call(self._client.upload_file, str(body), self.bucket, key, **how)
        elif size > _CHUNK:
            self._call(self._client.upload_fileobj, io.BytesIO(body), self.bucket, key, **how)
        else:
            self._call(self._client.put_object, Bucket=self.bucket, Key=key, Body=body, **extra)
        try:
            arrived = self.size(key)
        except ObjectMissing as error:
            raise TransferFailed(f"{key}: the service took it and does not have it") from error
        if arrived != size:
            raise TransferFailed(f"{key}: {size} bytes were sent, {arrived} arrived")
        return Stored(key=key, sha256=digest, size_bytes=size)

    def size(self, key: str) -> int:
        """Bytes of the object; raises ``ObjectMissing``."""
        return int(self._call(self._client.head_object, Bucket=self.bucket, Key=key)["ContentLength"])

    def get(self, key: str, *, sha256: str | None = None) -> bytes:
        """The whole object, in memory; raises ``DigestMismatch`` if it is not what was stored."""
        body = b"".join(self.stream(key))
        self._verify(key, hashlib.sha256(body).hexdigest(), len(body), expected=sha256)
        return body

    def _verify(self, key: str, digest: str, size_bytes: int, *, expected: str | None) -> None:
        if expected is None or digest == expected:
            return
        if (whole := self.size(key)) != size_bytes:
            # Not every server that breaks off says so: this one announced fewer bytes than it has.
            raise TransferFailed(f"{key}: the download broke off after {size_bytes} of {whole} bytes")
        raise DigestMismatch(key, found=digest, expected=expected)

    def stream(self, key: str, *, size_bytes: int | None = None) -> Iterator[bytes]:
        """The object in chunks; raises ``TransferFailed`` when it breaks off before its end.

        The end is where the answer says, unless ``size_bytes`` are known: not every server that breaks off says so.
        """
        response = self._call(self._client.get_object, Bucket=self.bucket, Key=key)
        received, size = 0, int(response["ContentLength"]) if size_bytes is None else size_bytes
        try:
            for chunk in response["Body"].iter_chunks(_CHUNK):
                received += len(chunk)
                yield chunk
        except (BotoCoreError, OSError) as error:
            raise StorageAway(f"{key}: the download broke off ({type(error).__name__})") from error
        if received != size:
            raise TransferFailed(f"{key}: the download broke off after {received} of {size} bytes")

    def download(self, key: str, path: Path, *, sha256: str | None = None, moved: "Moved" = _unheard) -> Stored:
        """Download to ``path``, which appears whole and verified or not at all. ``moved`` is called for each chunk.

        Raises:
            DigestMismatch: what came, whole, is not what was stored.
            TransferFailed: it did not come, or not whole.
            OSError: this machine's disk refused it.
        """
        digest, size = hashlib.sha256(), 0
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                for chunk in self.stream(key):
                    moved()
                    digest.update(chunk)
                    size += file.write(chunk)
            self._verify(key, digest.hexdigest(), size, expected=sha256)
            Path(partial).replace(path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
        return Stored(key=key, sha256=digest.hexdigest(), size_bytes=size)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing ones do not matter."""
        names = list(keys)
        for start in range(0, len(names), _DELETE_BATCH):
            batch = [{"Key": key} for key in names[start : start + _DELETE_BATCH]]
            answer = self._call(
                self._client.delete_objects, Bucket=self.bucket, Delete={"Objects": batch, "Quiet": True}
            )
            if answer.get("Errors"):
                raise StorageError(f"could not delete {answer['Errors'][0]}")

    def list(self, prefix: str, *, after: str = "") -> Iterator[Listed]:
        """Objects under a prefix, in the order of their keys, from the first key behind ``after``."""
        place = {"StartAfter": after} if after else {}
        while True:
            answer = self._call(self._client.list_objects_v2, Bucket=self.bucket, Prefix=prefix, **place)
            for item in answer.get("Contents", []):
                yield Listed(item["Key"], int(item["Size"]), item["LastModified"])
            if not answer.get("IsTruncated"):
                return
            place = {"ContinuationToken": answer["NextContinuationToken"]}

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        """Uploads in parts under a prefix that have not ended; raises ``StorageError`` where none can be listed."""
        place: dict[str, str] = {}
        while True:
            answer = self._call(self._client.list_multipart_uploads, Bucket=self.bucket, Prefix=prefix, **place)
            # Not every server heeds the prefix.
            found = (item for item in answer.get("Uploads", []) if item["Key"].startswith(prefix))
            yield from (Unfinished(item["Key"], item["UploadId"], item["Initiated"]) for item in found)
            if not answer.get("IsTruncated"):
                return
            place = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    def abort(self, upload: Unfinished) -> None:
        """Delete the parts of an upload, so that it cannot be completed; one that has ended does not matter."""

        def abort() -> None:
            try:
                self._client.abort_multipart_upload(Bucket=self.bucket, Key=upload.key, UploadId=upload.upload_id)
            except ClientError as error:
                # Not by its class: two threads may have made one each.
                if cast(Any, error).response["Error"]["Code"] != "NoSuchUpload":
                    raise

        self._call(abort)

    def link(
        self, key: str, *, filename: str | None = None, media_type: str | None = None, lifetime: timedelta | None = None
    ) -> str:
        """A presigned GET URL, as clients reach the service."""
        params: dict[str, str] = {"Bucket": self.bucket, "Key": key}
        if filename is not None:
            params["ResponseContentDisposition"] = f'attachment; filename="{filename}"'
        if media_type is not None:
            params["ResponseContentType"] = media_type
        return self._presign("get_object", params, lifetime)

    def upload_link(self, key: str, *, size_bytes: int, lifetime: timedelta | None = None) -> str:
        """A presigned PUT URL for exactly ``size_bytes``, which the signature covers."""
        return self._presign("put_object", {"Bucket": self.bucket, "Key": key, "ContentLength": size_bytes}, lifetime)

    def _presign(self, operation: str, params: dict[str, Any], lifetime: timedelta | None) -> str:
        seconds = int((lifetime or self._settings.link_lifetime).total_seconds())
        return str(self._public.generate_presigned_url(operation, Params=params, ExpiresIn=seconds))

    def _call(self, operation: "Callable[..., Any]", *args: Any, **kwargs: Any) -> Any:
        try:
            return operation(*args, **kwargs)
        except ClientError as error:
            raise _refused(error, kwargs.get("Key", kwargs.get("Bucket"))) from error
        except BotoCoreError as error:
            raise _unanswered(error) from error
        except Boto3Error as error:
            # A transfer wraps what the service said into an error of another kind.
            cause = error.__context__
            raise (_refused(cause, None) if isinstance(cause, ClientError) else _unanswered(cause or error)) from error
        except (ConnectionError, TimeoutError) as error:
            raise StorageAway(f"storage did not answer ({type(error).__name__})") from error
        except OSError as error:
            raise StorageError(f"a file of this machine could not be read ({type(error).__name__})") from error


def _refused(error: ClientError, name: str | None) -> StorageError:
    """What an error answer of the service means: it is gone, it may come later, or it never will."""
    response = cast(Any, error).response
    status, code = response.get("ResponseMetadata", {}).get("HTTPStatusCode"), response.get("Error", {}).get("Code")
    failed = (status or 0) >= _SERVER_ERROR and status != _NOT_IMPLEMENTED
    if code in _AWAY or status in _AWAY_STATUS or failed:
        return StorageAway(f"storage could not do it now ({code}, status {status})")
    if code in _AGAIN or status in _AGAIN_STATUS:
        return TransferFailed(f"storage did not take it ({code}, status {status})")
    return ObjectMissing(f"no such object: {name}") if status == _NOT_FOUND else StorageError(str(error))


def _unanswered(error: BaseException) -> StorageError:
    """What an error means that is no answer: storage is away, or it was never asked.

    The text of the error is left out: it names our address in the network, and clients see this message.
    """
    if type(error) is not HTTPClientError and isinstance(error, _BROKEN_OFF):
        return StorageAway(f"storage did not answer ({type(error).__name__})")
    return StorageError(f"storage could not be asked ({type(error).__name__})")


_SESSION: Final[Any] = cast(Any, Session())
"""Keeps what is read from disk to make the first client, which takes twenty times as long as the next."""
_MAKING: Final = Lock()
"""Sessions are not made for threads."""


def _client(settings: S3Settings, endpoint: str | None) -> Any:
    with _MAKING:
        return _make_client(settings, endpoint)


def _make_client(settings: S3Settings, endpoint: str | None) -> Any:
    return _SESSION.client(
        "s3",
        endpoint_url=endpoint,
        region_name=settings.region,
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key.get_secret_value(),
        config=Config(
            signature_version="s3v4",
            connect_timeout=5,
            read_timeout=30,
            retries={"mode": "standard", "max_attempts": 3},
            s3={"addressing_style": "path" if settings.path_style else "auto"},
            request_checksum_calculation=settings.checksums,
            # We compare SHA-256: the service's own sum would only hide which bytes came.
            response_checksum_validation="when_required",
        ),
    )


def _digest(body: bytes | Path) -> tuple[str, int]:
    if isinstance(body, bytes):
        return hashlib.sha256(body).hexdigest(), len(body)
    with body.open("rb") as file:
        return digest_of(file), body.stat().st_size


class _Readable(Protocol):
    def readinto(self, buffer: bytearray, /) -> int: ...

    def readable(self) -> bool: ...


def digest_of(file: _Readable) -> str:
    """SHA-256 of what is left of an open file, in hex."""
    return hashlib.file_digest(file, "sha256").hexdigest()
