"""Every wrong request is refused with a problem that names the field, and changes nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from shared.jobs.rows import DatasetState
from tests.api.conftest import MakeOwner
from tests.api.support import Owner, claim, succeed, train_request

CountRows = Callable[[], dict[str, int]]


@pytest.fixture
def nothing_changes(count_rows: CountRows) -> Iterator[None]:
    before = count_rows()
    yield
    assert count_rows() == before


def refused(answer: httpx.Response, status: int, code: str, *pointers: str) -> dict[str, Any]:
    """The problem of an answer, which must be one of these."""
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code), problem
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert problem["request_id"] == answer.headers["X-Request-Id"]
    assert [error.get("pointer") for error in problem.get("errors", [])] == list(pointers)
    assert "Traceback" not in answer.text and ".py" not in answer.text
    return problem


def edited(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, last = path.strip("/").split("/")
    node = body
    for parent in parents:
        node = node[parent]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return body


WRONG_FIELDS = [
    ("/type", "paint", "/type"),
    ("/type", ..., "/type"),
    ("/spec/family", "nobody", "/spec/family"),
    ("/spec/stepz", 5, "/spec/stepz"),
    ("/priority", "urgent", "/priority"),
    ("/colour", "red", "/colour"),
    ("/train", 1, "/train"),
    ("/spec/steps", 0, "/spec/steps"),
    ("/spec/steps", 10_000_001, "/spec/steps"),
    ("/spec/steps", "100", "/spec/steps"),
    ("/spec/steps", True, "/spec/steps"),
    ("/spec/steps", None, "/spec/steps"),
    ("/spec/steps", 10**400, "/spec/steps"),
    ("/spec/learning_rate", 2.0, "/spec/learning_rate"),
    ("/spec/seed", -1, "/spec/seed"),
    ("/spec/seed", 2**63, "/spec/seed"),
    ("/spec/warmup_steps", 101, "/spec/warmup_steps"),
    ("/spec/model", "../x", "/spec/model"),
    ("/spec/model", ..., "/spec/model"),
    ("/spec/dataset", 7, "/spec/dataset"),
    ("/spec/dataset", "ds_" + "0" * 32, "/spec/dataset"),
    ("/spec/dataset", "mdl_" + "0" * 32, "/spec/dataset"),
    ("/spec", [], "/spec"),
    ("/spec", ..., "/spec"),
    ("/labels", {"a b": "x"}, "/labels/a b"),
    ("/labels", {"a/b~": "!"}, "/labels/a~1b~0"),
    ("/max_attempts", 11, "/max_attempts"),
    ("/timeout_seconds", 0, "/timeout_seconds"),
]


@pytest.mark.parametrize(("path", "value", "pointer"), WRONG_FIELDS)
def test_a_wrong_field_of_a_job_is_named(
    owner: Owner, count_rows: CountRows, path: str, value: Any, pointer: str
) -> None:
    body = edited(train_request(owner.add_dataset()), path, value)
    before = count_rows()

    answer = owner.client.post("/v1/jobs", json=body)

    # A key that is wrong in itself is wrong twice when its "~" is no letter of a label, too.
    assert refused(answer, 422, "validation_failed", *[pointer] * len(answer.json()["errors"]))
    assert count_rows() == before


def test_every_wrong_field_is_named_at_once(owner: Owner) -> None:
    body = train_request("ds_" + "0" * 32, steps=0, beta=-1, wings=2)

    refused(
        owner.client.post("/v1/jobs", json=body), 422, "validation_failed", "/spec/steps", "/spec/beta", "/spec/wings"
    )


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_named(owner: Owner, nothing_changes: None, number: str) -> None:
    body = f'{{"type": "train", "spec": {{"family": "vae", "learning_rate": {number}}}}}'

    answer = owner.client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})

    refused(answer, 422, "validation_failed", "/spec/learning_rate")


@pytest.mark.parametrize("modality", ["text", "audio"])
def test_a_dataset_of_the_wrong_modality_is_refused(owner: Owner, count_rows: CountRows, modality: str) -> None:
    body = train_request(owner.add_dataset(modality=modality))
    before = count_rows()

    problem = refused(owner.client.post("/v1/jobs", json=body), 422, "validation_failed", "/spec/dataset")

    assert modality in problem["detail"] and "image" in problem["detail"]
    assert count_rows() == before


@pytest.mark.parametrize("state", [DatasetState.UPLOADING, DatasetState.INGESTING, DatasetState.FAILED])
def test_a_dataset_that_is_not_ready_is_refused(owner: Owner, state: DatasetState) -> None:
    body = train_request(owner.add_dataset(state=state))

    problem = refused(owner.client.post("/v1/jobs", json=body), 422, "validation_failed", "/spec/dataset")

    assert state.value in problem["detail"]


@pytest.mark.parametrize("model", ["nothing", "nothing@1", "digits@2"])
def test_a_missing_model_is_refused(owner: Owner, engine: Any, count_rows: CountRows, model: str) -> None:
    succeed(engine, claim(engine, owner.train()["id"]))
    before = count_rows()

    answer = owner.client.post("/v1/jobs", json={"type": "generate", "spec": {"model": model, "task": "generate"}})

    refused(answer, 422, "validation_failed", "/spec/model")
    assert count_rows() == before


@pytest.mark.parametrize(
    ("spec", "pointer"),
    [
        ({"task": "paint"}, "/spec/task"),
        ({}, "/spec/task"),
        ({"task": "generate", "num_samples": 0}, "/spec/num_samples"),
        ({"task": "generate", "dataset": "ds_" + "0" * 32}, "/spec/dataset"),
        ({"task": "interpolate", "num_points": 1}, "/spec/num_points"),
        ({"task": "reconstruct"}, "/spec/dataset"),
    ],
)
def test_a_wrong_field_of_a_generate_job_is_named(owner: Owner, spec: dict[str, Any], pointer: str) -> None:
    answer = owner.client.post("/v1/jobs", json={"type": "generate", "spec": {"model": "m", **spec}})

    refused(answer, 422, "validation_failed", pointer)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{'a': 1}",
        b'{"type": "train", "type": "generate"}',
        b"\xff\xfe{}",
        b'"\xc3"',
        b"[" * 20_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b"[" * 40 + b"]" * 40,
        b'{"spec": {"steps": ' + b"9" * 5000 + b"}}",
    ],
)
def test_a_body_that_is_not_json_is_malformed(owner: Owner, nothing_changes: None, body: bytes) -> None:
    answer = owner.client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})

    refused(answer, 400, "malformed_body")


@pytest.mark.parametrize("body", [b"null", b"[]", b'"text"', b"7"])
def test_a_body_that_is_no_object_is_refused(owner: Owner, nothing_changes: None, body: bytes) -> None:
    answer = owner.client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})

    refused(answer, 422, "validation_failed", "")


@pytest.mark.parametrize("text", ["a\\u0000b", "\\ud800"])
def test_text_that_cannot_be_stored_is_named(owner: Owner, nothing_changes: None, text: str) -> None:
    body = f'{{"name": "{text}", "filename": "a.zip", "size_bytes": 5}}'

    answer = owner.client.post("/v1/datasets", content=body, headers={"Content-Type": "application/json"})

    refused(answer, 422, "validation_failed", "/name")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/jsonish"},
        {"Content-Type": ""},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
def test_another_content_type_is_unsupported(owner: Owner, nothing_changes: None, headers: dict[str, str]) -> None:
    for path in ("/v1/jobs", "/v1/datasets"):
        answer = owner.client.post(path, content=b"{}", headers=headers)

        refused(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/datasets"])
def test_a_body_above_the_limit_is_too_large(owner: Owner, nothing_changes: None, path: str) -> None:
    body = b'{"a": "' + b"x" * 70_000 + b'"}'

    answer = owner.client.post(path, content=body, headers={"Content-Type": "application/json"})

    refused(answer, 413, "payload_too_large")


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/datasets"])
def test_a_body_without_a_length_is_counted(owner: Owner, nothing_changes: None, path: str) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"a": "'
        for _ in range(200):
            yield b"x" * 1000

    answer = owner.client.post(path, content=chunks(), headers={"Content-Type": "application/json"})

    refused(answer, 413, "payload_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/jobs/", 404, "not_found"),
        ("GET", "/v1/jobs/job_x", 404, "not_found"),
        ("GET", "/v1/jobs/ds_" + "0" * 32, 404, "not_found"),
        ("GET", "/v1/jobs/job_" + "g" * 32, 404, "not_found"),
        ("GET", "/v1/jobs/%00", 404, "not_found"),
        ("GET", "/v1/models/%00", 404, "not_found"),
        ("GET", "/v1/models/nothing/versions/1", 404, "not_found"),
        ("PUT", "/v1/jobs", 405, "method_not_allowed"),
        ("DELETE", "/v1/meta/job-states", 405, "method_not_allowed"),
    ],
)
def test_what_is_not_there_is_a_problem_too(owner: Owner, method: str, path: str, status: int, code: str) -> None:
    refused(owner.client.request(method, path), status, code)


def test_the_allowed_methods_are_told(owner: Owner) -> None:
    assert owner.client.delete("/v1/jobs").headers["Allow"] == "GET, POST"


@pytest.mark.parametrize(
    ("path", "headers", "parameter"),
    [
        ("/v1/models/m/versions/x", {}, "path version"),
        ("/v1/jobs/job_x/events?after=-1", {}, "query after"),
        ("/v1/jobs/job_x/events", {"Last-Event-ID": "x"}, "header last-event-id"),
        ("/v1/workers?x=1", {}, "query x"),
    ],
)
def test_a_wrong_parameter_is_named(owner: Owner, path: str, headers: dict[str, str], parameter: str) -> None:
    problem = refused(owner.client.get(path, headers=headers), 422, "validation_failed", None)  # type: ignore[arg-type]

    assert problem["errors"][0]["parameter"] == parameter


def test_a_request_id_is_taken_over_when_it_is_harmless(stranger: httpx.Client) -> None:
    given = stranger.get("/v1/nothing", headers={"X-Request-Id": "abc-1"})
    evil = stranger.get("/v1/nothing", headers={"X-Request-Id": "a b"})

    assert given.json()["request_id"] == given.headers["X-Request-Id"] == "abc-1"
    assert evil.json()["request_id"].startswith("req_")


def test_a_version_that_its_tenant_has_used_is_not_there_for_another(make_owner: MakeOwner) -> None:
    victim, thief = make_owner(), make_owner()
    ref = victim.add_model(job_id=victim.train()["id"])
    with victim.engine.begin() as connection:
        connection.execute(text("UPDATE model_versions SET spec = jobs.spec FROM jobs WHERE jobs.id = job_id"))
    body = {"type": "generate", "spec": {"model": ref, "task": "generate"}}

    answers = [each.client.post("/v1/jobs", json=body) for each in (victim, victim, thief)]

    assert [answer.status_code for answer in answers] == [202, 202, 422]
    assert answers[0].json()["summary"] == f"generate {ref}"
