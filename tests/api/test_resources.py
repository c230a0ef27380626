"""Artifacts, models, workers, and what the service knows about itself."""

import hashlib
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from shared.jobs import workers
from shared.jobs.state import MOVES
from shared.settings import Settings
from shared.specs import FAMILIES
from shared.storage import Storage
from tests.api.support import Owner, claim, new_artifact, succeed

BODY = b"bytes that a job made"


@pytest.fixture
def artifact(owner: Owner, engine: Engine, settings: Settings) -> dict[str, Any]:
    job = owner.train()
    stored = Storage(settings.s3).put(f"jobs/{job['id']}/1/a.txt", BODY, media_type="text/plain")
    made = new_artifact(stored.key, size_bytes=stored.size_bytes, sha256=stored.sha256, media_type="text/plain")
    succeed(engine, claim(engine, job["id"]), (made,))
    return owner.client.get(job["urls"]["artifacts"]).json()["data"][0]


def test_an_artifact_has_a_link_that_works_without_a_key(owner: Owner, artifact: dict[str, Any]) -> None:
    view = owner.client.get(f"/v1/artifacts/{artifact['id']}").json()

    assert (view["name"], view["sha256"]) == ("a.txt", hashlib.sha256(BODY).hexdigest())
    assert httpx.get(view["url"]).content == BODY


def test_the_content_of_an_artifact_is_a_redirect_to_storage(owner: Owner, artifact: dict[str, Any]) -> None:
    url = f"/v1/artifacts/{artifact['id']}/content"

    assert owner.client.get(url).status_code == 302
    assert owner.client.get(url, follow_redirects=True).content == BODY


def test_models_and_versions_are_shown_newest_first(owner: Owner, engine: Engine) -> None:
    trained = [owner.train(model=name)["id"] for name in ("a", "b", "a")]
    for job_id in trained:
        succeed(engine, claim(engine, job_id))

    models = owner.client.get("/v1/models").json()["data"]
    versions = owner.client.get("/v1/models/a/versions").json()["data"]

    assert [(one["name"], one["latest"], one["latest_version"]["ref"]) for one in models] == [
        ("b", 1, "b@1"),
        ("a", 2, "a@2"),
    ]
    assert [(one["ref"], one["job_id"]) for one in versions] == [("a@2", trained[2]), ("a@1", trained[0])]
    assert owner.client.get("/v1/models/a").json() == models[1]
    assert owner.client.get("/v1/models/a/versions/1").json() == versions[1]
    assert owner.client.get("/v1/models/a/versions/3").status_code == 404


def test_a_worker_that_fell_silent_is_gone(owner: Owner, engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        for name in ("here", "silent"):
            workers.sign_in(
                session, name=name, host="h", pid=1, queues=["train"], device="cpu", state="idle", job_id=None
            )
        session.execute(text("UPDATE workers SET seen_at = seen_at - interval '16 seconds' WHERE name = 'silent'"))

    shown = {one["name"]: one["state"] for one in owner.client.get("/v1/workers").json()["data"]}

    assert (shown["here"], shown["silent"]) == ("idle", "gone")


def test_the_life_of_a_job_is_told_as_it_is_coded(owner: Owner) -> None:
    told = owner.client.get("/v1/meta/job-states").json()

    assert {state: set(moves) for state, moves in told["moves"].items()} == {
        state.value: {to.value for to in targets} for state, targets in MOVES.items()
    }
    assert told["initial"] == "queued" and set(told["final"]) == {"succeeded", "failed", "canceled", "expired"}


def test_every_family_tells_what_may_be_asked_of_it(owner: Owner) -> None:
    told = {one["family"]: one for one in owner.client.get("/v1/families").json()["data"]}

    assert set(told) == set(FAMILIES)
    assert told["vae"]["train"]["properties"]["latent_dim"]["maximum"] == 1024
    assert set(told["vae"]["generate"]) == set(told["vae"]["tasks"]) == set(FAMILIES["vae"].tasks)
    assert {"temperature", "num_samples"} < set(told["vae"]["generate"]["generate"]["properties"])
    assert "guidance_scale" not in told["vae"]["generate"]["generate"]["properties"]
