"""Which jobs find their model on the device."""

from collections.abc import Callable

import pytest

from shared.settings import WorkerSettings
from tests.jobs.folder_run import FolderRun
from worker.engine.models import MODELS
from worker.jobs.generate import generate
from worker.jobs.train import train
from worker.runner import choose_device

MakeRun = Callable[..., FolderRun]


@pytest.mark.parametrize(
    ("rooms", "found"), [(0, [False, True, False, False]), (1, [False, True, False, False]), (2, [False, True] * 2)]
)
def test_models_are_kept_as_far_as_the_worker_has_room_for_them(
    train_run: MakeRun, generate_run: MakeRun, monkeypatch: pytest.MonkeyPatch, rooms: int, found: list[bool]
) -> None:
    """The model that was used last stays, even where there is room for none."""
    trained, other = (train(train_run(steps=steps)) for steps in (2, 3))
    MODELS.drop_unused()
    monkeypatch.setattr(MODELS, "limit_bytes", None)
    size_bytes = trained["weights"]["size_bytes"]
    runs = [generate_run(model, num_samples=1) for model in (trained, trained, other, trained)]

    choose_device(WorkerSettings(device="cpu", model_bytes=rooms * size_bytes))
    for run in runs:
        generate(run)

    assert [run.found[0] for run in runs] == found
