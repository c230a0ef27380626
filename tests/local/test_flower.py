"""Flower as the stack starts it: behind a password, and unable to change anything."""

import os
from collections.abc import Iterator
from datetime import timedelta
from http.client import HTTPConnection
from pathlib import Path

import pytest

from noisemill.local.ports import free_port
from noisemill.local.probe import basic_auth
from noisemill.local.processes import launch, stop, wait_ready
from noisemill.local.services import FLOWER_USER, S3Access, Wiring, noisemill_services

SIGNED_IN = basic_auth(FLOWER_USER, "f-secret")
PAGES = ["/", "/workers", "/tasks", "/broker", "/worker/any", "/task/any", "/tasks/datatable"]
READING = ["/api/workers", "/api/tasks", "/api/queues/length", "/api/task/types"]
CONTROL = [
    "/api/worker/shutdown/any",
    "/api/worker/pool/restart/any",
    "/api/worker/queue/add-consumer/any?queue=q",
    "/api/task/async-apply/any",
    "/api/task/send-task/any",
    "/api/task/revoke/any",
    "/api/task/abort/any",
]


@pytest.fixture(scope="module")
def flower_port(valkey: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("flower")
    port = free_port()
    [flower] = [part for part in noisemill_services(wiring(valkey, port, folder)).parts if part.name == "flower"]
    process = launch(flower, logs=folder, folder=folder, base_env=os.environ)
    try:
        wait_ready(flower, process, logs=folder, limit=timedelta(seconds=60))
        yield port
    finally:
        stop(process, grace=flower.grace)


def wiring(broker_url: str, flower_port: int, folder: Path) -> Wiring:
    return Wiring(
        api_port=1,
        api_key="unused",
        flower_port=flower_port,
        flower_password="f-secret",
        database_url="postgresql+psycopg://nobody@127.0.0.1:1/none",  # Flower reads no database
        broker_url=broker_url,
        s3=S3Access(endpoint="http://127.0.0.1:1", bucket="none", access_key="none", secret_key="none"),
        cache=folder,
    )


def status_of(port: int, method: str, path: str, headers: dict[str, str]) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("path", PAGES + READING)
def test_a_stranger_reads_no_page(flower_port: int, path: str) -> None:
    assert status_of(flower_port, "GET", path, {}) == 401


@pytest.mark.parametrize("path", ["/", "/workers", "/tasks", "/api/workers", "/api/tasks"])
def test_the_operator_reads_pages(flower_port: int, path: str) -> None:
    assert status_of(flower_port, "GET", path, SIGNED_IN) == 200


@pytest.mark.parametrize("path", CONTROL)
def test_a_stranger_controls_nothing(flower_port: int, path: str) -> None:
    assert status_of(flower_port, "POST", path, {}) == 401


@pytest.mark.parametrize("path", CONTROL)
def test_not_even_the_operator_controls_anything(flower_port: int, path: str) -> None:
    assert status_of(flower_port, "POST", path, SIGNED_IN) == 403


def test_a_wrong_password_is_refused(flower_port: int) -> None:
    assert status_of(flower_port, "GET", "/", basic_auth(FLOWER_USER, "guess")) == 401
