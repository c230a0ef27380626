"""Jobs that join others on the device, and what these feel of it."""

from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from shared.errors import InputGone
from tests.jobs.conftest import DATASET_ID
from tests.jobs.folder_run import FolderRun
from tests.jobs.test_generate import served
from worker.engine.models import MODELS
from worker.jobs.train import train
from worker.run import StoredObject

MakeRun = Callable[..., FolderRun]


@pytest.mark.parametrize("what", ["model", "pictures"])
def test_a_download_of_one_job_holds_up_no_other(
    train_run: MakeRun, generate_run: MakeRun, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, other = train(train_run(steps=2)), train(train_run(steps=3))
    MODELS.drop_unused()
    first, second = generate_run(trained, num_samples=40), generate_run(other, num_samples=1)
    if what == "pictures":
        second = generate_run(trained, task="reconstruct", dataset=DATASET_ID, num_samples=1)
    is_first_done = Event()
    first.before_publish = lambda kind: is_first_done.set() if kind == "sheet" else None
    fetch = second.fetch

    def fetch_late(stored: StoredObject) -> Path:
        assert is_first_done.wait(20)
        return fetch(stored)

    monkeypatch.setattr(second, "fetch", fetch_late)
    results = served(first, second)

    assert [results[place]["num_samples"] for place in range(2)] == [40, 1]


def test_what_cannot_be_fetched_ends_its_job_alone(train_run: MakeRun, generate_run: MakeRun) -> None:
    trained = train(train_run(steps=2))
    lost = trained["weights"] | {"key": "nowhere", "sha256": "0" * 64}
    runs = [generate_run(trained, num_samples=9), generate_run(trained | {"weights": lost})]

    results = served(*runs)

    assert results[0]["num_samples"] == 9
    assert isinstance(results[1], InputGone)
