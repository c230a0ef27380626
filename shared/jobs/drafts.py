"""Requests whose references have been looked up in SQL: what they name exists, fits, and is pinned to one version."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from pydantic_core import PydanticCustomError
from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from shared import ids
from shared.errors import InvalidSpec
from shared.jobs import named
from shared.jobs.named import Named
from shared.jobs.rows import Artifact, Dataset, DatasetState, JsonObject
from shared.jobs.state import JobType
from shared.specs import FAMILIES, TrainSpec
from shared.specs.evaluate import OF_SAMPLES, EvaluateSpec
from shared.specs.export import ExportSpec
from shared.specs.imports import ImportSpec
from shared.specs.reaverage import AVERAGES, ReaverageSpec
from shared.specs.tasks import Inpaint, MatchStyle, PictureField, Request, Stylise, WithInputs
from shared.wire import (
    AnyJobRequest,
    EvaluateRequest,
    ExportRequest,
    GenerateRequest,
    ImportRequest,
    ReaverageRequest,
    TrainRequest,
)

PICTURES = "image/png"
"""The media type of artifacts that a task can read."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A job to be."""

    type: JobType
    spec: dict[str, Any]
    summary: str
    inputs: dict[str, Any]
    needs: Sequence[JsonObject] = ()
    """What the job has to wait for (``Named.as_need``)."""


async def draft(session: AsyncSession, tenant_id: UUID, request: AnyJobRequest) -> Draft:
    """What ``request`` asks for.

    Raises:
        InvalidSpec: a reference in the spec cannot be used; the error points at the field.
    """
    match request:
        case TrainRequest():
            return await _train(session, tenant_id, request.spec)
        case GenerateRequest():
            return await _generate(session, tenant_id, request.spec)
        case EvaluateRequest():
            return await _evaluate(session, tenant_id, request.spec)
        case ReaverageRequest():
            return await _reaverage(session, tenant_id, request.spec)
        case ExportRequest():
            return await _export(session, tenant_id, request.spec)
        case ImportRequest():
            return await _import(session, tenant_id, request.spec)


async def _train(session: AsyncSession, tenant_id: UUID, spec: TrainSpec) -> Draft:
    dataset = await _dataset(session, tenant_id, spec.dataset, spec.modality)
    further = {field: await _further_dataset(session, spec, field, beside=dataset) for field in spec.further_datasets}
    models = dict[str, Named]()
    if spec.init_from is not None:
        models["init_from"] = await _origin(session, spec, "init_from", beside=dataset)
        with _pointing_at_its_field():
            spec = spec.begun_with(models["init_from"].trained.spec)
    for field in spec.references().keys() - models.keys():
        models[field] = await _origin(session, spec, field, beside=dataset)
    pinned = {field: model.ref for field, model in models.items()}
    known = {field: model.trained for field, model in models.items()}
    with _pointing_at_its_field():
        spec.model_copy(update=pinned).check_references(known, dataset.info)
        spec.check_fields()
        spec.check_data({"dataset": dataset.info} | {field: one.info for field, one in further.items()})
    inputs = {
        "dataset_id": str(dataset.id),
        "further_dataset_ids": {field: str(one.id) for field, one in further.items()},
        "models": {name: one for field, model in models.items() for name, one in model.as_input(field).items()},
    }
    return _waiting(
        Draft(
            type=JobType.TRAIN,
            spec=spec.model_dump(mode="json") | pinned,
            summary=f"train {getattr(spec, 'family', '')} {spec.model}",
            inputs=inputs,
        ),
        models,
    )


def _waiting(draft: Draft, models: Mapping[str, Named]) -> Draft:
    """The draft, of a job that waits for those of its ``models``, by the field that names them, that are yet to be."""
    promised = {field: model for field, model in models.items() if model.version_id is None}
    if not promised:
        return draft
    named = {field: ids.public("job", model.job_id) for field, model in promised.items()}
    needs = [model.as_need(field) for field, model in promised.items()]
    return replace(draft, inputs=draft.inputs | {"needs": named}, needs=needs)


async def _further_dataset(session: AsyncSession, spec: TrainSpec, field: str, *, beside: Dataset) -> Dataset:
    """The dataset that ``field`` names, whose samples are shaped as those that it stands ``beside``."""
    pointer = f"/spec/{field}"
    dataset = await _dataset(session, beside.tenant_id, getattr(spec, field), spec.modality, pointer=pointer)
    _require_shape(dataset, [tuple(beside.info.get("shape", ()))], pointer=pointer)
    return dataset


async def _origin(session: AsyncSession, spec: TrainSpec, field: str, *, beside: Dataset) -> Named:
    """The model that ``field`` names, of a family that it may be of, and of samples as those of the dataset."""
    pointer, (ref, families) = f"/spec/{field}", spec.references()[field]
    model = await named.find(session, beside.tenant_id, ref, pointer=pointer)
    if model.family not in families:
        known = " or ".join(sorted(families))
        raise InvalidSpec(f"{ref} is a {model.family} model, and {known} is needed", pointer=pointer)
    _require_same_shape(beside, model, pointer=pointer)
    return model


