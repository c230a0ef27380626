"""Samples of which the last bits do not matter, by code that is compiled meanwhile; all others know nothing of it."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from shared.specs import VaeSpec
from shared.specs.tasks import Generate
from tests.conftest import WaitUntil
from tests.jobs.conftest import SPEC, LeftBehind
from tests.jobs.folder_run import FolderRun
from worker.engine.models import MODELS
from worker.jobs import compiler
from worker.jobs.generate import generate
from worker.jobs.quickening import QUICKENINGS
from worker.jobs.train import train
from worker.run import Run

CONV = {**SPEC, "network": "conv", "base_channels": 8, "precision": "fp32", "channels_last": False}
RELAXED = {"determinism": "relaxed", "num_samples": 5}
ENDLESS = ("/bin/sh", "-c", "sleep 1000")

Drawing = Callable[..., FolderRun]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    for quickening in list(QUICKENINGS.values()):
        quickening.close()
    QUICKENINGS.clear()
    MODELS.drop_unused()


@pytest.fixture
def drawing(train_run: Callable[..., FolderRun], generate_run: Callable[..., FolderRun]) -> Drawing:
    """A run that draws from one small convolutional VAE."""
    result = train(train_run(base=CONV, steps=2))
    return lambda **spec: generate_run(result, base=CONV, **spec)


def drawn(run: Run) -> dict[str, Any]:
    return generate(run)


def samples(run: FolderRun) -> np.ndarray:
    from PIL import Image

    paths = [run.folder / one.stored.key for one in run.artifacts("sample")]
    return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int)


def test_samples_are_drawn_while_their_code_is_compiled(drawing: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "COMMAND", ENDLESS)
    plain, quickened = drawing(**RELAXED), drawing(**RELAXED, compiled=True)

    results = generate(plain), generate(quickened)

    assert np.array_equal(samples(plain), samples(quickened))
    assert results[1]["reproducibility"] == "none"


def test_what_cannot_be_compiled_is_told_to_each_job_once(drawing: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "COMMAND", ("/no/such/python",))
    runs = [drawing(**RELAXED, compiled=True) for _ in range(3)]

    for run in runs:
        generate(run)

    assert [line for line in runs[1].logs if "No such file" in line] == runs[1].logs
    assert len(runs[1].logs) == len(runs[2].logs) == 1


def test_exact_samples_have_a_network_that_is_never_compiled(drawing: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "COMMAND", ENDLESS)
    first, quickened, last = drawing(), drawing(**RELAXED, compiled=True), drawing()

    digests = [generate(run)["sha256"] for run in (first, quickened, last)]

    assert digests[0] == digests[2]
    assert [run.found for run in (first, quickened, last)] == [[False], [False], [True]]


def test_exact_samples_cannot_be_asked_for_in_compiled_code() -> None:
    with pytest.raises(ValidationError, match="relaxed"):
        Generate(task="generate", model="m@1", compiled=True)


def test_a_network_without_blocks_is_refused() -> None:
    spec = VaeSpec.model_validate(SPEC)
    asked = Generate(task="generate", model="m@1", compiled=True, determinism="relaxed")

    with pytest.raises(PydanticCustomError, match="no repeated blocks"):
        spec.check_task(asked, {"shape": [1, 12, 12]})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_samples_by_compiled_code_are_those_of_plain_code_up_to_rounding(
    drawing: Drawing, wait_until: WaitUntil, left_behind: LeftBehind
) -> None:
    plain = drawing(**RELAXED)
    generate(plain)
    generate(drawing(**RELAXED, compiled=True))
    (quickening,) = QUICKENINGS.values()
    wait_until(lambda: quickening._compiler.is_done, timeout=800)
    quickened = drawing(**RELAXED, compiled=True)

    generate(quickened)

    assert quickening.trouble is None
    assert quickening.num_taken > 0
    assert np.abs(samples(plain) - samples(quickened)).max() <= 1
    assert left_behind() == []
