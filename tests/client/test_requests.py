"""Requests get through where that is possible, happen once where they must, and fail in plain words."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from noisemill.client import Client
from noisemill.errors import ApiError, InvalidInput, ServerUnreachable, UnexpectedAnswer
from shared.specs import VaeSpec
from shared.wire import EvaluateRequest, GenerateRequest, TrainRequest
from tests.client.little import Answer, LittleServer, Request
from tests.client.log import JOB, NOW, job_view

SPEC = {"family": "vae", "dataset": "ds_" + "0" * 32, "model": "digits"}
ACCEPTED = Answer(status=202, body=json.dumps(job_view("queued")).encode())


def _refusal(status: int, code: str, **headers: str) -> Answer:
    problem = {"title": "No", "status": status, "code": code, "detail": f"because of {code}", "request_id": "req_1"}
    return Answer(
        status=status, body=json.dumps(problem).encode(), headers=headers, media_type="application/problem+json"
    )


def _in_turn(*answers: Answer) -> Callable[[Request], Answer]:
    left = iter(answers)
    return lambda request: next(left)


LOST = Answer(cut=-1)


def test_a_submit_whose_answer_was_lost_is_sent_again_as_the_same_job(little: LittleServer, client: Client):
    little.app = _in_turn(LOST, LOST, ACCEPTED)

    job = client.train(**SPEC)

    keys = {request.headers["idempotency-key"] for request in little.requests}
    assert job.id == JOB
    assert len(little.requests) == 3
    assert len(keys) == 1


def test_two_submits_are_two_jobs(little: LittleServer, client: Client):
    little.app = _in_turn(ACCEPTED, ACCEPTED)

    client.train(**SPEC)
    client.train(**SPEC)

    first, second = (request.headers["idempotency-key"] for request in little.requests)
    assert first != second


def test_a_submit_whose_first_try_is_still_worked_on_waits_for_its_answer(little: LittleServer, client: Client):
    little.app = _in_turn(LOST, _refusal(409, "idempotency_in_progress", **{"Retry-After": "0"}), ACCEPTED)

    assert client.train(**SPEC).id == JOB


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_passing_refusal_is_asked_again(little: LittleServer, client: Client, status: int):
    little.app = _in_turn(_refusal(status, "passing"), ACCEPTED)

    assert client.job(JOB).id == JOB


def test_the_server_says_how_long_to_wait(little: LittleServer, client: Client):
    little.app = _in_turn(_refusal(429, "rate_limited", **{"Retry-After": "1"}), ACCEPTED)
    begun = time.monotonic()

    client.job(JOB)

    assert time.monotonic() - begun >= 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_submit_that_is_put_off_comes_again_when_it_was_told_to(little: LittleServer, client: Client, status: int):
    little.app = _in_turn(_refusal(status, "queue_full", **{"Retry-After": "1"}), ACCEPTED)
    begun = time.monotonic()

    client.train(**SPEC)

    keys = {request.headers["idempotency-key"] for request in little.requests}
    assert time.monotonic() - begun >= 1
    assert len(little.requests) == 2
    assert len(keys) == 1


def test_nobody_waits_for_hours_because_a_server_says_so(little: LittleServer, client: Client):
    little.app = _in_turn(_refusal(429, "rate_limited", **{"Retry-After": "7200"}))

    with pytest.raises(ApiError) as raised:
        client.job(JOB)
    assert raised.value.retry_after == 7200


@pytest.mark.parametrize(("status", "code"), [(429, "quota_exceeded"), (422, "validation_failed"), (500, "internal")])
def test_what_will_not_pass_is_not_asked_again(little: LittleServer, client: Client, status: int, code: str):
    little.app = _in_turn(_refusal(status, code), ACCEPTED)

    with pytest.raises(ApiError, match=f"because of {code}") as raised:
        client.job(JOB)
    assert raised.value.code == code


def test_tries_are_bounded(little: LittleServer):
    little.app = lambda request: _refusal(503, "unavailable", **{"Retry-After": "0"})

    with Client(little.url, "nm_secret", max_retries=3) as client, pytest.raises(ApiError):
        client.job(JOB)
    assert len(little.requests) == 4


@pytest.mark.parametrize("action", ["pause", "resume", "retry", "cancel"])
def test_what_is_done_to_a_job_may_be_asked_for_again(little: LittleServer, client: Client, action: str):
    little.app = _in_turn(LOST, ACCEPTED)

    job = getattr(client, action)(JOB)

    assert job.id == JOB
    assert [(request.method, request.path) for request in little.requests] == [("POST", f"/v1/jobs/{JOB}/{action}")] * 2


def test_a_reproduction_whose_answer_was_lost_is_one_and_two_are_two(little: LittleServer, client: Client):
    little.app = _in_turn(LOST, ACCEPTED, ACCEPTED, ACCEPTED)

    for key in (None, None, "mine"):
        client.reproduce(JOB, idempotency_key=key)

    first, again, second, third = (request.headers["idempotency-key"] for request in little.requests)
    assert (first == again, first != second, third) == (True, True, "mine")
    assert {request.path for request in little.requests} == {f"/v1/jobs/{JOB}/reproduce"}


def test_an_erasure_whose_answer_was_lost_has_happened(little: LittleServer, client: Client):
    little.app = _in_turn(LOST, _refusal(410, "gone"))

    client.erase(JOB)

    assert [request.method for request in little.requests] == ["DELETE"] * 2


def test_a_job_that_cannot_be_erased_yet_is_said_so(little: LittleServer, client: Client):
    little.app = _in_turn(_refusal(409, "invalid_state"))

    with pytest.raises(ApiError, match="because of invalid_state"):
        client.erase(JOB)


def test_an_upload_whose_answer_was_lost_is_not_sent_twice(little: LittleServer, client: Client, tmp_path: Path):
    """Nothing tells the server that the second is the first, so it would become a second dataset."""
    (tmp_path / "a.txt").write_text("a")
    little.app = _in_turn(LOST, ACCEPTED)

    with pytest.raises(ServerUnreachable, match="broke"):
        client.upload_dataset(tmp_path / "a.txt")
    assert len(little.requests) == 1


def test_a_refusal_names_each_wrong_field(little: LittleServer, client: Client):
    problem = {
        "title": "Unprocessable", "status": 422, "code": "validation_failed", "detail": "2 fields are wrong",
        "errors": [
            {"pointer": "/spec/steps", "detail": "Input should be greater than 0"},
            {"parameter": "query limit", "detail": "too large"},
        ],
    }  # fmt: skip
    little.app = lambda request: Answer(status=422, body=json.dumps(problem).encode())

    with pytest.raises(ApiError) as raised:
        client.train(**SPEC, steps=0)
    assert "/spec/steps: Input should be greater than 0" in str(raised.value)
    assert "query limit: too large" in str(raised.value)


def test_a_proxys_own_error_page_is_still_an_error_in_words(little: LittleServer, client: Client):
    little.app = lambda request: Answer(status=403, body=b"<html>no</html>", media_type="text/html")

    with pytest.raises(ApiError, match="answered 403"):
        client.job(JOB)


def test_an_answer_that_is_no_noisemill_answer_is_said_so(little: LittleServer, client: Client):
    little.app = lambda request: Answer(body=b"<html>It works!</html>", media_type="text/html")

    with pytest.raises(UnexpectedAnswer, match="NOISEMILL_URL"):
        client.job(JOB)


def test_where_nobody_listens_the_error_says_how_to_start_a_server():
    server = LittleServer()
    with server.running():
        url = server.url
    begun = time.monotonic()

    with Client(url, "nm_secret") as client, pytest.raises(ServerUnreachable, match=f"No server at {url}: start one"):
        client.job(JOB)
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("name", ["../workers", "a/b", "a?b=c", "a#b", "%2e%2e"])
def test_an_identifier_stays_one_segment_of_the_path(little: LittleServer, client: Client, name: str):
    little.app = _in_turn(ACCEPTED)

    client.job(name)

    assert little.requests[0].path.startswith("/v1/jobs/")
    assert little.requests[0].path.count("/") == 3
    assert not little.requests[0].query


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_an_identifier_that_would_name_another_path_is_refused(client: Client, name: str):
    with pytest.raises(InvalidInput):
        client.job(name)


def test_only_the_fields_that_were_given_are_sent(little: LittleServer, client: Client):
    """What is left out is the server's to decide; a default sent along would count as asked for."""
    little.app = _in_turn(ACCEPTED, ACCEPTED)
    spec = VaeSpec.model_validate({**SPEC, "steps": 50})

    client.submit(TrainRequest(type="train", spec=spec, labels={"for": "test"}))
    client.train(spec)

    bodies = [json.loads(request.body) for request in little.requests]
    assert bodies[0] == {"type": "train", "spec": {**SPEC, "steps": 50}, "labels": {"for": "test"}}
    assert bodies[1] == {"type": "train", "spec": {**SPEC, "steps": 50}}


