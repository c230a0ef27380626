"""A request to measure a model: what it names is looked up, pinned, checked and handed to a worker."""

from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import func, literal, update
from sqlalchemy.dialects.postgresql import JSONB

from shared.errors import InvalidSpec
from shared.jobs import requests
from shared.jobs.rows import Job, ModelVersion
from shared.specs.evaluate import OF_SAMPLES, EvaluateSpec
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

    assert evaluate(desk).spec["metrics"] == sorted(OF_SAMPLES | {"scores", "reconstruction"})
    assert evaluate(desk, metrics=["mind"]).spec["metrics"] == ["mind"]


@pytest.mark.parametrize("features", [None, "digits", "dct", "pixels", "inception"])
def test_what_was_settled_is_what_the_worker_reads(desk: Desk, features: str | None) -> None:
    add_version(desk, "base", 1)

    settled = evaluate(desk, features=features).spec

    assert EvaluateSpec.model_validate(settled).metrics == settled["metrics"]
    assert ("classes" in settled["metrics"]) == (features in (None, "digits"))


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


def spec_of(**fields: Any) -> EvaluateSpec:
    return EvaluateSpec.model_validate({"model": "m", "dataset": "ds_" + "0" * 32, **fields})


def test_whatever_the_model_can_be_measured_by_is_the_default() -> None:
    assert spec_of().wanted({"generate", "reconstruct"}) == OF_SAMPLES | {"scores", "reconstruction"}
    assert spec_of().wanted({"generate"}) == OF_SAMPLES | {"scores"}
    assert spec_of().wanted(set()) == {"scores"}


def test_a_metric_that_the_model_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="reconstruction cannot be measured"):
        spec_of(metrics=["reconstruction"]).wanted({"generate"})


@pytest.mark.parametrize(
    "fields",
    [
        {"metrics": ["classes"], "features": "dct"},
        {"metrics": []},
        {"metrics": ["inception"]},
        {"num_samples": 5},
        {"features": "/etc/inception.pt"},
        {"task": "reconstruct"},
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec_of(**fields)
