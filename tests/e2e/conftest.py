"""One whole stack, as ``noisemill up`` starts it, for all tests of this folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from noisemill.client import Client
from noisemill.local import Stack
from shared.wire import DatasetView

LEASE_SECONDS = 5
SMALL = {"family": "vae", "network": "mlp", "hidden_dim": 32, "latent_dim": 4, "batch_size": 16, "warmup_steps": 0}
"""A model that trains in a second."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    environ = dict(os.environ) | {"NOISEMILL_JOBS_LEASE": str(LEASE_SECONDS), "NOISEMILL_JOBS_REDISPATCH_AFTER": "3"}
    stack = Stack(tmp_path_factory.mktemp("stack"), say=lambda _: None, environ=environ)
    stack.up()
    yield stack
    stack.down()


@pytest.fixture(scope="module")
def addresses(stack: Stack) -> dict:
    return stack.up()


@pytest.fixture(scope="module")
def client(addresses: dict) -> Iterator[Client]:
    with Client(addresses["api_url"], addresses["api_key"]) as client:
        yield client


@pytest.fixture(scope="module")
def dataset(client: Client, tmp_path_factory: pytest.TempPathFactory) -> DatasetView:
    """120 pictures of blobs, 12 x 12, in two classes."""
    path: Path = tmp_path_factory.mktemp("data") / "blobs.npz"
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:12, :12]
    centres = rng.uniform(2, 9, size=(120, 2))
    images = [255 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 6) for cx, cy in centres]
    np.savez(path, images=np.array(images).astype(np.uint8), labels=(centres[:, 0] > 5.5).astype(np.int64))
    uploaded = client.upload_dataset(path, "blobs", modality="image")
    return client.wait_dataset(uploaded.id, 60)


@pytest.fixture(autouse=True)
def no_process_left_behind() -> None:
    """Tests here restart parts of the module's stack; its end and the end of the run are checked instead."""
