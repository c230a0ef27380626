"""A little server of the test's own, and a client that speaks to it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from noisemill.client import Client
from tests.client.little import LittleServer


@pytest.fixture(autouse=True)
def _far_from_real_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own running stack must not be found."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)


@pytest.fixture
def little() -> Iterator[LittleServer]:
    with LittleServer().running() as server:
        yield server


@pytest.fixture
def client(little: LittleServer) -> Iterator[Client]:
    with Client(little.url, "nm_secret") as client:
        yield client
