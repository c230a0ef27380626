"""Style transfer as jobs: an encoder from a file, two datasets, one style for all samples, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from shared.errors import DatasetInvalid, ModelLoadFailed
from shared.specs import StyleSpec
from tests.jobs.conftest import DATASET_ID, bars
from tests.jobs.folder_run import FolderRun, put, store_array
from tests.jobs.origins import feature_networks
from worker.families.family import DataInfo
from worker.jobs.generate import generate
from worker.jobs.pictures import encode_png
from worker.jobs.train import train
from worker.metrics.networks import DIGITS, DIGITS_SHA256
from worker.run import Stopped, StoredObject

MakeRun = Callable[..., FolderRun]
STYLE_ID = "ds_" + "2" * 32
SPEC: dict[str, Any] = {
    "family": "style", "dataset": DATASET_ID, "style_dataset": STYLE_ID, "model": "bars", "steps": 2,
    "base_channels": 4, "batch_size": 4, "warmup_steps": 0, "precision": "fp32",
}  # fmt: skip
VGG = SPEC | {"encoder": "vgg19"}


@pytest.fixture
def styles(tmp_path: Path, dataset: dict[str, Any]) -> dict[str, Any]:
    """The negatives of the dataset's images."""
    images = store_array(tmp_path, "negatives.npy", 255 - bars(64)) | {"name": "images-00000.npy"}
    return {**dataset, "id": STYLE_ID, "files": [images, dataset["files"][-1]]}


@pytest.fixture
def training(train_run: MakeRun, styles: dict[str, Any]) -> MakeRun:
    """A run of a train job that reads both datasets."""

    def make(**options: Any) -> FolderRun:
        run = train_run(**{"base": SPEC, **options})
        inputs = {**run.assignment.inputs, "further_datasets": {"style_dataset": styles}}
        run.assignment = replace(run.assignment, inputs=inputs)
        return run

    return make


@pytest.fixture
def networks(tmp_path: Path) -> Path:
    """A folder with a VGG-19 of random weights, and of a classifier that is not needed."""
    folder = tmp_path / "networks"
    feature_networks(folder, StyleSpec.model_validate(VGG), DataInfo(shape=(1, 12, 12)))
    path = folder / "vgg19.safetensors"
    save_file(load_file(path) | load_file(DIGITS), path)
    return folder


@pytest.fixture
def asked(generate_run: MakeRun, training: MakeRun, styles: dict[str, Any]) -> Callable[..., dict[str, bytes]]:
    """The samples of a task of a trained model, on the first two held-out images."""
    result = train(training())

    def ask(task: str, *, inputs: dict[str, Any] | None = None, **spec: Any) -> dict[str, bytes]:
        read = {"style_dataset": styles} if inputs is None else inputs
        fields = {"style": STYLE_ID} if task != "reconstruct" else {}
        run = generate_run(
            result, base=SPEC, inputs=read, task=task, dataset=DATASET_ID, num_samples=2, **fields, **spec
        )
        generate(run)
        return {artifact.name: run.body(artifact) for artifact in run.artifacts("sample")}

    return ask


def pixels(samples: dict[str, bytes]) -> list[bytes]:
    """Without the recipe."""
    return [body[body.index(b"IDAT") :] for body in samples.values()]


def test_the_model_says_which_encoder_it_sees_with(training: MakeRun) -> None:
    run = training()

    result = train(run)

    assert result["info"]["feature_networks"] == {"encoder": DIGITS_SHA256}
    assert result["fingerprint"]["feature_networks"] == {"encoder": DIGITS_SHA256}
    weights = load_file(file_of(run, result))
    shipped = load_file(DIGITS)
    own = {name.removeprefix("encoder."): one for name, one in weights.items() if name.startswith("encoder.")}
    assert own and all(one.equal(shipped[name]) for name, one in own.items())


def file_of(run: FolderRun, result: dict[str, Any]) -> Path:
    return run.fetch(StoredObject(**result["weights"]))