def test_a_generate_job_is_typed_like_the_server_types_it(little: LittleServer, client: Client):
    little.app = _in_turn(ACCEPTED)

    client.generate(model="digits@1", num_samples=4)

    assert GenerateRequest.model_validate_json(little.requests[0].body).spec.num_samples == 4


def test_an_evaluate_job_is_typed_like_the_server_types_it(little: LittleServer, client: Client):
    little.app = _in_turn(ACCEPTED)

    client.evaluate(model="digits@1", dataset="ds_" + "0" * 32, metrics=["mind"])

    assert EvaluateRequest.model_validate_json(little.requests[0].body).spec.metrics == ["mind"]


def test_a_submit_can_wait_for_the_answer(little: LittleServer, client: Client):
    little.app = _in_turn(ACCEPTED)

    client.train(**SPEC, wait=200)

    assert little.requests[0].headers["prefer"] == "wait=60"


def test_lists_go_on_to_the_last_page(little: LittleServer, client: Client):
    pages = {
        None: {"data": [job_view(id="job_1"), job_view(id="job_2")], "has_more": True, "next_cursor": "two"},
        "two": {"data": [job_view(id="job_3")], "has_more": False},
    }
    little.app = lambda request: Answer(body=json.dumps(pages[request.query.get("cursor")]).encode())

    assert [job.id for job in client.jobs(state="running")] == ["job_1", "job_2", "job_3"]
    assert all(request.query["state"] == "running" for request in little.requests)


