"""Datasets on their way in: as a form, or straight to storage."""

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from shared.ids import parse
from shared.jobs.rows import Dataset, Job
from shared.settings import Settings
from shared.storage import Storage
from tests.api.support import Owner, serving
from tests.api.test_bad_input import refused
from tests.chaos.objects import Disk
from tests.chaos.s3 import S3Server

CountRows = Callable[[], dict[str, int]]


def a_zip(size: int = 100) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.png", bytes(size))
    return file.getvalue()


def upload(owner: Owner, file: Any = None, **fields: str) -> httpx.Response:
    file = file or ("digits.zip", a_zip(), "application/zip")
    return owner.client.post("/v1/datasets", data={"name": "digits", **fields}, files={"file": file})


def announce(owner: Owner, body: bytes, **fields: Any) -> httpx.Response:
    announced = {"name": "digits", "filename": "digits.zip", "size_bytes": len(body), **fields}
    return owner.client.post("/v1/datasets", json=announced)


def put(view: dict[str, Any], body: bytes) -> None:
    how = view["upload"]
    httpx.request(how["method"], how["url"], headers=how["headers"], content=body).raise_for_status()


def source_of(engine: Engine, dataset_id: str) -> dict[str, Any]:
    with Session(engine) as session:
        dataset = session.get(Dataset, parse("ds", dataset_id))
        assert dataset is not None
        return dataset.source


def test_an_uploaded_file_lies_in_storage_and_waits_for_ingestion(
    owner: Owner, engine: Engine, settings: Settings
) -> None:
    body = a_zip(5000)

    answer = upload(owner, ("digits.zip", body, "application/zip"), modality="image", resolution="28")

    view = answer.json()
    assert (answer.status_code, view["state"], view["upload"]) == (202, "ingesting", None)
    source = source_of(engine, view["id"])
    assert source == {
        "filename": "digits.zip",
        "key": source["key"],
        "size_bytes": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    assert Storage(settings.s3).get(source["key"], sha256=source["sha256"]) == body
    job = owner.client.get(f"/v1/jobs/{view['job_id']}").json()
    assert (job["type"], job["state"]) == ("ingest", "queued")
    assert job["spec"] == {"dataset": view["id"], "modality": "image", "resolution": 28}


def test_a_form_may_name_its_file_before_its_fields_in_many_small_pieces(owner: Owner) -> None:
    content = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="C:\\\\x\\\\d.zip"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n"
        + a_zip()
        + b'\r\n--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nd\r\n--b--\r\n'
    )
    pieces = (content[start : start + 7] for start in range(0, len(content), 7))

    answer = owner.client.post(
        "/v1/datasets", content=pieces, headers={"Content-Type": "multipart/form-data; boundary=b"}
    )

    assert answer.status_code == 202, answer.text


@pytest.mark.parametrize(
    ("change", "pointers"),
    [
        ({"name": ""}, ["/name"]),
        ({"name": "x" * 201}, ["/name"]),
        ({"modality": "smell"}, ["/modality"]),
        ({"resolution": "x"}, ["/resolution"]),
        ({"resolution": "2"}, ["/resolution"]),
        ({"modality": "text", "resolution": "28"}, ["/resolution"]),
        ({"colour": "red"}, ["/colour"]),
        ({"name": "", "colour": "red"}, ["/name", "/colour"]),
        ({"file": ("a.pt", b"x", "application/octet-stream")}, ["/file"]),
        ({"file": ("a", b"x", "application/octet-stream")}, ["/file"]),
        ({"file": ("a.zip", b"x", "image/png")}, ["/file"]),
        ({"file": ("a.zip", b"", "application/zip")}, ["/file"]),
        ({"file": ("a.txt", b"x", "text/plain"), "modality": "image"}, ["/modality"]),
    ],
)
def test_a_wrong_field_of_a_form_is_named(
    owner: Owner, count_rows: CountRows, change: dict[str, Any], pointers: list[str]
) -> None:
    before = count_rows()

    refused(upload(owner, **change), 422, "validation_failed", *pointers)

    assert count_rows() == before


def test_a_form_without_name_and_file_names_both(owner: Owner) -> None:
    answer = owner.client.post("/v1/datasets", files={"modality": (None, "image")})

    refused(answer, 422, "validation_failed", "/name", "/file")


def test_a_field_that_comes_twice_is_named(owner: Owner) -> None:
    files = [("file", ("a.zip", a_zip())), ("file", ("b.zip", a_zip()))]

    refused(owner.client.post("/v1/datasets", data={"name": "d"}, files=files), 422, "validation_failed", "/file")


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ("multipart/form-data", b"--b--"),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"no form"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nd'),
        ("multipart/form-data; boundary=" + "b" * 400, b"--b--"),
    ],
)
def test_a_body_that_is_no_whole_form_is_malformed(
    owner: Owner, count_rows: CountRows, headers: str, body: bytes
) -> None:
    before = count_rows()

    refused(owner.client.post("/v1/datasets", content=body, headers={"Content-Type": headers}), 400, "malformed_body")

    assert count_rows() == before


