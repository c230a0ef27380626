"""The client against the real API, with real SQL, broker and storage; the worker is played by hand."""

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import chain, repeat
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from noisemill.client import Client
from noisemill.errors import ApiError, JobCanceled, JobFailed
from shared.errors import NanLoss, WorkerLost
from shared.jobs.attempts import Claim
from shared.settings import Settings
from shared.storage import Storage
from tests.client.conftest import API_KEY
from tests.client.hand import Hand, job_of
from tests.client.proxy import BreakingProxy


def _train(client: Client, dataset_id: str, **fields: object) -> str:
    return client.train(family="vae", dataset=dataset_id, model="digits", steps=100, **fields).id


def _work(hand: Hand, claim: Claim, num_steps: int) -> None:
    for step in range(1, num_steps + 1):
        hand.step(claim, step, num_steps, loss=1 / step, rate=10.0, eta_seconds=1.0)
    hand.train(claim)


def test_a_job_is_followed_to_its_end_through_a_network_that_keeps_breaking(
    api_url: str, real: Client, hand: Hand, dataset_id: str
):
    job_id = _train(real, dataset_id)
    proxy = BreakingProxy(api_url, chain([700, 150, 1500, 0], repeat(None)))

    with proxy.running(), Client(proxy.url, API_KEY) as client, ThreadPoolExecutor(1) as worker:
        claim = hand.claim("train")
        working = worker.submit(_work, hand, claim, 60)
        seqs = [event.seq for event in client.events(job_id)]
        working.result()

    assert seqs == list(range(1, 64))
    assert proxy.num_connections >= 5


def test_a_submit_through_a_network_that_loses_answers_makes_one_job(
    api_url: str, real: Client, hand: Hand, dataset_id: str
):
    proxy = BreakingProxy(api_url, iter([0, 10, 200]))

    with proxy.running(), Client(proxy.url, API_KEY) as client:
        job_id = client.submit(
            {
                "type": "train",
                "spec": {"family": "vae", "dataset": dataset_id, "model": "once", "steps": 100},
                "labels": {"test": "once"},
            }
        ).id

    assert [job.id for job in real.jobs(labels={"test": "once"})] == [job_id]
    hand.train(hand.claim("train"))


def test_a_dataset_becomes_a_model_becomes_samples(real: Client, hand: Hand, dataset_id: str, tmp_path: Path):
    trained = _train(real, dataset_id)
    claim = hand.claim("train")
    assert job_of(claim) == trained
    hand.train(claim)
    job = real.wait(trained, 20)
    ref = (job.result or {})["model"]

    drawn = real.generate(model=ref, num_samples=2)
    hand.succeed(hand.claim("generate"), {"sample-0000.png": b"zero", "sample-0001.png": b"one" * 100_000})
    real.wait(drawn.id, 20)

    artifacts = real.artifacts(drawn.id, kind="sample")
    files = [real.download(artifact, tmp_path) for artifact in artifacts]
    assert [file.name for file in files] == ["sample-0000.png", "sample-0001.png"]
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] == [item.sha256 for item in artifacts]
    assert real.model_version("digits").ref == real.model_version(ref).ref == ref
    assert "digits" in [model.name for model in real.models()]
    assert real.artifact(artifacts[0].id).name == "sample-0000.png"


def test_a_download_survives_a_network_that_keeps_breaking(
    settings: Settings, real: Client, hand: Hand, dataset_id: str, tmp_path: Path
):
    body = bytes(range(256)) * 2000
    job_id = _train(real, dataset_id)
    hand.train(hand.claim("train"), body)
    artifact = real.artifacts(job_id)[0]
    key = urlsplit(artifact.url).path.removeprefix(f"/{settings.s3.bucket}/")
    proxy = BreakingProxy(settings.s3.endpoint or "", iter([100_000, 0, 200_000]))

    with proxy.running():
        # Signed for the proxy's address, as a presigned URL holds for one host.
        link = Storage(settings.s3.model_copy(update={"public_endpoint": proxy.url})).link(key)
        path = real.download(artifact.model_copy(update={"url": link}), tmp_path / "weights")

    assert proxy.num_connections == 4
    assert path.read_bytes() == body


