"""The promises, through the front door: REST in, presigned URL out, with the real stack between."""

import hashlib
import os
import signal
import time
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest
import redis

from noisemill.client import Client
from noisemill.local import Stack
from shared.ids import parse
from shared.wire import DatasetView, JobView
from tests.e2e.conftest import SMALL

# Starting and stopping seven processes takes its time where cores are few and busy.
pytestmark = pytest.mark.timeout(300)

LONG = 100_000
"""Steps that no test waits for."""


def train(client: Client, dataset: DatasetView, model: str, **fields: object) -> JobView:
    return client.train(dataset=dataset.id, model=model, **(SMALL | {"steps": 60} | fields))


@pytest.fixture(scope="module")
def model(client: Client, dataset: DatasetView) -> str:
    done = client.wait(train(client, dataset, "shared").id, 60)
    return (done.result or {})["model"]


def digests(client: Client, job: JobView) -> list[str]:
    return [artifact.sha256 for artifact in client.artifacts(job.id) if artifact.kind == "sample"]


def test_a_model_is_trained_from_an_upload_and_its_samples_are_fetched_by_link(
    client: Client, dataset: DatasetView, model: str, tmp_path: Path
) -> None:
    job = client.wait(client.generate(model=model, num_samples=3, seed=5).id, 60)

    samples = [artifact for artifact in client.artifacts(job.id) if artifact.kind == "sample"]
    content = httpx.get(samples[0].url).content
    assert len(samples) == 3
    assert content.startswith(b"\x89PNG")
    assert hashlib.sha256(content).hexdigest() == samples[0].sha256


def test_a_training_shows_its_figures_on_both_splits(client: Client, model: str) -> None:
    version = client.model_version(model)

    assert {"train", "held_out"} <= set(version.metrics)
    assert version.metrics["held_out"]["elbo"] < 0
    assert {"job.metric", "job.preview", "job.progress"} <= {event.type for event in client.events(version.job_id)}


def test_a_model_is_measured_by_a_job_and_measured_again_it_is_the_same(
    client: Client, dataset: DatasetView, model: str
) -> None:
    asked = {"model": model, "dataset": dataset.id, "split": "train", "num_samples": 40, "metrics": ["mind", "scores"]}
    first, second = (client.wait(client.evaluate(**asked).id, 60) for _ in range(2))

    figures = (first.result or {})["figures"]
    assert figures["elbo"]["value"] <= figures["iwae64"]["value"] and figures["mind"]["num_samples"] == 40
    assert (second.result or {})["figures"] == figures
    assert {artifact.name for artifact in client.artifacts(first.id)} == {"sheet.png", "evaluation.json"}


def test_whatever_a_job_made_is_made_again_byte_for_byte(client: Client, dataset: DatasetView, model: str) -> None:
    spec = {"model": model, "dataset": dataset.id, "split": "train", "num_samples": 40, "metrics": ["mind"]}
    drawn, measured = client.generate(model=model, num_samples=3, seed=5), client.evaluate(**spec)
    training, ingestion = client.model_version(model).job_id, client.dataset(dataset.id).job_id
    done = [client.wait(job_id, 90).id for job_id in (drawn.id, measured.id, training, ingestion or "")]
    before = client.model(model.partition("@")[0]).latest

    again = [client.reproduce(job_id).id for job_id in done]
    found = [(client.wait(job_id, 90).result or {})["reproduction"] for job_id in again]

    assert [one["of"] for one in found] == done
    assert [one["identical"] for one in found] == [True] * 4
    assert client.model(model.partition("@")[0]).latest == before
    assert client.dataset(dataset.id) == dataset


def test_a_job_that_made_something_else_is_found_out(client: Client, addresses: dict, model: str) -> None:
    job = client.wait(client.generate(model=model, num_samples=2, seed=6).id, 60)
    change = """UPDATE jobs SET result = jsonb_set(
        jsonb_set(result, '{sha256}', '"other"'), '{fingerprint,torch}', '"1.0"') WHERE id = %s"""
    with psycopg.connect(addresses["database_url"].replace("+psycopg", "")) as connection:
        connection.execute(change, [parse("job", job.id)])

    again = client.wait(client.reproduce(job.id).id, 60)

    found = (again.result or {})["reproduction"]
    assert (found["identical"], found["expected_sha256"]) == (False, "other")
    assert found["found_sha256"] == (job.result or {})["sha256"]
    assert found["differing"].keys() == {"torch"}


