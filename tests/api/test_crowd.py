"""Jobs that are submitted at the same time share a transaction, and nothing else."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from sqlalchemy import Engine, event, text

from tests.api.conftest import MakeOwner
from tests.api.support import Owner, train_request


def send_all(requests: list[tuple[Owner, dict[str, Any], dict[str, str]]]) -> list[httpx.Response]:
    """Send all of them at about the same time; answers in their order."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda asked: asked[0].client.post("/v1/jobs", json=asked[1], headers=asked[2]), requests))


def test_each_of_a_crowd_gets_the_job_that_it_asked_for(owner: Owner) -> None:
    dataset = owner.add_dataset()
    bodies = [train_request(dataset, labels={"number": str(number)}, seed=number) for number in range(48)]

    answers = send_all([(owner, body, {}) for body in bodies])

    assert {answer.status_code for answer in answers} == {202}
    jobs = [answer.json() for answer in answers]
    assert [(job["labels"]["number"], job["spec"]["seed"]) for job in jobs] == [(str(n), n) for n in range(48)]
    stored = [owner.client.get(answer.headers["Location"]).json() for answer in answers]
    assert [job["labels"] for job in stored] == [job["labels"] for job in jobs]
    assert len({job["id"] for job in stored}) == 48


def test_each_of_a_crowd_has_its_first_event_and_its_bell(owner: Owner, engine: Engine) -> None:
    dataset = owner.add_dataset()

    send_all([(owner, train_request(dataset), {}) for _ in range(24)])

    count = text("""
        SELECT count(*), count(DISTINCT events.job_id), count(DISTINCT outbox.job_id) FROM jobs
        LEFT JOIN events ON events.job_id = jobs.id AND seq = 1 AND events.type = 'job.state'
        LEFT JOIN outbox ON outbox.job_id = jobs.id WHERE tenant_id = :tenant_id""")
    with engine.connect() as connection:
        assert tuple(connection.execute(count, {"tenant_id": owner.id}).one()) == (24, 24, 24)


def test_tenants_of_a_crowd_get_each_their_own(make_owner: MakeOwner) -> None:
    owners = [make_owner() for _ in range(6)]
    datasets = [each.add_dataset() for each in owners]

    send_all([(each, train_request(one), {}) for each, one in zip(owners, datasets, strict=True) for _ in range(5)])

    for each, one in zip(owners, datasets, strict=True):
        jobs = each.client.get("/v1/jobs").json()["data"]
        assert [job["spec"]["dataset"] for job in jobs] == [one] * 5


def test_a_tenant_whose_account_is_locked_holds_up_no_other(make_owner: MakeOwner, engine: Engine) -> None:
    """As by a worker that was stopped while it recorded the end of an attempt."""
    stuck, other = make_owner(), make_owner()
    bodies = {each: train_request(each.add_dataset()) for each in (stuck, other)}

    with ThreadPoolExecutor(1) as pool:
        with engine.begin() as holder:
            holder.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            account = "INSERT INTO shares (tenant_id, attained) VALUES (:id, 0) ON CONFLICT DO NOTHING"
            holder.execute(text(account), {"id": stuck.id})
            waiting = pool.submit(lambda: stuck.client.post("/v1/jobs", json=bodies[stuck]))
            time.sleep(0.2)
            answer = other.client.post("/v1/jobs", json=bodies[other], timeout=10)
            has_waited = not waiting.done()
        late = waiting.result(20)

    assert has_waited
    assert (answer.status_code, late.status_code) == (202, 202)


def test_what_is_refused_of_a_crowd_is_refused_alone(owner: Owner) -> None:
    dataset, nobodys = owner.add_dataset(), "ds_" + "0" * 32
    wrong = {3, 11, 12}
    bodies = [train_request(nobodys if number in wrong else dataset) for number in range(24)]

    answers = send_all([(owner, body, {}) for body in bodies])

    assert {number for number, answer in enumerate(answers) if answer.status_code == 422} == wrong
    assert {answers[number].json()["errors"][0]["pointer"] for number in wrong} == {"/spec/dataset"}
    assert len(owner.client.get("/v1/jobs").json()["data"]) == 24 - len(wrong)


def test_a_key_of_a_crowd_makes_one_job(owner: Owner) -> None:
    body = train_request(owner.add_dataset())
    keys = [{"Idempotency-Key": f"k{number % 6}"} for number in range(30)]

    answers = send_all([(owner, body, key) for key in keys])

    assert {answer.status_code for answer in answers} == {202}
    assert len(owner.client.get("/v1/jobs").json()["data"]) == 6
    replayed = Counter("Idempotency-Replayed" in answer.headers for answer in answers)
    assert replayed == {False: 6, True: 24}
    for number in range(6):
        assert len({answer.content for answer in answers[number::6]}) == 1


def test_a_repetition_is_answered_as_before_though_its_dataset_is_gone(owner: Owner, engine: Engine) -> None:
    body, key = train_request(owner.add_dataset()), {"Idempotency-Key": "k"}
    first = owner.client.post("/v1/jobs", json=body, headers=key)
    with engine.begin() as connection:
        connection.execute(text("UPDATE datasets SET state = 'failed' WHERE tenant_id = :id"), {"id": owner.id})

    again = owner.client.post("/v1/jobs", json=body, headers=key)

    assert (again.status_code, again.content) == (202, first.content)


def test_a_key_that_somebody_holds_keeps_nobody_else_waiting(owner: Owner, engine: Engine) -> None:
    body = train_request(owner.add_dataset())
    hold = text("INSERT INTO idempotency_keys (tenant_id, key, request_sha256) VALUES (:id, 'held', '0')")

    with engine.begin() as connection, ThreadPoolExecutor(1) as pool:
        connection.execute(hold, {"id": owner.id})
        held = pool.submit(owner.client.post, "/v1/jobs", json=body, headers={"Idempotency-Key": "held"})
        num_free = 0
        while not held.done():
            num_free += owner.client.post("/v1/jobs", json=body).status_code == 202
        connection.rollback()

    assert held.result().json()["code"] == "idempotency_in_progress"
    assert num_free > 2


def test_a_crowd_is_recorded_by_fewer_statements_than_it_has_jobs(owner: Owner) -> None:
    body = train_request(owner.add_dataset())
    asked: list[str] = []
    listen = (Engine, "before_cursor_execute", lambda _connection, _cursor, statement, *_: asked.append(statement))
    event.listen(*listen)

    try:
        answers = send_all([(owner, body, {}) for _ in range(64)])
    finally:
        event.remove(*listen)

    assert {answer.status_code for answer in answers} == {202}
    # Before each of these go the rows of a crowd, in the same round trip (``shared/ahead.py``).
    assert 0 < sum("AS waiting" in statement and "ORDINALITY" in statement for statement in asked) < 48
