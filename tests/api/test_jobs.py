"""Submitting, looking at, listing and canceling jobs."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from api.news import POLL_RINGING
from shared.events import EventBell
from shared.ids import parse
from shared.jobs import workers
from shared.settings import Settings
from tests.api.conftest import MakeOwner
from tests.api.support import Owner, claim, new_artifact, succeed, train_request


def test_a_submitted_job_is_accepted_at_once_and_says_where_to_look(owner: Owner) -> None:
    answer = owner.client.post("/v1/jobs", json=train_request(owner.add_dataset()))

    view = answer.json()
    assert (answer.status_code, view["state"], view["attempt"]) == (202, "queued", 0)
    assert answer.headers["Location"] == view["urls"]["self"] and answer.headers["Retry-After"] == "1"
    assert owner.client.get(answer.headers["Location"]).json() == view


def test_a_finished_job_shows_its_attempts_result_and_times(owner: Owner, engine: Engine) -> None:
    job = owner.train()

    succeed(engine, claim(engine, job["id"]))

    view = owner.client.get(job["urls"]["self"]).json()
    assert (view["state"], view["progress"]["value"], view["result"]["model"]) == ("succeeded", 1.0, "digits@1")
    assert [(one["number"], one["outcome"]) for one in view["attempts"]] == [(1, "succeeded")]
    assert view["metrics"] | {"queue_ms": 0, "device_seconds": 0} == {
        "queue_ms": 0,
        "load_ms": 5,
        "execution_ms": 20,
        "upload_ms": 3,
        "device_seconds": 0,
    }


def test_attempts_are_a_list_of_their_own(owner: Owner, engine: Engine) -> None:
    job = owner.train()

    claim(engine, job["id"])

    page = owner.client.get(job["urls"]["attempts"]).json()
    assert [(one["number"], one["worker"], one["outcome"]) for one in page["data"]] == [(1, "w1", None)]
    assert page["has_more"] is False


def submit_and_wait(owner: Owner, dataset: str, seconds: int, work: Callable[[str], None]) -> httpx.Response:
    """The answer to who waits so long for the end of a job, at which somebody works as soon as it is there."""

    def find_and_work() -> None:
        while not (found := owner.client.get("/v1/jobs").json()["data"]):
            pass
        work(found[0]["id"])

    worker = threading.Thread(target=find_and_work)
    worker.start()
    answer = owner.client.post("/v1/jobs", json=train_request(dataset), headers={"Prefer": f"wait={seconds}"})
    worker.join()
    return answer


@contextmanager
def at_each_look_for_an_end(do: Callable[[str], None]) -> Iterator[None]:
    def look(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "jobs.completed_at IS NOT NULL" in statement:
            do(statement)

    event.listen(Engine, "before_cursor_execute", look)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", look)


def test_a_client_that_prefers_to_wait_gets_the_finished_job(owner: Owner, engine: Engine, settings: Settings) -> None:
    def work(job_id: str) -> None:
        succeed(engine, claim(engine, job_id))
        EventBell(settings.broker).ring(parse("job", job_id))

    answer = submit_and_wait(owner, owner.add_dataset(), 15, work)

    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
    assert answer.headers["Preference-Applied"] == "wait=15"
    assert answer.elapsed.total_seconds() < POLL_RINGING


def test_who_waits_for_the_end_looks_once_that_is_told(owner: Owner, engine: Engine, settings: Settings) -> None:
    """Not when the job was submitted, and not when an attempt at it begins."""
    dataset, bell, looks = owner.add_dataset(), EventBell(settings.broker), list[str]()

    def work(job_id: str) -> None:
        claimed = claim(engine, job_id)
        bell.ring(parse("job", job_id), begins=True)
        time.sleep(0.5)
        succeed(engine, claimed)
        bell.ring(parse("job", job_id))

    with at_each_look_for_an_end(looks.append):
        answer = submit_and_wait(owner, dataset, 4, work)

    assert (answer.status_code, answer.json()["state"], len(looks)) == (200, "succeeded", 1)


def test_who_waits_for_the_end_is_told_of_its_job_though_sql_goes_away_meanwhile(
    owner: Owner, settings: Settings
) -> None:
    """An error would have the client submit it again."""
    dataset, failed = owner.add_dataset(), list[str]()

    def away(statement: str) -> None:
        failed.append(statement)
        raise OperationalError(statement, None, Exception("server closed the connection unexpectedly"))

    with at_each_look_for_an_end(away):
        answer = submit_and_wait(
            owner, dataset, 2, lambda job_id: EventBell(settings.broker).ring(parse("job", job_id))
        )

    assert failed
    assert (answer.status_code, answer.json().get("state")) == (202, "queued")


def test_a_client_that_waits_in_vain_gets_the_job_as_accepted(owner: Owner) -> None:
    answer = owner.client.post("/v1/jobs", json=train_request(owner.add_dataset()), headers={"Prefer": "wait=1"})

    assert (answer.status_code, answer.json()["state"]) == (202, "queued")
    assert answer.elapsed.total_seconds() >= 1


def test_a_job_that_did_not_change_is_not_sent_again(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    claim(engine, job["id"])
    first = owner.client.get(job["urls"]["self"])

    again = owner.client.get(job["urls"]["self"], headers={"If-None-Match": first.headers["ETag"]})

    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["ETag"] == first.headers["ETag"]


def test_a_job_that_changed_is_sent_again(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    first = owner.client.get(job["urls"]["self"])

    succeed(engine, claim(engine, job["id"]))

    again = owner.client.get(job["urls"]["self"], headers={"If-None-Match": first.headers["ETag"]})
    assert again.status_code == 200
    assert "Retry-After" in first.headers and "Retry-After" not in again.headers


def test_pages_of_jobs_hold_each_job_once_newest_first(owner: Owner) -> None:
    made = [owner.train()["id"] for _ in range(5)]

    seen, url, links = [], "/v1/jobs?limit=2", 0
    while url:
        answer = owner.client.get(url)
        page = answer.json()
        seen += [job["id"] for job in page["data"]]
        assert page["has_more"] == (page["next_cursor"] is not None) == ("next" in answer.links)
        url = answer.links.get("next", {}).get("url")
        links += 1

    assert seen == made[::-1]
    assert links == 3


def test_jobs_are_found_by_state_type_and_label(owner: Owner, engine: Engine) -> None:
    plain, labelled = owner.train(), owner.train(labels={"project": "a", "run": "1"})
    claim(engine, plain["id"])

    def found(query: str) -> list[str]:
        return [job["id"] for job in owner.client.get(f"/v1/jobs?{query}").json()["data"]]

    assert found("state=running") == [plain["id"]]
    assert found("state=running&state=queued&type=train") == [labelled["id"], plain["id"]]
    assert found("label.project=a&label.run=1") == [labelled["id"]]
    assert found("label.project=b") == found("type=generate") == []


def test_a_page_keeps_its_filters(owner: Owner) -> None:
    wanted = [owner.train(labels={"keep": "yes"})["id"] for _ in range(2)]
    owner.train()

    first = owner.client.get("/v1/jobs?label.keep=yes&limit=1")
    second = owner.client.get(first.links["next"]["url"])

    assert [first.json()["data"][0]["id"], second.json()["data"][0]["id"]] == wanted[::-1]
    assert second.json()["has_more"] is False


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("stat=running", "query stat"),
        ("state=done", "query state"),
        ("limit=0", "query limit"),
        ("limit=201", "query limit"),
        ("limit=x", "query limit"),
        ("cursor=nonsense", "query cursor"),
        ("cursor=AAAA", "query cursor"),
    ],
)
def test_a_wrong_parameter_is_named(owner: Owner, query: str, parameter: str) -> None:
    answer = owner.client.get(f"/v1/jobs?{query}")

    assert answer.status_code == 422
    assert [one["parameter"] for one in answer.json()["errors"]] == [parameter]


def test_canceling_a_queued_job_ends_it_at_once(owner: Owner) -> None:
    job = owner.train()

    answers = [owner.client.post(job["urls"]["cancel"]) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["state"] == "canceled"
    assert answers[0].json()["state_version"] == answers[1].json()["state_version"]


def test_canceling_a_running_job_is_accepted_until_its_device_is_free(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    claim(engine, job["id"])

    answers = [owner.client.post(job["urls"]["cancel"]) for _ in range(2)]

    assert [(answer.status_code, answer.json()["state"]) for answer in answers] == [(202, "canceling")] * 2
    assert answers[0].json()["cancel_requested_at"] == answers[1].json()["cancel_requested_at"] is not None


def test_canceling_a_job_that_has_ended_changes_nothing(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    succeed(engine, claim(engine, job["id"]))

    answer = owner.client.post(job["urls"]["cancel"])

    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")


def test_places_in_the_queue_are_those_of_the_claim(make_owner: MakeOwner, engine: Engine) -> None:
    owner = make_owner()
    ids = [owner.train(priority=priority)["id"] for priority in ("high", "low", "high")]

    before = {job["id"]: job["queue"]["position"] for job in owner.client.get("/v1/jobs").json()["data"]}

    assert before[ids[0]] + 1 == before[ids[2]] < before[ids[1]]
    assert owner.client.get(f"/v1/jobs/{ids[1]}").json()["queue"]["position"] == before[ids[1]]


@pytest.fixture
def reason_of(owner: Owner, engine: Engine) -> Callable[[str], str]:
    def look(change: str = "") -> str:
        with Session(engine) as session, session.begin():
            session.execute(text("DELETE FROM workers"))
            session.execute(text("UPDATE jobs SET queue = 'elsewhere' WHERE state = 'queued'"))
        before = owner.train() if change == "others" else None
        job = owner.train()
        assert job["queue"]["position"] == (2 if before else 1)
        with Session(engine) as session, session.begin():
            if change in ("worker", "others"):
                workers.sign_in(
                    session, name="w", host="h", pid=1, queues=["train"], device=None, state="idle", job_id=None
                )
            if change == "backoff":
                later = "UPDATE jobs SET not_before = clock_timestamp() + interval '1 hour' WHERE id = :id"
                session.execute(text(later), {"id": parse("job", job["id"])})
        return owner.client.get(job["urls"]["self"]).json()["queue"]["reason"]

    return look


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("", "no_compatible_worker"),
        ("worker", "waiting_for_worker"),
        ("others", "behind_others"),
        ("backoff", "backing_off"),
    ],
)
def test_a_waiting_job_says_why(reason_of: Callable[[str], str], change: str, reason: str) -> None:
    assert reason_of(change) == reason


def test_artifacts_are_listed_oldest_first_with_links(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    made = tuple(new_artifact(f"{job['id']}/1/{number}.png") for number in range(3))
    succeed(engine, claim(engine, job["id"]), (*made, new_artifact(f"{job['id']}/1/w", kind="weights")))

    first = owner.client.get(job["urls"]["artifacts"], params={"limit": 2, "kind": "sample"})
    second = owner.client.get(first.links["next"]["url"])

    shown = first.json()["data"] + second.json()["data"]
    assert [one["name"] for one in shown] == ["0.png", "1.png", "2.png"]
    assert all(one["job_id"] == job["id"] and "X-Amz-Signature" in one["url"] for one in shown)
