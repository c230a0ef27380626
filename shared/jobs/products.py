"""What jobs read and what they make: datasets and model versions, resolved and published in SQL.

``resolve`` turns the references of a job into what its runner needs to fetch them; ``publish``
turns a finished job's result into rows, inside the transaction that makes it succeed.
"""

from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.errors import NotFound
from shared.ids import parse, public
from shared.jobs.rows import Artifact, Dataset, DatasetState, Model, ModelVersion
from shared.jobs.state import JobType
from shared.reproduction import Original, compare

_IN_ROWS: Final[Mapping[JobType, tuple[str, ...]]] = {
    JobType.TRAIN: ("weights", "info"),
    JobType.REAVERAGE: ("weights", "info"),
    JobType.IMPORT: ("weights", "info"),
    JobType.INGEST: ("files",),
}
"""What of a result is shown with the model version or the dataset that it became."""

_KNOWN: Final[dict[str, dict[str, Any]]] = {}
"""Versions of models that were read before, as inputs; they are never changed or deleted."""
_MOST_KNOWN: Final = 100


def resolve(
    session: Session, job_id: UUID, kind: JobType, inputs: Mapping[str, Any], *, fence: int = 1
) -> dict[str, Any]:
    """The ``inputs`` of an assignment, as ``worker/run.py`` describes them; ``reproduces`` is kept for ``publish``.

    An attempt after the first (``fence``) at drawing samples is told what the others have left.

    Raises:
        NotFound: something of it is gone.
    """
    kept = {"reproduces": inputs["reproduces"]} if "reproduces" in inputs else {}
    if kind == JobType.GENERATE and fence > 1:
        kept |= {"resume": _checkpoints(session, job_id, {})}
    return _resolved(session, job_id, kind, inputs) | kept


def _resolved(session: Session, job_id: UUID, kind: JobType, inputs: Mapping[str, Any]) -> dict[str, Any]:
    match kind:
        case JobType.INGEST:
            return {"source": _dataset(session, inputs["dataset_id"]).source}
        case JobType.TRAIN:
            return {
                "dataset": _dataset_input(session, inputs),
                "further_datasets": {
                    field: _dataset_input(session, {"dataset_id": one})
                    for field, one in inputs.get("further_dataset_ids", {}).items()
                },
                "models": {field: _model_input(session, one) for field, one in inputs.get("models", {}).items()},
                "resume": _checkpoints(session, job_id, inputs),
            }
        case JobType.GENERATE | JobType.EVALUATE:
            return _task_inputs(session, inputs)
        case JobType.REAVERAGE:
            return {
                "model": _model_input(session, inputs["version_id"]),
                "dataset": _dataset_input(session, inputs),
                "averages": _artifact(session, inputs["artifact_id"]),
            }
        case JobType.EXPORT:
            model = {"model": _model_input(session, inputs["version_id"])} if "version_id" in inputs else {}
            return model | {"dataset": _dataset_input(session, inputs)}
        case JobType.IMPORT:
            return {"model": inputs["model"], "dataset": _dataset_input(session, inputs)}


def _dataset(session: Session, dataset_id: str) -> Dataset:
    dataset = session.get(Dataset, UUID(dataset_id))
    if dataset is None:
        raise NotFound(f"the dataset {public('ds', UUID(dataset_id))} is gone")
    return dataset


def _task_inputs(session: Session, inputs: Mapping[str, Any]) -> dict[str, Any]:
    resolved: dict[str, Any] = {
        "model": _model_input(session, inputs["version_id"]),
        "dataset": _dataset_input(session, inputs),
    }
    resolved["images"] = [_artifact(session, one) for one in inputs.get("artifact_ids", [])]
    # Further pictures, each named by the field of the spec: a mask, a style.
    for name, reference in inputs.items():
        if name.endswith("_dataset_id"):
            resolved[name.removesuffix("_id")] = _dataset_input(session, {"dataset_id": reference})
        elif name.endswith("_artifact_id"):
            resolved[name.removesuffix("_artifact_id") + "_image"] = _artifact(session, reference)
    return resolved


def _artifact(session: Session, artifact_id: str) -> dict[str, Any]:
    row = session.get(Artifact, UUID(artifact_id))
    if row is None or row.removed_at is not None:
        raise NotFound(f"the artifact {public('art', UUID(artifact_id))} is gone")
    return {"key": row.key, "sha256": row.sha256, "size_bytes": row.size_bytes}


