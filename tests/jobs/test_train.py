"""What a train job leaves behind, also when it is stopped, resumed, or meets something broken."""

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load as load_safetensors

from shared.errors import DatasetInvalid, UploadFailed
from tests.jobs.conftest import SHAPE
from tests.jobs.folder_run import FolderRun, store_array
from worker.jobs import executor, server
from worker.jobs.train import milestone_interval, train
from worker.run import Stopped, StopReason, StoredObject

MakeRun = Callable[..., FolderRun]


def weights_of(run: FolderRun, result: dict[str, Any]) -> dict[str, np.ndarray]:
    return load_safetensors((run.folder / result["weights"]["key"]).read_bytes())


def stopped_run(train_run: MakeRun, step: int, reason: StopReason, **spec: Any) -> FolderRun:
    run = train_run(**spec)
    run.stop_at = (step, reason)
    with pytest.raises(Stopped, match=reason):
        train(run)
    return run


def test_every_step_is_reported_with_its_figures(train_run: MakeRun) -> None:
    run = train_run()

    train(run)

    training = [step for step, _, values in run.steps if values]
    assert training == list(range(1, 13))
    assert {"loss", "elbo", "reconstruction", "kl", "grad_norm"} <= run.steps[0][2].keys()


def test_a_training_whose_steps_cannot_be_captured_says_so_and_comes_to_the_same(train_run: MakeRun) -> None:
    plain, asking = train_run(), train_run(captured=True)

    weights, others = (weights_of(run, train(run)) for run in (plain, asking))

    assert asking.logs == ["Steps are not captured, and launched one kernel after the other: the device is no GPU."]
    assert all(np.array_equal(weights[name], others[name]) for name in weights)
    assert plain.logs == []


def test_the_phases_come_in_order(train_run: MakeRun) -> None:
    run = train_run()

    train(run)

    assert run.phases == ["loading_data", "training", "evaluating", "uploading"]


def test_the_result_describes_weights_that_are_in_storage(train_run: MakeRun) -> None:
    run = train_run()

    result = train(run)

    weights = weights_of(run, result)
    assert sum(tensor.size for tensor in weights.values()) == result["num_parameters"]
    assert (result["steps"], result["info"]) == (12, {"shape": SHAPE, "num_classes": 0})
    assert run.fetch(StoredObject(**result["weights"])).name == "model.safetensors"


def test_the_config_says_how_to_build_the_network(train_run: MakeRun) -> None:
    run = train_run()

    train(run)

    [config] = [
        json.loads(run.body(artifact)) for artifact in run.artifacts("weights") if artifact.name == "config.json"
    ]
    assert config["family"] == "vae"
    assert config["spec"]["latent_dim"] == 4
    assert config["info"]["shape"] == SHAPE


def test_both_splits_are_measured_each_epoch_with_the_last_ones_in_the_result(train_run: MakeRun) -> None:
    run = train_run()

    result = train(run)

    # 56 images in batches of 16: an epoch is 4 steps (rounded).
    assert [(step, split) for step, split, _ in run.measured] == [
        (step, split) for step in (4, 8, 12) for split in ("train", "held_out")
    ]
    assert result["metrics"] == {split: values for _, split, values in run.measured[-2:]}


