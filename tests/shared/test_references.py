"""A spec that names trained models, or asks something of one: looked up, pinned, checked and handed to the worker."""

from typing import Any

import pytest
from sqlalchemy import func, update
from sqlalchemy.orm import Session

from shared.errors import InvalidSpec
from shared.ids import public
from shared.jobs import claims, requests
from shared.jobs.attempts import Claim
from shared.jobs.rows import Artifact, Dataset, DatasetState, Job, Model, ModelVersion
from shared.jobs.state import JobState, JobType
from shared.wire import GenerateRequest
from tests.shared.desk import SETTINGS, TERMS, Desk

WEIGHTS = {"key": "w", "sha256": "0" * 64, "size_bytes": 1}


def add_version(desk: Desk, name: str, version: int, *, shape: tuple[int, ...] = (1, 8, 8)) -> None:
    """A version of a model, as its training published it."""
    job = desk.submit()

    def add(session: Session) -> None:
        model = session.query(Model).filter_by(tenant_id=desk.tenant_id, name=name).one_or_none()
        model = model or Model(tenant_id=desk.tenant_id, name=name, latest=version)
        model.latest = version
        session.add(model)
        session.flush()
        spec = {"family": "vae", "dataset": f"ds_{desk.dataset_id.hex}", "model": name}
        session.add(
            ModelVersion(
                model_id=model.id, version=version, family="vae", spec=spec, metrics={}, weights=WEIGHTS,
                info={"shape": list(shape), "num_classes": 0}, job_id=job.id,
            )
        )  # fmt: skip

    desk.work(add)
    desk.do(lambda session: requests.cancel(session, desk.tenant_id, job.id))


def add_artifact(desk: Desk, *, media_type: str = "image/png", removed: bool = False) -> str:
    """An artifact of an ended job; returns its public id."""
    job = desk.submit()
    desk.do(lambda session: requests.cancel(session, desk.tenant_id, job.id))

    def add(session: Session) -> str:
        artifact = Artifact(
            tenant_id=desk.tenant_id, job_id=job.id, fence=1, kind="sample", name="a", key=f"{job.id}/a",
            size_bytes=1, sha256="1" * 64, media_type=media_type, removed_at=func.now() if removed else None,
        )  # fmt: skip
        session.add(artifact)
        session.flush()
        return public("art", artifact.id)

    return desk.work(add)


def fine_tune(desk: Desk, ref: str) -> Any:
    spec = {"family": "vae", "dataset": f"ds_{desk.dataset_id.hex}", "model": "tuned", "init_from": ref}
    return desk.submit(spec=spec)


def refused(desk: Desk, **task: Any) -> str | None:
    """The field that the request is refused for; None if it is not."""
    request = GenerateRequest.model_validate({"type": "generate", "spec": {"model": "base", **task}})
    try:
        desk.do(lambda session: requests.submit(session, desk.tenant_id, request, settings=SETTINGS))
    except InvalidSpec as error:
        return error.pointer
    return None


def test_the_model_that_a_training_begins_with_is_the_newest_at_submission(desk: Desk) -> None:
    add_version(desk, "base", 1)
    job = fine_tune(desk, "base")
    add_version(desk, "base", 2)

    claimed: Claim = desk.claim()

    assert claimed.job_id == job.id
    assert claimed.spec["init_from"] == "base@1"
    assert claimed.inputs["models"]["init_from"]["version"] == 1
    assert claimed.inputs["models"]["init_from"]["weights"] == WEIGHTS


@pytest.mark.parametrize(
    ("ref", "version"),
    [
        ("nobody", {}),
        ("base@7", {}),
        ("base", {"shape": (3, 8, 8)}),
    ],
)
def test_a_training_cannot_begin_with_just_any_model(desk: Desk, ref: str, version: dict[str, Any]) -> None:
    add_version(desk, "base", 1, **version)

    with pytest.raises(InvalidSpec) as refusal:
        fine_tune(desk, ref)

    assert refusal.value.pointer == "/spec/init_from"


