"""Editing over REST: what is accepted reaches the worker whole, what cannot work is refused by its field."""

from typing import Any

import pytest

from shared.jobs.rows import DatasetState
from tests.api.conftest import MakeOwner
from tests.api.support import Owner, claim, new_artifact, succeed

SHAPE = [1, 28, 20]
"""Higher than broad, so that a box with its axes exchanged does not fit."""


@pytest.fixture
def spec(owner: Owner) -> dict[str, Any]:
    """A request to inpaint by a diffusion model that has just been trained, which left a picture, too."""
    dataset = owner.add_dataset(count=10, info={"shape": SHAPE})
    asked = {"family": "diffusion", "dataset": dataset, "model": "digits", "steps": 100}
    job = owner.client.post("/v1/jobs", json={"type": "train", "spec": asked}).json()
    pictures = tuple(new_artifact(f"{job['id']}/{name}.png") for name in "ab")
    succeed(owner.engine, claim(owner.engine, job["id"]), artifacts=pictures, shape=SHAPE)
    return {"model": "digits", "task": "inpaint", "dataset": dataset, "box": [4, 14, 20, 28]}


def pictures_of(owner: Owner) -> list[str]:
    [job] = [one for one in owner.client.get("/v1/jobs").json()["data"] if one["type"] == "train"]
    return [one["id"] for one in owner.client.get(f"/v1/jobs/{job['id']}/artifacts").json()["data"]]


def changed(spec: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**spec, **change}.items() if value is not ...}


def test_what_is_to_be_filled_may_be_a_box_a_picture_or_a_dataset(owner: Owner, spec: dict[str, Any]) -> None:
    picture, masks = pictures_of(owner)[0], owner.add_dataset(count=1, info={"shape": [3, *SHAPE[1:]]})
    asked = [spec, changed(spec, {"box": ..., "mask": picture}), changed(spec, {"box": ..., "mask": masks})]
    answers = [owner.client.post("/v1/jobs", json={"type": "generate", "spec": one}) for one in asked]
    assert [one.status_code for one in answers] == [202] * 3, [one.text for one in answers]

    claims = [claim(owner.engine, one.json()["id"]) for one in answers]

    assert claims[0].spec["box"] == spec["box"]
    assert [sorted(one.inputs.keys() & {"mask_image", "mask_dataset"}) for one in claims] == [
        [], ["mask_image"], ["mask_dataset"],
    ]  # fmt: skip
    assert claims[1].inputs["mask_image"]["key"].endswith(".png")
    assert claims[2].inputs["mask_dataset"]["id"] == masks


@pytest.mark.parametrize(
    "change",
    [
        {"task": "super_resolve", "factor": 4}, {"task": "image_to_image", "strength": 0.4},
        {"task": "inpaint", "box": [0, 0, 1, 1], "average_of": 40},
    ],
)  # fmt: skip
def test_every_edit_takes_pictures_that_jobs_have_made(
    owner: Owner, spec: dict[str, Any], change: dict[str, Any]
) -> None:
    asked = changed(spec, {"box": ..., "dataset": ..., "images": pictures_of(owner)} | change)

    answer = owner.client.post("/v1/jobs", json={"type": "generate", "spec": asked})

    assert answer.status_code == 202, answer.text
    assert len(claim(owner.engine, answer.json()["id"]).inputs["images"]) == 2


WRONG = [
    ({"box": [4, 14, 21, 28]}, "/spec/box"),
    ({"box": [4, 14, 20, 29]}, "/spec/box"),
    ({"box": [14, 4, 28, 20]}, "/spec/box"),
    ({"box": [-1, 0, 4, 4]}, "/spec/box/0"),
    ({"box": [4, 4, 4, 8]}, "/spec/box"),
    ({"box": [4, 8, 8, 4]}, "/spec/box"),
    ({"box": [4, 4, 8]}, "/spec/box/3"),
    ({"box": "left"}, "/spec/box"),
    ({"box": ...}, "/spec/box"),
    ({"mask": "art_" + "0" * 32}, "/spec/box"),
    ({"box": ..., "mask": "art_" + "0" * 32}, "/spec/mask"),
    ({"box": ..., "mask": "ds_" + "0" * 32}, "/spec/mask"),
    ({"box": ..., "mask": "mask.png"}, "/spec/mask"),
    ({"dataset": ...}, "/spec/dataset"),
    ({"images": ["art_" + "0" * 32]}, "/spec/dataset"),
    ({"dataset": ..., "images": ["art_" + "0" * 32]}, "/spec/images/0"),
    ({"average_of": 41}, "/spec/average_of"),
    ({"average_of": 65}, "/spec/average_of"),
    ({"task": "super_resolve", "box": ..., "factor": 3}, "/spec/factor"),
    ({"task": "super_resolve", "box": ..., "factor": 8}, "/spec/factor"),
    ({"task": "super_resolve"}, "/spec/box"),
    ({"task": "colourise", "box": ...}, "/spec/task"),  # the model knows no colours
    ({"task": "image_to_image", "box": ..., "strength": 0}, "/spec/strength"),
]


@pytest.mark.parametrize(("change", "pointer"), WRONG)
def test_what_cannot_be_edited_is_refused_by_its_field(
    owner: Owner, spec: dict[str, Any], change: dict[str, Any], pointer: str
) -> None:
    answer = owner.client.post("/v1/jobs", json={"type": "generate", "spec": changed(spec, change)})

    assert answer.status_code == 422, answer.text
    assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]


@pytest.mark.parametrize(
    "columns",
    [{"info": {"shape": [1, 20, 28]}}, {"info": {"shape": [2, 28, 20]}}, {"modality": "text"},
     {"state": DatasetState.INGESTING}],
)  # fmt: skip
def test_a_mask_is_as_large_as_the_model_s_images(owner: Owner, spec: dict[str, Any], columns: dict[str, Any]) -> None:
    mask = owner.add_dataset(count=1, **columns)

    answer = owner.client.post("/v1/jobs", json={"type": "generate", "spec": changed(spec, {"box": ..., "mask": mask})})

    assert answer.status_code == 422
    assert [error["pointer"] for error in answer.json()["errors"]] == ["/spec/mask"]


def test_a_mask_of_somebody_else_is_not_there(owner: Owner, make_owner: MakeOwner, spec: dict[str, Any]) -> None:
    theirs = make_owner().add_dataset(count=1, info={"shape": SHAPE})

    answer = owner.client.post(
        "/v1/jobs", json={"type": "generate", "spec": changed(spec, {"box": ..., "mask": theirs})}
    )

    assert [error["pointer"] for error in answer.json()["errors"]] == ["/spec/mask"]
