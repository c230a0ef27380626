"""Keys: who is let in, to do what, and to see whose things."""

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from api.app import create_app
from shared.ids import parse
from shared.jobs import workers
from shared.settings import Settings
from tests.api.conftest import MakeOwner
from tests.api.support import Owner, claim, new_artifact, succeed, train_request


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Basic d3Jvbmc6d3Jvbmc=", "Bearer \xff", "Bearer " + "x" * 5000]
)
def test_without_a_valid_key_nobody_gets_in(stranger: httpx.Client, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}

    answer = stranger.get("/v1/jobs", headers=headers)  # type: ignore[arg-type]

    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_key_is_asked_for_before_the_body_is_read(stranger: httpx.Client) -> None:
    answer = stranger.post("/v1/jobs", content=b"{", headers={"Content-Type": "application/json"})

    assert answer.status_code == 401


def test_a_key_ends_when_it_expires(make_owner: MakeOwner) -> None:
    now = datetime.now(UTC)
    past = make_owner(expires_at=now - timedelta(seconds=1))
    future = make_owner(expires_at=now + timedelta(hours=1))

    assert past.client.get("/v1/jobs").status_code == 401
    assert future.client.get("/v1/jobs").status_code == 200


def test_a_revoked_key_is_refused_from_then_on(owner: Owner, engine: Engine) -> None:
    before = owner.client.get("/v1/jobs").status_code
    with engine.begin() as connection:
        revoke = text("UPDATE api_keys SET revoked_at = clock_timestamp() WHERE tenant_id = :id")
        connection.execute(revoke, {"id": owner.id})

    assert (before, owner.client.get("/v1/jobs").status_code) == (200, 401)


def test_only_a_digest_of_a_key_is_stored(owner: Owner, engine: Engine) -> None:
    with engine.connect() as connection:
        row = connection.execute(text("SELECT * FROM api_keys WHERE tenant_id = :id"), {"id": owner.id}).one()

    assert owner.key not in str(row) and owner.key.encode() not in bytes(row.digest)


def operations(settings: Settings) -> list[Any]:
    """Every documented operation under /v1: method, path, and the scope that it needs."""
    document = create_app(settings).openapi()
    return [
        (method.upper(), path, operation["security"][0]["key"])
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if path.startswith("/v1/")
    ]


def test_every_operation_needs_its_scope(settings: Settings, make_owner: MakeOwner) -> None:
    powerless = make_owner(scopes=())

    for method, path, scopes in operations(settings):
        answer = powerless.client.request(method, path)
        if scopes:
            assert answer.status_code == 403, (method, path)
            assert answer.json()["code"] == "forbidden" and scopes[0] in answer.headers["WWW-Authenticate"]
        else:
            assert path in ("/v1/meta/job-states", "/v1/families")


def test_writing_needs_more_than_reading(make_owner: MakeOwner) -> None:
    reader = make_owner(scopes=("jobs:read", "datasets:read", "models:read"))

    assert reader.client.get("/v1/jobs").status_code == 200
    assert reader.client.post("/v1/jobs", json=train_request(reader.add_dataset())).status_code == 403


def test_no_operation_shows_or_touches_what_belongs_to_another_tenant(
    settings: Settings, make_owner: MakeOwner, engine: Engine, count_rows: Any
) -> None:
    """Generated from the OpenAPI document: a route that is added and forgets its tenant fails here."""
    victim, thief = make_owner(), make_owner()
    job = victim.train(labels={"secret": "label"})
    succeed(engine, claim(engine, job["id"]), (new_artifact(f"{job['id']}/secret.png"),))
    running = victim.train()
    claim(engine, running["id"])
    artifact = victim.client.get(job["urls"]["artifacts"]).json()["data"][0]["id"]
    ids = {
        "job_id": running["id"],
        "artifact_id": artifact,
        "dataset_id": victim.add_dataset(),
        "name": "digits",
        "version": "1",
        "alias": "production",
    }
    victim.client.put("/v1/models/digits/aliases/production", json={"version": 1})
    before = count_rows(), victim.client.get(running["urls"]["self"]).json()["state"]

    with_ids = [(method, path) for method, path, _ in operations(settings) if "{" in path]
    for method, path in with_ids:
        body = {"json": {"version": 1}} if method == "PUT" else {}
        theirs = thief.client.request(method, path.format(**ids), **body)
        assert (theirs.status_code, theirs.json()["code"]) == (404, "not_found"), (method, path)
    for path in ("/v1/jobs", "/v1/datasets", "/v1/models", "/v1/jobs?label.secret=label"):
        assert thief.client.get(path).json()["data"] == []
    for request in (
        train_request(ids["dataset_id"]),
        {"type": "generate", "spec": {"model": "digits", "task": "generate"}},
        {"type": "generate", "spec": {"model": "digits@production", "task": "generate"}},
    ):
        assert thief.client.post("/v1/jobs", json=request).status_code == 422

    assert len(with_ids) >= 11
    assert (count_rows(), victim.client.get(running["urls"]["self"]).json()["state"]) == before


def test_a_cursor_of_another_tenant_shows_nothing(make_owner: MakeOwner) -> None:
    victim, thief = make_owner(), make_owner()
    for _ in range(2):
        victim.train()
    cursor = victim.client.get("/v1/jobs?limit=1").json()["next_cursor"]

    assert thief.client.get(f"/v1/jobs?cursor={cursor}").json()["data"] == []


def test_a_workers_job_is_named_to_its_owner_only(make_owner: MakeOwner, engine: Engine) -> None:
    owner, other = make_owner(), make_owner()
    job = owner.train()
    what = {"queues": ["train"], "device": None, "state": "busy", "job_id": parse("job", job["id"])}
    with Session(engine) as session, session.begin():
        workers.sign_in(session, name="w", host="h", pid=1, **what)

    shown = [each.client.get("/v1/workers").json()["data"][0]["job_id"] for each in (owner, other)]

    assert shown == [job["id"], None]
