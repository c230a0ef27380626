"""A client that stops sending is answered and cut off."""

import socket

import httpx
import pytest

from api import body
from tests.api.support import Owner


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
