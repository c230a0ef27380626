"""The best state of a training by what it draws: a distance of samples to held-out images, as ``best_by`` may say."""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic_core import PydanticCustomError
from torch import Tensor

from shared.errors import DatasetInvalid
from shared.specs import FAMILIES as SPECS
from tests.jobs.conftest import DIFFUSION, SPEC
from tests.jobs.folder_run import FolderRun, store_array
from tests.jobs.test_best import measured, weights_of
from worker.engine.sampling import Tile
from worker.jobs import nearness
from worker.jobs import train as training
from worker.jobs.generate import generate
from worker.jobs.previews import Previewer
from worker.jobs.train import train
from worker.metrics import sets
from worker.metrics.features import dct
from worker.run import Stopped

MakeRun = Callable[..., FolderRun]
NUM_DRAWN = 24
FIELDS = {"checkpoint_every": 4, "learning_rate": 1e-2, "preview_every": 4, "best_by": "frechet_distance"}
FIGURES = {"frechet_distance", "kernel_distance"}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are drawn, so that a test takes a moment."""
    for module in (nearness, training):
        monkeypatch.setattr(module, "NUM_DRAWN", NUM_DRAWN)


def held_out(folder: Path) -> Tensor:
    """Every eighth image."""
    shards = [np.load(folder / f"datasets/images-0000{shard}.npy") for shard in range(2)]
    return torch.from_numpy(np.concatenate(shards)[::8])


@pytest.mark.parametrize("figure", sorted(FIGURES))
def test_the_figure_is_that_of_what_the_model_draws(
    train_run: MakeRun, generate_run: MakeRun, tmp_path: Path, figure: str
) -> None:
    """Drawn by a generate job of the same seed, and compared by what evaluate jobs compare with."""
    run = train_run(**FIELDS | {"best_by": figure})
    result = train(run)

    generate(drawing := generate_run(result, num_samples=NUM_DRAWN, seed=0))

    found = [np.asarray(Image.open(BytesIO(drawing.body(one)))) for one in drawing.artifacts("sample")]
    samples, reference = torch.from_numpy(np.stack(found))[:, None], held_out(tmp_path)
    features = dct()
    expected = sets.values(features.of(samples), features.of(reference), [figure])
    assert {split: values[figure] for split, values in result["metrics"].items() if figure in values} == {
        "held_out": pytest.approx(expected[figure], rel=1e-5)
    }
    told = {"num_samples": NUM_DRAWN, "features": features.digest, "reference": sets.digest(reference)}
    assert {name: result["best"][name] for name in told} == told


@pytest.mark.parametrize("fields", [{}, {"base": DIFFUSION, "steps": 2, "preview_every": 1}])
def test_the_state_whose_samples_are_nearest_is_registered(train_run: MakeRun, fields: dict[str, Any]) -> None:
    run = train_run(**FIELDS | {"weights": "best"} | fields)

    result = train(run)

    figures = measured(run, "frechet_distance")
    step = min(figures, key=figures.__getitem__)
    assert (result["best"]["by"], result["best"]["step"]) == ("frechet_distance", step)
    assert result["best"]["value"] == figures[step] == result["metrics"]["held_out"]["frechet_distance"]
    assert len(figures) == len([*run.artifacts("preview")]) > 1


def test_measuring_samples_changes_nothing_of_the_training(train_run: MakeRun) -> None:
    plain, drawn = train_run(**FIELDS | {"best_by": None}), train_run(**FIELDS)
    results = train(plain), train(drawn)

    first, second = weights_of(plain, results[0]), weights_of(drawn, results[1])
    assert all(np.array_equal(first[name], second[name]) for name in first)
    sheets = [[run.body(one) for one in run.artifacts("preview")] for run in (plain, drawn)]
    assert sheets[0] == sheets[1]


@pytest.mark.parametrize("fields", [{}, {"base": DIFFUSION, "steps": 6, "preview_every": 2}])
@pytest.mark.parametrize("calls", [0, 2])
def test_a_training_that_was_stopped_while_it_was_measured_goes_on_to_the_same_best(
    train_run: MakeRun, monkeypatch: pytest.MonkeyPatch, calls: int, fields: dict[str, Any]
) -> None:
    """Stopped when samples are drawn and when they are compared: what is measured again is measured as before."""
    given = FIELDS | {"weights": "best"} | fields
    straight = train(whole := train_run(**given))
    stopped = train_run(**given)
    _stop_in_the_second_measurement(stopped, monkeypatch, calls)
    with pytest.raises(Stopped):
        train(stopped)

    resumed = train(again := train_run(**given, resume=[stopped]))

    assert (resumed["best"], resumed["metrics"]) == (straight["best"], straight["metrics"])
    assert resumed["weights"]["sha256"] == straight["weights"]["sha256"]
    found = {**measured(stopped, "frechet_distance"), **measured(again, "frechet_distance")}
    assert found == measured(whole, "frechet_distance")


def _stop_in_the_second_measurement(run: FolderRun, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """So many calls of ``step`` after its samples are asked for."""
    asked: list[int] = []
    drawn = Previewer.drawn

    def counted(previewer: Previewer, num_samples: int | None, on_step: Any) -> Tensor | None:
        if num_samples is not None:
            asked.append(len(run.steps))
        return drawn(previewer, num_samples, on_step)

    step = run.step

    def stopping(at: int, steps: int, **values: float) -> None:
        step(at, steps, **values)
        if len(asked) == 2 and run.stop_at is None and len(run.steps) > asked[1] + calls:
            run.stop_at = (at, "interrupt")
            raise Stopped("interrupt")

    monkeypatch.setattr(Previewer, "drawn", counted)
    monkeypatch.setattr(run, "step", stopping)


def _lose(monkeypatch: pytest.MonkeyPatch, index: int, step: int) -> None:
    """Of what is drawn after ``step`` one sample comes out as no number."""
    now: list[int] = []
    drawn, finish = Previewer.drawn, Tile._finish

    def noting(previewer: Previewer, num_samples: int | None, on_step: Any) -> Tensor | None:
        now[:] = [previewer.trainer.step]
        return drawn(previewer, num_samples, on_step)

    def losing(tile: Tile[Any], slot: int) -> Tensor | None:
        occupant = tile._slots[slot]
        is_lost = now == [step] and occupant is not None and occupant.draw.index == index
        return None if is_lost else finish(tile, slot)

    monkeypatch.setattr(Previewer, "drawn", noting)
    monkeypatch.setattr(Tile, "_finish", losing)


def test_a_state_whose_samples_are_no_numbers_is_not_the_best(
    train_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends no training, either, whose weights are numbers."""
    fields = FIELDS | {"weights": "best"}
    best = train(whole := train_run(**fields))["best"]["step"]
    _lose(monkeypatch, index=5, step=best)

    result = train(run := train_run(**fields))

    figures = {step: value for step, value in measured(whole, "frechet_distance").items() if step != best}
    assert measured(run, "frechet_distance") == figures
    assert result["best"]["step"] == min(figures, key=figures.__getitem__)
    trouble = "sample 5 came out as no number: the model or what was asked of it is too extreme."
    assert run.logs == [
        f"There is no sheet of samples after step {best}: {trouble}",
        f"What it draws after step {best} was not measured: {trouble}",
    ]


