"""The best state of a training, by a held-out figure: named in the result, and registered where that was asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load as load_safetensors

from shared.errors import DatasetInvalid, NanLoss
from shared.specs import FAMILIES as SPECS
from tests.jobs.conftest import SPEC
from tests.jobs.folder_run import FolderRun, store_array
from worker.engine.training import Trainer
from worker.jobs.generate import generate
from worker.jobs.train import train
from worker.run import Stopped

MakeRun = Callable[..., FolderRun]
FIELDS = {"checkpoint_every": 4, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def contrary(dataset: dict[str, Any], tmp_path: Path) -> None:
    """Held-out images are the negatives of what is learnt, so that the first state measured is the best."""
    for shard in range(2):
        images = np.load(tmp_path / f"datasets/images-0000{shard}.npy")
        images[::8] = 255 - images[::8]
        dataset["files"][shard] = store_array(tmp_path, f"images-0000{shard}.npy", images)


def measured(run: FolderRun, figure: str) -> dict[int, float]:
    found = {step: values for step, split, values in run.measured if split == "held_out"}
    return {step: values[figure] for step, values in found.items() if figure in values}


def weights_of(run: FolderRun, result: dict[str, Any]) -> dict[str, np.ndarray]:
    return load_safetensors((run.folder / result["weights"]["key"]).read_bytes())


def averages_at(run: FolderRun, step: int) -> dict[str, np.ndarray]:
    """The averaged weights in the checkpoint of ``step``."""
    (found,) = [one for one in run.artifacts("checkpoint") if one.metadata["step"] == step]
    tensors = load_safetensors(run.body(found))
    return {name.removeprefix("average."): one for name, one in tensors.items() if name.startswith("average.")}


@pytest.mark.parametrize(("figure", "choose"), [(None, min), ("elbo", max)])
def test_the_result_names_the_step_that_was_measured_best(
    train_run: MakeRun, figure: str | None, choose: Callable[..., Any]
) -> None:
    run = train_run(**FIELDS, best_by=figure)

    best = train(run)["best"]

    figures = measured(run, figure or "loss")
    step = choose(figures, key=figures.__getitem__)
    assert best == {"by": figure or "loss", "step": step, "value": figures[step]}
    assert step == 4
    # The checkpoint that is kept beside the last ones is that of the lowest score.
    scores = {one.metadata["step"]: one.metadata["score"] for one in run.artifacts("checkpoint")}
    assert scores[4] == (figures[4] if choose is min else -figures[4])


def test_the_last_weights_are_registered_unless_the_best_are_asked_for(train_run: MakeRun) -> None:
    last, best = train_run(**FIELDS), train_run(**FIELDS, weights="best")
    results = train(last), train(best)

    step = results[0]["best"]["step"]
    assert results[0]["best"] == results[1]["best"]
    expected = averages_at(last, step)
    registered = weights_of(best, results[1])
    assert registered.keys() == expected.keys()
    assert all(np.array_equal(registered[name], expected[name]) for name in expected)
    trained_on = weights_of(last, results[0])
    assert not all(np.array_equal(trained_on[name], expected[name]) for name in expected)


def test_figures_and_description_are_those_of_the_registered_weights(train_run: MakeRun, generate_run: MakeRun) -> None:
    run = train_run(**FIELDS, weights="best")

    result = train(run)

    step = result["best"]["step"]
    assert result["metrics"] == {split: values for at, split, values in run.measured if at == step}
    config = next(one for one in run.artifacts("weights") if one.name == "config.json")
    assert (json.loads(run.body(config))["step"], result["steps"]) == (step, 12)
    assert generate(generate_run(result, num_samples=2))["num_samples"] == 2


@pytest.mark.parametrize("stop", [6, 12])
def test_a_resumed_training_registers_the_same_best_weights(train_run: MakeRun, stop: int) -> None:
    straight = train(train_run(**FIELDS, weights="best"))
    stopped = train_run(**FIELDS, weights="best")
    stopped.stop_at = (stop, "interrupt")
    with pytest.raises(Stopped):
        train(stopped)

    resumed = train(train_run(**FIELDS, weights="best", resume=[stopped]))

    assert resumed["best"] == straight["best"]
    assert resumed["metrics"] == straight["metrics"]
    assert resumed["weights"]["sha256"] == straight["weights"]["sha256"]


def test_what_was_best_outlives_going_back_to_a_checkpoint_before_it(
    train_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4 is measured, and not again when it comes again after the fault in step 6, between two checkpoints."""
    fields = FIELDS | {"checkpoint_every": 3, "weights": "best"}
    straight = train(train_run(**fields))
    faults = [5]
    advance = Trainer.advance

    def advance_with_a_fault(trainer: Trainer[Any, Any], batch: Any) -> dict[str, float]:
        if trainer.step in faults:
            faults.remove(trainer.step)
            raise NanLoss("loss is nan")
        return advance(trainer, batch)

    monkeypatch.setattr(Trainer, "advance", advance_with_a_fault)
    run = train_run(**fields)
    went_back = train(run)

    assert any("going back to step 3" in said for said in run.logs)
    assert went_back["best"] == straight["best"]
    assert went_back["weights"]["sha256"] == straight["weights"]["sha256"]


def test_without_held_out_samples_nothing_is_best(train_run: MakeRun, dataset: dict[str, Any], tmp_path: Path) -> None:
    dataset["files"][2] = store_array(tmp_path, "split.npy", np.zeros(64, np.uint8))

    assert train(train_run(steps=3))["best"] is None
    with pytest.raises(DatasetInvalid, match="no held-out samples"):
        train(train_run(weights="best"))


@pytest.mark.parametrize(
    ("family", "fields", "refused"),
    [
        ("gan", {"weights": "best"}, "weights"),
        ("gan", {"best_by": "discriminator_loss"}, "best_by"),
        ("vq", {"weights": "best"}, "weights"),
        ("vq", {"best_by": "reconstruction", "weights": "best"}, None),
        ("vae", {"best_by": "kl_bits_per_dim"}, "best_by"),
        ("vae", {"objective": "denoising", "best_by": "elbo"}, "best_by"),
        ("vae", {"best_by": "bits_per_dim"}, "best_by"),
        ("vae", {"likelihood": "logistic", "best_by": "bits_per_dim"}, None),
        ("diffusion", {"best_by": "denoising_error"}, None),
        *((family, {"best_by": "frechet_distance", "weights": "best"}, None) for family in ("gan", "vq", "vae")),
        ("diffusion", {"best_by": "kernel_distance"}, None),
        ("consistency", {"best_by": "kernel_distance", "init_from": "m@1"}, None),
        ("style", {"best_by": "frechet_distance", "style_dataset": SPEC["dataset"]}, "best_by"),
        ("translation", {"best_by": "kernel_distance", "target_dataset": SPEC["dataset"]}, "best_by"),
        ("vae", {"objective": "denoising", "best_by": "frechet_distance"}, "best_by"),
        ("vae", {"best_by": "mind"}, "best_by"),
    ],
)
def test_a_figure_that_does_not_compare_states_is_refused(
    family: str, fields: dict[str, Any], refused: str | None
) -> None:
    plain = {"family": family, "dataset": SPEC["dataset"], "model": "m"}
    if refused is None:
        assert SPECS[family].model_validate(plain | fields)
        return

    with pytest.raises(ValidationError) as error:
        SPECS[family].model_validate(plain | fields)
    assert error.value.errors()[0].get("ctx", {})["field"] == refused
