"""Rows as clients see them. The only place that builds views."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from fastapi import Request

from api.parts import Parts
from api.waiting import JobFacts
from shared.errors import retryable_codes
from shared.ids import public
from shared.jobs.alias_rows import AliasMove, ModelAlias
from shared.jobs.rows import ApiKey, Artifact, Attempt, Dataset, Event, Job, Model, ModelVersion, Worker
from shared.jobs.state import JobState
from shared.specs import FAMILIES
from shared.specs.gate import Bound, Check
from shared.wire import (
    AliasMoveView,
    AliasView,
    ArtifactView,
    AttemptView,
    CauseView,
    DatasetView,
    ErrorView,
    EventView,
    JobView,
    ModelVersionView,
    ModelView,
    ProgressView,
    WorkerView,
)

if TYPE_CHECKING:
    from shared.storage import Storage

_PRIORITIES: tuple[Literal["low"], Literal["normal"], Literal["high"]] = ("low", "normal", "high")
_TIMINGS = ("queue_ms", "load_ms", "execution_ms", "upload_ms")
_RETRYABLE = retryable_codes()


@dataclass(frozen=True)
class Links:
    """Addresses of resources, as clients reach this API: a dependency of its own ``base``."""

    base: str

    @staticmethod
    async def of(request: Request) -> "Links":
        """The dependency."""
        parts = await Parts.of(request)
        return Links((parts.settings.api.url or str(request.base_url)).rstrip("/"))

    def job(self, job_id: UUID) -> dict[str, str]:
        own = f"{self.base}/v1/jobs/{public('job', job_id)}"
        under = {
            name: f"{own}/{name}"
            for name in ("events", "attempts", "artifacts", "cancel", "pause", "resume", "retry", "reproduce")
        }
        return {"self": own, **under, "web": f"{self.base}/jobs/{public('job', job_id)}"}

    def dataset(self, dataset_id: UUID) -> dict[str, str]:
        own = f"{self.base}/v1/datasets/{public('ds', dataset_id)}"
        return {"self": own, "complete": f"{own}/complete"}


def job(row: Job, facts: JobFacts, links: Links) -> JobView:
    done = row.state == JobState.SUCCEEDED
    return JobView(
        id=public("job", row.id),
        type=row.type.value,
        state=row.state.value,
        state_version=row.state_version,
        summary=row.summary,
        spec=row.spec,
        priority=_PRIORITIES[row.priority],
        labels=row.labels,
        attempt=row.fence,
        max_attempts=row.max_attempts,
        attempts=[attempt(one) for one in facts.attempts],
        phase=row.phase,
        progress=ProgressView(
            value=1.0 if done else min(row.step / row.steps, 1.0) if row.steps else 0.0,
            step=row.step,
            steps=row.steps,
            figures=row.figures,
        ),
        queue=facts.queue,
        metrics={**{name: row.timings.get(name) for name in _TIMINGS}, "device_seconds": facts.device_seconds},
        error=_failure(row, facts.attempts),
        result=row.result,
        created_at=_given(row.created_at),
        started_at=row.started_at,
        completed_at=row.completed_at,
        cancel_requested_at=row.cancel_requested_at,
        retry_of=_job_id(row.retry_of),
        retried_by=_job_id(facts.retried_by),
        needs=row.inputs.get("needs", {}),
        reproduces=row.inputs.get("reproduces"),
        urls=links.job(row.id),
    )


def error(code: str | None, message: str | None) -> ErrorView | None:
    if code is None:
        return None
    return ErrorView(code=code, message=message or "", retryable=code in _RETRYABLE)


def _failure(row: Job, attempts: Sequence[Attempt]) -> ErrorView | None:
    failure = error(row.error_code, row.error_message)
    if failure is not None:
        failure.causes = [
            CauseView(attempt=one.fence, code=one.error_code, message=one.error_message or "")
            for one in attempts
            if one.error_code is not None
        ]
    return failure


def _job_id(job_id: UUID | None) -> str | None:
    return None if job_id is None else public("job", job_id)


def attempt(row: Attempt) -> AttemptView:
    return AttemptView(
        number=row.fence,
        worker=row.worker,
        started_at=_given(row.started_at),
        ended_at=row.ended_at,
        outcome=None if row.outcome is None else row.outcome.value,
        error=error(row.error_code, row.error_message),
    )


def event(row: Event) -> EventView:
    return EventView.model_validate({"seq": row.seq, "type": row.type, "data": row.data, "created_at": row.created_at})


def artifact(row: Artifact, link: str, link_expires_at: datetime) -> ArtifactView:
    return ArtifactView(
        id=public("art", row.id),
        job_id=public("job", row.job_id),
        attempt=row.fence,
        kind=row.kind,
        name=row.name,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        media_type=row.media_type,
        details=row.details,
        created_at=_given(row.created_at),
        expires_at=row.expires_at,
        url=link,
        url_expires_at=link_expires_at,
    )


def artifact_link(row: Artifact, storage: "Storage") -> str:
    """A presigned URL. Signing takes a moment of CPU, so call it in a thread for many."""
    # The name goes into a header of somebody else's server.
    filename = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(row.name).name) or "artifact"
    return storage.link(row.key, filename=filename, media_type=row.media_type)


def dataset(row: Dataset, links: Links, *, upload: Mapping[str, Any] | None = None) -> DatasetView:
    return DatasetView.model_validate(
        {
            "id": public("ds", row.id),
            "name": row.name,
            "state": row.state.value,
            "modality": row.modality,
            "count": row.count,
            "digest": row.digest,
            "info": row.info,
            "error": row.error,
            "job_id": _job_id(row.job_id),
            "created_at": row.created_at,
            "upload": None if upload is None else dict(upload),
            "urls": links.dataset(row.id),
        }
    )


def version(model_row: Model, row: ModelVersion) -> ModelVersionView:
    family = FAMILIES.get(row.family)
    return ModelVersionView(
        model=model_row.name,
        version=row.version,
        ref=f"{model_row.name}@{row.version}",
        family=row.family,
        spec=row.spec,
        info=row.info,
        metrics=row.metrics,
        tasks=sorted(family.tasks) if family else [],
        weights_sha256=row.weights["sha256"],
        size_bytes=row.weights["size_bytes"],
        job_id=public("job", row.job_id),
        dataset_id=None if row.dataset_id is None else public("ds", row.dataset_id),
        created_at=_given(row.created_at),
    )


def model(row: Model, latest: ModelVersion | None, aliases: Mapping[str, int]) -> ModelView:
    return ModelView(
        id=public("mdl", row.id),
        name=row.name,
        latest=row.latest,
        aliases=dict(aliases),
        created_at=_given(row.created_at),
        latest_version=None if latest is None else version(row, latest),
    )


def alias(model_name: str, row: ModelAlias, version_number: int) -> AliasView:
    return AliasView(
        model=model_name,
        alias=row.name,
        ref=f"{model_name}@{row.name}",
        version=version_number,
        gate=[Bound.model_validate(bound) for bound in row.gate],
        created_at=_given(row.created_at),
    )


def alias_move(row: AliasMove, key: ApiKey) -> AliasMoveView:
    return AliasMoveView(
        id=public("mov", row.id),
        alias=row.alias,
        from_version=row.from_version,
        to_version=row.to_version,
        gate=[Bound.model_validate(bound) for bound in row.gate],
        checks=[Check.model_validate(check) for check in row.checks],
        key_id=public("key", key.id),
        key_hint=key.hint,
        created_at=_given(row.created_at),
    )


def worker(row: Worker, *, is_gone: bool, own_jobs: Sequence[UUID]) -> WorkerView:
    """``own_jobs``: the job is named only to the tenant that owns it."""
    return WorkerView(
        name=row.name,
        host=row.host,
        queues=row.queues,
        device=row.device,
        state="gone" if is_gone and row.state != "stopped" else row.state,
        job_id=public("job", row.job_id) if row.job_id is not None and row.job_id in own_jobs else None,
        seen_at=_given(row.seen_at),
    )


def _given(time: datetime | None) -> datetime:
    """A column that SQL always fills."""
    if time is None:
        raise ValueError("the row was not read back after it was written")
    return time