def test_a_distance_that_is_no_number_says_nothing_of_a_state(
    train_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "values", lambda *_: {"frechet_distance": np.nan})

    result = train(run := train_run(**FIELDS))

    assert result["best"] is None
    assert measured_steps(run) == [4, 8, 12]
    assert run.logs == [
        f"What it draws after step {step} was not measured: the frechet_distance to held-out images is no number."
        for step in measured_steps(run)
    ]


def measured_steps(run: FolderRun) -> list[int]:
    return [step for step, split, _ in run.measured if split == "held_out"]


def test_samples_are_compared_to_all_held_out_images_though_few_are_trained_on(
    train_run: MakeRun, dataset: dict[str, Any], tmp_path: Path
) -> None:
    is_held_out = np.ones(64, np.uint8)
    is_held_out[0] = 0
    dataset["files"][2] = store_array(tmp_path, "split.npy", is_held_out)

    best = train(train_run(**FIELDS))["best"]

    shards = [np.load(tmp_path / f"datasets/images-0000{shard}.npy") for shard in range(2)]
    assert best["reference"] == sets.digest(torch.from_numpy(np.concatenate(shards)[1:]))


def test_images_that_samples_are_compared_to_are_not_kept() -> None:
    """All of them may be gigabytes, and a training lasts."""
    images, read = torch.arange(48 * 64, dtype=torch.uint8).view(48, 1, 8, 8), list[ReferenceType[Tensor]]()

    def held_out() -> Iterator[Tensor]:
        for part in images.split(nearness.BATCH_SIZE):
            copied = part.clone()
            read.append(ref(copied))
            yield copied

    near = nearness.Nearness("frechet_distance", images.shape, held_out)
    figure = near.of(images.flip(3), lambda: None)

    assert len(read) == 3
    assert not any(part() is not None for part in read)
    assert figure == sets.values(dct().of(images.flip(3)), dct().of(images), ["frechet_distance"])
    assert near.told()["reference"] == sets.digest(images)


@pytest.mark.parametrize("num_held_out", [0, 1])
def test_one_image_is_nothing_to_compare_to(
    train_run: MakeRun, dataset: dict[str, Any], tmp_path: Path, num_held_out: int
) -> None:
    is_held_out = np.zeros(64, np.uint8)
    is_held_out[:num_held_out] = 1
    dataset["files"][2] = store_array(tmp_path, "split.npy", is_held_out)
    spec: Any = SPECS["vae"].model_validate({**SPEC, "best_by": "frechet_distance"})

    with pytest.raises(DatasetInvalid, match=f"needs 2 held-out images, and the dataset has {num_held_out}"):
        train(train_run(**FIELDS))
    with pytest.raises(PydanticCustomError) as refused:
        spec.check_data({"dataset": {"shape": [1, 12, 12], "counts": {"train": 60, "held_out": num_held_out}}})
    assert refused.value.context["field"] == "best_by"  # pyright: ignore[reportOptionalSubscript]
