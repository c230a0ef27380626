"""A job that waits for the model of another is released when that is there and not before; so is its retry."""

from uuid import UUID

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.errors import DependencyEnded, InvalidSpec
from shared.jobs import needs, upkeep
from shared.jobs.attempts import NewArtifact
from shared.jobs.rows import Bell, Event, Job
from shared.jobs.state import JobState
from shared.specs.reaverage import AVERAGES
from shared.wire import ReaverageRequest
from tests.shared.desk import Desk
from tests.shared.needing import INFO, ask, cancel, claimable, diffuse, draw, ending_well, ref, succeed


def test_a_graph_of_three_runs_in_its_order(desk: Desk) -> None:
    first = desk.submit()
    second = diffuse(desk, autoencoder=ref(first))
    third = draw(desk, ref(second))

    order = list[UUID]()
    for _ in range(2):
        claim = desk.claim()
        assert not claimable(desk)
        order.append(claim.job_id)
        succeed(desk, claim)
    claim = desk.claim()

    assert [*order, claim.job_id] == [first.id, second.id, third.id]
    assert desk.job(second.id).spec["autoencoder"] == "digits@1"
    assert (desk.job(third.id).summary, claim.inputs["model"]["name"]) == ("generate drawn@1", "drawn")


def test_a_job_that_needs_two_waits_for_both(desk: Desk) -> None:
    first = desk.submit()
    second = diffuse(desk, "second", autoencoder=ref(first))
    third = diffuse(desk, "third", init_from=ref(second))

    assert desk.job(third.id).inputs["needs"] == {"autoencoder": ref(first), "init_from": ref(second)}
    succeed(desk, desk.claim())
    assert desk.job(third.id).queued_at is None
    succeed(desk, desk.claim())

    claim = desk.claim()
    assert (claim.job_id, claim.spec["autoencoder"], claim.spec["init_from"]) == (third.id, "digits@1", "second@1")
    assert {field: model["name"] for field, model in claim.inputs["models"].items()} == {
        "autoencoder": "digits", "init_from": "second",
    }  # fmt: skip


def test_a_job_that_has_made_its_model_stands_for_it_at_once(desk: Desk) -> None:
    first = desk.submit()
    succeed(desk, desk.claim())
    desk.submit()
    succeed(desk, desk.claim())

    job = draw(desk, ref(first))

    assert (job.spec["model"], "needs" in job.inputs) == ("digits@1", False)
    assert desk.claim().job_id == job.id


def test_averages_of_another_length_can_be_asked_for_before_there_are_any(desk: Desk) -> None:
    base = {"family": "vae", "dataset": f"ds_{desk.dataset_id.hex}", "model": "digits"}
    plain, first = desk.submit(spec=base), desk.submit(spec=base | {"ema": "power"})
    asked = {"type": "reaverage", "spec": {"ema_length": 0.1}}

    def reaverage(job: Job) -> Job:
        return ask(desk, ReaverageRequest.model_validate(asked | {"spec": asked["spec"] | {"model": ref(job)}}))

    with pytest.raises(InvalidSpec, match="no training with ema: power"):
        reaverage(plain)
    second = reaverage(first)
    third = draw(desk, ref(second))
    cancel(desk, plain.id)
    claim = desk.claim()
    averages = NewArtifact(kind="weights", name=AVERAGES, key="averages", size_bytes=1, sha256="0", media_type="x/y")
    succeed(desk, claim, INFO, averages)

    claim = desk.claim()
    assert (claim.job_id, claim.inputs["averages"]["key"], claim.spec["name"]) == (second.id, "averages", "digits")
    succeed(desk, claim, INFO | {"ema_length": 0.1})
    assert desk.claim().job_id == third.id
    assert desk.job(third.id).spec["model"] == "digits@2"


def test_an_ending_that_is_not_committed_releases_nobody(desk: Desk) -> None:
    first = desk.submit()
    second = draw(desk, ref(first))
    claim = desk.claim()

    with Session(desk.engine) as session, session.begin() as transaction:
        ending_well(session, claim)
        transaction.rollback()

    assert desk.job(second.id).queued_at is None
    assert desk.work(upkeep.settle_needs) == []
    succeed(desk, claim)
    assert desk.claim().job_id == second.id


def test_of_who_is_released_whoever_commits_has_to_tell_too(desk: Desk) -> None:
    first = desk.submit()
    second = draw(desk, ref(first))
    claim = desk.claim()

    def end(session: Session) -> list[UUID]:
        ending_well(session, claim)
        return needs.news(session)

    assert desk.work(end) == [second.id]


def test_no_bell_is_rung_before_there_is_something_to_do(desk: Desk) -> None:
    first = desk.submit()
    second = draw(desk, ref(first))
    desk.pause(second.id)
    desk.resume(second.id)
    assert desk.count(Bell, col(Bell.job_id) == second.id) == 0

    succeed(desk, desk.claim())

    assert desk.count(Bell, col(Bell.job_id) == second.id) == 1
    said = desk.work(lambda s: s.scalars(select(col(Event.data)).where(col(Event.job_id) == second.id)).all())
    assert said[-1] == {"message": "What it waited for is there: digits@1."}


def test_who_waits_may_be_paused_and_resumed(desk: Desk) -> None:
    first = desk.submit()
    second = draw(desk, ref(first))
    desk.pause(second.id)
    resumed = desk.resume(second.id)
    claim = desk.claim()

    assert (resumed.state, claimable(desk)) == (JobState.QUEUED, [])

    desk.pause(second.id)
    succeed(desk, claim)
    assert (desk.job(second.id).state, claimable(desk)) == (JobState.PAUSED, [])
    desk.resume(second.id)
    assert desk.claim().job_id == second.id


def test_a_training_keeps_its_summary_whatever_its_model_is_called(desk: Desk) -> None:
    first = desk.submit()
    second = diffuse(desk, ref(first), autoencoder=ref(first))

    succeed(desk, desk.claim())

    assert desk.job(second.id).summary == second.summary == f"train diffusion {ref(first)}"


def test_a_job_that_was_tried_again_stands_for_what_its_retry_makes(desk: Desk) -> None:
    first = desk.submit()
    cancel(desk, first.id)
    again = desk.retry(first.id)

    assert draw(desk, ref(first)).inputs["needs"] == {"model": ref(again)}


def test_a_retry_of_who_had_waited_waits_for_the_retry(desk: Desk) -> None:
    first = desk.submit()
    second = diffuse(desk, autoencoder=ref(first))
    cancel(desk, first.id)
    with pytest.raises(DependencyEnded):
        desk.retry(second.id)
    again = desk.retry(first.id)

    retried = desk.retry(second.id)

    assert retried.inputs["needs"] == {"autoencoder": ref(again)}
    assert (retried.retry_of, retried.inputs["lineage"]) == (second.id, [str(second.id)])
    claim = desk.claim()
    assert (claim.job_id, claimable(desk)) == (again.id, [])
    succeed(desk, claim)
    assert desk.claim().job_id == retried.id


def test_a_retry_of_who_had_what_it_needs_needs_it_no_more(desk: Desk) -> None:
    first = desk.submit()
    second = draw(desk, ref(first))
    succeed(desk, desk.claim())
    cancel(desk, second.id)

    retried = desk.retry(second.id)

    assert (retried.spec["model"], desk.claim().job_id) == ("digits@1", retried.id)
