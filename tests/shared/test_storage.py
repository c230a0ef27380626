"""Objects against a real S3 server: what was stored is what is read, or an error says otherwise."""

import hashlib
import secrets
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from botocore.exceptions import ConnectTimeoutError, ReadTimeoutError
from pydantic import SecretStr

from shared.errors import StorageAway, StorageError, TransferFailed
from shared.settings import S3Settings
from shared.storage import ObjectMissing, Storage

SMALLEST_PART = 5 * 1024 * 1024


@pytest.fixture
def settings(s3: Any) -> S3Settings:
    return S3Settings(
        endpoint=s3.endpoint,
        bucket=s3.bucket,
        access_key=s3.access_key,
        secret_key=SecretStr(s3.secret_key),
        multipart_threshold=SMALLEST_PART,
    )


@pytest.fixture
def storage(settings: S3Settings) -> Storage:
    return Storage(settings)


def test_an_object_is_read_as_it_was_stored(storage: Storage) -> None:
    stored = storage.put("a/b", b"hello", media_type="text/plain")

    assert storage.get("a/b", sha256=stored.sha256) == b"hello"
    assert (stored.sha256, stored.size_bytes) == (hashlib.sha256(b"hello").hexdigest(), 5)


def test_a_large_file_travels_in_parts_and_arrives_whole(storage: Storage, tmp_path: Path) -> None:
    body = secrets.token_bytes(2 * SMALLEST_PART + 7)
    (tmp_path / "large").write_bytes(body)

    stored = storage.put("large", tmp_path / "large", media_type="application/octet-stream")
    storage.download("large", tmp_path / "back", sha256=stored.sha256)

    assert (tmp_path / "back").read_bytes() == body
    assert stored.sha256 == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("body", [b"other", b"hell", b""])
def test_bytes_that_are_not_those_stored_are_refused(storage: Storage, tmp_path: Path, body: bytes) -> None:
    stored = storage.put("a", b"hello", media_type="text/plain")
    storage.put("a", body, media_type="text/plain")

    with pytest.raises(StorageError, match="SHA-256"):
        storage.download("a", tmp_path / "a", sha256=stored.sha256)

    assert list(tmp_path.iterdir()) == []


def test_a_missing_object_is_told_apart_from_a_missing_service(storage: Storage, settings: S3Settings) -> None:
    with pytest.raises(ObjectMissing):
        storage.get("nothing")
    away = Storage(settings.model_copy(update={"endpoint": "http://127.0.0.1:9"}))
    with pytest.raises(StorageAway) as told:
        away.size("nothing")
    assert "127.0.0.1" not in str(told.value)


def test_objects_are_listed_by_prefix_and_deleted(storage: Storage) -> None:
    for name in ("x/1", "x/2", "y/1"):
        storage.put(name, name.encode(), media_type="text/plain")

    storage.delete(["x/1", "x/never"])

    assert [(found.key, found.size_bytes) for found in storage.list("x/")] == [("x/2", 3)]
    assert [found.key for found in storage.list("")] == ["x/2", "y/1"]
    assert [found.key for found in storage.list("", after="x/2")] == ["y/1"]


def test_a_link_works_without_a_key_and_only_for_its_object(storage: Storage) -> None:
    storage.put("a", b"hello", media_type="text/plain")
    storage.put("b", b"secret", media_type="text/plain")
    link = storage.link("a", filename="a.txt")

    assert httpx.get(link).content == b"hello"
    assert httpx.get(link.replace("/a?", "/b?")).status_code == 403


def test_an_upload_link_stores_an_object(storage: Storage) -> None:
    answer = httpx.put(storage.upload_link("up", size_bytes=5), content=b"hello")

    assert answer.status_code == 200
    assert storage.get("up") == b"hello"


def test_a_bucket_is_made_once(settings: S3Settings) -> None:
    storage = Storage(settings.model_copy(update={"bucket": "fresh-bucket"}))

    storage.ensure_bucket()
    storage.put("a", b"x", media_type="text/plain")
    storage.ensure_bucket()

    assert storage.get("a") == b"x"


def test_an_upload_in_parts_that_was_never_finished_is_found_and_aborted(storage: Storage) -> None:
    client: Any = storage._client
    begun = client.create_multipart_upload(Bucket=storage.bucket, Key="x/large")
    client.create_multipart_upload(Bucket=storage.bucket, Key="y/large")
    client.upload_part(
        Bucket=storage.bucket, Key="x/large", UploadId=begun["UploadId"], PartNumber=1, Body=b"x" * SMALLEST_PART
    )

    (upload,) = storage.unfinished("x/")
    for _ in range(2):
        storage.abort(upload)

    assert (upload.key, upload.upload_id) == ("x/large", begun["UploadId"])
    assert list(storage.unfinished("x/")) == []
    assert [other.key for other in storage.unfinished("")] == ["y/large"]


@pytest.fixture
def refusing(settings: S3Settings) -> Iterator[Callable[[int, str], Storage]]:
    """A service that answers everything with the same error."""
    answer: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = f"<Error><Code>{answer['code']}</Code><Message>no</Message></Error>".encode()
            self.send_response(answer["status"])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """No access log."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()

    def refuse(status: int, code: str) -> Storage:
        answer.update(status=status, code=code)
        return Storage(settings.model_copy(update={"endpoint": f"http://127.0.0.1:{server.server_port}"}))

    yield refuse
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (500, "InternalError", StorageAway),
        (503, "SlowDown", StorageAway),
        (503, "ServiceUnavailable", StorageAway),
        (507, "XMinioStorageFull", StorageAway),
        (429, "TooManyRequests", StorageAway),
        (400, "RequestTimeout", StorageAway),
        (400, "BadDigest", TransferFailed),
        (409, "OperationAborted", TransferFailed),
        (403, "AccessDenied", StorageError),
        (404, "NoSuchBucket", ObjectMissing),
        (400, "InvalidArgument", StorageError),
        (501, "NotImplemented", StorageError),
    ],
)
def test_a_refusal_of_one_request_is_not_taken_for_an_outage(
    refusing: Callable[[int, str], Storage], status: int, code: str, kind: type[StorageError]
) -> None:
    with pytest.raises(StorageError) as told:
        refusing(status, code).put("a", b"x", media_type="text/plain")

    assert type(told.value) is kind


@pytest.mark.parametrize("timeout", [ConnectTimeoutError, ReadTimeoutError])
def test_a_service_that_does_not_answer_in_time_is_away(storage: Storage, timeout: type[Exception]) -> None:
    def wait() -> None:
        raise timeout(endpoint_url="http://127.0.0.1")  # pyright: ignore[reportCallIssue]

    with pytest.raises(StorageAway):
        storage._call(wait)


def test_a_request_that_was_never_sent_is_no_outage(storage: Storage) -> None:
    """Botocore refuses an empty key by itself."""
    with pytest.raises(StorageError) as told:
        storage.put("", b"x", media_type="text/plain")

    assert not isinstance(told.value, TransferFailed)
