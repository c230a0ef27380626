"""A request to export a model: looked up, checked, handed to a worker, and compared when it is made again."""

from typing import Any

import pytest
from sqlalchemy.orm import Session

from shared.errors import InvalidSpec
from shared.ids import public
from shared.jobs import attempts, requests
from shared.jobs.rows import Job, Model, ModelVersion
from shared.jobs.state import JobState
from shared.wire import ExportRequest
from tests.shared.desk import SETTINGS, Desk
from tests.shared.test_references import WEIGHTS, add_version

EPS: dict[str, Any] = {"network": "unet", "preset": "s", "objective": "eps"}
RESULT = {"format": "diffusers", "files": {"config.json": "1" * 64}, "sha256": "2" * 64}


def add_diffusion(desk: Desk, *, shape: tuple[int, ...] = (1, 8, 8), **choice: Any) -> None:
    """The version ``drawn@1``, of which the dataset is known."""
    spec = {"family": "diffusion", "dataset": public("ds", desk.dataset_id), "model": "drawn", **EPS, **choice}
    job = desk.submit()

    def add(session: Session) -> None:
        model = Model(tenant_id=desk.tenant_id, name="drawn", latest=1)
        session.add(model)
        session.flush()
        session.add(
            ModelVersion(
                model_id=model.id, version=1, family="diffusion", spec=spec, metrics={}, weights=WEIGHTS,
                info={"shape": list(shape), "num_classes": 0}, job_id=job.id, dataset_id=desk.dataset_id,
            )
        )  # fmt: skip

    desk.work(add)
    desk.do(lambda session: requests.cancel(session, desk.tenant_id, job.id))


def export(desk: Desk, model: str = "drawn") -> Job:
    request = ExportRequest.model_validate({"type": "export", "spec": {"model": model, "format": "diffusers"}})
    return desk.do(lambda session: requests.submit(session, desk.tenant_id, request, settings=SETTINGS))


def succeed(desk: Desk, result: dict[str, Any]) -> None:
    claim = desk.claim(queues=["generate"])
    desk.work(lambda session: attempts.succeed(session, claim, result=result, artifacts=[], timings={}, steps=3))


def test_a_worker_that_draws_is_handed_the_version_and_what_it_was_trained_on(desk: Desk) -> None:
    add_diffusion(desk)
    job = export(desk)

    claim = desk.claim(queues=["generate"])

    assert (job.spec, job.summary) == ({"model": "drawn@1", "format": "diffusers"}, "export drawn@1")
    assert (claim.inputs["model"]["weights"], claim.inputs["model"]["family"]) == (WEIGHTS, "diffusion")
    assert claim.inputs["dataset"]["id"] == public("ds", desk.dataset_id)


def test_the_result_is_shown_as_it_is_and_registers_nothing(desk: Desk) -> None:
    add_diffusion(desk)
    job = export(desk)

    succeed(desk, RESULT)

    assert (desk.job(job.id).state, desk.job(job.id).result) == (JobState.SUCCEEDED, RESULT)
    assert desk.count(ModelVersion) == 1


@pytest.mark.parametrize(("sha256", "identical"), [("2" * 64, True), ("3" * 64, False)])
def test_it_is_made_again_and_compared(desk: Desk, sha256: str, identical: bool) -> None:
    add_diffusion(desk)
    first = export(desk)
    succeed(desk, RESULT)

    again = desk.do(lambda session: requests.reproduce(session, desk.tenant_id, first.id, settings=SETTINGS))
    succeed(desk, RESULT | {"sha256": sha256})

    found = (desk.job(again.id).result or {})["reproduction"]
    assert (found["of"], found["identical"]) == (public("job", first.id), identical)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"network": "dit"}, "the model is a dit"),
        ({"preset": "xs"}, "squares of pixels"),
        ({"autoencoder": "vae@1"}, "works in latents"),
        ({"shape": (1, 8, 6)}, "multiples of 4, and here they are 6 by 8"),
    ],
)
def test_a_model_that_the_library_has_no_words_for_is_refused(desk: Desk, choice: dict[str, Any], reason: str) -> None:
    add_diffusion(desk, **choice)

    with pytest.raises(InvalidSpec, match=reason) as refused:
        export(desk)

    assert refused.value.pointer == "/spec/model"


def test_a_model_of_another_family_is_refused(desk: Desk) -> None:
    add_version(desk, "base", 1)

    with pytest.raises(InvalidSpec, match="of the family vae cannot be exported as diffusers") as refused:
        export(desk, "base")

    assert refused.value.pointer == "/spec/model"


def test_a_model_that_does_not_exist_is_refused(desk: Desk) -> None:
    with pytest.raises(InvalidSpec, match="no such model"):
        export(desk, "theirs")
