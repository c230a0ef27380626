"""A training that another host helps with, by the front door: REST in, a worker that leads, a member that dials in."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from noisemill.client import Client
from noisemill.local.ports import free_port
from shared.wire import DatasetView
from tests.chaos.servers import REPOSITORY, Installation, Setup
from tests.e2e.test_stack import train, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """Of an installation with one worker and one member."""
    folder: Path = tmp_path_factory.mktemp("hosts")
    environ = {"NOISEMILL_WORKER_TRAIN_ADDRESS": f"127.0.0.1:{free_port()}"}
    environ |= {"NOISEMILL_WORKER_TRAIN_SECRET": "one that nobody guesses", "NOISEMILL_WORKER_DEVICE": "cpu"}
    with Installation(Setup(folder=folder, workers=1, environ=environ)).running() as installation:
        own = {"NOISEMILL_WORKER_CACHE_DIR": str(folder / "member"), "PYTHONPATH": str(REPOSITORY)}
        env = os.environ | installation.wiring.env() | environ | own
        with subprocess.Popen([sys.executable, "-m", "worker.member"], env=env) as member:
            yield installation.wiring.addresses()
            member.kill()


def test_a_training_of_a_worker_is_shared_by_a_member_and_its_weights_are_the_same_again(
    client: Client, dataset: DatasetView
) -> None:
    first, again = (client.wait(train(client, dataset, name).id, 180) for name in ("first", "again"))

    assert [(job.state, job.error) for job in (first, again)] == [("succeeded", None)] * 2
    assert [(job.result or {})["fingerprint"]["num_processes"] for job in (first, again)] == [2, 2]
    assert weights(client, first) == weights(client, again)
    logs = [event.data["message"] for event in client.events(first.id) if event.type == "job.log"]
    assert "Training with 2 processes, on 2 hosts." in logs
