"""A request to average a model over another length: looked up, handed to a worker, and registered as a version."""

from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import func
from sqlalchemy.orm import Session

from shared.errors import InvalidSpec
from shared.jobs import attempts, requests
from shared.jobs.rows import Artifact, Job, Model, ModelVersion
from shared.jobs.state import JobState
from shared.specs.reaverage import AVERAGES, ReaverageSpec
from shared.wire import ReaverageRequest
from tests.shared.desk import SETTINGS, Desk
from tests.shared.test_references import WEIGHTS, add_version


def reaverage(desk: Desk, **spec: Any) -> Job:
    request = ReaverageRequest.model_validate(
        {"type": "reaverage", "spec": {"model": "base", "ema_length": 0.1, **spec}}
    )
    return desk.do(lambda session: requests.submit(session, desk.tenant_id, request, settings=SETTINGS))


def leave_averages(desk: Desk, *, removed: bool = False) -> None:
    """What the training of the only version left."""

    def add(session: Session) -> None:
        job_id = session.query(ModelVersion).one().job_id
        session.add(
            Artifact(
                tenant_id=desk.tenant_id, job_id=job_id, fence=1, kind="weights", name=AVERAGES, key=f"{job_id}/a",
                size_bytes=1, sha256="1" * 64, media_type="x/y", removed_at=func.now() if removed else None,
            )
        )  # fmt: skip

    desk.work(add)


def test_the_result_is_a_version_of_the_same_training(desk: Desk) -> None:
    add_version(desk, "base", 1)
    leave_averages(desk)
    job = reaverage(desk, name="smooth", ema_length=0.07)

    claim = desk.claim(queues=["generate"])
    info = {"shape": [1, 8, 8], "num_classes": 0, "ema_length": 0.07}
    result = {"metrics": {}, "weights": WEIGHTS, "info": info, "ema_length": 0.07}
    desk.work(lambda session: attempts.succeed(session, claim, result=result, artifacts=[], timings={}, steps=1))

    def versions(session: Session) -> list[tuple[str, int, dict[str, Any], dict[str, Any]]]:
        rows = session.query(Model, ModelVersion).join(ModelVersion, ModelVersion.model_id == Model.id).all()
        return [(model.name, version.version, version.spec, version.info) for model, version in rows]

    made = {name: (version, spec, info) for name, version, spec, info in desk.work(versions)}
    assert claim.inputs["averages"]["sha256"] == "1" * 64
    assert (job.spec["model"], job.summary) == ("base@1", "reaverage base@1")
    assert made["smooth"] == (1, {**made["base"][1], "model": "smooth"}, info)
    assert desk.job(job.id).state == JobState.SUCCEEDED
    assert (desk.job(job.id).result or {})["model"] == "smooth@1"


@pytest.mark.parametrize("left", [None, "removed"])
def test_a_model_whose_training_left_nothing_is_refused(desk: Desk, left: str | None) -> None:
    add_version(desk, "base", 1)
    if left:
        leave_averages(desk, removed=True)

    with pytest.raises(InvalidSpec, match="no training with ema: power") as refused:
        reaverage(desk)

    assert refused.value.pointer == "/spec/model"


def test_a_model_that_does_not_exist_is_refused(desk: Desk) -> None:
    with pytest.raises(InvalidSpec, match="no such model"):
        reaverage(desk, model="theirs")


@pytest.mark.parametrize("length", [0.04, 0.26, 0, None])
def test_lengths_that_no_copies_come_close_to_are_refused(length: float | None) -> None:
    with pytest.raises(ValidationError):
        ReaverageSpec.model_validate({"model": "base", "ema_length": length})