def test_the_result_is_plain_json(train_run: MakeRun) -> None:
    result = train(train_run())

    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_held_out_split_is_never_trained_on(train_run: MakeRun, dataset: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the held-out images are, the weights are the same."""
    before = weights_of(run := train_run(), train(run))

    images = np.load(tmp_path / "datasets/images-00000.npy")
    images[::8] = 255 - images[::8]
    dataset["files"][0] = store_array(tmp_path, "images-00000.npy", images)
    after = weights_of(run := train_run(), train(run))

    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_previews_show_the_same_grid_through_time(train_run: MakeRun) -> None:
    run = train_run()

    train(run)

    previews = run.artifacts("preview")
    assert [artifact.metadata["step"] for artifact in previews] == [4, 8, 12]
    sizes = {Image.open(io.BytesIO(run.body(artifact))).size for artifact in previews}
    # Eight by eight images of 12 pixels, enlarged five times, and the gaps around them.
    assert sizes == {(8 * 62 + 2, 8 * 62 + 2)}


@pytest.mark.parametrize(
    ("steps", "steps_per_epoch", "interval"), [(12, 4, 4), (1, 4, 4), (200, 4, 4), (201, 4, 8), (10**7, 1, 200_000)]
)
def test_a_milestone_comes_each_epoch_but_not_more_than_fifty_times(
    steps: int, steps_per_epoch: int, interval: int
) -> None:
    assert milestone_interval(steps, steps_per_epoch) == interval


def test_previews_come_as_often_as_was_asked(train_run: MakeRun) -> None:
    run = train_run(preview_every=5)

    train(run)

    assert [artifact.metadata["step"] for artifact in run.artifacts("preview")] == [5, 10, 12]


def test_checkpoints_come_as_often_as_was_asked(train_run: MakeRun) -> None:
    run = train_run(checkpoint_every=3)

    train(run)

    steps = [artifact.metadata["step"] for artifact in run.artifacts("checkpoint")]
    # One that comes due during an upload is taken after it, so later ones may be further apart.
    assert steps[0] == 3
    assert all(later - earlier >= 3 for earlier, later in pairwise(steps))


@pytest.mark.parametrize("reason", ["interrupt", "pause"])
def test_a_stopped_training_leaves_a_checkpoint_of_its_last_step(train_run: MakeRun, reason: StopReason) -> None:
    run = stopped_run(train_run, 7, reason)

    assert run.artifacts("checkpoint")[-1].metadata["step"] == 7


def test_a_canceled_training_leaves_no_checkpoint_of_its_last_step(train_run: MakeRun) -> None:
    run = stopped_run(train_run, 7, "cancel", checkpoint_every=100)

    assert run.artifacts("checkpoint") == []


def test_a_training_stopped_right_after_a_checkpoint_does_not_write_it_twice(train_run: MakeRun) -> None:
    run = train_run(checkpoint_every=4)
    run.before_publish = lambda kind: setattr(run, "stop_at", (4, "pause")) if kind == "preview" else None

    with pytest.raises(Stopped):
        train(run)

    assert [artifact.metadata["step"] for artifact in run.artifacts("checkpoint")] == [4]


@pytest.mark.parametrize("step", [1, 5, 7, 11, 12])
def test_a_training_stopped_anywhere_resumes_to_the_same_weights(train_run: MakeRun, step: int) -> None:
    straight = weights_of(run := train_run(), train(run))

    stopped = stopped_run(train_run, step, "interrupt")
    resumed = train_run(resume=[stopped])
    result = train(resumed)

    assert result["steps"] == 12
    assert min((at for at, _, values in resumed.steps if values), default=12) == min(step + 1, 12)
    assert all(np.array_equal(straight[name], tensor) for name, tensor in weights_of(resumed, result).items())


def test_a_resumed_training_measures_what_the_straight_one_did(train_run: MakeRun) -> None:
    train(straight := train_run())
    stopped = stopped_run(train_run, 7, "interrupt")

    train(resumed := train_run(resume=[stopped]))

    assert resumed.measured == [entry for entry in straight.measured if entry[0] > 7]


def test_a_training_stopped_while_it_measures_resumes_to_the_same_weights(train_run: MakeRun) -> None:
    """The first report of step 4 is the training's, the second comes from between two batches of an evaluation."""
    straight = weights_of(run := train_run(), train(run))
    run = train_run()

    def stop_in_evaluation(kind: str) -> None:
        if kind == "preview":
            run.stop_at = (4, "interrupt")

    run.before_publish = stop_in_evaluation
    with pytest.raises(Stopped):
        train(run)

    resumed = train_run(resume=[run])
    assert all(np.array_equal(straight[name], tensor) for name, tensor in weights_of(resumed, train(resumed)).items())


def test_training_goes_on_while_a_checkpoint_is_uploaded(train_run: MakeRun) -> None:
    run = train_run(checkpoint_every=1)
    finished_training = Event()

    def wait_for_the_end(kind: str) -> None:
        if kind == "preview" and run.steps[-1][0] == 12:
            finished_training.set()
        if kind == "checkpoint":
            assert finished_training.wait(timeout=20), "training waited for the upload"

    run.before_publish = wait_for_the_end
    train(run)

    assert [artifact.metadata["step"] for artifact in run.artifacts("checkpoint")] == [1]


@pytest.mark.parametrize("checkpoint_every", [5, 10])
def test_a_checkpoint_that_cannot_be_stored_fails_the_attempt(train_run: MakeRun, checkpoint_every: int) -> None:
    run = train_run(checkpoint_every=checkpoint_every)

    def refuse(kind: str) -> None:
        if kind == "checkpoint":
            raise UploadFailed("no space")

    run.before_publish = refuse
    with pytest.raises(UploadFailed, match="no space"):
        train(run)


def test_a_dataset_without_images_is_refused(train_run: MakeRun, dataset: dict[str, Any]) -> None:
    dataset["files"] = dataset["files"][1:]

    with pytest.raises(DatasetInvalid):
        train(train_run())


def test_a_dataset_without_held_out_images_is_measured_on_the_train_split(
    train_run: MakeRun, dataset: dict[str, Any], tmp_path: Path
) -> None:
    dataset["files"][2] = store_array(tmp_path, "split.npy", np.zeros(64, np.uint8))

    result = train(train_run(steps=3))

    assert result["metrics"].keys() == {"train"}


def test_the_same_spec_gives_the_same_file(train_run: MakeRun) -> None:
    first, second = (train(train_run())["weights"]["sha256"] for _ in range(2))

    assert first == second


@pytest.mark.parametrize("job_type", ["train", "evaluate", "reaverage", "export"])
def test_executors_are_found_by_the_type_of_the_job(job_type: str) -> None:
    assert executor(job_type).__name__ == job_type
    assert server(job_type) is None


def test_jobs_that_share_the_device_are_served_together() -> None:
    serve = server("generate")

    assert serve is not None
    assert serve.__name__ == "serve"
