"""A downloaded file is exactly what the job made, or it is not there."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from noisemill import downloads
from noisemill.client import Client
from noisemill.errors import TransferFailed, UnsafeName
from shared.wire import ArtifactView
from tests.client.little import Answer, LittleServer, Request
from tests.client.log import JOB, NOW

BODY = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "backoff", lambda tries: 0.001)


@dataclass
class Storage:
    """An app: one object behind a presigned URL, and the API's view of its artifact."""

    url: str
    body: bytes = BODY
    cuts: Iterator[int | None] = field(default_factory=lambda: iter(()))
    knows_ranges: bool = True
    signature: str = "1"
    name: str = "sample.png"

    def artifact(self, **changed: Any) -> ArtifactView:
        view = {
            "id": "art_1", "job_id": JOB, "attempt": 1, "kind": "sample", "name": self.name, "media_type": "image/png",
            "size_bytes": len(BODY), "sha256": hashlib.sha256(BODY).hexdigest(), "created_at": NOW,
            "url": f"{self.url}/bucket/key?signature={self.signature}", "url_expires_at": NOW,
        }  # fmt: skip
        return ArtifactView.model_validate(view | changed)

    def __call__(self, request: Request) -> Answer:
        if request.path == "/v1/artifacts/art_1":
            return Answer(body=json.dumps(self.artifact().model_dump(mode="json")).encode())
        if request.query["signature"] != self.signature:
            return Answer(status=403, body=b"<Error/>")
        wanted = request.headers.get("range")
        if wanted is None or not self.knows_ranges:
            return Answer(body=self.body, cut=next(self.cuts, None))
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        span = {"Content-Range": f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"}
        return Answer(status=206, body=self.body[start:], headers=span, cut=next(self.cuts, None))


@pytest.fixture
def storage(little: LittleServer) -> Storage:
    little.app = storage = Storage(little.url)
    return storage


def _left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_artifact_goes_under_its_name_into_a_folder(storage: Storage, client: Client, tmp_path: Path):
    path = client.download("art_1", f"{tmp_path}/new/")

    assert path == tmp_path / "new" / "sample.png"
    assert path.read_bytes() == BODY


def test_storage_is_not_told_the_key(storage: Storage, little: LittleServer, client: Client, tmp_path: Path):
    client.download(storage.artifact(), tmp_path)

    assert "authorization" not in little.requests[-1].headers


def test_a_download_that_breaks_goes_on_where_it_broke(
    storage: Storage, little: LittleServer, client: Client, tmp_path: Path
):
    storage.cuts = iter([1000, 2000, 0, 3000])
    counted: list[int] = []

    path = client.download(storage.artifact(), tmp_path / "a.png", on_bytes=counted.append)

    asked = [request.headers.get("range") for request in little.requests]
    assert path.read_bytes() == BODY
    assert asked == [None, "bytes=1000-", "bytes=3000-", "bytes=3000-", "bytes=6000-"]
    assert sum(counted) == len(BODY)


def test_a_storage_without_ranges_is_read_from_the_start_again(storage: Storage, client: Client, tmp_path: Path):
    storage.knows_ranges = False
    storage.cuts = iter([1000, 2000])
    counted: list[int] = []

    path = client.download(storage.artifact(), tmp_path / "a.png", on_bytes=counted.append)

    assert path.read_bytes() == BODY
    assert sum(counted) == len(BODY)


def test_damaged_bytes_are_never_seen(storage: Storage, client: Client, tmp_path: Path):
    storage.body = BODY[:-1] + b"!"

    with pytest.raises(TransferFailed, match="damaged"):
        client.download(storage.artifact(), tmp_path)
    assert _left_in(tmp_path) == ["home"]


def test_a_failed_download_leaves_the_file_that_was_there(storage: Storage, client: Client, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"old")
    storage.body = BODY + b"more"

    with pytest.raises(TransferFailed, match="longer"):
        client.download(storage.artifact(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert _left_in(tmp_path) == ["a.png", "home"]


def test_an_object_that_never_arrives_is_given_up(storage: Storage, client: Client, tmp_path: Path):
    storage.cuts = iter([500] + [0] * 100)

    with pytest.raises(TransferFailed, match="try again"):
        client.download(storage.artifact(), tmp_path)
    assert _left_in(tmp_path) == ["home"]


def test_an_expired_url_is_replaced_by_a_fresh_one(storage: Storage, client: Client, tmp_path: Path):
    artifact = storage.artifact()
    storage.signature = "2"

    assert client.download(artifact, tmp_path).read_bytes() == BODY


def test_a_file_that_is_there_already_is_not_fetched_again(
    storage: Storage, little: LittleServer, client: Client, tmp_path: Path
):
    (tmp_path / "sample.png").write_bytes(BODY)

    client.download(storage.artifact(), tmp_path)

    assert not little.requests


def test_an_empty_artifact_is_an_empty_file(storage: Storage, client: Client, tmp_path: Path):
    empty = storage.artifact(size_bytes=0, sha256=hashlib.sha256(b"").hexdigest())

    assert client.download(empty, tmp_path).read_bytes() == b""


def test_a_name_may_have_folders(storage: Storage, client: Client, tmp_path: Path):
    storage.name = "samples/0001.png"

    assert client.download(storage.artifact(), tmp_path) == tmp_path / "samples" / "0001.png"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/../../b", "/etc/passwd", "a//b", "a\\..\\b", "C:a", "a\0b", "a\nb", "a/", "x" * 300],
)
def test_a_name_that_leaves_the_folder_is_refused(
    storage: Storage, little: LittleServer, client: Client, tmp_path: Path, name: str
):
    storage.name = name

    with pytest.raises(UnsafeName, match="give a path"):
        client.download(storage.artifact(), tmp_path)
    assert not little.requests
    assert _left_in(tmp_path) == ["home"]
