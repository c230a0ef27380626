"""What an evaluate job measures, and that it measures the same each time."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from shared.errors import DatasetInvalid
from shared.specs import DiffusionSpec, GanSpec
from tests.jobs.conftest import DATASET_ID, DIFFUSION, bars
from tests.jobs.folder_run import FolderRun, put, store_array
from worker.engine.blocks import disturb
from worker.engine.checkpoint import write_weights
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.jobs.evaluate import evaluate
from worker.jobs.train import train
from worker.run import Stopped

MakeRun = Callable[..., FolderRun]
OF_SETS = {"frechet_distance", "kernel_distance", "mind", "precision", "recall", "density", "coverage", "diversity"}


@pytest.fixture
def trained(train_run: MakeRun) -> dict[str, Any]:
    return train(train_run(steps=2))


def test_everything_that_the_model_can_be_measured_by_is_measured(
    evaluate_run: MakeRun, trained: dict[str, Any]
) -> None:
    result = evaluate(evaluate_run(trained))

    of_model = {"elbo", "iwae64", "kl", "active_units", "reconstruction_mse", "psnr", "ssim"}
    assert result["figures"].keys() == OF_SETS | of_model | {"nearer_to_train", "copying"}
    assert result["baselines"]["real"].keys() == OF_SETS
    assert len(result["details"]["kl"]) == 4


def test_each_figure_says_how_sure_it_is_and_what_it_was_measured_in_and_against(
    evaluate_run: MakeRun, trained: dict[str, Any]
) -> None:
    result = evaluate(evaluate_run(trained, metrics=["mind", "scores"], split="train"))

    mind, elbo = result["figures"]["mind"], result["figures"]["elbo"]
    assert mind["confidence_95"][0] < mind["value"] < mind["confidence_95"][1]
    assert (mind["features"], mind["reference"]) == (
        result["features"]["digest"],
        result["details"]["reference"]["digest"],
    )
    assert (mind["num_samples"], elbo["num_samples"]) == (48, 48)


def test_the_same_request_gives_the_same_figures(evaluate_run: MakeRun, trained: dict[str, Any]) -> None:
    first, second = (evaluate_run(trained, seed=7) for _ in range(2))

    assert evaluate(first) == evaluate(second)
    assert [first.body(one) for one in first.published] == [second.body(one) for one in second.published]


def test_another_seed_draws_other_samples(evaluate_run: MakeRun, trained: dict[str, Any]) -> None:
    one, other = (evaluate(evaluate_run(trained, seed=seed, metrics=["mind"])) for seed in (1, 2))

    assert one["figures"] != other["figures"]


def test_figures_do_not_depend_on_how_many_images_are_scored_at_once(
    evaluate_run: MakeRun, trained: dict[str, Any]
) -> None:
    """Noise is keyed by an image's place in the split."""
    whole, small = (evaluate(evaluate_run(trained, metrics=["scores"], batch_size=size)) for size in (64, 3))

    for name, figure in whole["figures"].items():
        assert small["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-5)


def test_the_likelihood_of_a_diffusion_model_is_measured_on_a_few_images_step_by_step(
    train_run: MakeRun, evaluate_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: dict[str, Any] = FAMILIES["diffusion"].scores  # pyright: ignore[reportAssignmentType]
    monkeypatch.setitem(scores, "bits_per_dim", replace(scores["bits_per_dim"], most=2))
    run = evaluate_run(train(train_run(base=DIFFUSION)), model_spec=DIFFUSION, metrics=["scores"], batch_size=1)

    figure = evaluate(run)["figures"]["bits_per_dim"]

    assert figure["num_samples"] == 2
    assert figure["confidence_95"][0] < figure["value"] < figure["confidence_95"][1]
    assert [step[:2] for step in run.steps] == [(1, 2)] * 33 + [(2, 2)] * 33


def test_a_likelihood_is_that_of_fp32_whatever_samples_are_drawn_in(
    tmp_path: Path, evaluate_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: dict[str, Any] = FAMILIES["diffusion"].scores  # pyright: ignore[reportAssignmentType]
    monkeypatch.setitem(scores, "bits_per_dim", replace(scores["bits_per_dim"], most=2))
    monkeypatch.setattr("worker.families.nets.likelihood.STEPS", 2)
    spec = {"family": "diffusion", "dataset": DATASET_ID, "model": "bars"}
    info, path = DataInfo(shape=(1, 12, 12)), tmp_path / "model.safetensors"
    net = build(FAMILIES["diffusion"], DiffusionSpec.model_validate(spec), info)
    disturb(net)  # first weights give zeros in any precision
    write_weights(path, net, {})
    model = {"info": info.as_json(), "weights": put(tmp_path, "weights", path.read_bytes()).as_json()}
    runs = {one: evaluate_run(model, model_spec=spec, metrics=["scores"], precision=one) for one in ("fp32", "bf16")}

    results = {precision: evaluate(run) for precision, run in runs.items()}

    assert results["bf16"]["fingerprint"]["precision"] == "bf16"
    assert results["bf16"]["figures"] == results["fp32"]["figures"]


def test_the_report_and_its_pictures_are_published(evaluate_run: MakeRun, trained: dict[str, Any]) -> None:
    run = evaluate_run(trained)

    result = evaluate(run)

    assert [(one.kind, one.name) for one in run.published] == [
        ("sheet", "sheet.png"),
        ("sheet", "closest.png"),
        ("report", "evaluation.json"),
    ]
    assert json.loads(run.body(run.published[-1]))["figures"] == result["figures"]


@pytest.mark.parametrize(
    ("metric", "at"), [("scores", 2), ("reconstruction", 5), ("diversity", 40), ("mind", 60), ("memorisation", 50)]
)
def test_a_stop_is_heeded_in_every_part(evaluate_run: MakeRun, trained: dict[str, Any], metric: str, at: int) -> None:
    """While scoring, reconstructing and drawing, between passes over sets (after 48 draws) and between neighbours."""
    run = evaluate_run(trained, metrics=[metric], batch_size=4)
    run.stop_at = (at, "interrupt")

    with pytest.raises(Stopped):
        evaluate(run)

    assert run.steps[-1][0] == at
    assert run.artifacts("report") == []


def test_progress_ends_where_it_said_it_would_or_later(evaluate_run: MakeRun, trained: dict[str, Any]) -> None:
    run = evaluate_run(trained)

    evaluate(run)

    shares = [step / steps for step, steps, _ in run.steps]
    assert shares == sorted(shares)
    assert shares[0] < 0.05 and shares[-1] == 1


def test_training_brings_the_samples_nearer_to_the_data(evaluate_run: MakeRun, train_run: MakeRun) -> None:
    early, late = (evaluate(evaluate_run(train(train_run(steps=steps)), metrics=["mind"])) for steps in (2, 400))

    assert late["figures"]["mind"]["value"] < 0.5 * early["figures"]["mind"]["value"]


def test_without_held_out_images_nothing_is_compared_to_them(
    evaluate_run: MakeRun, trained: dict[str, Any], dataset: dict[str, Any], tmp_path: Path
) -> None:
    files = [
        store_array(tmp_path, "images-00000.npy", bars(64)),
        store_array(tmp_path, "split.npy", np.zeros(64, np.uint8)),
    ]
    without = dataset | {"files": files}

    with pytest.raises(DatasetInvalid, match="no held_out"):
        evaluate(evaluate_run(trained, data=without))
    with pytest.raises(DatasetInvalid, match="memorisation cannot be measured"):
        evaluate(evaluate_run(trained, data=without, split="train", metrics=["memorisation"]))
    result = evaluate(evaluate_run(trained, data=without, split="train"))
    assert "real" not in result["baselines"] and "copying" not in result["figures"]


@pytest.fixture
def gan(tmp_path: Path) -> dict[str, Any]:
    """A class-conditional GAN that draws one image for ever, and data for it: what ``evaluate_run`` takes."""
    spec = {"family": "gan", "network": "mlp", "hidden_dim": 16, "dataset": DATASET_ID, "model": "bars"}
    info = DataInfo(shape=(1, 28, 28), num_classes=10)
    path = tmp_path / "model.safetensors"
    net = build(FAMILIES["gan"], GanSpec.model_validate(spec), info)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    write_weights(path, net, {})
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 28, 28), dtype=np.uint8)
    arrays = {"images-00000.npy": images, "split.npy": (np.arange(40) % 2).astype(np.uint8)}
    files = [store_array(tmp_path, name, array) for name, array in arrays.items()]
    weights = put(tmp_path, "weights", path.read_bytes()).as_json()
    data = {"id": DATASET_ID, "modality": "image", "info": info.as_json(), "files": files}
    return {"result": {"info": info.as_json(), "weights": weights}, "model_spec": spec, "data": data}


def test_a_family_that_only_generates_is_measured_by_its_samples(evaluate_run: MakeRun, gan: dict[str, Any]) -> None:
    result = evaluate(evaluate_run(**gan))

    assert result["figures"].keys() == OF_SETS | {"nearer_to_train", "copying", "class_accuracy"}
    assert result["features"]["name"] == "digits"
    assert sum(result["details"]["class_shares"]) == pytest.approx(1)


def test_the_accuracy_is_the_share_of_samples_that_look_like_the_class_asked_for(
    evaluate_run: MakeRun, gan: dict[str, Any]
) -> None:
    results = [evaluate(evaluate_run(**gan, metrics=["classes"], labels=[label])) for label in range(10)]

    for label, result in enumerate(results):
        share = result["details"]["class_shares"][label]
        assert result["figures"]["class_accuracy"]["value"] == pytest.approx(share)
    assert any(result["figures"]["class_accuracy"]["value"] > 0 for result in results)


def test_classes_take_turns(evaluate_run: MakeRun, gan: dict[str, Any]) -> None:
    """All samples look alike, and every fourth of eighteen is asked to look like that."""
    shares = evaluate(evaluate_run(**gan, metrics=["classes"]))["details"]["class_shares"]
    look = shares.index(1)
    other = (look + 1) % 10

    result = evaluate(evaluate_run(**gan, metrics=["classes"], num_samples=18, labels=[look, other, other, other]))

    assert result["figures"]["class_accuracy"]["value"] == pytest.approx(5 / 18)


def test_classes_that_were_not_asked_for_are_all_of_them_in_order(evaluate_run: MakeRun, gan: dict[str, Any]) -> None:
    turns, asked = (evaluate(evaluate_run(**gan, metrics=["classes"], labels=one)) for one in (None, [*range(10)]))

    assert turns["figures"] == asked["figures"]


def test_the_dataset_of_the_request_is_named_in_the_result(evaluate_run: MakeRun, trained: dict[str, Any]) -> None:
    result = evaluate(evaluate_run(trained, metrics=["diversity"]))

    assert (result["dataset"], result["split"], result["model"]) == (DATASET_ID, "held_out", "bars@1")
