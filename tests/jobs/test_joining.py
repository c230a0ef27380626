"""Jobs that join others on the device, and what these feel of it."""

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from shared.errors import InputGone, NanLoss
from tests.jobs.conftest import DATASET_ID, DIFFUSION
from tests.jobs.folder_desk import served
from tests.jobs.folder_run import FolderRun
from tests.jobs.test_generate import samples_of
from worker.engine.models import MODELS
from worker.engine.sampling import Tile
from worker.families.nets.solving import FromNoise
from worker.jobs.generate import generate
from worker.jobs.train import train
from worker.run import Stopped, StoredObject

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


def test_a_sample_that_is_no_number_ends_its_job_alone(
    train_run: MakeRun, generate_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, start = train(train_run(base=DIFFUSION)), FromNoise.start

    def asked(seed: int) -> FolderRun:
        return generate_run(trained, base=DIFFUSION, num_samples=2, steps=4 + seed, seed=seed)

    def start_spoiled(sampler: FromNoise, draws: Any, noise: Any) -> Any:
        state = start(sampler, draws, noise)
        return state | {"x": state["x"] * torch.inf} if draws[0].request.seed == 1 else state

    alone, together = [asked(0), asked(2)], [asked(seed) for seed in range(3)]
    expected = [generate(run)["sha256"] for run in alone]
    monkeypatch.setattr(FromNoise, "start", start_spoiled)
    results = served(*together)

    assert isinstance(results[1], NanLoss)
    assert [results[0]["sha256"], results[2]["sha256"]] == expected
    assert [samples_of(run) for run in (together[0], together[2])] == [samples_of(run) for run in alone]


def test_a_canceled_job_has_left_its_slots_before_the_next_step(
    train_run: MakeRun, generate_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of it that waits for a slot takes one."""
    trained, step = train(train_run(base=DIFFUSION)), Tile.step
    canceled = generate_run(trained, base=DIFFUSION, num_samples=20, solver="euler", steps=30)
    canceled.stop_at = (2 * 8, "cancel")
    other = generate_run(trained, base=DIFFUSION, num_samples=1, solver="euler", steps=12)
    taken: list[int] = []

    def step_counted(tile: Tile[Any]) -> Any:
        taken.append(tile.width - tile.num_free)
        return step(tile)

    monkeypatch.setattr(Tile, "step", step_counted)
    results = served(canceled, other)

    assert isinstance(results[0], Stopped)
    assert results[1]["num_samples"] == 1
    assert taken == [8] * 2 + [1] * 12
