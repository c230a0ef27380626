"""The strict S3 server, as boto3 sees it: what AWS refuses is refused, and each fault is what it says."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError, ResponseStreamingError

from tests.chaos.objects import LEAST_PART, Disk
from tests.chaos.s3 import S3Server

BODY = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path: Path) -> Iterator[S3Server]:
    server = S3Server(Disk(tmp_path / "s3", room_bytes=0), bucket="b", access_key="key")
    server.start()
    yield server
    server.stop()


def connect(server: S3Server, **options: Any) -> Any:
    config = {"signature_version": "s3v4", "retries": {"total_max_attempts": 1}, "read_timeout": 2}
    return Session().client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        config=Config(**(config | {"s3": {"addressing_style": "path"}} | options)),
    )


@pytest.fixture
def s3(server: S3Server) -> Iterator[Any]:
    client = connect(server)
    yield client
    client.close()


def code_of(refused: pytest.ExceptionInfo[ClientError]) -> str:
    return refused.value.response["Error"]["Code"]


@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_what_was_put_is_got_with_its_description(server: S3Server, checksums: str) -> None:
    s3 = connect(server, request_checksum_calculation=checksums, response_checksum_validation=checksums)

    s3.put_object(Bucket="b", Key="a/ü", Body=BODY, ContentType="image/png", Metadata={"sha256": "x"})
    found = s3.get_object(Bucket="b", Key="a/ü")

    assert found["Body"].read() == BODY
    assert (found["ContentType"], found["Metadata"]) == ("image/png", {"sha256": "x"})
    assert s3.head_object(Bucket="b", Key="a/ü")["ContentLength"] == len(BODY)
    s3.close()


@pytest.mark.parametrize(
    ("claim", "code"),
    [
        ({"ChecksumSHA256": "A" * 43 + "="}, "BadDigest"),
        ({"ChecksumCRC32": "AAAAAA=="}, "BadDigest"),
        ({"ContentMD5": "A" * 22 + "=="}, "BadDigest"),
        ({"ContentMD5": "not a digest"}, "InvalidDigest"),
        ({"IfMatch": '"other"'}, "NoSuchKey"),
    ],
)
def test_a_wrong_claim_about_the_body_is_refused_and_stores_nothing(s3: Any, claim: dict, code: str) -> None:
    with pytest.raises(ClientError) as refused:
        s3.put_object(Bucket="b", Key="k", Body=BODY, **claim)

    assert code_of(refused) == code
    assert s3.list_objects_v2(Bucket="b")["KeyCount"] == 0


def headers(**changed: str) -> dict[str, str]:
    signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=key/x", "x-amz-content-sha256": "UNSIGNED-PAYLOAD"}
    return signed | {name.replace("_", "-"): value for name, value in changed.items()}


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (headers(x_amz_content_sha256=hashlib.sha256(b"other").hexdigest()), "XAmzContentSHA256Mismatch"),
        (headers(x_amz_content_sha256="STREAMING-UNSIGNED-PAYLOAD-TRAILER"), "NotImplemented"),
        (headers(x_amz_copy_source="b/other"), "NotImplemented"),
        (headers(Authorization="AWS4-HMAC-SHA256 Credential=stranger/x"), "AccessDenied"),
        ({}, "AccessDenied"),
    ],
)
def test_what_cannot_be_checked_is_refused(server: S3Server, sent: dict[str, str], code: str) -> None:
    answer = httpx.put(f"{server.endpoint}/b/k", headers=sent, content=BODY)

    assert f"<Code>{code}</Code>" in answer.text
    assert server.objects.all() == []


def test_a_body_without_a_length_is_refused(server: S3Server) -> None:
    answer = httpx.put(f"{server.endpoint}/b/k", headers=headers(), content=iter([BODY]))

    assert answer.status_code == 501


def test_a_conditional_write_does_not_replace(s3: Any) -> None:
    s3.put_object(Bucket="b", Key="k", Body=b"first", IfNoneMatch="*")

    with pytest.raises(ClientError) as refused:
        s3.put_object(Bucket="b", Key="k", Body=b"second", IfNoneMatch="*")

    assert code_of(refused) == "PreconditionFailed"
    assert s3.get_object(Bucket="b", Key="k")["Body"].read() == b"first"


def test_parts_become_one_object_only_as_they_were_sent(s3: Any) -> None:
    upload = s3.create_multipart_upload(Bucket="b", Key="k", ContentType="text/plain")["UploadId"]
    bodies = [bytes(LEAST_PART), b"end"]
    etags = [
        s3.upload_part(Bucket="b", Key="k", UploadId=upload, PartNumber=number, Body=body)["ETag"]
        for number, body in enumerate(bodies, start=1)
    ]
    parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, start=1)]

    for wrong, code in [
        ([parts[0], parts[1] | {"ETag": etags[0]}], "InvalidPart"),
        (parts[::-1], "InvalidPartOrder"),
    ]:
        with pytest.raises(ClientError) as refused:
            s3.complete_multipart_upload(Bucket="b", Key="k", UploadId=upload, MultipartUpload={"Parts": wrong})
        assert code_of(refused) == code
    s3.complete_multipart_upload(Bucket="b", Key="k", UploadId=upload, MultipartUpload={"Parts": parts})

    assert s3.get_object(Bucket="b", Key="k")["Body"].read() == b"".join(bodies)
    assert "Uploads" not in s3.list_multipart_uploads(Bucket="b")


def test_a_part_that_is_too_small_is_refused(s3: Any) -> None:
    upload = s3.create_multipart_upload(Bucket="b", Key="k")["UploadId"]
    etags = [
        s3.upload_part(Bucket="b", Key="k", UploadId=upload, PartNumber=number, Body=b"small")["ETag"]
        for number in (1, 2)
    ]
    parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, start=1)]

    with pytest.raises(ClientError) as refused:
        s3.complete_multipart_upload(Bucket="b", Key="k", UploadId=upload, MultipartUpload={"Parts": parts})

    assert code_of(refused) == "EntityTooSmall"


@pytest.mark.parametrize(
    ("asked", "expected"), [("bytes=0-9", BODY[:10]), ("bytes=-7", BODY[-7:]), ("bytes=10000-", BODY[10000:])]
)
def test_a_range_is_cut_out(s3: Any, asked: str, expected: bytes) -> None:
    s3.put_object(Bucket="b", Key="k", Body=BODY)

    found = s3.get_object(Bucket="b", Key="k", Range=asked)

    assert found["Body"].read() == expected
    assert found["ResponseMetadata"]["HTTPStatusCode"] == 206


def test_a_range_outside_is_refused(s3: Any) -> None:
    s3.put_object(Bucket="b", Key="k", Body=BODY)

    with pytest.raises(ClientError) as refused:
        s3.get_object(Bucket="b", Key="k", Range=f"bytes={len(BODY)}-")

    assert code_of(refused) == "InvalidRange"


def test_a_list_comes_in_pages_in_the_order_of_the_keys(s3: Any) -> None:
    for number in range(5):
        s3.put_object(Bucket="b", Key=f"a/{number}", Body=b"x")
    s3.put_object(Bucket="b", Key="other", Body=b"x")

    pages = list(
        s3.get_paginator("list_objects_v2").paginate(Bucket="b", Prefix="a/", PaginationConfig={"PageSize": 2})
    )

    assert [item["Key"] for page in pages for item in page["Contents"]] == [f"a/{number}" for number in range(5)]
    assert len(pages) == 3
    assert pages[0]["Contents"][0]["LastModified"].tzinfo is not None


def test_a_batch_is_deleted_only_with_a_checksum(server: S3Server, s3: Any) -> None:
    s3.put_object(Bucket="b", Key="k", Body=BODY)
    bare = httpx.post(f"{server.endpoint}/b?delete", headers=headers(), content=b"<Delete/>")
    s3.delete_objects(Bucket="b", Delete={"Objects": [{"Key": "k"}, {"Key": "missing"}]})

    assert bare.status_code == 400
    assert server.objects.all() == []


def test_a_presigned_link_names_the_download(s3: Any) -> None:
    s3.put_object(Bucket="b", Key="k", Body=BODY)

    named = {"Bucket": "b", "Key": "k", "ResponseContentDisposition": 'attachment; filename="a.png"'}
    answer = httpx.get(s3.generate_presigned_url("get_object", Params=named))

    assert answer.content == BODY
    assert answer.headers["Content-Disposition"] == 'attachment; filename="a.png"'


@pytest.mark.parametrize("mounted", [False, True])
def test_a_full_disk_fails_the_write_and_keeps_what_was_there(tmp_path: Path, mounted: bool) -> None:
    disk = Disk(tmp_path / "s3", room_bytes=1024 * 1024, mounted=mounted)
    server = S3Server(disk, bucket="b", access_key="key")
    server.start()
    try:
        s3 = connect(server)
        s3.put_object(Bucket="b", Key="k", Body=b"before")
        disk.fill()
        with pytest.raises(ClientError) as refused:
            s3.put_object(Bucket="b", Key="k", Body=BODY)
        disk.free()

        assert code_of(refused) == "XMinioStorageFull"
        assert s3.get_object(Bucket="b", Key="k")["Body"].read() == b"before"
        assert [path.name for path in disk.folder.iterdir() if path.name.startswith(".")] == []
        s3.put_object(Bucket="b", Key="k", Body=BODY)
        s3.close()
    finally:
        server.stop()
        disk.close()


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("error", (ClientError,)),
        ("stall", (ReadTimeoutError,)),
        ("reset", (ConnectionClosedError, ConnectionError)),
        ("lie", (ClientError, ConnectionClosedError)),
    ],
)
def test_a_fault_fails_a_write_and_only_a_lie_executes_it(server: S3Server, s3: Any, fault: str, seen: tuple) -> None:
    server.faults.begin(fault, share=1)
    for number in range(6):  # a fault has several ways to fail
        with pytest.raises(seen):
            s3.put_object(Bucket="b", Key=str(number), Body=BODY)
        if fault == "stall":
            break
    server.faults.end()

    assert server.faults.hits[fault] >= 1
    assert len(server.objects.all()) == (6 if fault == "lie" else 0)


def test_a_truncated_download_is_short_with_or_without_saying_so(server: S3Server) -> None:
    s3 = connect(server, response_checksum_validation="when_required")
    s3.put_object(Bucket="b", Key="k", Body=BODY)
    server.faults.begin("truncate", share=1)
    endings = set()
    for _ in range(12):
        try:
            body = s3.get_object(Bucket="b", Key="k")["Body"].read()
        except ResponseStreamingError:
            endings.add("broken")
        else:
            endings.add("whole" if body == BODY else "short")

    s3.close()
    assert endings == {"broken", "short"}


def test_objects_are_files_with_their_description(server: S3Server, s3: Any) -> None:
    s3.put_object(Bucket="b", Key="k", Body=BODY)

    (path,) = server.objects.disk.folder.iterdir()
    first, _, rest = path.read_bytes().partition(b"\n")
    assert json.loads(first)["sha256"] == hashlib.sha256(BODY).hexdigest()
    assert rest == BODY
