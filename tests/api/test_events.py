"""A job's log, as pages and as a stream that may break at any moment."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, func, update
from sqlalchemy.orm import Session
from sqlmodel import col

from api import stream
from noisemill import Client
from noisemill.local.ports import free_port
from shared.events import EventBell
from shared.ids import parse
from shared.jobs.retention import LogDuty
from shared.jobs.rows import Job
from shared.settings import Settings
from tests.api.conftest import MakeOwner
from tests.api.support import Owner, claim, environment, is_up, make_settings, note, serving, succeed
from tests.conftest import WaitUntil

STREAM = {"Accept": "text/event-stream"}
MONTH = timedelta(days=30)


@dataclass
class Message:
    """One server-sent event."""

    id: int
    event: str
    data: dict[str, Any]


@contextmanager
def listening(owner: Owner, job: dict[str, Any], **headers: str) -> Iterator[Iterator[Message]]:
    with owner.client.stream("GET", job["urls"]["events"], headers=STREAM | headers, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        yield _messages(answer)


def _messages(answer: httpx.Response) -> Iterator[Message]:
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield Message(int(fields["id"]), fields["event"], httpx.Response(200, text=fields["data"]).json())
            fields = {}


def test_the_log_is_read_in_pages_without_a_gap(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    claimed = claim(engine, job["id"])
    for number in range(5):
        note(engine, claimed, str(number))

    first = owner.client.get(job["urls"]["events"], params={"limit": 4})
    second = owner.client.get(first.links["next"]["url"])

    assert [event["seq"] for event in first.json()["data"] + second.json()["data"]] == [1, 2, 3, 4, 5, 6, 7]
    assert [event["seq"] for event in owner.client.get(job["urls"]["events"], params={"after": 6}).json()["data"]] == [
        7
    ]
    assert first.json()["has_more"] and not second.json()["has_more"]


def test_a_stream_ends_after_the_event_that_ends_the_job(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    succeed(engine, claim(engine, job["id"]))

    with listening(owner, job) as messages:
        seen = list(messages)

    assert [(one.id, one.event, one.data["data"]["state"]) for one in seen] == [
        (1, "job.state", "queued"),
        (2, "job.state", "running"),
        (3, "job.state", "succeeded"),
    ]
    assert [one.data["seq"] for one in seen] == [1, 2, 3]


def test_a_stream_brings_what_happens_as_soon_as_the_bell_rings(
    owner: Owner, engine: Engine, settings: Settings
) -> None:
    job = owner.train()
    claimed, bell = claim(engine, job["id"]), EventBell(settings.broker)

    with listening(owner, job) as messages:
        assert [next(messages).id for _ in range(2)] == [1, 2]
        for number in range(3):
            note(engine, claimed, str(number))
            began = time.monotonic()
            bell.ring(claimed.job_id)
            assert next(messages).data["data"]["message"] == str(number)
            assert time.monotonic() - began < 1
        succeed(engine, claimed)
        bell.ring(claimed.job_id)
        assert [one.id for one in messages] == [6]


@pytest.mark.parametrize(("last_seen", "seen"), [(0, [1, 2, 6]), (1, [2, 6]), (3, [6]), (5, [6])])
def test_of_a_log_that_was_pruned_what_is_left_is_read_to_its_end(
    owner: Owner, engine: Engine, last_seen: int, seen: list[int]
) -> None:
    job = owner.train()
    claimed = claim(engine, job["id"])
    for number in range(3):
        note(engine, claimed, str(number))
    succeed(engine, claimed)
    with Session(engine) as session, session.begin():
        session.execute(update(Job).where(col(Job.id) == claimed.job_id).values(completed_at=func.now() - MONTH))
        LogDuty(lifetime=MONTH).do(session, limit=1000)

    with Client(str(owner.client.base_url), owner.key) as client:
        followed = [event.seq for event in client.events(job["id"], after=last_seen)]
    with listening(owner, job, **{"Last-Event-ID": str(last_seen)}) as messages:
        streamed = [one.id for one in messages]

    assert (streamed, followed) == (seen, seen)
    assert owner.client.get(job["urls"]["events"], headers=STREAM | {"Last-Event-ID": "6"}).status_code == 204


def test_a_resumed_stream_has_neither_gap_nor_double(owner: Owner, engine: Engine, settings: Settings) -> None:
    """The stream is cut after every second event, while a worker writes at full speed."""
    job = owner.train()
    claimed, bell = claim(engine, job["id"]), EventBell(settings.broker)

    def work() -> None:
        for number in range(40):
            note(engine, claimed, str(number))
            bell.ring(claimed.job_id)
        succeed(engine, claimed)
        bell.ring(claimed.job_id)

    worker = threading.Thread(target=work)
    worker.start()
    seen = [0]
    while seen[-1] < 43:
        with listening(owner, job, **{"Last-Event-ID": str(seen[-1])}) as messages:
            seen += [message.id for message, _ in zip(messages, range(2), strict=False)]
    worker.join()

    assert seen == list(range(44))


def test_a_stream_can_start_after_an_event(owner: Owner, engine: Engine) -> None:
    job = owner.train()
    succeed(engine, claim(engine, job["id"]))

    url = job["urls"]["events"] + "?after=2"
    with owner.client.stream("GET", url, headers=STREAM) as answer:
        assert [one.id for one in _messages(answer)] == [3]


def test_a_stream_of_which_everything_was_seen_is_no_content(owner: Owner, engine: Engine) -> None:
    """By this status a browser's EventSource knows that it must not come back."""
    job = owner.train()
    succeed(engine, claim(engine, job["id"]))

    answer = owner.client.get(job["urls"]["events"], headers=STREAM | {"Last-Event-ID": "3"})

    assert (answer.status_code, answer.content) == (204, b"")


