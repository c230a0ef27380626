"""No family is special: one that a package brings is trained, drawn from and measured through every real part."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image

from noisemill.client import Client
from noisemill.errors import ApiError
from noisemill.local import Stack
from shared.wire import DatasetView
from tests.e2e.conftest import LEASE_SECONDS
from tests.plugin.installing import PIXEL_GAUSSIAN, REPOSITORY, install

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the package is installed."""
    packages = tmp_path_factory.mktemp("packages")
    install(packages, PIXEL_GAUSSIAN)
    return dict(os.environ) | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{packages}"}


@pytest.fixture(scope="module")
def stack(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    told = environ | {"NOISEMILL_JOBS_LEASE": str(LEASE_SECONDS)}
    stack = Stack(tmp_path_factory.mktemp("stack"), say=lambda _: None, environ=told)
    stack.up(flower=False)
    yield stack
    stack.down()


@pytest.fixture(scope="module")
def addresses(stack: Stack) -> dict:
    return stack.up(flower=False)


@pytest.fixture(scope="module")
def model(client: Client, dataset: DatasetView) -> str:
    spec = {"family": "pixel_gaussian", "dataset": dataset.id, "model": "pixels", "learning_rate": 0.05}
    trained = client.train(**spec, steps=150, batch_size=32, ema_decay=0, warmup_steps=0)
    return (client.wait(trained.id, 120).result or {})["model"]


def pictures(client: Client, job_id: str) -> np.ndarray:
    """The samples of a job, (N, H, W)."""
    samples = [artifact for artifact in client.artifacts(job_id) if artifact.kind == "sample"]
    return np.stack([np.asarray(Image.open(io.BytesIO(httpx.get(one.url).content))) for one in samples]).astype(float)


def test_its_samples_look_like_the_data_on_average(client: Client, model: str) -> None:
    images = pictures(client, client.wait(client.generate(model=model, num_samples=32).id, 120).id)
    y, x = np.mgrid[:12, :12]
    centre = np.exp(-((x - 5.5) ** 2 + (y - 5.5) ** 2) / 18)

    assert images.shape == (32, 12, 12)
    assert np.corrcoef(images.mean(0).ravel(), centre.ravel())[0, 1] > 0.8
    assert images.std(0).mean() > 10


def test_it_is_measured_by_its_own_scores_as_well(client: Client, dataset: DatasetView, model: str) -> None:
    asked = {"split": "train", "num_samples": 40, "metrics": ["mind", "scores"]}
    job = client.wait(client.evaluate(model=model, dataset=dataset.id, **asked).id, 120)

    figures = (job.result or {})["figures"]
    assert set(figures) == {"mind", "log_density"}
    assert client.model_version(model).metrics["train"]["log_density"] > 0


def test_the_api_tells_of_it_and_refuses_what_it_does_not_know(client: Client, addresses: dict, model: str) -> None:
    headers = {"Authorization": f"Bearer {addresses['api_key']}"}
    told = httpx.get(f"{addresses['api_url']}/v1/families", headers=headers).json()["data"]
    schema = next(one for one in told if one["family"] == "pixel_gaussian")

    with pytest.raises(ApiError, match="/spec/least_deviation"):
        client.train(family="pixel_gaussian", dataset="ds_" + "0" * 32, model="m", least_deviation=-1.0)
    with pytest.raises(ApiError, match="/spec/task"):
        client.generate(model=model, task="interpolate")

    assert schema["tasks"] == ["generate"]
    assert schema["train"]["properties"]["least_deviation"]["maximum"] == 1


def test_the_command_line_trains_it(addresses: dict, environ: dict[str, str], dataset: DatasetView) -> None:
    told = {"NOISEMILL_URL": addresses["api_url"], "NOISEMILL_API_KEY": addresses["api_key"]}
    options = ["--family", "pixel_gaussian", "--dataset", dataset.id, "--model", "typed", "--steps", "10"]
    command = [sys.executable, "-m", "noisemill", "train", *options, "--set", "least_deviation=0.1", "--json"]

    done = subprocess.run(command, env=environ | told, capture_output=True, text=True, check=False, timeout=200)

    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert (job["state"], job["spec"]["least_deviation"]) == ("succeeded", 0.1)