def test_the_same_seed_gives_the_same_bytes_in_another_order_on_another_worker(
    client: Client, stack: Stack, model: str
) -> None:
    first = {seed: client.wait(client.generate(model=model, num_samples=4, seed=seed).id, 60) for seed in (1, 2)}
    worker = stack.up()["pids"]["worker-generate-1"]
    os.kill(worker, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(worker)] if psutil.pid_exists(worker) else [], timeout=5)
    assert stack.up()["pids"]["worker-generate-1"] != worker
    second = {seed: client.wait(client.generate(model=model, num_samples=4, seed=seed).id, 60) for seed in (2, 1)}

    for seed in (1, 2):
        assert digests(client, first[seed]) == digests(client, second[seed])
    assert digests(client, first[1]) != digests(client, first[2])


def test_fewer_samples_of_a_seed_are_the_first_of_more(client: Client, model: str) -> None:
    few, many = (client.wait(client.generate(model=model, num_samples=n, seed=9).id, 60) for n in (1, 11))

    assert digests(client, few) == digests(client, many)[:1]


def test_a_cancel_of_a_training_frees_the_worker_within_two_seconds(client: Client, dataset: DatasetView) -> None:
    job = train(client, dataset, "canceled", steps=LONG)
    next(event for event in client.events(job.id) if event.type == "job.progress" and event.data["step"] > 0)

    asked = time.monotonic()
    client.cancel(job.id)
    while not (job := client.job(job.id)).is_final:
        time.sleep(0.02)

    assert time.monotonic() - asked < 2
    assert job.state == "canceled"
    assert client.wait(train(client, dataset, "after-cancel").id, 30).state == "succeeded"


def test_a_training_whose_worker_was_killed_ends_with_the_weights_of_one_that_was_not(
    client: Client, stack: Stack, dataset: DatasetView
) -> None:
    spec = {"steps": 1000, "checkpoint_every": 100, "preview_every": 1000, "seed": 3}
    undisturbed = client.wait(train(client, dataset, "quiet", **spec).id, 90)
    job = train(client, dataset, "killed", **spec)
    next(event for event in client.events(job.id) if event.type == "job.checkpoint")

    os.kill(stack.up()["pids"]["worker-train-1"], signal.SIGKILL)
    stack.up()
    killed = client.wait(job.id, 90)

    assert [attempt.outcome for attempt in killed.attempts] == ["lost", "succeeded"]
    assert weights(client, killed) == weights(client, undisturbed)


def weights(client: Client, job: JobView) -> dict[str, bytes]:
    """The trained tensors, without the description in the file's header."""
    from safetensors.numpy import load

    (artifact,) = [a for a in client.artifacts(job.id) if a.name == "model.safetensors"]
    return {name: tensor.tobytes() for name, tensor in load(httpx.get(artifact.url).content).items()}


def test_a_job_whose_bell_was_flushed_from_the_broker_runs(client: Client, addresses: dict, model: str) -> None:
    with redis.Redis.from_url(addresses["broker_url"]) as broker:
        job = client.generate(model=model, num_samples=1, seed=0)
        broker.flushall()

    assert client.wait(job.id, 30).state == "succeeded"


def test_a_job_runs_while_the_broker_is_down(client: Client, stack: Stack, model: str) -> None:
    os.kill(stack.up()["pids"]["valkey"], signal.SIGKILL)

    asked = time.monotonic()
    job = client.generate(model=model, num_samples=1, seed=0)
    assert time.monotonic() - asked < 1
    assert client.wait(job.id, 40).state == "succeeded"
    stack.up()


def test_flower_shows_readable_tasks_to_those_who_sign_in(client: Client, stack: Stack, model: str, wait_until) -> None:
    addresses = stack.up()
    job = client.wait(client.generate(model=model, num_samples=1, seed=0).id, 30)
    sign_in = (addresses["flower_user"], addresses["flower_password"])

    def tasks() -> list[dict]:
        return list(httpx.get(f"{addresses['flower_url']}/api/tasks", auth=sign_in).json().values())

    wait_until(
        lambda: [t for t in tasks() if job.id in t["args"] and t["name"] == "generate" and "shared@1" in t["args"]]
    )
    assert httpx.get(f"{addresses['flower_url']}/tasks").status_code == 401


def test_data_survives_down_and_up(client: Client, stack: Stack, model: str) -> None:
    stack.down()
    stack.up()

    assert client.model_version(model).ref == model
    assert client.wait(client.generate(model=model, num_samples=1, seed=0).id, 30).state == "succeeded"