@pytest.mark.parametrize("direct", [False, True], ids=["through the API", "straight to storage"])
def test_an_upload_arrives(real: Client, hand: Hand, tmp_path: Path, direct: bool):
    (tmp_path / "zip").mkdir()
    with zipfile.ZipFile(tmp_path / "zip" / "Zahlen ü.zip", "w") as archive:
        archive.writestr("a.png", bytes(100_000))
    sent: list[int] = []

    dataset = real.upload_dataset(
        tmp_path / "zip" / "Zahlen ü.zip", modality="image", resolution=32, direct=direct, on_bytes=sent.append
    )
    claim = hand.claim("ingest")
    hand.succeed(claim, modality="image", count=1, digest="1" * 64, info={}, files=[])

    source = claim.inputs["source"]
    content = (tmp_path / "zip" / "Zahlen ü.zip").read_bytes()
    assert (source["sha256"], source["size_bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
    assert real.wait_dataset(dataset.id, 20).state == "ready"
    assert sum(sent) == len(content)


def test_a_folder_is_uploaded_as_a_zip_of_what_is_visible_in_it(real: Client, hand: Hand, tmp_path: Path):
    for name in ("photos/cats/1.png", "photos/dogs/1.png", "photos/.hidden/2.png", "photos/.DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())

    dataset = real.upload_dataset(tmp_path / "photos")
    claim = hand.claim("ingest")

    hand._storage.download(claim.inputs["source"]["key"], tmp_path / "arrived.zip")
    with zipfile.ZipFile(tmp_path / "arrived.zip") as archive:
        assert archive.namelist() == ["cats/1.png", "dogs/1.png"]
    assert dataset.name == "photos"
    hand.succeed(claim, modality="image", count=2, digest="2" * 64, info={}, files=[])


def test_a_failed_job_says_why(real: Client, hand: Hand, dataset_id: str):
    job_id = _train(real, dataset_id)
    hand.fail(hand.claim("train"), NanLoss("the loss is not a number at step 7"))

    with pytest.raises(JobFailed, match=r"nan_loss\): the loss is not a number at step 7"):
        real.wait(job_id, 20)
    assert [attempt.outcome for attempt in real.attempts(job_id)] == ["failed"]


def test_a_canceled_job_is_told_to_who_waits_for_it(real: Client, hand: Hand, dataset_id: str):
    job_id = _train(real, dataset_id)
    claim = hand.claim("train")

    assert real.cancel(job_id).state == "canceling"
    assert real.cancel(job_id).state == "canceling"
    hand.hand_back(claim)

    with pytest.raises(JobCanceled):
        real.wait(job_id, 20)


def test_a_training_is_paused_and_goes_on_as_the_same_job(real: Client, hand: Hand, dataset_id: str):
    job_id = _train(real, dataset_id)
    claim = hand.claim("train")

    states = [real.pause(job_id).state]
    hand.hand_back(claim)
    states += [real.pause(job_id).state, real.resume(job_id).state]
    hand.train(hand.claim("train"))

    assert states == ["pausing", "paused", "queued"]
    assert real.wait(job_id, 20).attempt == 2


def test_a_failed_job_is_retried_as_another_which_names_it(real: Client, hand: Hand, dataset_id: str):
    job_id = _train(real, dataset_id)
    hand.fail(hand.claim("train"), NanLoss("no number"))

    again = real.retry(job_id)
    hand.train(hand.claim("train"))

    assert real.retry(job_id).id == again.id == real.job(job_id).retried_by
    assert real.wait(again.id, 20).retry_of == job_id


def test_a_dataset_is_there_although_its_ingestion_was_erased(real: Client, hand: Hand, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", b"an image")
    dataset = real.upload_dataset(tmp_path / "a.zip")
    hand.ingest()
    assert dataset.job_id is not None

    real.erase(dataset.job_id)
    real.erase(dataset.job_id)

    assert real.wait_dataset(dataset.id, 20).state == "ready"
    with pytest.raises(ApiError) as raised:
        real.job(dataset.job_id)
    assert raised.value.code == "gone"


def test_a_job_that_failed_in_several_ways_names_them(real: Client, hand: Hand, dataset_id: str):
    job_id = _train(real, dataset_id)
    hand.fail(hand.claim("train"), WorkerLost("gone"), backoff=timedelta(0))
    hand.fail(hand.claim("train"), NanLoss("the loss is not a number at step 7"))

    with pytest.raises(JobFailed, match=r"after 2 attempts .* ended by worker_lost, nan_loss"):
        real.wait(job_id, 20)


def test_a_wrong_spec_names_the_field_and_makes_no_job(real: Client, dataset_id: str):
    before = [job.id for job in real.jobs()]

    with pytest.raises(ApiError, match="/spec/learning_rate"):
        _train(real, dataset_id, learning_rate=-1)
    assert [job.id for job in real.jobs()] == before


def test_a_wrong_key_says_where_keys_come_from(api_url: str):
    with Client(api_url, "nm_wrong") as client, pytest.raises(ApiError, match="NOISEMILL_API_KEY"):
        list(client.jobs())


def test_workers_can_be_listed(real: Client):
    assert real.workers() == []