def add_dataset(desk: Desk, *, tenant_id: Any = None, **columns: Any) -> str:
    """Another dataset of this tenant, unless said otherwise; returns its public id."""
    columns = {"state": DatasetState.READY, "modality": "image", "info": {"shape": [1, 8, 8]}, "files": []} | columns

    def add(session: Session) -> str:
        dataset = Dataset(tenant_id=tenant_id or desk.tenant_id, name="other", source={}, **columns)
        session.add(dataset)
        session.flush()
        return public("ds", dataset.id)

    return desk.work(add)


def translate(desk: Desk, target: str) -> Any:
    spec = {"family": "translation", "dataset": f"ds_{desk.dataset_id.hex}", "model": "m", "target_dataset": target}
    return desk.submit(spec=spec)


def test_a_training_gets_each_dataset_that_it_names(desk: Desk) -> None:
    target = add_dataset(desk)
    job = translate(desk, target)

    claimed = desk.claim()

    assert claimed.job_id == job.id
    assert claimed.inputs["dataset"]["id"] == f"ds_{desk.dataset_id.hex}"
    assert claimed.inputs["further_datasets"]["target_dataset"]["id"] == target


@pytest.mark.parametrize(
    "columns",
    [{"info": {"shape": [3, 8, 8]}}, {"state": DatasetState.INGESTING}, {"modality": "text"}, {"tenant_id": "another"}],
)
def test_a_training_cannot_have_just_any_further_dataset(desk: Desk, columns: dict[str, Any]) -> None:
    if "tenant_id" in columns:
        columns = {"tenant_id": Desk(desk.url, desk.engine).tenant_id}
    target = add_dataset(desk, **columns)

    with pytest.raises(InvalidSpec) as refusal:
        translate(desk, target)

    assert refusal.value.pointer == "/spec/target_dataset"


def test_an_option_that_the_family_does_not_understand_is_refused(desk: Desk) -> None:
    add_version(desk, "base", 1)

    assert refused(desk, task="generate", temperature=0.5) is None
    assert refused(desk, task="generate", guidance_scale=1.0, steps=None) is None
    assert refused(desk, task="generate", guidance_scale=2.0) == "/spec/guidance_scale"
    assert refused(desk, task="generate", steps=10) == "/spec/steps"
    assert refused(desk, task="interpolate", labels=[0]) == "/spec/labels"


def test_pictures_that_jobs_have_made_can_be_inputs(desk: Desk) -> None:
    add_version(desk, "base", 1)
    pictures = [add_artifact(desk), add_artifact(desk)]

    assert refused(desk, task="reconstruct", images=pictures) is None

    read = desk.claim().inputs["images"]
    assert [one["sha256"] for one in read] == ["1" * 64] * 2
    assert read[0]["key"] != read[1]["key"]


def test_what_cannot_be_an_input_is_refused_by_its_place(desk: Desk) -> None:
    add_version(desk, "base", 1)
    other = Desk(desk.url, desk.engine)
    good = add_artifact(desk)
    bad = [
        add_artifact(desk, media_type="application/json"),
        add_artifact(desk, removed=True),
        add_artifact(other),
        "art_" + "0" * 32,
    ]

    assert [refused(desk, task="reconstruct", images=[good, one]) for one in bad] == ["/spec/images/1"] * 4


def test_an_input_that_is_removed_before_the_job_runs_ends_it_by_name(desk: Desk) -> None:
    add_version(desk, "base", 1)
    picture = add_artifact(desk)
    assert refused(desk, task="reconstruct", images=[picture]) is None
    desk.work(lambda session: session.execute(update(Artifact).values(removed_at=func.now())))

    claimed = desk.work(lambda s: claims.claim(s, worker="w", queues=["generate"], terms=TERMS))

    (job,) = desk.work(lambda session: session.query(Job).filter_by(type=JobType.GENERATE).all())
    assert not claimed
    assert (job.state, job.error_code) == (JobState.FAILED, "input_gone")
