"""A request to import a model: checked by what was uploaded, handed to a worker, and registered as a version."""

from typing import Any

import pytest
from sqlalchemy.orm import Session

from shared.errors import InvalidSpec
from shared.ids import public
from shared.jobs import attempts, requests
from shared.jobs.rows import Dataset, DatasetState, Job, Model, ModelVersion
from shared.jobs.state import JobState
from shared.wire import GenerateRequest, ImportRequest, TrainRequest
from tests.families.test_diffusers_folder import CIFAR10_SCHEDULER, CONFIG
from tests.shared.desk import SETTINGS, Desk
from tests.shared.test_references import WEIGHTS

INFO = {"format": "diffusers", "config": CONFIG, "scheduler": CIFAR10_SCHEDULER, "sha256": "5" * 64}
TRAINED = {"network": "unet", "preset": "b", "objective": "eps", "class_conditional": False, "dropout": 0.0}


def upload(desk: Desk, **columns: Any) -> str:
    """The id of an uploaded folder."""
    folder = Dataset(
        tenant_id=desk.tenant_id, name="folder", source={}, count=1,
        **{"state": DatasetState.READY, "modality": "model", "info": INFO, "digest": "6" * 64, **columns},
    )  # fmt: skip

    def add(session: Session) -> str:
        session.add(folder)
        session.flush()
        return public("ds", folder.id)

    return desk.work(add)


def take_in(desk: Desk, dataset: str, **spec: Any) -> Job:
    request = ImportRequest.model_validate({"type": "import", "spec": {"dataset": dataset, "model": "faces", **spec}})
    return desk.do(lambda session: requests.submit(session, desk.tenant_id, request, settings=SETTINGS))


def succeed(desk: Desk) -> dict[str, Any]:
    """What the worker was handed."""
    claim = desk.claim(queues=["generate"])
    result = {"metrics": {}, "weights": WEIGHTS, "info": claim.inputs["model"]["info"], "num_parameters": 3}
    desk.work(lambda session: attempts.succeed(session, claim, result=result, artifacts=[], timings={}, steps=1))
    return dict(claim.inputs)


def test_a_worker_is_handed_the_files_and_what_they_are_of(desk: Desk) -> None:
    dataset = upload(desk)
    job = take_in(desk, dataset)

    inputs = succeed(desk)

    assert (job.summary, job.spec["family"]) == ("import faces", "diffusion")
    assert (inputs["dataset"]["id"], inputs["dataset"]["info"]) == (dataset, INFO)
    assert inputs["model"]["spec"] == {"family": "diffusion", "dataset": dataset, "model": "faces", **TRAINED}


def test_the_result_is_a_version_that_tells_where_it_comes_from(desk: Desk) -> None:
    dataset = upload(desk)
    job = take_in(desk, dataset)

    succeed(desk)

    def made(session: Session) -> tuple[str, ModelVersion]:
        return session.query(Model).one().name, session.query(ModelVersion).one()

    name, version = desk.work(made)
    source = {"format": "diffusers", "dataset": dataset, "sha256": "5" * 64}
    assert (name, version.version, version.family, public("ds", version.dataset_id)) == (
        "faces",
        1,
        "diffusion",
        dataset,
    )
    assert version.info == {"shape": [3, 32, 32], "num_classes": 0, "imported": source}
    result = desk.job(job.id).result or {}
    assert (desk.job(job.id).state, result["model"], result["sha256"]) == (
        JobState.SUCCEEDED, "faces@1", WEIGHTS["sha256"],
    )  # fmt: skip


def test_it_may_be_asked_what_a_model_of_its_family_may_be_asked(desk: Desk) -> None:
    take_in(desk, upload(desk))
    succeed(desk)

    asked = {"type": "generate", "spec": {"model": "faces", "task": "generate", "steps": 10, "solver": "ddim"}}
    job = desk.do(
        lambda session: requests.submit(
            session, desk.tenant_id, GenerateRequest.model_validate(asked), settings=SETTINGS
        )
    )

    assert job.spec["model"] == "faces@1"


def test_a_training_may_begin_with_it(desk: Desk) -> None:
    """And has its architecture, which is set in its spec as of any model."""
    take_in(desk, upload(desk))
    succeed(desk)
    desk.work(lambda session: setattr(session.get_one(Dataset, desk.dataset_id), "info", {"shape": [3, 32, 32]}))

    spec = {"family": "diffusion", "dataset": public("ds", desk.dataset_id), "model": "tuned", "init_from": "faces"}
    request = TrainRequest.model_validate({"type": "train", "spec": spec})
    job = desk.do(lambda session: requests.submit(session, desk.tenant_id, request, settings=SETTINGS))

    assert {name: job.spec[name] for name in ("preset", "objective")} == {"preset": "b", "objective": "eps"}
    assert job.spec["init_from"] == "faces@1"


def test_it_is_made_again_and_compared_without_a_second_version(desk: Desk) -> None:
    first = take_in(desk, upload(desk))
    succeed(desk)

    again = desk.do(lambda session: requests.reproduce(session, desk.tenant_id, first.id, settings=SETTINGS))
    succeed(desk)

    assert (desk.job(again.id).result or {})["reproduction"]["identical"] is True
    assert desk.count(ModelVersion) == 1


@pytest.mark.parametrize(
    ("columns", "spec", "pointer", "message"),
    [
        ({"modality": "image"}, {}, "/spec/dataset", "holds image, and model is needed"),
        ({"state": DatasetState.INGESTING}, {}, "/spec/dataset", "not ready"),
        ({"info": INFO | {"scheduler": None}}, {}, "/spec/objective", "say it here"),
        ({"info": INFO | {"config": CONFIG | {"act_fn": "gelu"}}}, {}, "/spec/dataset", "act_fn"),
        ({}, {"objective": "v"}, "/spec/objective", "the objective is eps"),
        ({}, {"num_classes": 3}, "/spec/num_classes", "no class embeddings"),
        ({}, {"family": "vae"}, "/spec/family", "become a model of diffusion"),
        ({"info": INFO | {"format": "keras"}}, {}, "/spec/family", "become a model of no family"),
    ],
)
def test_what_no_family_can_be_made_of_is_refused_by_the_field(
    desk: Desk, columns: dict[str, Any], spec: dict[str, Any], pointer: str, message: str
) -> None:
    dataset = upload(desk, **columns)

    with pytest.raises(InvalidSpec, match=message) as refused:
        take_in(desk, dataset, **spec)

    assert refused.value.pointer == pointer


def test_a_model_is_nothing_to_learn_from(desk: Desk) -> None:
    spec = {"family": "diffusion", "dataset": upload(desk), "model": "m"}
    request = TrainRequest.model_validate({"type": "train", "spec": spec})

    with pytest.raises(InvalidSpec, match="holds model, and image is needed"):
        desk.do(lambda session: requests.submit(session, desk.tenant_id, request, settings=SETTINGS))


def test_the_folder_of_another_tenant_is_not_found(desk: Desk) -> None:
    with pytest.raises(InvalidSpec, match="no such dataset"):
        take_in(desk, "ds_" + "7" * 32)
