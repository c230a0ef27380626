"""A job that succeeded is run again: from the same inputs, from the start, and compared with what it made then."""

from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from shared.errors import NanLoss
from shared.ids import parse
from shared.jobs import attempts
from shared.jobs.attempts import Claim
from tests.api.evaluated import URL, put, train
from tests.api.support import LEASE, Owner, claim, fail, new_artifact, train_request

SHA256 = "a" * 64
OTHER = "b" * 64
FINGERPRINT = {"torch": "2.13.0", "device": "CPU of then", "num_threads": 2}


def submit(owner: Owner, kind: str, **spec: Any) -> dict[str, Any]:
    answer = owner.client.post("/v1/jobs", json={"type": kind, "spec": spec})
    assert answer.status_code == 202, answer.text
    return answer.json()


def do(engine: Engine, job: dict[str, Any], **result: Any) -> Claim:
    """Run a job well; returns what its worker was handed."""
    claimed = claim(engine, job["id"])
    with Session(engine) as session, session.begin():
        assert attempts.succeed(session, claimed, result=result, artifacts=(), timings={}, steps=1)
    return claimed


def drawn(sha256: str = SHA256, **fingerprint: Any) -> dict[str, Any]:
    return {"sha256": sha256, "reproducibility": "same_hardware", "fingerprint": FINGERPRINT | fingerprint}


def trained(sha256: str = SHA256) -> dict[str, Any]:
    weights = {"key": f"w{sha256}", "sha256": sha256, "size_bytes": 10}
    return drawn() | {"metrics": {}, "info": {"shape": [1, 28, 28]}, "weights": weights}


def reproduce(owner: Owner, job: dict[str, Any], **headers: str) -> httpx.Response:
    return owner.client.post(job["urls"]["reproduce"], headers=headers)


def shown(owner: Owner, job: dict[str, Any]) -> dict[str, Any]:
    return owner.client.get(job["urls"]["self"]).json()


def compared(owner: Owner, job: dict[str, Any]) -> dict[str, Any]:
    return shown(owner, job)["result"]["reproduction"]


