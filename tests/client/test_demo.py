"""What the demo does around its work: it cleans up and says where to look. The work itself is done by ``make demo``."""

import io
import json
import signal
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from noisemill import demo
from noisemill.demo import Demo, DemoFailed, write_digits
from noisemill.local.stack import PartStatus
from tests.client.little import Answer, LittleServer, Request
from tests.client.log import NOW


@dataclass
class OneServerStack:
    """A stack that consists of a little server which was there before."""

    url: str
    data_dir: Path
    is_running: bool = False
    said: list[str] = field(default_factory=list[str])

    def status(self) -> list[PartStatus]:
        return [PartStatus(name="api", pid=1, is_running=True)] if self.is_running else []

    def up(self) -> dict[str, Any]:
        self.is_running = True
        return {
            "api_url": self.url,
            "api_key": "nm_secret",
            "flower_url": None,
            "flower_user": "",
            "flower_password": "",
        }

    def down(self) -> list[str]:
        self.is_running = False
        return ["api"]


@pytest.fixture
def stack(little: LittleServer, tmp_path: Path) -> OneServerStack:
    little.app = _refuses_uploads
    return OneServerStack(little.url, tmp_path / ".stack")


@pytest.fixture(autouse=True)
def _few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "write_digits", lambda path: path.write_bytes(b"digits"))


def _refuses_uploads(request: Request) -> Answer:
    if request.method == "GET":
        return Answer(body=b'{"data": []}')
    problem = {"title": "Refused", "status": 413, "code": "payload_too_large", "detail": "no digits today"}
    return Answer(status=413, body=json.dumps(problem).encode())


def test_a_demo_that_fails_names_the_stage_and_the_log(stack: OneServerStack, tmp_path: Path):
    with pytest.raises(DemoFailed) as raised:
        Demo(stack, folder=tmp_path).run(keep=False)  # pyright: ignore[reportArgumentType]

    assert "Uploading" in str(raised.value) and "no digits today" in str(raised.value)
    assert str(tmp_path / ".stack" / "logs" / "worker-train-1.log") in str(raised.value)


def test_a_demo_that_fails_stops_what_it_started(stack: OneServerStack, tmp_path: Path):
    with pytest.raises(DemoFailed):
        Demo(stack, folder=tmp_path).run(keep=False)  # pyright: ignore[reportArgumentType]

    assert not stack.is_running
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("was_running", "keep"), [(True, False), (False, True)])
def test_what_shall_go_on_is_not_stopped(stack: OneServerStack, tmp_path: Path, was_running: bool, keep: bool):
    stack.is_running = was_running

    with pytest.raises(DemoFailed):
        Demo(stack, folder=tmp_path).run(keep=keep)  # pyright: ignore[reportArgumentType]
    assert stack.is_running


def test_a_job_left_by_an_interrupted_demo_is_canceled(stack: OneServerStack, little: LittleServer, tmp_path: Path):
    view = {
        "id": "job_left", "type": "train", "state": "queued", "state_version": 1, "summary": "", "spec": {},
        "priority": "normal", "attempt": 1, "max_attempts": 3, "progress": {}, "created_at": NOW,
    }  # fmt: skip

    def has_a_job(request: Request) -> Answer:
        if request.query.get("label.from") == "demo":
            return Answer(body=json.dumps({"data": [view]}).encode())
        return Answer(body=json.dumps(view).encode()) if "cancel" in request.path else _refuses_uploads(request)

    little.app = has_a_job

    with pytest.raises(DemoFailed):
        Demo(stack, folder=tmp_path).run(keep=False)  # pyright: ignore[reportArgumentType]
    assert "/v1/jobs/job_left/cancel" in [request.path for request in little.requests]


@pytest.mark.slow
def test_the_digits_are_five_thousand_images_in_a_folder_per_class(tmp_path: Path):
    from PIL import Image

    write_digits(tmp_path / "digits.zip")

    with zipfile.ZipFile(tmp_path / "digits.zip") as archive:
        names = archive.namelist()
        image = Image.open(io.BytesIO(archive.read(names[0])))
        assert (len(names), {name[0] for name in names}) == (5000, set("0123456789"))
        assert (image.size, image.mode) == ((28, 28), "L")
