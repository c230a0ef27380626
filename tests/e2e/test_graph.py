"""A graph of jobs, submitted at once and left alone: each waits for the model that the one before it makes."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from noisemill.client import Client
from noisemill.errors import ApiError, JobFailed
from noisemill.local import Stack
from shared.wire import DatasetView, JobView
from tests.e2e.conftest import LEASE_SECONDS, SMALL

pytestmark = pytest.mark.timeout(300)

LATENT = {"family": "diffusion", "network": "dit", "steps": 30, "batch_size": 16, "preview_every": 1000}
DRAWN = {"num_samples": 4, "labels": [0, 1], "guidance_scale": 2.0, "solver": "euler", "steps": 3, "seed": 1}


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


def submit_all(client: Client, dataset: DatasetView, name: str, **first: Any) -> list[JobView]:
    """An autoencoder, a conditional diffusion model in its latents, and samples of that."""
    coded = client.train(dataset=dataset.id, model=f"{name}-coded", **(SMALL | {"steps": 60} | first))
    drawn = client.train(dataset=dataset.id, model=f"{name}-drawn", autoencoder=coded.id, **LATENT)
    return [coded, drawn, client.generate(model=drawn.id, **DRAWN)]


def test_conditional_latent_diffusion_runs_as_a_graph_that_is_submitted_at_once(
    client: Client, dataset: DatasetView
) -> None:
    coded, drawn, samples = submit_all(client, dataset, "done")

    assert [job.needs for job in (drawn, samples)] == [{"autoencoder": coded.id}, {"model": drawn.id}]
    assert samples.queue and (samples.queue.reason, samples.queue.waits_for) == ("waiting_for_jobs", [drawn.id])
    done = client.wait(samples.id, 200)

    assert done.state == "succeeded"
    assert len([artifact for artifact in client.artifacts(done.id) if artifact.kind == "sample"]) == 4
    assert (client.job(drawn.id).spec["autoencoder"], done.spec["model"]) == ("done-coded@1", "done-drawn@1")
    assert done.needs == {"model": drawn.id}
    # The same, asked for by name once all is there.
    again = client.wait(client.generate(model="done-drawn@1", **DRAWN).id, 100)
    assert (again.result or {})["sha256"] == (done.result or {})["sha256"]


def test_a_graph_whose_first_job_is_canceled_ends_by_its_name_and_is_tried_again_as_a_whole(
    client: Client, dataset: DatasetView
) -> None:
    graph = submit_all(client, dataset, "canceled", steps=100_000)
    next(event for event in client.events(graph[0].id) if event.type == "job.progress")

    client.cancel(graph[0].id)

    for job in graph[1:]:
        with pytest.raises(JobFailed, match=f"dependency_failed.*{graph[0].id}, whose model it needs, was canceled"):
            client.wait(job.id, 60)
    with pytest.raises(ApiError) as refusal:
        client.retry(graph[1].id)
    assert refusal.value.code == "dependency_failed"

    retried = [client.retry(job.id) for job in graph]
    assert [job.needs for job in retried] == [{}, {"autoencoder": retried[0].id}, {"model": retried[1].id}]
    client.cancel(retried[0].id)
    with pytest.raises(JobFailed):
        client.wait(retried[2].id, 60)
