"""While the broker is away jobs are accepted all the same, and their bells are published later."""

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import httpx
import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import Engine, make_url, text

from api import relay
from noisemill.local.ports import free_port
from shared.settings import Settings
from tests.api.conftest import MakeOwner
from tests.api.support import Owner, make_settings, serving, train_request
from tests.conftest import WaitUntil


@pytest.fixture(scope="module")
def settings(module_database: str, module_s3: Any) -> Settings:
    """Of a server whose broker is away. No other server works on its database."""
    return make_settings(module_database, "redis://127.0.0.1:9/0", module_s3)


def test_without_a_broker_the_api_is_degraded_and_ready(stranger: httpx.Client) -> None:
    answer = stranger.get("/readyz")

    assert (answer.status_code, answer.json()["status"], answer.json()["broker"]) == (200, "degraded", "away")


def test_jobs_are_accepted_at_once_while_the_broker_is_away(owner: Owner, engine: Engine) -> None:
    dataset = owner.add_dataset()

    times = []
    for _ in range(20):
        began = time.monotonic()
        assert owner.client.post("/v1/jobs", json=train_request(dataset)).status_code == 202
        times.append(time.monotonic() - began)

    assert sorted(times)[10] < 0.25
    with engine.connect() as connection:
        unsent = "SELECT count(*) FROM outbox JOIN jobs ON jobs.id = job_id WHERE sent_at IS NULL AND tenant_id = :id"
        assert connection.execute(text(unsent), {"id": owner.id}).scalar_one() == 20


def test_bells_are_published_once_the_broker_is_back(
    settings: Settings,
    make_owner: MakeOwner,
    valkey: str,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(relay, "LONGEST_PAUSE", timedelta(seconds=0.5))
    port = free_port()
    url = make_url(valkey).set(port=port).render_as_string(hide_password=False)
    broker = settings.broker.model_copy(update={"url": SecretStr(url), "prefix": "back:"})
    settings = settings.model_copy(update={"broker": broker})
    caplog.clear()
    with serving(settings) as api_url:
        job_id = make_owner(url=api_url).train()["id"]
        wait_until(lambda: "bells cannot be published" in caplog.text)

        with forwarding(port, make_url(valkey).port or 0):
            wait_until(lambda: job_id in messages(settings, valkey), timeout=15)


@contextmanager
def forwarding(port: int, target: int) -> Iterator[None]:
    """Connect a port of this machine with another, until the end."""

    class Forward(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", target)) as there:
                back = threading.Thread(target=pump, args=(there, self.request))
                back.start()
                pump(self.request, there)
                back.join()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    with socketserver.ThreadingTCPServer(("127.0.0.1", port), Forward) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield
        server.shutdown()
        thread.join()


def test_a_submission_rings_within_a_moment(
    settings: Settings,
    make_owner: MakeOwner,
    valkey: str,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shared.relay.RELAY_PAUSE", timedelta(minutes=1))  # only a wake can be in time
    broker = settings.broker.model_copy(update={"url": SecretStr(valkey), "prefix": "moment:"})
    settings = settings.model_copy(update={"broker": broker})
    with serving(settings) as url:
        job_id = make_owner(url=url).train()["id"]

        wait_until(lambda: job_id in messages(settings, valkey), timeout=10)


def messages(settings: Settings, valkey: str) -> str:
    with redis.Redis.from_url(valkey) as client:
        return str(client.lrange(f"{settings.broker.prefix}train", 0, -1))
