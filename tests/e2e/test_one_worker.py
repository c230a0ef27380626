"""Jobs that share their only worker: with an urgent one, with another model, with second thoughts. Real parts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from noisemill.client import Client
from shared.wire import DatasetView, JobView
from tests.chaos.servers import Installation, Setup
from tests.e2e.test_stack import digests, train, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SPEC = {"steps": 3000, "checkpoint_every": 200, "preview_every": 3000, "seed": 3}


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """Of an installation with one worker for everything."""
    folder: Path = tmp_path_factory.mktemp("one")
    with Installation(Setup(folder=folder, workers=1)).running() as installation:
        yield installation.wiring.addresses()


@pytest.fixture(scope="module")
def undisturbed(client: Client, dataset: DatasetView) -> JobView:
    return client.wait(train(client, dataset, "quiet", **SPEC).id, 180)


def begin(client: Client, dataset: DatasetView, model: str) -> str:
    job = train(client, dataset, model, **SPEC)
    next(event for event in client.events(job.id) if event.type == "job.progress" and event.data["step"] > 0)
    return job.id


def test_an_urgent_generation_takes_the_only_worker_at_a_checkpoint_and_the_training_goes_on_exactly(
    client: Client, dataset: DatasetView, undisturbed: JobView
) -> None:
    job_id = begin(client, dataset, "preempted")
    spec = {"task": "generate", "model": "quiet@1", "num_samples": 1, "seed": 0}
    urgent = client.submit({"type": "generate", "spec": spec, "priority": "high"})

    drawn = client.wait(urgent.id, 180)
    between = client.job(job_id)
    done = client.wait(job_id, 300)

    assert drawn.state == "succeeded"
    assert not between.is_final
    # On a machine that stands still for half a lease, an attempt is handed back once more.
    outcomes = [attempt.outcome for attempt in done.attempts]
    assert (outcomes[0], outcomes[-1]) == ("preempted", "succeeded")
    assert {*outcomes[1:-1]} <= {"interrupted"}
    assert weights(client, done) == weights(client, undisturbed)


def test_a_training_that_was_paused_and_resumed_ends_with_the_same_weights(
    client: Client, dataset: DatasetView, undisturbed: JobView
) -> None:
    job_id = begin(client, dataset, "paused")

    client.pause(job_id)
    while client.job(job_id).state != "paused":
        assert not client.job(job_id).is_final
    other = client.wait(client.generate(model="quiet@1", num_samples=1, seed=0).id, 120)
    client.resume(job_id)
    done = client.wait(job_id, 300)

    assert other.state == "succeeded"
    assert [attempt.outcome for attempt in done.attempts] == ["paused", "succeeded"]
    assert weights(client, done) == weights(client, undisturbed)


def test_a_long_generation_gives_way_to_another_model_and_ends_with_the_same_samples(
    client: Client, dataset: DatasetView, undisturbed: JobView
) -> None:
    assert undisturbed.state == "succeeded"
    other = client.wait(train(client, dataset, "other", steps=20).id, 60)
    asked = {"model": "quiet@1", "num_samples": 2048, "seed": 3}
    alone = client.wait(client.generate(**asked).id, 180)
    long = client.generate(**asked)
    next(event for event in client.events(long.id) if event.type == "job.progress" and event.data["step"] > 0)

    short = client.wait(client.generate(model=(other.result or {})["model"], num_samples=1, seed=0).id, 60)
    between = client.job(long.id)
    done = client.wait(long.id, 180)

    assert short.state == "succeeded"
    assert not between.is_final
    outcomes = [attempt.outcome for attempt in done.attempts]
    assert (outcomes[0], outcomes[-1]) == ("preempted", "succeeded")
    assert digests(client, done) == digests(client, alone)
    assert len(digests(client, done)) == 2048
