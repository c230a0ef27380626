"""Two servers to speak to: a little one of the test's own, and the real one with a worker played by hand."""

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from noisemill.client import Client
from shared.settings import Settings
from tests.api.support import make_settings, serving
from tests.client.hand import Hand
from tests.client.little import LittleServer

API_KEY = "nm_Kp3xW9qLzT7vB2nR5mYc"


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


@pytest.fixture(scope="module")
def settings(module_database: str, valkey: str, module_s3: Any) -> Settings:
    from api.setup import register

    settings = make_settings(module_database, valkey, module_s3)
    register(settings, API_KEY)
    return settings


@pytest.fixture(scope="module")
def api_url(settings: Settings) -> Iterator[str]:
    with serving(settings) as url:
        yield url


@pytest.fixture(scope="module")
def hand(settings: Settings) -> Iterator[Hand]:
    """A worker that does what the test says."""
    with ExitStack() as stack:
        yield Hand(settings, stack)


@pytest.fixture
def real(api_url: str) -> Iterator[Client]:
    """A client of a real server."""
    with Client(api_url, API_KEY) as client:
        yield client


@pytest.fixture(scope="module")
def dataset_id(api_url: str, hand: Hand, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset that is ready to be learned from."""
    path = tmp_path_factory.mktemp("data") / "ten.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"ten images")
    with Client(api_url, API_KEY) as client:
        dataset = client.upload_dataset(path, "ten")
        hand.ingest()
        return client.wait_dataset(dataset.id, 20).id
