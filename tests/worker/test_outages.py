"""What an attempt does while storage is away, and what it goes on to show."""

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from pydantic import SecretStr

from shared.errors import DiskFailed, InputGone, InputUnreadable
from shared.settings import S3Settings
from shared.storage import Storage
from tests.chaos.objects import Disk
from tests.chaos.s3 import S3Server
from tests.conftest import WaitUntil
from tests.worker.conftest import Workplace
from worker.cache import ObjectCache
from worker.run import Assignment, InputDamaged, Stopped, StopReason, StoredObject
from worker.runner import STORAGE_PATIENCE, RunnerRun


class Supervised:
    """Stands where the runner's process is: the storage that it uses, and what it said."""

    device = "cpu"

    def __init__(self, settings: S3Settings, folder: Path) -> None:
        self.storage = Storage(settings)
        self.cache = ObjectCache(folder, self.storage, limit_bytes=1_000_000)
        self.channel = self
        self.said: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.said.append(message)


def _run(supervised: Supervised) -> RunnerRun:
    assignment = Assignment(job_id="job_1", fence=1, type="train", spec={}, inputs={})
    return RunnerRun(supervised, assignment)  # type: ignore[arg-type]


def _away() -> S3Settings:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    return S3Settings(endpoint=endpoint, bucket="b", access_key="a", secret_key=SecretStr("s"))


def test_an_upload_waits_for_storage_to_come_back(workplace: Workplace, tmp_path: Path) -> None:
    supervised = Supervised(_away(), tmp_path)
    run = _run(supervised)
    upload = Thread(target=run.publish, args=("preview", "p", b"x"), kwargs={"media_type": "image/png"}, daemon=True)
    upload.start()

    upload.join(8)
    assert upload.is_alive()
    supervised.storage = Storage(workplace.settings.s3)
    upload.join(30)

    assert [message["artifact"]["name"] for message in supervised.said] == ["p"]


def test_a_stop_ends_the_wait_for_storage(tmp_path: Path) -> None:
    run = _run(Supervised(_away(), tmp_path))
    run.stop("cancel")

    with pytest.raises(Stopped):
        run.publish("preview", "p", b"x", media_type="image/png")


def test_a_step_without_figures_keeps_those_of_the_last(tmp_path: Path) -> None:
    supervised = Supervised(_away(), tmp_path)
    run = _run(supervised)

    run.step(2, 2, loss=0.5)
    run.step(2, 2)

    assert [message["figures"]["loss"] for message in supervised.said] == [0.5, 0.5]


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[S3Server]:
    server = S3Server(Disk(tmp_path / "s3", room_bytes=0), bucket="b", access_key="a")
    server.start()
    yield server
    server.stop()


def _connected(server: S3Server, tmp_path: Path, **options: Any) -> Supervised:
    settings = {"endpoint": server.endpoint, "bucket": "b", "access_key": "a", "secret_key": SecretStr("s")}
    return Supervised(S3Settings(**settings | options), tmp_path / "cache")