def _dataset_input(session: Session, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    if "dataset_id" not in inputs:
        return None
    row = _dataset(session, inputs["dataset_id"])
    return {
        "id": public("ds", row.id),
        "modality": row.modality,
        "digest": row.digest,
        "info": row.info,
        "files": row.files,
    }


def _checkpoints(session: Session, job_id: UUID, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where the job may go on: its own checkpoints, the last made first, then those of the jobs it retries."""
    lineage = [job_id, *(UUID(ancestor) for ancestor in inputs.get("lineage", []))]
    kept = (
        select(Artifact)
        .where(
            col(Artifact.job_id).in_(lineage), col(Artifact.kind) == "checkpoint", col(Artifact.removed_at).is_(None)
        )
        .order_by(col(Artifact.fence).desc(), col(Artifact.id).desc())
    )
    rows = sorted(session.scalars(kept), key=lambda row: lineage.index(row.job_id))
    return [
        {"key": row.key, "sha256": row.sha256, "size_bytes": row.size_bytes, "step": row.details["step"]}
        for row in rows
    ]


def _model_input(session: Session, version_id: str) -> dict[str, Any]:
    if (known := _KNOWN.get(version_id)) is None:
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        known = _KNOWN[version_id] = _look_up_model(session, version_id)
    return known


def _look_up_model(session: Session, version_id: str) -> dict[str, Any]:
    asked = (
        select(ModelVersion, Model)
        .join(Model, col(ModelVersion.model_id) == Model.id)
        .where(col(ModelVersion.id) == UUID(version_id))
    )
    row = session.execute(asked).one_or_none()
    if row is None:
        raise NotFound("the version of the model is gone")
    version, model = row
    return {
        "id": public("mdl", model.id),
        "name": model.name,
        "version": version.version,
        "family": version.family,
        "spec": version.spec,
        "info": version.info,
        "weights": version.weights,
    }


def shows_as_it_is(kind: JobType, inputs: Mapping[str, Any]) -> bool:
    """Whether the result of such a job stands for no rows and is compared with nothing: ``publish`` changes nothing."""
    return "reproduces" not in inputs and kind not in _IN_ROWS


def publish(
    session: Session,
    tenant_id: UUID,
    job_id: UUID,
    kind: JobType,
    *,
    spec: Mapping[str, Any],
    inputs: Mapping[str, Any],
    result: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the rows that a finished job's result stands for; returns the result to show.

    A job that reproduces another makes no dataset and no version, whose first ones are there: its result tells how it
    compares (``docs/decisions/0020-a-reproduction-registers-nothing.md``).
    """
    if "reproduces" in inputs:
        return _compared(kind, _shown(kind, result), Original.model_validate(inputs["reproduces"]))
    match kind:
        case JobType.INGEST:
            return _publish_dataset(session, job_id, result)
        case JobType.TRAIN:
            return _publish_version(session, tenant_id, job_id, spec, inputs, result)
        case JobType.REAVERAGE:
            trained = {**inputs["model"]["spec"], "family": inputs["model"]["family"], "model": spec["name"]}
            return _publish_version(session, tenant_id, job_id, trained, inputs, result)
        case JobType.IMPORT:
            return _publish_version(session, tenant_id, job_id, inputs["model"]["spec"], inputs, result)
        case _:
            return dict(result)


def digest_of(kind: JobType, result: Mapping[str, Any]) -> str | None:
    """The SHA-256 of all that a job made, by which it is known (``shared/reproduction.py``), as its result shows it."""
    return result.get("digest" if kind == JobType.INGEST else "sha256")


def _compared(kind: JobType, shown: dict[str, Any], original: Original) -> dict[str, Any]:
    found = compare(original, sha256=digest_of(kind, shown), fingerprint=shown.get("fingerprint"))
    return {**shown, "reproduction": found.model_dump(mode="json")}


def _shown(kind: JobType, result: Mapping[str, Any]) -> dict[str, Any]:
    """What a result tells that no row tells."""
    told = {name: value for name, value in result.items() if name not in _IN_ROWS.get(kind, ())}
    return {"sha256": result["weights"]["sha256"], **told} if "weights" in result else told


def _publish_dataset(session: Session, job_id: UUID, result: Mapping[str, Any]) -> dict[str, Any]:
    ready = (
        update(Dataset)
        .where(col(Dataset.job_id) == job_id)
        .values(
            state=DatasetState.READY,
            error=None,
            **{name: result[name] for name in ("modality", "count", "digest", "info", "files")},
        )
        .returning(col(Dataset.id))
    )
    dataset_id = session.execute(ready).scalar_one()
    return {"dataset": public("ds", dataset_id), **_shown(JobType.INGEST, result)}


def _publish_version(
    session: Session,
    tenant_id: UUID,
    job_id: UUID,
    spec: Mapping[str, Any],
    inputs: Mapping[str, Any],
    result: Mapping[str, Any],
) -> dict[str, Any]:
    # The upsert locks the name's row, so versions of one name are numbered without a gap or a tie.
    named = (
        insert(Model)
        .values(tenant_id=tenant_id, name=spec["model"], latest=1)
        .on_conflict_do_update(index_elements=["tenant_id", "name"], set_={"latest": Model.latest + 1})
        .returning(col(Model.id), col(Model.latest))
    )
    model_id, version = session.execute(named).one()
    dataset = inputs.get("dataset")
    session.add(
        ModelVersion(
            model_id=model_id,
            version=version,
            family=spec["family"],
            spec=dict(spec),
            info=result["info"],
            metrics=result["metrics"],
            weights=result["weights"],
            job_id=job_id,
            dataset_id=None if dataset is None else parse("ds", dataset["id"]),
        )
    )
    named = {"model": f"{spec['model']}@{version}", "model_id": public("mdl", model_id), "version": version}
    return named | _shown(JobType.TRAIN, result)