@pytest.mark.parametrize("says_its_length", [True, False])
def test_an_upload_above_the_limit_is_too_large(owner: Owner, count_rows: CountRows, says_its_length: bool) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="d.zip"\r\n\r\n'
    before = count_rows()

    def chunks() -> Iterator[bytes]:
        yield head
        for _ in range(40):
            yield bytes(64 * 1024)

    content: Any = b"".join(chunks()) if says_its_length else chunks()
    answer = owner.client.post(
        "/v1/datasets", content=content, headers={"Content-Type": "multipart/form-data; boundary=b"}
    )

    refused(answer, 413, "payload_too_large")
    assert count_rows() == before


def test_a_large_file_goes_straight_to_storage(owner: Owner, engine: Engine) -> None:
    body = a_zip(300_000)
    announced = announce(owner, body, modality="image")
    view = announced.json()
    assert (announced.status_code, view["state"], view["job_id"]) == (201, "uploading", None)

    put(view, body)
    answer = owner.client.post(view["urls"]["complete"])

    assert (answer.status_code, answer.json()["state"]) == (202, "ingesting")
    source = source_of(engine, view["id"])
    assert (source["size_bytes"], source["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
    assert owner.client.get(view["urls"]["self"]).json()["upload"] is None


def test_completing_many_times_makes_one_job(owner: Owner, engine: Engine) -> None:
    view = announce(owner, b"x" * 50).json()
    put(view, b"x" * 50)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: owner.client.post(view["urls"]["complete"]), range(8)))

    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [202]
    assert len({answer.json()["job_id"] for answer in answers}) == 1
    with Session(engine) as session:
        assert session.query(Job).filter_by(tenant_id=owner.id).count() == 1


def test_a_download_that_breaks_off_quietly_is_not_taken_for_the_upload(
    make_owner: Any, settings: Settings, engine: Engine, tmp_path: Path
) -> None:
    strict = S3Server(Disk(tmp_path / "s3", room_bytes=0), bucket="b", access_key="a")
    strict.start()
    there = {"endpoint": strict.endpoint, "bucket": "b", "access_key": "a", "public_endpoint": None}
    body = a_zip(300_000)
    try:
        with serving(settings.model_copy(update={"s3": settings.s3.model_copy(update=there)})) as url:
            owner = make_owner(url=url)
            view = announce(owner, body).json()
            put(view, body)
            strict.faults.begin("truncate", share=1)
            answers = [owner.client.post(view["urls"]["complete"]) for _ in range(6)]
            strict.faults.end()

            assert {answer.status_code for answer in answers} == {503}
            assert owner.client.post(view["urls"]["complete"]).status_code == 202
    finally:
        strict.stop()

    assert source_of(engine, view["id"])["sha256"] == hashlib.sha256(body).hexdigest()


def test_an_upload_that_did_not_happen_cannot_be_completed(owner: Owner, count_rows: CountRows) -> None:
    view = announce(owner, b"x").json()
    before = count_rows()

    refused(owner.client.post(view["urls"]["complete"]), 409, "invalid_state")

    assert count_rows() == before


def test_an_upload_of_another_size_cannot_be_completed(owner: Owner, settings: Settings, engine: Engine) -> None:
    view = announce(owner, b"x" * 10).json()
    Storage(settings.s3).put(source_of(engine, view["id"])["key"], b"x" * 9, media_type="application/zip")

    problem = refused(owner.client.post(view["urls"]["complete"]), 409, "invalid_state")

    assert "10 bytes" in problem["detail"] and "9" in problem["detail"]
    assert owner.client.get(view["urls"]["self"]).json()["state"] == "uploading"


def test_an_awaited_upload_is_told_again_to_those_who_may_write(owner: Owner, make_owner: Any, engine: Engine) -> None:
    view = announce(owner, b"x").json()

    assert owner.client.get(view["urls"]["self"]).json()["upload"]["method"] == "PUT"
    assert owner.client.get("/v1/datasets").json()["data"][0]["upload"] is None


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"filename": "a.exe"}, "/filename"),
        ({"filename": ""}, "/filename"),
        ({"size_bytes": 0}, "/size_bytes"),
        ({"size_bytes": 1024 * 1024 + 1}, "/size_bytes"),
        ({"modality": "audio", "filename": "a.npz"}, "/modality"),
        ({"modality": "audio", "resolution": 28}, "/resolution"),
        ({"name": 5}, "/name"),
    ],
)
def test_a_wrong_field_of_an_announcement_is_named(
    owner: Owner, count_rows: CountRows, fields: dict[str, Any], pointer: str
) -> None:
    before = count_rows()

    refused(announce(owner, b"x", **fields), 422, "validation_failed", pointer)

    assert count_rows() == before


def test_datasets_are_listed_newest_first(owner: Owner) -> None:
    made = [upload(owner).json()["id"] for _ in range(3)]

    first = owner.client.get("/v1/datasets?limit=2")
    second = owner.client.get(first.links["next"]["url"])

    assert [one["id"] for one in first.json()["data"] + second.json()["data"]] == made[::-1]


def test_an_upload_that_might_be_collected_before_it_is_recorded_is_not_recorded(
    settings: Settings, make_owner: Any, count_rows: CountRows
) -> None:
    """What nothing names is collected at some age: a dataset must be there long before its file has that age."""
    jobs = settings.jobs.model_copy(update={"orphan_grace": timedelta(microseconds=1)})
    with serving(settings.model_copy(update={"jobs": jobs})) as url:
        owner = make_owner(url=url)
        before = count_rows()

        answer = upload(owner)

    assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
    assert count_rows() == before
