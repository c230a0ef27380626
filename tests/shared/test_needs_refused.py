"""What cannot be built on the model that a job will make is refused when it is asked for, and by name."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.errors import DependencyEnded, InvalidSpec
from shared.jobs import erasure, named, requests
from shared.jobs.rows import Job
from tests.shared.desk import SETTINGS, Desk
from tests.shared.needing import cancel, diffuse, draw, expire, fail, ref, stop, succeed


@pytest.mark.parametrize("what", ["unknown", "other", "generate", "reproduction"])
def test_a_job_that_makes_no_model_of_the_tenant_is_pointed_at(desk: Desk, what: str, database: str) -> None:
    first = desk.submit()
    succeed(desk, desk.claim())
    known: dict[str, Callable[[], UUID]] = {
        "unknown": lambda: UUID(int=7),
        "other": lambda: Desk(database, desk.engine).submit().id,
        "generate": lambda: draw(desk, "digits").id,
        "reproduction": lambda: (
            desk.do(lambda s: requests.reproduce(s, desk.tenant_id, first.id, settings=SETTINGS)).id
        ),
    }

    with pytest.raises(InvalidSpec) as refusal:
        draw(desk, ref(known[what]()))

    assert (refusal.value.pointer, refusal.value.code) == ("/spec/model", "validation_failed")


@pytest.mark.parametrize("end", [cancel, stop, expire, fail])
def test_a_job_that_ended_without_a_model_is_refused_by_name(desk: Desk, end: Callable[[Desk, UUID], object]) -> None:
    first = desk.submit()
    end(desk, first.id)

    with pytest.raises(DependencyEnded) as refusal:
        draw(desk, ref(first))

    assert (refusal.value.pointer, refusal.value.code) == ("/spec/model", "dependency_failed")


def test_a_job_that_is_being_canceled_is_refused_already(desk: Desk) -> None:
    first = desk.submit()
    desk.claim()
    cancel(desk, first.id)

    with pytest.raises(DependencyEnded, match="is being canceled"):
        draw(desk, ref(first))


def test_what_stands_on_an_erased_job_is_refused_by_name(desk: Desk) -> None:
    """Whose model it needed was ended while somebody held its row, and erased before a round came by."""
    first = desk.submit()
    second = diffuse(desk, autoencoder=ref(first))
    with Session(desk.engine) as session, session.begin():
        session.execute(select(col(Job.id)).where(col(Job.id) == second.id).with_for_update())
        cancel(desk, first.id)
    desk.do(lambda session: erasure.erase(session, desk.tenant_id, first.id))

    with pytest.raises(DependencyEnded, match="was erased") as refusal:
        draw(desk, ref(second))

    assert (refusal.value.pointer, refusal.value.code) == ("/spec/model", "dependency_failed")


@pytest.mark.parametrize(
    ("spec", "pointer"),
    [({"labels": [3]}, "/spec/labels"), ({"steps": 3}, "/spec/steps"), ({"solver": "ddim"}, "/spec/solver")],
)
def test_what_a_model_to_be_cannot_do_is_refused_at_submission(desk: Desk, spec: dict[str, Any], pointer: str) -> None:
    first = desk.submit()

    with pytest.raises(InvalidSpec) as refusal:
        draw(desk, ref(first), **spec)

    assert refusal.value.pointer == pointer


@pytest.mark.parametrize(
    ("spec", "field"),
    [({"family": "gan"}, "autoencoder"), ({"network": "ladder"}, "autoencoder"), ({}, "init_from")],
    ids=["other-family", "ladder", "init-from-another-family"],
)
def test_what_cannot_be_built_on_a_model_to_be_is_refused_at_submission(
    desk: Desk, spec: dict[str, Any], field: str
) -> None:
    base = {"family": "vae", "dataset": f"ds_{desk.dataset_id.hex}", "model": "digits"}
    first = desk.submit(spec=base | spec)

    with pytest.raises(InvalidSpec) as refusal:
        diffuse(desk, **{field: ref(first)})

    assert refusal.value.pointer == f"/spec/{field}"


def test_a_chain_is_no_longer_than_what_is_told_through_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "MOST_IN_A_CHAIN", 2)
    job = diffuse(desk, "m0")
    for number in (1, 2):
        job = diffuse(desk, f"m{number}", init_from=ref(job))

    with pytest.raises(InvalidSpec, match="more than 2 jobs"):
        diffuse(desk, "m3", init_from=ref(job))