def test_an_artifact_and_an_image_of_a_dataset_are_the_same_style(
    asked: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    style = put(tmp_path, "style.png", encode_png(255 - bars(64)[5])).as_json()

    named = pixels(asked("stylise", style_index=5))

    assert named == pixels(asked("stylise", inputs={"style_image": style}))
    assert named != pixels(asked("stylise", style_index=6))


def test_each_task_makes_something_else_of_an_image(asked: Callable[..., dict[str, bytes]]) -> None:
    stylised, matched = pixels(asked("stylise")), pixels(asked("match_style", steps=3))
    reconstructed = pixels(asked("reconstruct"))

    assert pixels(asked("stylise", strength=0)) == reconstructed
    assert len({*stylised, *matched, *reconstructed}) == 6


@pytest.mark.parametrize(
    ("picture", "trouble"),
    [(np.zeros((3, 12, 12), np.uint8), r"\[3, 12, 12\]"), (np.zeros((1, 12, 13), np.uint8), r"\[1, 12, 13\]")],
)
def test_a_style_of_another_shape_is_refused_by_name(
    asked: Callable[..., dict[str, bytes]], tmp_path: Path, picture: np.ndarray, trouble: str
) -> None:
    style = put(tmp_path, "style.png", encode_png(picture)).as_json()

    with pytest.raises(DatasetInvalid, match=f"the style is {trouble}"):
        asked("stylise", inputs={"style_image": style})


def test_an_image_that_the_dataset_does_not_have_is_refused(asked: Callable[..., dict[str, bytes]]) -> None:
    with pytest.raises(DatasetInvalid, match="64 images"):
        asked("match_style", style_index=64)


def test_the_operator_s_network_is_taken_over_with_its_digest(training: MakeRun, networks: Path) -> None:
    run = training(base=VGG)
    run.feature_networks = networks

    result = train(run)

    file = networks / "vgg19.safetensors"
    assert result["info"]["feature_networks"] == {"encoder": sha256(file.read_bytes()).hexdigest()}
    weights, given = load_file(file_of(run, result)), load_file(file)
    assert weights["encoder.features.19.weight"].equal(given["features.19.weight"])


def test_a_worker_without_the_network_says_so_at_the_start(training: MakeRun, tmp_path: Path) -> None:
    run = training(base=VGG)

    with pytest.raises(ModelLoadFailed, match="vgg19 .* NOISEMILL_WORKER_FEATURE_NETWORKS is not set"):
        train(run)
    run.feature_networks = tmp_path
    with pytest.raises(ModelLoadFailed, match=r"vgg19\.safetensors cannot be read"):
        train(run)

    assert (run.steps, run.published) == ([], [])


def test_a_file_of_another_network_is_refused_by_what_it_lacks(training: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "vgg19.safetensors").write_bytes(DIGITS.read_bytes())
    run = training(base=VGG)
    run.feature_networks = tmp_path

    with pytest.raises(ModelLoadFailed, match=r"it lacks features\.0\.bias"):
        train(run)


def test_a_training_goes_on_where_the_network_is_not(training: MakeRun, networks: Path) -> None:
    """What it needs of it is in the checkpoint."""
    stopped = training(base=VGG, steps=4)
    stopped.feature_networks, stopped.stop_at = networks, (2, "interrupt")
    with pytest.raises(Stopped):
        train(stopped)
    straight = training(base=VGG, steps=4)
    straight.feature_networks = networks

    resumed = train(training(base=VGG, steps=4, resume=[stopped]))

    whole = train(straight)
    assert resumed["weights"]["sha256"] == whole["weights"]["sha256"]
    assert resumed["info"] == whole["info"]


def test_fine_tuning_keeps_the_encoder_of_the_model_that_it_begins_with(training: MakeRun, networks: Path) -> None:
    first = training(base=VGG)
    first.feature_networks = networks
    result = train(first)
    origin = {"family": "style", "spec": VGG, "info": result["info"], "weights": result["weights"]}

    tuned = training(base=VGG, init_from="bars@1", models={"init_from": origin})

    again = train(tuned)
    assert again["info"]["feature_networks"] == result["info"]["feature_networks"]
    weights, given = load_file(file_of(tuned, again)), load_file(networks / "vgg19.safetensors")
    assert weights["encoder.features.19.weight"].equal(given["features.19.weight"])
