"""A model leaves: trained, exported and downloaded through every real part, and opened by the other library."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from noisemill.client import Client
from noisemill.errors import ApiError
from noisemill.local import Stack
from shared.wire import DatasetView, JobView
from tests.e2e.conftest import LEASE_SECONDS, SMALL
from worker.engine.checkpoint import load_weights
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo

pytestmark = pytest.mark.timeout(300)

UNET = {
    "family": "diffusion", "preset": "s", "objective": "v", "steps": 3, "batch_size": 8, "preview_every": 1000,
    "learning_rate": 0.01, "warmup_steps": 0, "schedule": "constant", "ema_decay": 0,
}  # fmt: skip
"""A model whose few steps are wide enough to make something of its last layer, which begins at zero."""
FILES = ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    environ = dict(os.environ) | {"NOISEMILL_JOBS_LEASE": str(LEASE_SECONDS)}
    stack = Stack(tmp_path_factory.mktemp("stack"), say=lambda _: None, environ=environ)
    stack.up(flower=False)
    yield stack
    stack.down()


@pytest.fixture(scope="module")
def addresses(stack: Stack) -> dict:
    return stack.up(flower=False)


@pytest.fixture(scope="module")
def model(client: Client, dataset: DatasetView) -> str:
    trained = client.wait(client.train(dataset=dataset.id, model="blobs", **UNET).id, 200)
    return (trained.result or {})["model"]


@pytest.fixture(scope="module")
def exported(client: Client, model: str) -> JobView:
    return client.wait(client.export(model=model, format="diffusers").id, 120)


def network(client: Client, ref: str, folder: Path) -> Any:
    """Our own network of the version, of the weights that its training left."""
    version, family = client.model_version(ref), FAMILIES["diffusion"]
    net = build(family, family.spec.model_validate(version.spec), DataInfo.from_json(version.info))
    (weights,) = [one for one in client.artifacts(version.job_id) if one.name == "model.safetensors"]
    load_weights(client.download(weights, folder), net)
    return net.eval().network


def test_the_command_line_leaves_a_folder_that_the_library_opens(
    client: Client, addresses: dict, model: str, tmp_path: Path
) -> None:
    told = {"NOISEMILL_URL": addresses["api_url"], "NOISEMILL_API_KEY": addresses["api_key"]}
    command = [sys.executable, "-m", "noisemill", "export", "blobs", "--format", "diffusers", "--out"]
    done = subprocess.run(
        [*command, str(tmp_path / "out"), "--json"], env=os.environ | told, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    theirs, ours = UNet2DModel.from_pretrained(tmp_path / "out").eval(), network(client, model, tmp_path)
    x, t = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 500, 900])
    with torch.no_grad():
        expected = ours(x, t, torch.arange(3))
        difference = (theirs(x, t, class_labels=torch.arange(3)).sample - expected).abs().max()
    assert difference <= 1e-5 < 1e-3 * expected.std()
    assert sorted(Path(file).name for file in json.loads(done.stdout)["files"]) == FILES


def test_the_result_has_the_digests_of_what_is_downloaded(client: Client, exported: JobView, tmp_path: Path) -> None:
    files = [client.download(artifact, tmp_path) for artifact in client.artifacts(exported.id)]

    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert (exported.result or {})["files"] == found
    assert sorted(found) == FILES


def test_it_is_made_again_byte_for_byte(client: Client, exported: JobView) -> None:
    again = client.wait(client.reproduce(exported.id).id, 120)

    assert (again.result or {})["reproduction"]["identical"] is True


def test_what_cannot_be_exported_is_refused_by_the_field(client: Client, addresses: dict, dataset: DatasetView) -> None:
    client.wait(client.train(dataset=dataset.id, model="plain", steps=2, **SMALL).id, 120)
    headers = {"Authorization": f"Bearer {addresses['api_key']}"}
    body = {"type": "export", "spec": {"model": "plain", "format": "diffusers"}}

    answer = httpx.post(f"{addresses['api_url']}/v1/jobs", headers=headers, json=body)

    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/spec/model")
    with pytest.raises(ApiError, match="/spec/format"):
        client.export(model="blobs", format="pickle")
