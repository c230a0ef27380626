"""A job that needs the model of another, asked for at the desk, and the ways in which that other ends."""

from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from shared.errors import NanLoss
from shared.ids import public
from shared.jobs import attempts, claims, requests, upkeep
from shared.jobs.attempts import Claim, NewArtifact
from shared.jobs.rows import Job
from shared.jobs.state import JobState
from shared.wire import GenerateRequest, TrainRequest
from tests.shared.desk import QUEUES, SETTINGS, TERMS, Desk
from tests.shared.test_references import WEIGHTS

INFO = {"shape": [1, 8, 8], "num_classes": 0}


def ref(job: Job | UUID) -> str:
    return public("job", job if isinstance(job, UUID) else job.id)


def ask(desk: Desk, request: Any) -> Job:
    return desk.do(lambda session: requests.submit(session, desk.tenant_id, request, settings=SETTINGS))


def draw(desk: Desk, model: str, **spec: Any) -> Job:
    return ask(desk, drawing(model, **spec))


def drawing(model: str, **spec: Any) -> GenerateRequest:
    return GenerateRequest.model_validate({"type": "generate", "spec": {"task": "generate", "model": model, **spec}})


def diffuse(desk: Desk, model: str = "drawn", **spec: Any) -> Job:
    fields = {"family": "diffusion", "dataset": f"ds_{desk.dataset_id.hex}", "model": model}
    return ask(desk, TrainRequest.model_validate({"type": "train", "spec": fields | spec}))


def succeed(desk: Desk, claim: Claim, info: dict[str, Any] = INFO, *artifacts: NewArtifact) -> None:
    assert desk.work(lambda session: ending_well(session, claim, info, artifacts)) is JobState.SUCCEEDED


def ending_well(session: Session, claim: Claim, info: dict[str, Any] = INFO, artifacts: Any = ()) -> JobState | None:
    result = {"weights": WEIGHTS | {"key": claim.job_id.hex}, "info": info, "metrics": {}}
    return attempts.succeed(session, claim, result=result, artifacts=artifacts, timings={}, steps=1)


def claimable(desk: Desk) -> list[Claim]:
    return desk.work(lambda session: claims.claim(session, worker="w", queues=QUEUES, terms=TERMS))


def cancel(desk: Desk, job_id: UUID) -> Job:
    return desk.do(lambda session: requests.cancel(session, desk.tenant_id, job_id))


def stop(desk: Desk, job_id: UUID) -> None:
    claim = desk.claim()
    cancel(desk, job_id)
    desk.work(lambda session: attempts.hand_back(session, job_id, claim.fence))


def expire(desk: Desk, job_id: UUID) -> None:
    desk.force(job_id, start_deadline=text("clock_timestamp() - interval '1 s'"))
    desk.work(upkeep.expire)


def fail(desk: Desk, job_id: UUID) -> None:
    claim = desk.claim()
    desk.work(lambda s: attempts.fail(s, job_id, claim.fence, NanLoss("the loss is no number"), backoff=TERMS.lease))


def lose(desk: Desk, job_id: UUID) -> None:
    desk.claim()
    desk.force(job_id, max_attempts=1, lease_until=text("clock_timestamp() - interval '1 s'"))
    desk.work(upkeep.reap)
