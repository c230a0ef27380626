"""What is done to a job that exists: pause, resume, retry, erase, each as often as one likes."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text

from shared.errors import NanLoss, WorkerLost
from shared.ids import parse
from shared.jobs.rows import DatasetState
from tests.api.conftest import MakeOwner
from tests.api.support import Owner, claim, fail, hand_back, new_artifact, note, succeed, train_request


def post(owner: Owner, job: dict[str, Any], action: str, **headers: str) -> httpx.Response:
    return owner.client.post(job["urls"][action], headers=headers)


def state_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["state"]


@pytest.fixture
def failed(owner: Owner, engine: Engine) -> dict[str, Any]:
    """A training with labels that failed for good."""
    job = owner.train(labels={"secret": "label"}, priority="low")
    fail(engine, claim(engine, job["id"]), NanLoss("the loss is not a number at step 7"))
    return job


@pytest.fixture
def reached(request: pytest.FixtureRequest, owner: Owner, engine: Engine) -> dict[str, Any]:
    """A job in the state that the test names."""
    job, state = owner.train(), request.param
    if state == "paused":
        post(owner, job, "pause")
    elif state == "canceled":
        post(owner, job, "cancel")
    elif state != "queued":
        claimed = claim(engine, job["id"])
        if state == "succeeded":
            succeed(engine, claimed)
        elif state == "failed":
            fail(engine, claimed, NanLoss("x"))
        elif state in ("pausing", "canceling"):
            post(owner, job, {"pausing": "pause", "canceling": "cancel"}[state])
    assert owner.client.get(job["urls"]["self"]).json()["state"] == state
    return job


def test_a_waiting_job_is_paused_and_resumed_at_once(owner: Owner) -> None:
    job = owner.train()

    paused = [post(owner, job, "pause") for _ in range(2)]
    resumed = [post(owner, job, "resume") for _ in range(2)]

    assert [state_of(answer) for answer in paused] == [(200, "paused")] * 2
    assert [state_of(answer) for answer in resumed] == [(200, "queued")] * 2
    assert resumed[0].json()["state_version"] == resumed[1].json()["state_version"] == job["state_version"] + 2


def test_a_running_job_is_pausing_until_its_worker_is_free(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    claimed = claim(engine, job["id"])

    asked = [post(owner, job, "pause") for _ in range(2)]
    hand_back(engine, claimed)
    after = post(owner, job, "pause")

    assert [state_of(answer) for answer in asked] == [(202, "pausing")] * 2
    assert asked[0].headers["Location"] == job["urls"]["self"] and asked[0].headers["Retry-After"] == "1"
    assert state_of(after) == (200, "paused") and "Retry-After" not in after.headers


def test_a_pause_that_has_not_happened_is_withdrawn(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    claimed = claim(engine, job["id"])
    post(owner, job, "pause")

    assert state_of(post(owner, job, "resume")) == (200, "running")
    succeed(engine, claimed)
    assert owner.client.get(job["urls"]["self"]).json()["attempt"] == 1


@pytest.mark.parametrize(
    ("action", "reached"),
    [
        *(("pause", state) for state in ("succeeded", "failed", "canceled", "canceling")),
        *(("resume", state) for state in ("succeeded", "failed", "canceled", "canceling")),
        *(("retry", state) for state in ("queued", "running", "paused", "pausing", "canceling", "succeeded")),
        *(("reproduce", state) for state in ("queued", "running", "paused", "pausing", "canceling")),
        *(("reproduce", state) for state in ("failed", "canceled")),
        *(("erase", state) for state in ("queued", "running", "paused", "pausing", "canceling")),
    ],
    indirect=["reached"],
)
def test_what_the_state_forbids_is_a_conflict_that_changes_nothing(
    owner: Owner, reached: dict[str, Any], action: str
) -> None:
    before = owner.client.get(reached["urls"]["self"]).json()["state_version"]

    answer = owner.client.delete(reached["urls"]["self"]) if action == "erase" else post(owner, reached, action)

    assert (answer.status_code, answer.json()["code"]) == (409, "invalid_state")
    assert owner.client.get(reached["urls"]["self"]).json()["state_version"] == before


def test_a_resumed_job_rings(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    post(owner, job, "pause")
    count = text("SELECT count(*) FROM outbox WHERE job_id = :id")
    with engine.connect() as connection:
        before = connection.execute(count, {"id": parse("job", job["id"])}).scalar_one()

    post(owner, job, "resume")

    with engine.connect() as connection:
        assert connection.execute(count, {"id": parse("job", job["id"])}).scalar_one() == before + 1


def test_a_retry_is_a_new_job_that_asks_for_the_same(owner: Owner, failed: dict[str, Any]) -> None:
    answer = post(owner, failed, "retry")

    again = answer.json()
    assert state_of(answer) == (202, "queued") and answer.headers["Location"] == again["urls"]["self"]
    same = ("type", "spec", "labels", "priority", "max_attempts", "summary")
    assert [again[name] for name in same] == [failed[name] for name in same]
    assert (again["retry_of"], again["retried_by"]) == (failed["id"], None)
    assert owner.client.get(failed["urls"]["self"]).json()["retried_by"] == again["id"]


def test_a_job_is_retried_once_however_often_it_is_asked_for(
    owner: Owner, failed: dict[str, Any], engine: Engine
) -> None:
    first = post(owner, failed, "retry").json()
    claim(engine, first["id"])

    again = post(owner, failed, "retry")

    assert state_of(again) == (200, "running") and "Idempotency-Replayed" not in again.headers
    assert again.json()["id"] == first["id"] and again.headers["Location"] == first["urls"]["self"]


def test_a_retry_is_retried_in_turn(owner: Owner, failed: dict[str, Any], engine: Engine) -> None:
    second = post(owner, failed, "retry").json()
    fail(engine, claim(engine, second["id"]), NanLoss("again"))

    third = post(owner, second, "retry").json()

    assert third["retry_of"] == second["id"] != failed["id"]
    assert post(owner, failed, "retry").json()["retried_by"] == third["id"]


def test_64_retries_at_once_make_one_job(owner: Owner, failed: dict[str, Any]) -> None:
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: post(owner, failed, "retry"), range(64)))

    assert Counter(answer.status_code for answer in answers) == {202: 1, 200: 63}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(owner.client.get("/v1/jobs").json()["data"]) == 2


def test_64_retries_with_one_key_get_one_answer(owner: Owner, failed: dict[str, Any]) -> None:
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: post(owner, failed, "retry", **{"Idempotency-Key": "k"}), range(64)))

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.content for answer in answers}) == 1
    assert Counter(answer.headers.get("Idempotency-Replayed") for answer in answers) == {None: 1, "true": 63}


def test_a_key_of_one_jobs_retry_is_not_one_of_anothers(owner: Owner, failed: dict[str, Any], engine: Engine) -> None:
    other = owner.train()
    post(owner, other, "cancel")
    post(owner, failed, "retry", **{"Idempotency-Key": "k"})

    answer = post(owner, other, "retry", **{"Idempotency-Key": "k"})

    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reuse")


def test_a_failed_job_names_what_ended_each_attempt(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    for error in (WorkerLost("gone"), WorkerLost("gone again"), NanLoss("not a number")):
        waiting = owner.client.get(job["urls"]["self"]).json()
        assert waiting["error"] is None
        fail(engine, claim(engine, job["id"]), error)

    error = owner.client.get(job["urls"]["self"]).json()["error"]

    assert (error["code"], error["message"]) == ("nan_loss", "not a number")
    assert [(one["attempt"], one["code"], one["message"]) for one in error["causes"]] == [
        (1, "worker_lost", "gone"),
        (2, "worker_lost", "gone again"),
        (3, "nan_loss", "not a number"),
    ]


def urls_under(job: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("self", "events", "attempts", "artifacts"):
        yield "GET", job["urls"][name]
    for name in ("cancel", "pause", "resume", "retry", "reproduce"):
        yield "POST", job["urls"][name]
    yield "DELETE", job["urls"]["self"]


def test_an_erased_job_is_gone_with_all_that_is_under_it(owner: Owner, failed: dict[str, Any]) -> None:
    erased = owner.client.delete(failed["urls"]["self"])

    assert (erased.status_code, erased.content) == (204, b"")
    for method, url in urls_under(failed):
        answer = owner.client.request(method, url)
        assert (answer.status_code, answer.json()["code"]) == (410, "gone"), (method, url)
    assert owner.client.get("/v1/jobs").json()["data"] == []
    assert owner.client.get("/v1/jobs?label.secret=label&state=failed").json()["data"] == []


def test_64_erasures_at_once_erase_once(owner: Owner, failed: dict[str, Any]) -> None:
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: owner.client.delete(failed["urls"]["self"]), range(64)))

    assert Counter(answer.status_code for answer in answers) == {204: 1, 410: 63}
    told = [answer.json() | {"request_id": ""} for answer in answers if answer.content]
    assert told == [told[0]] * 63


def test_nothing_that_was_said_is_left_of_an_erased_job(owner: Owner, engine: Engine) -> None:
    dataset = owner.add_dataset()
    body = train_request(dataset, labels={"who": "hush-label"}, model="hush-model")
    job = owner.client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"}).json()
    claimed = claim(engine, job["id"])
    note(engine, claimed, "hush-message")
    fail(engine, claimed, NanLoss("hush-error"))

    owner.client.delete(job["urls"]["self"])

    tables = ("jobs", "events", "attempts", "outbox", "idempotency_keys")
    with engine.connect() as connection:
        for table in tables:
            rows = connection.execute(text(f"SELECT row_to_json({table})::text FROM {table}")).scalars().all()
            assert not [row for row in rows if "hush" in row], table
        charged = text("SELECT count(*) FROM usage WHERE job_id = :id")
        assert connection.execute(charged, {"id": parse("job", job["id"])}).scalar_one() == 1


def test_a_request_whose_job_was_erased_makes_no_second_one(owner: Owner, engine: Engine) -> None:
    body = train_request(owner.add_dataset())
    headers = {"Idempotency-Key": "k"}
    job = owner.client.post("/v1/jobs", json=body, headers=headers).json()
    post(owner, job, "cancel")
    owner.client.delete(job["urls"]["self"])

    again = owner.client.post("/v1/jobs", json=body, headers=headers)

    assert (again.status_code, again.json()["code"]) == (410, "gone")
    assert owner.client.get("/v1/jobs").json()["data"] == []


def test_the_answer_of_a_retry_outlives_the_job_it_retried(owner: Owner, failed: dict[str, Any]) -> None:
    """That job's id is in the answer, too."""
    first = post(owner, failed, "retry", **{"Idempotency-Key": "k"})
    owner.client.delete(failed["urls"]["self"])

    kept = owner.client.get(first.json()["urls"]["self"]).json()

    assert kept["retry_of"] == failed["id"]
    assert kept["labels"] == {"secret": "label"}


