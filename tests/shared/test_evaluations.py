"""A request to measure a model: what it names is looked up, pinned, checked and handed to a worker."""

from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import func, literal, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import col

from shared.errors import InvalidSpec
from shared.jobs import requests
from shared.jobs.rows import Dataset, Job, ModelVersion
from shared.specs import FAMILIES
from shared.specs.evaluate import FEWEST, NUM_NEIGHBOURS, OF_SAMPLES, EvaluateSpec
from shared.specs.training import TrainSpec
from shared.wire import EvaluateRequest
from tests.shared.desk import SETTINGS, Desk
from tests.shared.test_references import add_version


def evaluate(desk: Desk, **spec: Any) -> Job:
    fields = {"model": "base", "dataset": f"ds_{desk.dataset_id.hex}", **spec}
    request = EvaluateRequest.model_validate({"type": "evaluate", "spec": fields})
    return desk.do(lambda session: requests.submit(session, desk.tenant_id, request, settings=SETTINGS))


def test_the_newest_version_at_submission_is_measured_by_a_worker_that_generates(desk: Desk) -> None:
    add_version(desk, "base", 1)
    job = evaluate(desk)
    add_version(desk, "base", 2)

    inputs = desk.claim(queues=["generate"]).inputs

    assert (job.spec["model"], job.summary) == ("base@1", "evaluate base@1")
    assert (inputs["model"]["version"], inputs["dataset"]["id"]) == (1, job.spec["dataset"])


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"model": "nobody"}, "/spec/model"),
        ({"dataset": "ds_" + "0" * 32}, "/spec/dataset"),
        ({"solver": "heun"}, "/spec/solver"),
        ({"labels": [1]}, "/spec/labels"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_the_field(desk: Desk, fields: dict[str, Any], pointer: str) -> None:
    add_version(desk, "base", 1)

    with pytest.raises(InvalidSpec) as refused:
        evaluate(desk, **fields)

    assert refused.value.pointer == pointer


def test_what_is_measured_is_settled_at_submission(desk: Desk) -> None:
    add_version(desk, "base", 1)

    assert evaluate(desk).spec["metrics"] == sorted(OF_SAMPLES - {"classes"} | {"scores", "reconstruction"})
    assert evaluate(desk, metrics=["mind"]).spec["metrics"] == ["mind"]


@pytest.mark.parametrize("features", [None, "digits", "dct", "pixels", "inception"])
def test_what_was_settled_is_what_the_worker_reads(desk: Desk, features: str | None) -> None:
    add_version(desk, "base", 1)

    settled = evaluate(desk, features=features).spec

    assert EvaluateSpec.model_validate(settled).metrics == settled["metrics"]
    assert settled["features"] == (features or "dct")
    assert ("classes" in settled["metrics"]) == (features == "digits")


def test_of_a_model_without_a_prior_no_samples_are_measured(desk: Desk) -> None:
    add_version(desk, "base", 1)
    told = func.jsonb_set(ModelVersion.spec, ["objective"], literal("denoising", JSONB))
    desk.work(lambda session: session.execute(update(ModelVersion).values(spec=told)))

    assert evaluate(desk).spec["metrics"] == ["reconstruction", "scores"]
    with pytest.raises(InvalidSpec, match="mind cannot be measured"):
        evaluate(desk, metrics=["mind"])


def test_a_dataset_of_another_shape_is_refused(desk: Desk) -> None:
    add_version(desk, "base", 1, shape=(3, 8, 8))

    with pytest.raises(InvalidSpec) as refused:
        evaluate(desk)

    assert refused.value.pointer == "/spec/dataset"


def tell(desk: Desk, **info: Any) -> None:
    """What is known of the dataset."""
    told = update(Dataset).where(col(Dataset.id) == desk.dataset_id).values(info={"shape": [1, 8, 8], **info})
    desk.work(lambda session: session.execute(told))


@pytest.mark.parametrize(
    ("counts", "fields", "pointer"),
    [
        ({"train": 9, "held_out": 0}, {}, "/spec/split"),
        ({"train": 9, "held_out": 0}, {"split": "train", "metrics": ["mind", "memorisation"]}, "/spec/metrics/1"),
        ({"train": 0, "held_out": 9}, {"metrics": ["memorisation"]}, "/spec/metrics/0"),
        ({"train": 60, "held_out": 5}, {"metrics": ["mind", "coverage"]}, "/spec/metrics/1"),
        ({"train": 60, "held_out": 1}, {"metrics": ["frechet_distance"]}, "/spec/metrics/0"),
        ({"train": 60, "held_out": 1}, {"metrics": ["scores"]}, "/spec/metrics/0"),
        ({"train": 60, "held_out": 6}, {"metrics": ["coverage", "memorisation", "scores"]}, None),
        ({"train": 60, "held_out": 6}, {"metrics": ["classes"]}, "/spec/metrics/0"),
        ({"train": 60, "held_out": 6}, {"metrics": ["classes"], "features": "digits"}, None),
        ({"train": 60, "held_out": 6}, {"num_samples": 17, "metrics": ["coverage"]}, None),
    ],
)
def test_what_the_dataset_has_too_few_images_for_is_refused_where_it_was_asked_for(
    desk: Desk, counts: dict[str, int], fields: dict[str, Any], pointer: str | None
) -> None:
    add_version(desk, "base", 1)
    tell(desk, counts=counts)

    if pointer is None:
        assert evaluate(desk, **fields).spec["metrics"] == sorted(fields["metrics"])
        return
    with pytest.raises(InvalidSpec) as refused:
        evaluate(desk, **fields)
    assert refused.value.pointer == pointer


def test_what_the_dataset_has_too_few_images_for_is_left_out_where_nothing_was_asked_for(desk: Desk) -> None:
    add_version(desk, "base", 1)
    tell(desk, counts={"train": 5, "held_out": 0})

    left = {"frechet_distance", "kernel_distance", "mind", "diversity", "reconstruction", "scores"}
    assert evaluate(desk, split="train").spec["metrics"] == sorted(left)


def test_a_ball_needs_as_many_neighbours_as_it_reaches_to() -> None:
    assert FEWEST["coverage"] == NUM_NEIGHBOURS + 1


DATA = {"shape": (1, 8, 8), "num_classes": 0, "counts": {"train": 90, "held_out": 10}}


def spec_of(**fields: Any) -> EvaluateSpec:
    return EvaluateSpec.model_validate({"model": "m", "dataset": "ds_" + "0" * 32, **fields})


def trained(family: str, **fields: Any) -> TrainSpec:
    own = {"consistency": {"init_from": "base@1"}, "translation": {"target_dataset": "ds_" + "1" * 32}}
    own |= {"style": {"style_dataset": "ds_" + "1" * 32}}
    common = {"family": family, "dataset": "ds_" + "0" * 32, "model": "m"}
    return FAMILIES[family].model_validate(common | own.get(family, {}) | fields)


def info_of(family: str, num_classes: int) -> dict[str, Any]:
    info = {"shape": (1, 8, 8), "num_classes": num_classes}
    return info | {"models": {"init_from": {"spec": {}, "info": info}}} if family == "consistency" else info


@pytest.mark.parametrize(
    ("family", "fields", "num_classes", "without"),
    [
        ("vae", {}, 0, set()),
        ("vae", {"objective": "denoising"}, 0, OF_SAMPLES),
        ("vq", {}, 3, set()),
        ("gan", {}, 3, {"scores", "reconstruction"}),
        ("gan", {}, 26, {"scores", "reconstruction", "classes"}),
        ("diffusion", {}, 3, set()),
        ("diffusion", {"label_dropout": 0}, 3, {"scores"}),
        ("diffusion", {"label_dropout": 0}, 0, set()),
        ("diffusion", {"autoencoder": "vae@1"}, 3, {"scores"}),
        ("consistency", {}, 3, {"scores", "reconstruction"}),
        ("translation", {}, 0, OF_SAMPLES | {"reconstruction"}),
        ("style", {}, 0, OF_SAMPLES | {"scores"}),
    ],
)
def test_of_each_model_that_is_refused_which_it_cannot_be_measured_by(
    family: str, fields: dict[str, Any], num_classes: int, without: set[str]
) -> None:
    asked = trained(family, **fields), info_of(family, num_classes), DATA
    everything = OF_SAMPLES | {"scores", "reconstruction"}

    assert spec_of(features="digits").wanted(*asked) == everything - without
    for metric in everything:
        if metric not in without:
            assert spec_of(features="digits", metrics=[metric]).wanted(*asked) == {metric}
            continue
        with pytest.raises(ValueError, match=f"{metric} cannot be measured"):
            spec_of(features="digits", metrics=[metric]).wanted(*asked)


def test_a_model_of_which_nothing_can_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing can be measured"):
        spec_of().wanted(trained("translation", objective="contrastive"), info_of("translation", 0), DATA)


@pytest.mark.parametrize(
    ("family", "fields", "known", "told", "scores"),
    [
        ("vae", {}, 0, 0, {"elbo", "iwae64", "kl", "active_units"}),
        ("vae", {"likelihood": "gaussian"}, 0, 0, {"elbo", "iwae64", "kl", "active_units"}),
        ("vae", {"likelihood": "logistic"}, 0, 0, {"elbo", "iwae64", "kl", "active_units", "bits_per_dim"}),
        ("vae", {"likelihood": "logistic", "objective": "denoising"}, 0, 0, {"active_units"}),
        ("vq", {}, 3, 3, {"codebook", "code_bits_per_dim"}),
        ("vq", {}, 3, 2, {"codebook", "code_bits_per_dim"}),
        ("vq", {}, 3, 4, {"codebook"}),
        ("vq", {}, 3, 0, {"codebook"}),
        ("vq", {"class_conditional": False}, 3, 0, {"codebook", "code_bits_per_dim"}),
        ("diffusion", {}, 3, 0, {"bits_per_dim"}),
        ("gan", {}, 3, 3, set()),
    ],
)
def test_bits_are_told_where_they_bound_what_bytes_cost_or_by_a_name_of_their_own(
    family: str, fields: dict[str, Any], known: int, told: int, scores: set[str]
) -> None:
    assert trained(family, **fields).scores_on(DATA | {"num_classes": told}, info_of(family, known)) == scores


@pytest.mark.parametrize(
    "fields",
    [
        {"metrics": []},
        {"metrics": ["inception"]},
        {"num_samples": 5},
        {"features": "/etc/inception.pt"},
        {"task": "reconstruct"},
        {"preview_every": 5},
        {"compiled": True, "determinism": "relaxed"},
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec_of(**fields)


def test_digits_are_the_default_for_images_like_digits_only() -> None:
    assert [spec_of().features_of(shape) for shape in ((1, 28, 28), (3, 28, 28))] == ["digits", "dct"]
    assert spec_of(features="pixels").features_of((1, 28, 28)) == "pixels"