async def _model(session: AsyncSession, tenant_id: UUID, ref: str) -> Named:
    return await named.find(session, tenant_id, ref, pointer="/spec/model")


async def _generate(session: AsyncSession, tenant_id: UUID, spec: Request) -> Draft:
    model = await _model(session, tenant_id, spec.model)
    trained = model.trained
    if spec.task not in trained.spec.tasks:
        known = ", ".join(sorted(trained.spec.tasks))
        raise InvalidSpec(f"a {model.family} model cannot {spec.task}; it can {known}", pointer="/spec/task")
    inputs: dict[str, Any] = model.as_input()
    with _pointing_at_its_field():
        trained.spec.check_task(spec, trained.info)
        if isinstance(spec, WithInputs):
            inputs |= await _inputs(session, tenant_id, spec, tuple(trained.info["shape"]))
    # The spec names the version that was the newest at submission, so that it means the same for ever.
    draft = Draft(
        type=JobType.GENERATE,
        spec=spec.model_dump(mode="json") | {"model": model.ref},
        summary=f"{spec.task} {model.ref}",
        inputs=inputs,
    )
    return _waiting(draft, {"model": model})


async def _evaluate(session: AsyncSession, tenant_id: UUID, spec: EvaluateSpec) -> Draft:
    model = await _model(session, tenant_id, spec.model)
    trained = model.trained
    dataset = await _dataset(session, tenant_id, spec.dataset, trained.spec.modality)
    _require_same_shape(dataset, model, pointer="/spec/dataset")
    with _pointing_at_its_field():
        wanted = spec.wanted(trained.spec, model.info, dataset.info)
        if wanted & OF_SAMPLES:
            trained.spec.check_task(spec, model.info)
    settled = {"model": model.ref, "metrics": sorted(wanted), "features": spec.features_of(model.info["shape"])}
    draft = Draft(
        type=JobType.EVALUATE,
        spec=spec.model_dump(mode="json") | settled,
        summary=f"evaluate {model.ref}",
        inputs=model.as_input() | {"dataset_id": str(dataset.id)},
    )
    return _waiting(draft, {"model": model})


async def _reaverage(session: AsyncSession, tenant_id: UUID, spec: ReaverageSpec) -> Draft:
    model = await _model(session, tenant_id, spec.model)
    artifact_id = None if model.version_id is None else await session.scalar(averages_of(model.job_id))
    if artifact_id is None and not model.has_averages:
        told = f"no training with ema: power made {model.ref}, or what it left is gone"
        raise InvalidSpec(told, pointer="/spec/model")
    draft = Draft(
        type=JobType.REAVERAGE,
        spec=spec.model_dump(mode="json") | {"model": model.ref, "name": spec.name or model.name},
        summary=f"reaverage {model.ref}",
        inputs=_version_ids(model) | ({} if artifact_id is None else {"artifact_id": str(artifact_id)}),
    )
    return _waiting(draft, {"model": model})


def averages_of(job_id: Any) -> Select[UUID]:
    """The artifact of a training that averages of other lengths are made of."""
    named = (col(Artifact.kind) == "weights", col(Artifact.name) == AVERAGES, col(Artifact.removed_at).is_(None))
    found = select(col(Artifact.id)).where(col(Artifact.job_id) == job_id, *named)
    return found.order_by(col(Artifact.id).desc()).limit(1)


async def _export(session: AsyncSession, tenant_id: UUID, spec: ExportSpec) -> Draft:
    model = await _model(session, tenant_id, spec.model)
    with _pointing_at_its_field():
        model.trained.spec.check_export(spec, model.info)
    draft = Draft(
        type=JobType.EXPORT,
        spec=spec.model_dump(mode="json") | {"model": model.ref},
        summary=f"export {model.ref}",
        inputs=_version_ids(model),
    )
    return _waiting(draft, {"model": model})


async def _import(session: AsyncSession, tenant_id: UUID, spec: ImportSpec) -> Draft:
    dataset = await _dataset(session, tenant_id, spec.dataset, "model")
    name = _importing_family(spec, dataset)
    with _pointing_at_its_field():
        model = FAMILIES[name].imported(spec, dataset.info)
    # Of its training nothing is known: only the fields that are set tell something.
    trained = model.spec.model_dump(mode="json", exclude_unset=True)
    source = {"format": dataset.info["format"], "dataset": spec.dataset, "sha256": dataset.info["sha256"]}
    return Draft(
        type=JobType.IMPORT,
        spec=spec.model_dump(mode="json") | {"family": name},
        summary=f"import {spec.model}",
        inputs={
            "dataset_id": str(dataset.id),
            "model": {"family": name, "spec": trained, "info": {**model.info, "imported": source}},
        },
    )


def _importing_family(spec: ImportSpec, dataset: Dataset) -> str:
    """The family that reads such files."""
    able = sorted(name for name, family in FAMILIES.items() if dataset.info["format"] in family.imports)
    if spec.family is None and len(able) == 1:
        return able[0]
    if spec.family not in able:
        known = f"files of {dataset.info['format']} become a model of {' or '.join(able) or 'no family'}"
        raise InvalidSpec(f"{known}: name one", pointer="/spec/family")
    return spec.family