def test_importing_the_client_or_running_the_command_loads_no_server_library():
    program = (
        "import sys; from noisemill import Client; from typer.testing import CliRunner; from noisemill.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'sqlalchemy', 'sqlmodel', 'torch', 'celery', 'fastapi', 'redis', 'boto3', 'numpy', 'psutil', 'PIL',"
        " 'alembic', 'pydantic_settings', 'noisemill.local'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=_root())

    assert done.stdout.strip() == "[]", done.stderr


def _root() -> Path:
    return Path(__file__).parents[2]


def _write_stack(folder: Path, url: str, pid: int) -> None:
    folder.mkdir(parents=True)
    content = {"api_url": url, "api_key": f"key of {url}", "pids": {"api": pid}}
    (folder / "stack.json").write_text(json.dumps(content))


@pytest.fixture
def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_the_nearest_running_stack_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead_pid: int):
    project = tmp_path / "home" / "project"
    _write_stack(tmp_path / "home" / ".noisemill", "http://127.0.0.1:1", os.getpid())
    _write_stack(project / ".noisemill", "http://127.0.0.1:2", os.getpid())
    _write_stack(project / "deep" / ".noisemill", "http://127.0.0.1:3", dead_pid)
    monkeypatch.chdir(project / "deep")

    with Client() as client:
        assert client.url == "http://127.0.0.1:2"


def test_the_environment_goes_before_a_running_stack(
    little: LittleServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _write_stack(tmp_path / "home" / ".noisemill", "http://127.0.0.1:1", os.getpid())
    monkeypatch.setenv("NOISEMILL_URL", little.url)
    monkeypatch.setenv("NOISEMILL_API_KEY", "nm_from_environment")
    little.app = _in_turn(ACCEPTED)

    with Client() as client:
        client.job(JOB)

    assert little.requests[0].headers["authorization"] == "Bearer nm_from_environment"


def test_the_key_of_a_local_stack_is_not_sent_elsewhere(little: LittleServer, tmp_path: Path):
    _write_stack(tmp_path / "home" / ".noisemill", "http://127.0.0.1:1", os.getpid())
    little.app = _in_turn(ACCEPTED)

    with Client(little.url) as client:
        client.job(JOB)

    assert "authorization" not in little.requests[0].headers


def test_without_any_server_the_error_says_how_to_start_one():
    with pytest.raises(ServerUnreachable, match="noisemill up"):
        Client()


def test_direct_uploads_take_no_key_to_storage(little: LittleServer, client: Client, tmp_path: Path):
    (tmp_path / "text.txt").write_text("hello" * 1000)
    dataset = {"id": "ds_1", "name": "text", "state": "uploading", "created_at": NOW}
    upload = {"method": "PUT", "url": f"{little.url}/bucket/key?signature=1", "headers": {"Content-Type": "text/plain"}}
    little.app = _in_turn(
        Answer(status=201, body=json.dumps({**dataset, "upload": upload}).encode()),
        LOST,
        Answer(),
        Answer(status=202, body=json.dumps({**dataset, "state": "ingesting"}).encode()),
    )

    sent: list[int] = []

    dataset = client.upload_dataset(tmp_path / "text.txt", direct=True, on_bytes=sent.append)

    assert dataset.state == "ingesting"
    assert sum(sent) == 5000

    announced, _, put, completed = little.requests
    assert json.loads(announced.body) == {"name": "text", "filename": "text.txt", "size_bytes": 5000}
    assert put.body == b"hello" * 1000
    assert "authorization" not in put.headers
    assert completed.path == "/v1/datasets/ds_1/complete"
