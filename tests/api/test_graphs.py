"""Jobs that were submitted with a job in the place of a model, as clients and operators see them."""

import time
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text

from api import news
from api.stream import HEARTBEAT_SECONDS
from shared.ids import parse
from tests.api.support import Owner, claim
from tests.api.test_events import listening
from tests.api.test_health import metric
from tests.api.test_reproductions import do, drawn, reproduce, shown, submit, trained


def draw(owner: Owner, model: str) -> dict[str, Any]:
    return submit(owner, "generate", task="generate", model=model)


def test_a_job_that_waits_says_for_whom_and_has_no_place(owner: Owner, engine: Engine) -> None:
    first = owner.train()
    second = draw(owner, first["id"])

    assert second["needs"] == {"model": first["id"]}
    assert second["queue"] == {"position": None, "reason": "waiting_for_jobs", "eta": None, "waits_for": [first["id"]]}

    do(engine, first, **trained())
    released = shown(owner, second)
    assert (released["queue"]["reason"], released["queue"]["waits_for"]) == ("no_compatible_worker", [])
    assert (released["spec"]["model"], released["needs"]) == ("digits@1", {"model": first["id"]})


def test_a_job_that_waits_for_one_less_is_another_view(owner: Owner, engine: Engine) -> None:
    first = owner.train()
    fields = {"family": "diffusion", "dataset": first["spec"]["dataset"]}
    second = submit(owner, "train", **fields, model="second", autoencoder=first["id"])
    third = submit(owner, "train", **fields, model="third", init_from=second["id"])["urls"]["self"]
    before = owner.client.get(third).headers["ETag"]
    assert owner.client.get(third, headers={"If-None-Match": before}).status_code == 304

    do(engine, first, **trained())

    after = owner.client.get(third, headers={"If-None-Match": before})
    assert (after.status_code, after.json()["queue"]["waits_for"]) == (200, [second["id"]])


def test_a_stream_of_who_ends_with_another_ends_at_once(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news, "POLL_RINGING", 60.0)
    first = owner.train()
    second = draw(owner, first["id"])

    with listening(owner, second) as messages:
        assert next(messages).data["data"]["state"] == "queued"
        began = time.monotonic()
        owner.client.post(first["urls"]["cancel"]).raise_for_status()
        (ended,) = messages

    assert ended.data["data"]["state"] == "failed"
    assert time.monotonic() - began < HEARTBEAT_SECONDS / 2


def test_a_repetition_is_answered_as_the_first_request_was_whatever_became_of_the_other(owner: Owner) -> None:
    first = owner.train()
    body = {"type": "generate", "spec": {"task": "generate", "model": first["id"]}}
    asked = owner.client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"})
    owner.client.post(first["urls"]["cancel"])

    again = owner.client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"})

    assert (again.status_code, again.content) == (202, asked.content)
    refused = owner.client.post("/v1/jobs", json=body).json()
    assert (refused["status"], refused["code"], refused["errors"][0]["pointer"]) == (
        422, "dependency_failed", "/spec/model",
    )  # fmt: skip


def test_a_job_that_had_waited_is_reproduced_from_what_it_waited_for(owner: Owner, engine: Engine) -> None:
    first = owner.train()
    second = draw(owner, first["id"])
    do(engine, first, **trained())
    do(engine, second, **drawn())

    again = reproduce(owner, second).json()

    assert (again["needs"], again["spec"]["model"], again["queue"]["waits_for"]) == ({}, "digits@1", [])
    assert claim(engine, again["id"]).inputs["model"]["version"] == 1


def test_what_was_erased_still_stands_for_the_model_that_it_made(owner: Owner, engine: Engine) -> None:
    first = owner.train()
    do(engine, first, **trained())
    assert owner.client.delete(first["urls"]["self"]).status_code == 204

    assert draw(owner, first["id"])["spec"]["model"] == "digits@1"


def test_who_was_erased_after_it_had_waited_leaves_nothing_of_that(owner: Owner, engine: Engine) -> None:
    first = owner.train()
    second = draw(owner, first["id"])
    owner.client.post(second["urls"]["cancel"])
    owner.client.delete(second["urls"]["self"])

    with engine.connect() as connection:
        left = text("SELECT count(*) FROM needs WHERE job_id = :id")
        assert connection.scalar(left, {"id": parse("job", second["id"])}) == 0
    do(engine, first, **trained())


def test_who_waits_for_jobs_asks_for_no_worker(
    owner: Owner, stranger: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from api import metrics

    monkeypatch.setattr(metrics, "CACHE_SECONDS", 0.0)
    states = [f'noisemill_queue_jobs{{queue="generate",state="{state}"}}' for state in ("queued", "waiting")]
    before = [metric(stranger, line) for line in states]
    draw(owner, owner.train()["id"])

    assert [metric(stranger, line) - was for line, was in zip(states, before, strict=True)] == [0, 1]