def _version_ids(model: Named) -> dict[str, str]:
    """The ids of a version and, where it is known, of what it was trained on."""
    dataset = {} if model.dataset_id is None else {"dataset_id": str(model.dataset_id)}
    return model.as_input() | dataset


@contextmanager
def _pointing_at_its_field() -> Generator[None, None, None]:
    """What a spec refuses (``wrong``), as the refusal of a request."""
    try:
        yield
    except PydanticCustomError as error:
        refused = error.context or {}
        raise InvalidSpec(refused["message"], pointer=f"/spec/{refused['field']}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = first.get("ctx", {}).get("field") or "/".join(str(part) for part in first["loc"])
        raise InvalidSpec(first["msg"], pointer=f"/spec/{field}") from error


def _require_same_shape(dataset: Dataset, model: Named, *, pointer: str) -> None:
    _require_shape(dataset, [tuple(model.info["shape"])], pointer=pointer)


def _require_shape(dataset: Dataset, allowed: Sequence[tuple[int, ...]], *, pointer: str) -> None:
    if (shape := tuple(dataset.info.get("shape", ()))) not in allowed:
        needed = " or ".join(str(list(one)) for one in allowed)
        raise InvalidSpec(f"the dataset's samples are {list(shape)}, and {needed} is needed", pointer=pointer)


async def _inputs(session: AsyncSession, tenant_id: UUID, spec: WithInputs, shape: tuple[int, ...]) -> dict[str, Any]:
    """The ids of what the task reads, for a model of samples of this shape."""
    inputs: dict[str, Any] = {}
    if spec.dataset is not None:
        dataset = await _dataset(session, tenant_id, spec.dataset, "image")
        _require_shape(dataset, spec.input_shapes(shape), pointer="/spec/dataset")
        inputs["dataset_id"] = str(dataset.id)
    pictures = {f"/spec/images/{place}": one for place, one in enumerate(spec.images or [])}
    inputs["artifact_ids"] = [await _picture(session, tenant_id, one, pointer) for pointer, one in pictures.items()]
    if spec.picture is not None and getattr(spec, spec.picture) is not None:
        inputs |= await _further_picture(session, tenant_id, spec, spec.picture, shape)
    if isinstance(spec, Inpaint) and spec.box is not None and (spec.box[2] > shape[2] or spec.box[3] > shape[1]):
        raise InvalidSpec(f"the images are {shape[2]} pixels wide and {shape[1]} high", pointer="/spec/box")
    return inputs


async def _further_picture(
    session: AsyncSession, tenant_id: UUID, spec: WithInputs, field: PictureField, shape: tuple[int, ...]
) -> dict[str, str]:
    """The id of the picture that ``field`` names: a dataset, one image of which it is, or an artifact."""
    named: str = getattr(spec, field)
    if not named.startswith("ds_"):
        return {f"{field}_artifact_id": await _picture(session, tenant_id, named, f"/spec/{field}")}
    dataset = await _dataset(session, tenant_id, named, "image", pointer=f"/spec/{field}")
    _require_shape(dataset, spec.picture_shapes(shape), pointer=f"/spec/{field}")
    if isinstance(spec, Stylise | MatchStyle) and spec.style_index >= (count := dataset.count or 0):
        raise InvalidSpec(f"the dataset has {count} images", pointer="/spec/style_index")
    return {f"{field}_dataset_id": str(dataset.id)}


async def _picture(session: AsyncSession, tenant_id: UUID, artifact_id: str, pointer: str) -> str:
    wanted = ids.parse("art", artifact_id)
    found = select(Artifact).where(col(Artifact.id) == wanted, col(Artifact.tenant_id) == tenant_id)
    artifact = (await session.execute(found)).scalar_one_or_none()
    if artifact is None or artifact.removed_at is not None:
        raise InvalidSpec(f"no such artifact: {artifact_id}", pointer=pointer)
    if artifact.media_type != PICTURES:
        raise InvalidSpec(f"the artifact is {artifact.media_type}, and {PICTURES} is needed", pointer=pointer)
    return str(artifact.id)


async def _dataset(
    session: AsyncSession, tenant_id: UUID, dataset_id: str, modality: str, *, pointer: str = "/spec/dataset"
) -> Dataset:
    found = select(Dataset).where(col(Dataset.id) == ids.parse("ds", dataset_id), col(Dataset.tenant_id) == tenant_id)
    dataset = (await session.execute(found)).scalar_one_or_none()
    if dataset is None:
        raise InvalidSpec(f"no such dataset: {dataset_id}", pointer=pointer)
    if dataset.state != DatasetState.READY:
        raise InvalidSpec(f"the dataset is not ready: it is {dataset.state.value}", pointer=pointer)
    if dataset.modality != modality:
        raise InvalidSpec(f"the dataset holds {dataset.modality}, and {modality} is needed", pointer=pointer)
    return dataset