def execute(engine: Engine, statement: str, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(text(statement), values)


@pytest.fixture
def generated(owner: Owner, engine: Engine) -> dict[str, Any]:
    """A finished generation by an alias that stands for the first of two versions."""
    train(owner, engine, versions=2)
    put(owner, 1)
    job = submit(owner, "generate", model="digits@production", task="generate", seed=7)
    do(engine, job, **drawn())
    return job


def test_a_reproduction_is_a_new_job_that_asks_for_the_same_and_says_what_it_has_to_match(
    owner: Owner, generated: dict[str, Any]
) -> None:
    answer = reproduce(owner, generated)

    again = answer.json()
    assert (answer.status_code, answer.headers["Location"]) == (202, again["urls"]["self"])
    assert (again["id"] != generated["id"], again["state"], again["retry_of"]) == (True, "queued", None)
    same = ("type", "spec", "labels", "priority", "max_attempts")
    assert [again[name] for name in same] == [generated[name] for name in same]
    assert again["summary"] == "reproduce generate digits@1"
    told = {"job_id": generated["id"], "sha256": SHA256, "reproducibility": "same_hardware", "fingerprint": FINGERPRINT}
    assert again["reproduces"] == told
    assert (shown(owner, generated)["reproduces"], shown(owner, generated)["retried_by"]) == (None, None)


def test_it_draws_from_the_version_that_was_meant_then(owner: Owner, engine: Engine, generated: dict[str, Any]) -> None:
    assert put(owner, 2, url=URL).status_code == 200

    again = reproduce(owner, generated).json()

    assert claim(engine, again["id"]).inputs["model"]["version"] == 1


def test_the_same_bytes_are_identical(owner: Owner, engine: Engine, generated: dict[str, Any]) -> None:
    again = reproduce(owner, generated).json()
    do(engine, again, **drawn())

    assert compared(owner, again) == {
        "of": generated["id"],
        "identical": True,
        "expected_sha256": SHA256,
        "found_sha256": SHA256,
        "reproducibility": "same_hardware",
        "same_fingerprint": True,
        "differing": {},
    }


def test_other_bytes_are_told_with_what_else_was_other(owner: Owner, engine: Engine, generated: dict[str, Any]) -> None:
    again = reproduce(owner, generated).json()
    do(engine, again, **drawn(OTHER, torch="2.14.0", tile=8))

    found = compared(owner, again)
    assert (found["identical"], found["expected_sha256"], found["found_sha256"]) == (False, SHA256, OTHER)
    assert found["same_fingerprint"] is False
    assert found["differing"] == {
        "tile": {"expected": None, "found": 8},
        "torch": {"expected": "2.13.0", "found": "2.14.0"},
    }


def test_a_reproduction_is_compared_although_the_first_job_was_erased_meanwhile(
    owner: Owner, engine: Engine, generated: dict[str, Any]
) -> None:
    again = reproduce(owner, generated).json()
    owner.client.delete(generated["urls"]["self"])
    do(engine, again, **drawn(OTHER))

    assert (compared(owner, again)["of"], compared(owner, again)["identical"]) == (generated["id"], False)


def test_a_reproduction_can_be_reproduced(owner: Owner, engine: Engine, generated: dict[str, Any]) -> None:
    second = reproduce(owner, generated).json()
    do(engine, second, **drawn(OTHER))

    third = reproduce(owner, second).json()
    do(engine, third, **drawn(OTHER))

    assert third["summary"] == second["summary"]
    assert (compared(owner, third)["of"], compared(owner, third)["identical"]) == (second["id"], True)


def test_a_failed_reproduction_is_retried_as_one(owner: Owner, engine: Engine, generated: dict[str, Any]) -> None:
    first = reproduce(owner, generated).json()
    fail(engine, claim(engine, first["id"]), NanLoss("x"))

    again = owner.client.post(first["urls"]["retry"]).json()
    do(engine, again, **drawn())

    assert (again["retry_of"], again["reproduces"]["job_id"]) == (first["id"], generated["id"])
    assert compared(owner, again)["identical"]


def test_each_request_makes_a_job_but_for_those_with_one_key(owner: Owner, generated: dict[str, Any]) -> None:
    first, other = (reproduce(owner, generated).json()["id"] for _ in range(2))
    with_key = [reproduce(owner, generated, **{"Idempotency-Key": "k"}) for _ in range(2)]

    assert len({first, other, *(answer.json()["id"] for answer in with_key)}) == 3
    assert [answer.headers.get("Idempotency-Replayed") for answer in with_key] == [None, "true"]
    assert with_key[0].content == with_key[1].content


def test_a_training_registers_no_second_version(owner: Owner, engine: Engine) -> None:
    job = owner.client.post("/v1/jobs", json=train_request(owner.add_dataset())).json()
    do(engine, job, **trained())

    again = reproduce(owner, job).json()
    do(engine, again, **trained())

    assert owner.client.get("/v1/models/digits").json()["latest"] == 1
    assert shown(owner, job)["result"]["sha256"] == SHA256
    result = shown(owner, again)["result"]
    assert result["reproduction"]["identical"] and result["sha256"] == SHA256
    assert result.keys() & {"model", "model_id", "version", "weights", "info"} == set()


def test_a_training_that_was_retried_begins_at_the_first_step(owner: Owner, engine: Engine) -> None:
    first = owner.client.post("/v1/jobs", json=train_request(owner.add_dataset())).json()
    claimed = claim(engine, first["id"])
    left = new_artifact(f"{first['id']}/5", kind="checkpoint", details={"step": 5})
    with Session(engine) as session, session.begin():
        attempts.report(session, claimed, [attempts.Report.of(left)], lease=LEASE)
    fail(engine, claimed, NanLoss("x"))
    retried = owner.client.post(first["urls"]["retry"]).json()
    resumed = do(engine, retried, **trained())

    again = reproduce(owner, retried).json()

    assert len(resumed.inputs["resume"]) == 1
    assert claim(engine, again["id"]).inputs["resume"] == []


def test_an_ingestion_changes_nothing_of_the_dataset(owner: Owner, engine: Engine) -> None:
    uploaded = owner.client.post("/v1/datasets", data={"name": "cats"}, files={"file": ("cats.npz", b"cats")}).json()
    job = owner.client.get(f"/v1/jobs/{uploaded['job_id']}").json()
    made = {"modality": "image", "count": 3, "digest": SHA256, "info": {"shape": [1, 8, 8]}, "files": []}
    do(engine, job, **made)
    before = owner.client.get(uploaded["urls"]["self"]).json()

    again = reproduce(owner, job).json()
    waiting = owner.client.get(uploaded["urls"]["self"]).json()
    do(engine, again, **made | {"digest": OTHER, "count": 4, "files": [{"key": "other"}]})

    assert waiting == owner.client.get(uploaded["urls"]["self"]).json() == before
    assert before["state"] == "ready"
    assert (compared(owner, again)["identical"], compared(owner, again)["same_fingerprint"]) == (False, None)


def test_an_evaluation_is_compared_by_its_report(owner: Owner, engine: Engine) -> None:
    dataset = train(owner, engine)
    job = submit(owner, "evaluate", model="digits", dataset=dataset, metrics=["scores"])
    do(engine, job, figures={}, **drawn())

    again = reproduce(owner, job).json()
    do(engine, again, figures={}, **drawn(OTHER))

    assert not compared(owner, again)["identical"]


def test_what_says_that_its_bytes_cannot_be_had_again_is_run_again_and_the_answer_says_so(
    owner: Owner, engine: Engine, generated: dict[str, Any]
) -> None:
    job = submit(owner, "generate", model="digits@1", task="generate", seed=8)
    do(engine, job, **drawn() | {"reproducibility": "none"})

    answer = reproduce(owner, job)
    do(engine, answer.json(), **drawn(OTHER))

    assert (answer.status_code, answer.json()["reproduces"]["reproducibility"]) == (202, "none")
    assert compared(owner, answer.json())["reproducibility"] == "none"


def refused(answer: httpx.Response) -> tuple[int, str, str]:
    return answer.status_code, answer.json()["code"], answer.json()["detail"]


def test_a_job_whose_dataset_is_gone_is_refused(owner: Owner, engine: Engine) -> None:
    dataset = owner.add_dataset()
    job = owner.client.post("/v1/jobs", json=train_request(dataset)).json()
    do(engine, job, **trained())
    execute(engine, "UPDATE model_versions SET dataset_id = NULL WHERE dataset_id = :id", id=parse("ds", dataset))
    execute(engine, "DELETE FROM datasets WHERE id = :id", id=parse("ds", dataset))

    answer = reproduce(owner, job)

    assert refused(answer) == (409, "not_reproducible", f"the job cannot be run again: the dataset {dataset} is gone")
    assert [one["id"] for one in owner.client.get("/v1/jobs").json()["data"]] == [job["id"]]


def test_a_job_whose_picture_is_gone_is_refused(owner: Owner, engine: Engine, generated: dict[str, Any]) -> None:
    made = (new_artifact(f"{generated['id']}.png"),)
    other = submit(owner, "generate", model="digits@1", task="generate")
    with Session(engine) as session, session.begin():
        attempts.succeed(session, claim(engine, other["id"]), result=drawn(), artifacts=made, timings={}, steps=1)
    picture = owner.client.get(other["urls"]["artifacts"]).json()["data"][0]["id"]
    job = submit(owner, "generate", model="digits@1", task="reconstruct", images=[picture])
    do(engine, job, **drawn())
    owner.client.delete(other["urls"]["self"])

    assert refused(reproduce(owner, job)) == (
        *(409, "not_reproducible"),
        f"the job cannot be run again: the artifact {picture} is gone",
    )


def test_a_job_that_tells_no_digest_is_refused(owner: Owner, engine: Engine, generated: dict[str, Any]) -> None:
    job = submit(owner, "generate", model="digits@1", task="generate")
    do(engine, job, num_samples=1)

    assert refused(reproduce(owner, job))[:2] == (409, "not_reproducible")
