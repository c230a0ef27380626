"""A client that stops sending is answered and cut off."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import httpx
import pytest
import yaml

from api import body
from noisemill.local.ports import free_port
from shared.settings import Settings
from tests.api.support import Owner, environment
from tests.conftest import WaitUntil

COMPOSE = Path(__file__).parents[2] / "docker-compose.yml"


def test_a_body_that_stops_short_is_answered_408(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_SILENCE_SECONDS", 0.2)
    address = httpx.URL(owner.client.base_url)
    lines = ["POST /v1/jobs HTTP/1.1", "Host: here", f"Authorization: Bearer {owner.key}"]
    lines += ["Content-Type: application/json", "Content-Length: 10", "", "{}"]

    with socket.create_connection((address.host, address.port), timeout=10) as connection:
        connection.sendall("\r\n".join(lines).encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b""))

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer


def test_a_server_that_is_told_to_stop_waits_for_no_client_that_sends_a_byte_now_and_then(
    settings: Settings, owner: Owner, wait_until: WaitUntil
) -> None:
    """By the command that containers run."""
    port, has_ended = free_port(), Event()
    _, *arguments = yaml.safe_load(COMPOSE.read_text())["services"]["api"]["command"]
    command = [sys.executable, *(str(port) if one == "8000" else one for one in arguments)]
    server = subprocess.Popen(command, env=os.environ | environment(settings), stderr=subprocess.DEVNULL)

    def is_up() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def dribble(connection: socket.socket) -> None:
        while not has_ended.wait(0.2):
            try:
                connection.sendall(b" ")
            except OSError:
                return

    try:
        wait_until(is_up, timeout=30)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            lines = ["POST /v1/jobs HTTP/1.1", "Host: here", f"Authorization: Bearer {owner.key}"]
            lines += ["Content-Type: application/json", "Content-Length: 60000", "", "{"]
            connection.sendall("\r\n".join(lines).encode())
            Thread(target=dribble, args=[connection], daemon=True).start()
            server.terminate()
            assert server.wait(25) in (0, -signal.SIGTERM)
    finally:
        has_ended.set()
        server.kill()