@pytest.mark.parametrize("fault", ["error", "reset", "lie"])
@pytest.mark.parametrize("size", [100, 6_000_000])
def test_an_upload_arrives_whole_through_an_outage(strict: S3Server, tmp_path: Path, fault: str, size: int) -> None:
    """Also where the service did what it says it did not: an upload in parts that has ended cannot be ended again."""
    supervised = _connected(strict, tmp_path, multipart_threshold=5 * 2**20)
    (tmp_path / "body").write_bytes(body := bytes(range(100)) * (size // 100))
    strict.faults.begin(fault, share=0.4)

    stored = _run(supervised).publish("preview", "p", tmp_path / "body", media_type="image/png")

    strict.faults.end()
    assert supervised.storage.get(stored.key, sha256=stored.sha256) == body


@pytest.mark.parametrize("fault", ["error", "reset", "truncate"])
def test_a_download_arrives_whole_through_an_outage(strict: S3Server, tmp_path: Path, fault: str) -> None:
    supervised = _connected(strict, tmp_path)
    stored = supervised.storage.put("k", body := bytes(range(256)) * 400, media_type="text/plain")
    strict.faults.begin(fault, share=0.7)

    path = _run(supervised).fetch(StoredObject(key="k", sha256=stored.sha256, size_bytes=stored.size_bytes))

    assert path.read_bytes() == body


@pytest.mark.parametrize("fault", ["truncate", "error"])
def test_a_fault_that_lasts_is_not_taken_for_the_last_word(
    strict: S3Server, tmp_path: Path, wait_until: WaitUntil, fault: str
) -> None:
    """Every answer is a server's error, or a body that is cut off, also where the server announces the shorter one."""
    supervised = _connected(strict, tmp_path)
    stored = supervised.storage.put("k", bytes(range(256)) * 400, media_type="text/plain")
    strict.faults.begin(fault, share=1)
    paths: list[Path] = []
    wanted = StoredObject(key="k", sha256=stored.sha256, size_bytes=stored.size_bytes)
    download = Thread(target=lambda: paths.append(_run(supervised).fetch(wanted)), daemon=True)
    download.start()

    wait_until(lambda: strict.faults.hits[fault] > 12, timeout=60)
    strict.faults.end()
    download.join(60)

    assert [path.stat().st_size for path in paths] == [stored.size_bytes]


def _damaged(strict: S3Server, supervised: Supervised) -> StoredObject:
    stored = supervised.storage.put("k", b"as it was", media_type="text/plain")
    supervised.storage.put("k", b"as it is!", media_type="text/plain")
    return StoredObject(key="k", sha256=stored.sha256, size_bytes=stored.size_bytes)


def test_a_damaged_object_is_named_after_it_was_read_again(strict: S3Server, tmp_path: Path) -> None:
    supervised = _connected(strict, tmp_path)
    stored = _damaged(strict, supervised)

    with pytest.raises(InputDamaged, match=f"^SHA-256 [0-9a-f]{{64}}, expected {stored.sha256}$"):
        _run(supervised).fetch(stored)


def test_an_object_that_is_shorter_in_storage_is_damaged_and_not_waited_for(strict: S3Server, tmp_path: Path) -> None:
    supervised = _connected(strict, tmp_path)
    stored = supervised.storage.put("k", b"as it was", media_type="text/plain")
    supervised.storage.put("k", b"as", media_type="text/plain")

    with pytest.raises(InputDamaged):
        _run(supervised).fetch(StoredObject(key="k", sha256=stored.sha256, size_bytes=9))


@pytest.mark.parametrize(("key", "refused"), [("missing", InputGone), ("k", InputUnreadable)])
def test_what_no_waiting_changes_is_not_waited_for(
    strict: S3Server, tmp_path: Path, key: str, refused: type[Exception]
) -> None:
    """A missing object is a 404, and another's key a 403."""
    _connected(strict, tmp_path).storage.put("k", b"x", media_type="text/plain")
    stranger = "a" if key == "missing" else "stranger"
    began = time.monotonic()

    with pytest.raises(refused):
        _run(_connected(strict, tmp_path, access_key=stranger)).fetch(StoredObject(key=key, sha256="0", size_bytes=1))

    assert time.monotonic() - began < STORAGE_PATIENCE / 4


def test_a_checkpoint_is_still_stored_after_a_stop_and_a_preview_is_not(strict: S3Server, tmp_path: Path) -> None:
    run = _run(_connected(strict, tmp_path))
    run.stop("interrupt")
    strict.faults.begin("error", share=1)
    with pytest.raises(Stopped):
        run.publish("preview", "p", b"x", media_type="image/png")

    strict.faults.begin("error", share=0.8)
    assert run.publish("checkpoint", "c", b"x", media_type="text/plain").size_bytes == 1


def test_a_full_disk_of_the_worker_is_named(strict: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervised = _connected(strict, tmp_path)
    stored = supervised.storage.put("k", b"x" * 100_000, media_type="text/plain")
    full = os.open("/dev/full", os.O_WRONLY)  # a device of the kernel whose every write fails with ENOSPC
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: (full, str(tmp_path / "partial")))

    with pytest.raises(DiskFailed, match="^the worker's own disk is full$"):
        _run(supervised).fetch(StoredObject(key="k", sha256=stored.sha256, size_bytes=100_000))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["preempt", "pause"], "pause"),
        (["pause", "preempt"], "pause"),
        (["interrupt", "pause"], "interrupt"),
        (["pause", "cancel"], "cancel"),
        (["cancel", "interrupt"], "cancel"),
    ],
)
def test_the_most_urgent_reason_to_stop_counts(tmp_path: Path, asked: list[StopReason], told: str) -> None:
    run = _run(Supervised(_away(), tmp_path))
    for reason in asked:
        run.stop(reason)

    with pytest.raises(Stopped, match=told):
        run.step(1, 2)


def test_only_a_boundary_gives_way_to_a_more_urgent_job(tmp_path: Path) -> None:
    run = _run(Supervised(_away(), tmp_path))
    run.boundary()
    run.stop("preempt")

    run.step(1, 2)
    with pytest.raises(Stopped, match="preempt"):
        run.boundary()


def test_the_pace_begins_anew_when_the_training_goes_back(tmp_path: Path) -> None:
    supervised = Supervised(_away(), tmp_path)
    run = _run(supervised)
    for step in (5, 6, 2):
        time.sleep(0.6)
        run.step(step, 10)

    assert [message["figures"].keys() >= {"rate"} for message in supervised.said] == [False, True, False]
