"""Style transfer over REST: what is accepted reaches the worker whole, what cannot work is refused by its field."""

from typing import Any

import pytest

from shared.jobs.rows import DatasetState
from tests.api.support import Owner, claim, new_artifact, succeed


@pytest.fixture
def trained(owner: Owner) -> dict[str, Any]:
    """A request of a style model that has just been trained, on ten images in the style of one of ten."""
    content, styles = owner.add_dataset(count=10), owner.add_dataset(count=10)
    spec = {"family": "style", "dataset": content, "style_dataset": styles, "model": "digits", "steps": 100}
    job = owner.client.post("/v1/jobs", json={"type": "train", "spec": spec}).json()
    succeed(owner.engine, claim(owner.engine, job["id"]), artifacts=(new_artifact(f"{job['id']}/a.png"),))
    made = owner.client.get(f"/v1/jobs/{job['id']}/artifacts").json()["data"]
    assert owner.client.get("/v1/models/digits/versions/1").json()["tasks"] == ["match_style", "reconstruct", "stylise"]
    asked = {"model": "digits", "task": "stylise", "dataset": content, "style": styles, "style_index": 9}
    return {"spec": asked, "picture": made[0]["id"]}


def test_a_style_may_be_an_image_of_a_dataset_or_an_artifact(owner: Owner, trained: dict[str, Any]) -> None:
    spec = trained["spec"]
    by_picture = {**spec, "style": trained["picture"], "style_index": 0, "task": "match_style", "steps": 20}
    jobs = [owner.client.post("/v1/jobs", json={"type": "generate", "spec": one}) for one in (spec, by_picture)]
    assert [job.status_code for job in jobs] == [202, 202]

    inputs = [claim(owner.engine, job.json()["id"]).inputs for job in jobs]

    assert inputs[0]["style_dataset"]["id"] == spec["style"] and "style_image" not in inputs[0]
    assert inputs[1]["style_image"]["key"].endswith("/a.png") and "style_dataset" not in inputs[1]
    assert [one["dataset"]["id"] for one in inputs] == [spec["dataset"]] * 2


WRONG = [
    ({"style": "art_" + "0" * 32, "style_index": 0}, "/spec/style"),
    ({"style": "ds_" + "0" * 32}, "/spec/style"),
    ({"style": "a.png"}, "/spec/style"),
    ({"style": ...}, "/spec/style"),
    ({"style_index": 10}, "/spec/style_index"),
    ({"style_index": -1}, "/spec/style_index"),
    ({"style": "art_" + "0" * 32}, "/spec/style_index"),
    ({"strength": 1.5}, "/spec/strength"),
    ({"strength": -0.5}, "/spec/strength"),
    ({"steps": 20}, "/spec/steps"),
    ({"style_weight": 1}, "/spec/style_weight"),
    ({"task": "match_style", "strength": 0.5}, "/spec/strength"),
    ({"task": "match_style", "steps": 1001}, "/spec/steps"),
    ({"task": "inpaint", "style": ..., "style_index": ..., "box": [0, 0, 2, 2]}, "/spec/task"),
]


@pytest.mark.parametrize(("change", "pointer"), WRONG)
def test_what_cannot_be_stylised_is_refused_by_its_field(
    owner: Owner, trained: dict[str, Any], change: dict[str, Any], pointer: str
) -> None:
    spec = {name: value for name, value in {**trained["spec"], **change}.items() if value is not ...}

    answer = owner.client.post("/v1/jobs", json={"type": "generate", "spec": spec})

    assert answer.status_code == 422, answer.text
    assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]


@pytest.mark.parametrize(
    "columns",
    [{"info": {"shape": [3, 28, 28]}}, {"info": {"shape": [1, 28, 14]}}, {"modality": "text"},
     {"state": DatasetState.INGESTING}],
)  # fmt: skip
def test_a_style_is_as_large_as_the_model_s_images(
    owner: Owner, trained: dict[str, Any], columns: dict[str, Any]
) -> None:
    spec = trained["spec"] | {"style": owner.add_dataset(count=10, **columns)}

    answer = owner.client.post("/v1/jobs", json={"type": "generate", "spec": spec})

    assert answer.status_code == 422
    assert [error["pointer"] for error in answer.json()["errors"]] == ["/spec/style"]


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"encoder": "vgg16"}, "/spec/encoder"), ({"style_dataset": ...}, "/spec/style_dataset"),
        ({"style_weight": -1}, "/spec/style_weight"), ({"init_from": "digits", "encoder": "vgg19"}, "/spec/encoder"),
        ({"init_from": "nobody"}, "/spec/init_from"), ({"best_by": "elbo"}, "/spec/best_by"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_by_its_field(
    owner: Owner, trained: dict[str, Any], fields: dict[str, Any], pointer: str
) -> None:
    named = {"dataset": trained["spec"]["dataset"], "style_dataset": trained["spec"]["style"]}
    spec = {"family": "style", "model": "m", **named, **fields}

    answer = owner.client.post(
        "/v1/jobs", json={"type": "train", "spec": {name: value for name, value in spec.items() if value is not ...}}
    )

    assert answer.status_code == 422, answer.text
    assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]