def test_a_job_whose_retry_was_erased_is_not_retried_again(owner: Owner, failed: dict[str, Any]) -> None:
    again = post(owner, failed, "retry").json()
    post(owner, again, "cancel")
    owner.client.delete(again["urls"]["self"])

    answer = post(owner, failed, "retry")

    assert (answer.status_code, answer.json()["code"]) == (410, "gone")


def test_what_a_model_is_made_of_outlives_its_training(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    key = f"jobs/{job['id']}/1"
    weights, preview = new_artifact("w", kind="weights"), new_artifact(f"{key}/preview.png")
    with engine.begin() as connection:  # the key that `succeed` gives to the model's weights is another test's, too
        connection.execute(text("DELETE FROM artifacts WHERE key = 'w'"))
    succeed(engine, claim(engine, job["id"]), (weights, preview))
    shown = {one["kind"]: one["id"] for one in owner.client.get(job["urls"]["artifacts"]).json()["data"]}

    owner.client.delete(job["urls"]["self"])

    assert owner.client.get(f"/v1/artifacts/{shown['weights']}").status_code == 200
    for path in (f"/v1/artifacts/{shown['sample']}", f"/v1/artifacts/{shown['sample']}/content"):
        gone = owner.client.get(path)
        assert (gone.status_code, gone.json()["code"]) == (410, "gone")
    assert owner.client.get("/v1/models/digits/versions/1").json()["job_id"] == job["id"]


def test_a_dataset_outlives_its_ingestion(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    dataset = owner.add_dataset(state=DatasetState.READY, job_id=parse("job", job["id"]), files=[{"key": job["id"]}])
    succeed(engine, claim(engine, job["id"]), (new_artifact(job["id"], kind="dataset"),))
    artifact = owner.client.get(job["urls"]["artifacts"]).json()["data"][0]["id"]

    owner.client.delete(job["urls"]["self"])

    assert owner.client.get(f"/v1/artifacts/{artifact}").status_code == 200
    assert owner.client.get(f"/v1/datasets/{dataset}").json()["state"] == "ready"


def test_a_removed_artifact_is_gone_and_an_expiring_one_says_when(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    made = tuple(new_artifact(f"jobs/{job['id']}/1/{number}.png") for number in range(3))
    succeed(engine, claim(engine, job["id"]), made)
    first, second, third = owner.client.get(job["urls"]["artifacts"]).json()["data"]
    with engine.begin() as connection:
        remove = "UPDATE artifacts SET removed_at = clock_timestamp() WHERE id = :id"
        connection.execute(text(remove), {"id": parse("art", second["id"])})
        expire = "UPDATE artifacts SET expires_at = '2040-01-01T00:00:00Z' WHERE id = :id"
        connection.execute(text(expire), {"id": parse("art", third["id"])})

    listed = owner.client.get(job["urls"]["artifacts"]).json()["data"]

    shown = [(one["id"], one["expires_at"]) for one in listed]
    assert shown == [(first["id"], None), (third["id"], "2040-01-01T00:00:00Z")]
    assert owner.client.get(f"/v1/artifacts/{second['id']}").status_code == 410


def test_a_stream_of_an_erased_jobs_events_ends(owner: Owner, failed: dict[str, Any]) -> None:
    with owner.client.stream("GET", failed["urls"]["events"], headers={"Accept": "text/event-stream"}) as stream:
        owner.client.delete(failed["urls"]["self"])
        assert "failed" in "".join(stream.iter_text())


def test_another_tenants_job_is_not_there_even_when_erased(
    owner: Owner, failed: dict[str, Any], make_owner: MakeOwner
) -> None:
    other = make_owner()
    theirs = other.client.delete(failed["urls"]["self"])
    owner.client.delete(failed["urls"]["self"])

    assert [theirs.status_code, other.client.get(failed["urls"]["self"]).status_code] == [404, 404]
