"""What an attempt does while storage is away, and what it goes on to show."""

import socket
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from pydantic import SecretStr

from shared.settings import S3Settings
from shared.storage import Storage
from tests.worker.conftest import Workplace
from worker.cache import ObjectCache
from worker.run import Assignment, Stopped
from worker.runner import RunnerRun


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
