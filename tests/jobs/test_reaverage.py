"""A finished training's weights, averaged over another length by a job of its own."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

from shared.errors import ModelLoadFailed
from shared.specs.reaverage import AVERAGES
from tests.jobs.conftest import SPEC
from tests.jobs.folder_run import FolderRun
from worker.engine.averages import LENGTHS
from worker.jobs.generate import generate
from worker.jobs.reaverage import reaverage
from worker.jobs.train import train
from worker.run import Assignment, Stopped

MakeRun = Callable[..., FolderRun]
POWER = {"ema": "power", "ema_snapshots": 4, "learning_rate": 1e-2}


def averages_of(run: FolderRun) -> dict[str, Any]:
    (found,) = [one for one in run.artifacts("weights") if one.name == AVERAGES]
    return found.stored.as_json()


def reaverage_run(run: FolderRun, result: dict[str, Any], fence: int, **spec: Any) -> FolderRun:
    """A run of a reaverage job with the model that ``run`` trained."""
    model = {"id": "mdl_1", "name": "bars", "version": 1, "family": "vae", "spec": {**SPEC, **POWER}}
    inputs = {
        "model": model | {"info": result["info"], "weights": result["weights"]}, "averages": averages_of(run),
        "dataset": None,
    }  # fmt: skip
    asked = {"model": "bars@1", "ema_length": 0.07, "name": "bars"} | spec
    assignment = Assignment(job_id="job_reaverage", fence=fence, type="reaverage", spec=asked, inputs=inputs)
    return FolderRun(folder=run.folder, assignment=assignment)


def weights_of(run: FolderRun, result: dict[str, Any]) -> dict[str, np.ndarray]:
    return load_safetensors((run.folder / result["weights"]["key"]).read_bytes())


def test_a_new_version_is_made_of_what_a_training_left(train_run: MakeRun, generate_run: MakeRun) -> None:
    result = train(trained := train_run(**POWER))
    registered = weights_of(trained, result)

    same = reaverage(same_run := reaverage_run(trained, result, 1, ema_length=LENGTHS[0]))
    other = reaverage(other_run := reaverage_run(trained, result, 2, ema_length=0.07))
    again = reaverage(reaverage_run(trained, result, 3, ema_length=0.07))

    recovered, shorter = weights_of(same_run, same), weights_of(other_run, other)
    assert all(np.allclose(recovered[name], registered[name], atol=1e-6) for name in registered)
    assert not all(np.allclose(shorter[name], registered[name], atol=1e-4) for name in registered)
    assert (same["profile_error"] < 1e-6, 0 < other["profile_error"] < 0.1) == (True, True)
    assert again["weights"]["sha256"] == other["weights"]["sha256"]
    assert other["info"] == {**result["info"], "ema_length": 0.07}
    assert generate(generate_run(other, model_spec=POWER, num_samples=2))["num_samples"] == 2


def test_a_resumed_training_leaves_the_same_averages(train_run: MakeRun) -> None:
    train(straight := train_run(**POWER))
    stopped = train_run(**POWER)
    stopped.stop_at = (7, "interrupt")
    with pytest.raises(Stopped):
        train(stopped)

    train(resumed := train_run(**POWER, resume=[stopped]))

    assert averages_of(resumed)["sha256"] == averages_of(straight)["sha256"]


def test_averages_of_another_network_are_refused(train_run: MakeRun) -> None:
    run = reaverage_run(trained := train_run(**POWER, hidden_dim=16), train(trained), 4)

    with pytest.raises(ModelLoadFailed, match="does not fit the network"):
        reaverage(run)


def test_a_training_that_is_averaged_exponentially_leaves_none(train_run: MakeRun) -> None:
    train(run := train_run(steps=2))

    assert [one.name for one in run.artifacts("weights")] == ["config.json", "model.safetensors"]
