"""S3-compatible storage through boto3: immutable objects, each known by its SHA-256.

Nothing here trusts the service: sizes and digests are checked by us, never by ETag.
"""

# boto3 ships no types; what it returns is Any here and typed by our own signatures.
# pyright: reportMissingTypeStubs=false

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from shared.errors import StorageAway, StorageError
from shared.settings import S3Settings

if TYPE_CHECKING:
    from collections.abc import Callable

_CHUNK: Final = 1024 * 1024
_NOT_FOUND: Final = 404
_DELETE_BATCH: Final = 1000
"""Most keys that one DeleteObjects request may name (S3 API)."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An object that is in storage."""

    key: str
    sha256: str
    size_bytes: int


class ObjectMissing(StorageError):
    """There is no object under this key."""


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

    def put(self, key: str, body: bytes | Path, *, media_type: str) -> Stored:
        """Upload, in parts above the configured size.

        Raises:
            StorageError: the service refused, or another size arrived than was sent.
        """
        digest, size = _digest(body)
        extra = {"ContentType": media_type, "Metadata": {"sha256": digest}}
        if isinstance(body, bytes):
            self._call(self._client.put_object, Bucket=self.bucket, Key=key, Body=body, **extra)
        else:
            self._call(self._client.upload_file, str(body), self.bucket, key, ExtraArgs=extra, Config=self._transfer)
        if self.size(key) != size:
            raise StorageError(f"{key}: {size} bytes were sent, {self.size(key)} arrived")
        return Stored(key=key, sha256=digest, size_bytes=size)

    def size(self, key: str) -> int:
        """Bytes of the object; raises ``ObjectMissing``."""
        return int(self._call(self._client.head_object, Bucket=self.bucket, Key=key)["ContentLength"])

    def get(self, key: str, *, sha256: str | None = None) -> bytes:
        """The whole object, in memory; raises ``StorageError`` if its digest differs."""
        body = b"".join(self.stream(key))
        if sha256 is not None and hashlib.sha256(body).hexdigest() != sha256:
            raise StorageError(f"{key}: the stored bytes do not have the SHA-256 {sha256}")
        return body

    def stream(self, key: str) -> Iterator[bytes]:
        """The object in chunks."""
        response = self._call(self._client.get_object, Bucket=self.bucket, Key=key)
        try:
            yield from response["Body"].iter_chunks(_CHUNK)
        except (BotoCoreError, OSError) as error:
            raise StorageError(f"{key}: the download broke off: {error}") from error

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> Stored:
        """Download to ``path``, which appears whole and verified or not at all."""
        digest, size = hashlib.sha256(), 0
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                for chunk in self.stream(key):
                    digest.update(chunk)
                    size += file.write(chunk)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise StorageError(f"{key}: the stored bytes have the SHA-256 {digest.hexdigest()}, not {sha256}")
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

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Keys under a prefix, with their sizes in bytes."""
        token: dict[str, str] = {}
        while True:
            answer = self._call(self._client.list_objects_v2, Bucket=self.bucket, Prefix=prefix, **token)
            yield from ((item["Key"], int(item["Size"])) for item in answer.get("Contents", []))
            if not answer.get("IsTruncated"):
                return
            token = {"ContinuationToken": answer["NextContinuationToken"]}

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
            if cast(Any, error).response.get("ResponseMetadata", {}).get("HTTPStatusCode") == _NOT_FOUND:
                raise ObjectMissing(f"no such object: {kwargs.get('Key', kwargs.get('Bucket'))}") from error
            raise StorageError(str(error)) from error
        except BotoCoreError as error:
            # The text of the error names our address in the network, and clients see this message.
            raise StorageAway(f"storage did not answer ({type(error).__name__})") from error
        except (OSError, Boto3Error) as error:
            raise StorageError(f"storage did not answer ({type(error).__name__})") from error


def _client(settings: S3Settings, endpoint: str | None) -> Any:
    return cast(Any, Session()).client(
        "s3",
        endpoint_url=endpoint,
        region_name=settings.region,
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key.get_secret_value(),
        config=Config(
            signature_version="s3v4",
            connect_timeout=5,
            read_timeout=30,
            retries={"mode": "standard", "max_attempts": 5},
            s3={"addressing_style": "path" if settings.path_style else "auto"},
            request_checksum_calculation=settings.checksums,
            response_checksum_validation=settings.checksums,
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