def test_a_quiet_stream_sends_comments(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_SECONDS", 0.2)
    job = owner.train()

    with owner.client.stream("GET", job["urls"]["events"], headers=STREAM) as answer:
        comments = (line for line in answer.iter_lines() if line.startswith(":"))
        assert next(comments) and next(comments)


def test_a_waiting_stream_holds_no_database_connection(make_owner: MakeOwner, engine: Engine) -> None:
    """More streams than the pool has connections, and the API still answers."""
    owner = make_owner()
    job = owner.train()
    opened = [owner.client.stream("GET", job["urls"]["events"], headers=STREAM) for _ in range(20)]

    answers = [one.__enter__() for one in opened]
    firsts = [next(_messages(answer)).id for answer in answers]
    answered = owner.client.get(job["urls"]["self"]).status_code
    for one in opened:
        one.__exit__(None, None, None)

    assert (firsts, answered) == ([1] * 20, 200)


def test_streams_go_on_without_redis(
    module_database: str, module_s3: Any, make_owner: MakeOwner, engine: Engine
) -> None:
    with serving(make_settings(module_database, "redis://127.0.0.1:9/0", module_s3)) as url:
        owner = make_owner(url=url)
        job = owner.train()
        with listening(owner, job) as messages:
            assert next(messages).id == 1
            claimed = claim(engine, job["id"])
            assert next(messages).id == 2
            began = time.monotonic()
            succeed(engine, claimed)
            assert [one.id for one in messages] == [3]
            assert time.monotonic() - began < 3
    assert parse("job", job["id"]) == claimed.job_id


def test_a_server_that_is_told_to_stop_ends_its_streams_and_itself(
    settings: Settings, make_owner: MakeOwner, wait_until: WaitUntil
) -> None:
    """Servers wait for open answers before they end an app, and a stream may be open for days."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", "--port", str(port)]
    server = subprocess.Popen(command, env=os.environ | environment(settings), stderr=subprocess.DEVNULL)
    try:
        owner = make_owner(url=f"http://127.0.0.1:{port}")
        wait_until(lambda: is_up(owner), timeout=30)
        with listening(owner, owner.train()) as messages:
            assert next(messages).id == 1
            server.terminate()
            assert list(messages) == []
        assert server.wait(5) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.wait()
