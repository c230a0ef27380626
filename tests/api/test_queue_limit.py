"""A tenant may have only so many jobs waiting: one more is told when to come again, and is never let in."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text

from noisemill.local.ports import free_port
from shared.settings import Settings
from tests.api.conftest import MakeOwner
from tests.api.support import Owner, claim, environment, is_up, make_settings, succeed, train_request
from tests.conftest import WaitUntil

LIMIT = 430
"""Above the margin within which submissions take turns, so that both ways of counting are taken."""


@pytest.fixture(scope="module")
def settings(module_database: str, valkey: str, module_s3: Any) -> Settings:
    return make_settings(module_database, valkey, module_s3, jobs={"max_queued": LIMIT})


def fill(owner: Owner, engine: Engine, count: int) -> None:
    """Let so many jobs wait."""
    waiting = text("""
        INSERT INTO jobs (id, tenant_id, type, queue, spec, inputs, summary, state, max_attempts)
        SELECT gen_random_uuid(), :tenant_id, 'train', 'train', '{}', '{}', 'waits', 'queued', 3
        FROM generate_series(1, :count)""")
    with engine.begin() as connection:
        connection.execute(waiting, {"tenant_id": owner.id, "count": count})


def num_waiting(owner: Owner, engine: Engine) -> int:
    count = text("SELECT count(*) FROM jobs WHERE tenant_id = :tenant_id AND state = 'queued'")
    with engine.connect() as connection:
        return connection.execute(count, {"tenant_id": owner.id}).scalar_one()


def is_full(answer: httpx.Response) -> bool:
    return (answer.status_code, answer.json().get("code")) == (429, "queue_full")


def test_the_last_place_is_given_and_none_after_it(owner: Owner, engine: Engine) -> None:
    body = train_request(owner.add_dataset())
    fill(owner, engine, LIMIT - 1)

    last, one_more = (owner.client.post("/v1/jobs", json=body) for _ in range(2))

    assert last.status_code == 202
    assert is_full(one_more) and one_more.headers["Retry-After"].isdigit()
    assert num_waiting(owner, engine) == LIMIT


def test_a_place_is_free_once_a_job_has_begun(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    fill(owner, engine, LIMIT - 1)
    body = train_request(owner.add_dataset())
    assert is_full(owner.client.post("/v1/jobs", json=body))

    claim(engine, job["id"])

    assert owner.client.post("/v1/jobs", json=body).status_code == 202


@pytest.mark.parametrize("places", [7, 407], ids=["near the limit", "from beyond the margin"])
def test_many_at_once_take_exactly_the_places_there_are(owner: Owner, engine: Engine, places: int) -> None:
    body = train_request(owner.add_dataset())
    fill(owner, engine, LIMIT - places)

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: owner.client.post("/v1/jobs", json=body), range(places + 40)))

    assert Counter(answer.status_code for answer in answers) == {202: places, 429: 40}
    assert num_waiting(owner, engine) == LIMIT


def test_64_requests_with_one_key_take_the_last_place_once(owner: Owner, engine: Engine) -> None:
    body, headers = train_request(owner.add_dataset()), {"Idempotency-Key": "k"}
    fill(owner, engine, LIMIT - 1)

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: owner.client.post("/v1/jobs", json=body, headers=headers), range(64)))

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.content for answer in answers}) == 1


def test_a_refused_request_may_use_its_key_later(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    fill(owner, engine, LIMIT - 1)
    body, headers = train_request(owner.add_dataset()), {"Idempotency-Key": "k"}
    refused = owner.client.post("/v1/jobs", json=body, headers=headers)

    claim(engine, job["id"])
    accepted = owner.client.post("/v1/jobs", json=body, headers=headers)

    assert is_full(refused) and accepted.status_code == 202
    assert "Idempotency-Replayed" not in accepted.headers


def test_another_tenant_has_places_of_its_own(owner: Owner, make_owner: MakeOwner, engine: Engine) -> None:
    fill(owner, engine, LIMIT)

    make_owner().train()


@pytest.mark.parametrize("action", ["resume", "retry"])
def test_who_comes_back_into_a_full_queue_waits_too(owner: Owner, engine: Engine, action: str) -> None:
    job = owner.train()
    owner.client.post(job["urls"]["pause" if action == "resume" else "cancel"])
    state = owner.client.get(job["urls"]["self"]).json()["state"]
    fill(owner, engine, LIMIT)

    answer = owner.client.post(job["urls"][action])

    assert is_full(answer) and "Retry-After" in answer.headers
    assert owner.client.get(job["urls"]["self"]).json()["state"] == state


def test_a_reproduction_finds_no_place_in_a_full_queue_either(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    succeed(engine, claim(engine, job["id"]))
    fill(owner, engine, LIMIT)

    assert is_full(owner.client.post(job["urls"]["reproduce"]))
    assert num_waiting(owner, engine) == LIMIT


def test_an_upload_into_a_full_queue_leaves_no_dataset(owner: Owner, engine: Engine) -> None:
    fill(owner, engine, LIMIT)

    answer = owner.client.post("/v1/datasets", data={"name": "cats"}, files={"file": ("cats.npz", b"cats")})

    assert is_full(answer)
    assert owner.client.get("/v1/datasets").json()["data"] == []


@pytest.fixture
def drained(owner: Owner, make_owner: MakeOwner, engine: Engine) -> Callable[..., int]:
    """Say how many seconds ago attempts ended (another tenant's: just now); returns what the refusal says then."""
    busy = make_owner()

    def look(*ended: float, seconds: float = 1.0) -> int:
        add = text("""INSERT INTO usage (job_id, fence, tenant_id, queue, priority, seconds, created_at)
            VALUES (:job_id, :fence, :tenant_id, 'train', 1, :seconds, clock_timestamp() - make_interval(secs => :ago))
        """)
        job = owner.train()
        succeed(engine, claim(engine, job["id"]))
        fill(owner, engine, LIMIT)
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM usage"))
            known = {"job_id": job["id"].removeprefix("job_"), "seconds": seconds}
            for fence, ago in enumerate(ended):
                connection.execute(add, known | {"tenant_id": owner.id, "fence": fence, "ago": ago})
            for fence in range(100, 120):
                connection.execute(add, known | {"tenant_id": busy.id, "fence": fence, "ago": 0.5})
        answer = owner.client.post("/v1/jobs", json=train_request(owner.add_dataset()))
        assert is_full(answer)
        return int(answer.headers["Retry-After"])

    return look


def test_it_is_said_when_to_come_again_by_how_fast_the_queue_moves(drained: Callable[..., int]) -> None:
    assert drained(*(10.0 * number for number in range(12))) in range(9, 14)


def test_a_queue_that_moves_fast_is_worth_a_second(drained: Callable[..., int]) -> None:
    assert drained(*(0.1 * number for number in range(20))) == 1


@pytest.mark.parametrize("ended", [(), (3600.0,)], ids=["never", "long ago"])
def test_nobody_waits_longer_than_five_minutes_for_a_queue_that_stands(
    drained: Callable[..., int], ended: tuple[float, ...]
) -> None:
    assert drained(*ended) == 300


def test_a_long_attempt_that_ended_just_now_is_not_fast(drained: Callable[..., int]) -> None:
    assert drained(0.0, seconds=200.0) in range(199, 240)


@contextmanager
def other_process(settings: Settings, make_owner: MakeOwner, wait_until: WaitUntil) -> Iterator[tuple[Any, str]]:
    """A second API, with the same database; yields its process and its address."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", "--port", str(port)]
    env = os.environ | environment(settings) | {"NOISEMILL_JOBS_MAX_QUEUED": str(LIMIT)}
    server = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    try:
        there = make_owner(url=f"http://127.0.0.1:{port}")
        wait_until(lambda: is_up(there), timeout=60)
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def test_an_api_that_was_stopped_after_it_had_counted_lets_nobody_in_beyond_the_limit(
    owner: Owner, settings: Settings, make_owner: MakeOwner, engine: Engine, wait_until: WaitUntil
) -> None:
    """It had counted when there was room for many; the other API fills the queue; then it goes on and commits."""
    body = train_request(owner.add_dataset())
    fill(owner, engine, 20)
    with other_process(settings, make_owner, wait_until) as (server, url), ThreadPoolExecutor(8) as pool:
        key = {"Authorization": owner.client.headers["Authorization"]}
        # What a submission looks at after it was counted, so that it stands there.
        with engine.begin() as blocker:
            blocker.execute(text("LOCK TABLE workers IN ACCESS EXCLUSIVE MODE"))
            late = pool.submit(httpx.post, f"{url}/v1/jobs", json=body, headers=key, timeout=60)
            wait_until(lambda: num_blocked(engine) == 1, timeout=30)
            server.send_signal(signal.SIGSTOP)
        fill(owner, engine, LIMIT - 20 - 3)

        answers = [owner.client.post("/v1/jobs", json=body) for _ in range(2)]
        server.send_signal(signal.SIGCONT)
        answers.append(late.result())
        answers += [owner.client.post("/v1/jobs", json=body) for _ in range(4)]

    assert sum(answer.status_code == 202 for answer in answers) == 3
    assert answers[2].status_code == 202 and all(is_full(answer) for answer in answers if answer.status_code != 202)
    assert num_waiting(owner, engine) == LIMIT


def num_blocked(engine: Engine) -> int:
    """Transactions that have recorded jobs and wait to read the table of workers."""
    waiting = text("""
        SELECT count(*) FROM pg_locks AS waiting JOIN pg_locks AS held USING (pid)
        WHERE waiting.relation = 'workers'::regclass AND NOT waiting.granted
            AND held.relation = 'jobs'::regclass AND held.mode = 'RowExclusiveLock'""")
    with engine.connect() as connection:
        return connection.execute(waiting).scalar_one()
