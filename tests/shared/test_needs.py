"""Jobs that wait for the models of other jobs, on a real database: released, refused, ended with them, never lost."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.errors import DependencyEnded, InvalidSpec, NanLoss
from shared.ids import public
from shared.jobs import attempts, claims, erasure, named, needs, requests, upkeep
from shared.jobs.attempts import Claim, NewArtifact
from shared.jobs.need_rows import Need
from shared.jobs.rows import Bell, Event, Job
from shared.jobs.state import JobState
from shared.specs.reaverage import AVERAGES
from shared.wire import GenerateRequest, ReaverageRequest, TrainRequest
from tests.conftest import WaitUntil
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


def cancel(desk: Desk, job_id: UUID) -> Job:
    return desk.do(lambda session: requests.cancel(session, desk.tenant_id, job_id))


def claimable(desk: Desk) -> list[Claim]:
    return desk.work(lambda session: claims.claim(session, worker="w", queues=QUEUES, terms=TERMS))


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


def fail(desk: Desk, job_id: UUID) -> None:
    claim = desk.claim()
    desk.work(lambda s: attempts.fail(s, job_id, claim.fence, NanLoss("the loss is no number"), backoff=TERMS.lease))


def expire(desk: Desk, job_id: UUID) -> None:
    desk.force(job_id, start_deadline=text("clock_timestamp() - interval '1 s'"))
    desk.work(upkeep.expire)


def lose(desk: Desk, job_id: UUID) -> None:
    desk.claim()
    desk.force(job_id, max_attempts=1, lease_until=text("clock_timestamp() - interval '1 s'"))
    desk.work(upkeep.reap)


def stop(desk: Desk, job_id: UUID) -> None:
    claim = desk.claim()
    cancel(desk, job_id)
    desk.work(lambda session: attempts.hand_back(session, job_id, claim.fence))


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (cancel, "was canceled"),
        (stop, "was canceled"),
        (expire, "expired"),
        (fail, "failed: the loss is no number"),
        (lose, "failed: the worker stopped answering; its lease ran out"),
    ],
)
def test_who_waits_ends_with_whom_it_waits_for_and_says_why(
    desk: Desk, end: Callable[[Desk, UUID], object], told: str
) -> None:
    first = desk.submit()
    second = diffuse(desk, autoencoder=ref(first))
    third, beside = draw(desk, ref(second)), draw(desk, ref(first))
    desk.pause(second.id)

    end(desk, first.id)

    ended = [desk.job(job.id) for job in (second, third, beside)]
    assert [(job.state, job.error_code) for job in ended] == [(JobState.FAILED, "dependency_failed")] * 3
    cause = f"{ref(first)}, whose model it needs, {told}"
    assert ended[0].error_message == ended[2].error_message == cause
    assert ended[1].error_message == f"{ref(second)}, whose model it needs, failed: {cause}"


def test_a_job_that_has_made_its_model_stands_for_it_at_once(desk: Desk) -> None:
    first = desk.submit()
    succeed(desk, desk.claim())
    desk.submit()
    succeed(desk, desk.claim())

    job = draw(desk, ref(first))

    assert (job.spec["model"], "needs" in job.inputs) == ("digits@1", False)
    assert desk.claim().job_id == job.id


def test_a_job_that_was_tried_again_stands_for_what_its_retry_makes(desk: Desk) -> None:
    first = desk.submit()
    cancel(desk, first.id)
    again = desk.retry(first.id)

    assert draw(desk, ref(first)).inputs["needs"] == {"model": ref(again)}


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


def test_a_model_that_is_not_what_was_told_of_it_ends_who_waits_by_name(desk: Desk) -> None:
    first = desk.submit()
    second = draw(desk, ref(first))

    succeed(desk, desk.claim(), INFO | {"shape": [1, 1, 8]})

    assert (desk.job(second.id).state, desk.job(second.id).error_code) == (JobState.FAILED, "dependency_unfit")


def test_a_chain_is_no_longer_than_what_is_told_through_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "MOST_IN_A_CHAIN", 2)
    job = diffuse(desk, "m0")
    for number in (1, 2):
        job = diffuse(desk, f"m{number}", init_from=ref(job))

    with pytest.raises(InvalidSpec, match="more than 2 jobs"):
        diffuse(desk, "m3", init_from=ref(job))


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


class Beside:
    """Somebody else's transaction, which goes as far as it gets."""

    def __init__(self, desk: Desk, work: Callable[[], object]) -> None:
        self._desk = desk
        self._before = self._waiting()
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(work)

    def _waiting(self) -> int:
        waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return self._desk.work(lambda session: session.scalar(waiting) or 0)

    def has_come_to_wait(self) -> bool:
        return self._waiting() > self._before

    def answer(self) -> object:
        """What it returned or raised."""
        self._pool.shutdown()
        return self._future.exception() or self._future.result()


ENDINGS: dict[str, Callable[[Session, Claim], object]] = {
    "succeeded": ending_well,
    "failed": lambda session, claim: attempts.fail(
        session, claim.job_id, claim.fence, NanLoss("no number"), backoff=TERMS.lease
    ),
}


def went_the_way_of(desk: Desk, second: Job, ending: str) -> bool:
    if ending == "failed":
        seen = desk.job(second.id)
        return (seen.state, seen.error_code) == (JobState.FAILED, "dependency_failed")
    return desk.claim().job_id == second.id


@pytest.mark.parametrize("ending", ENDINGS)
def test_who_is_submitted_while_the_other_ends_goes_the_way_of_that(desk: Desk, ending: str) -> None:
    first = desk.submit()
    claim = desk.claim()

    with Session(desk.engine) as session, session.begin():
        ENDINGS[ending](session, claim)
        second = draw(desk, ref(first))  # waits for nobody
    assert desk.work(upkeep.settle_needs) == ([second.id] if ending == "failed" else [])

    assert went_the_way_of(desk, second, ending)


@pytest.mark.parametrize("ending", ENDINGS)
def test_who_was_not_committed_when_the_other_ended_goes_the_way_of_that(desk: Desk, ending: str) -> None:
    first = desk.submit()
    claim = desk.claim()

    async def submit(session: Any) -> Job:
        job = await requests.submit(session, desk.tenant_id, drawing(ref(first)), settings=SETTINGS)
        desk.work(lambda other: ENDINGS[ending](other, claim))  # waits for nobody
        return job

    second = desk.do(submit)
    desk.work(upkeep.settle_needs)

    assert went_the_way_of(desk, second, ending)


@pytest.mark.parametrize("ending", ENDINGS)
def test_who_was_passed_over_is_found_by_the_next_round(desk: Desk, ending: str) -> None:
    first = desk.submit()
    second = draw(desk, ref(first))
    claim = desk.claim()

    with Session(desk.engine) as session, session.begin():
        session.execute(select(col(Job.id)).where(col(Job.id) == second.id).with_for_update())
        desk.work(lambda other: ENDINGS[ending](other, claim))
    assert desk.job(second.id).queued_at is None
    assert desk.job(second.id).state is JobState.QUEUED
    failed = desk.work(upkeep.settle_needs)

    assert failed == ([second.id] if ending == "failed" else [])
    assert went_the_way_of(desk, second, ending)
    assert desk.work(upkeep.settle_needs) == []


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


def test_two_that_end_at_once_leave_nobody_who_needs_both_behind(desk: Desk, wait_until: WaitUntil) -> None:
    first = desk.submit()
    second = diffuse(desk, "second")
    third = ask(desk, TrainRequest.model_validate({"type": "train", "spec": {
        "family": "diffusion", "dataset": f"ds_{desk.dataset_id.hex}", "model": "third", "autoencoder": ref(first),
    }}))  # fmt: skip
    values = "(:job, 'init_from', :needed, '{}')"
    desk.work(
        lambda s: s.execute(
            text(f"INSERT INTO needs (job_id, field, needs_job_id, told) VALUES {values}"),
            {"job": third.id, "needed": second.id},
        )
    )
    both = [desk.claim(), desk.claim()]

    with Session(desk.engine) as session, session.begin():
        ending_well(session, both[0])
        other = Beside(desk, lambda: succeed(desk, both[1]))
        wait_until(other.has_come_to_wait)
    assert other.answer() is None

    assert desk.claim().job_id == third.id


@contextmanager
def statements(engine: Any) -> Iterator[list[str]]:
    """Those that are executed meanwhile."""
    said = list[str]()

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        said.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    yield said
    event.remove(engine, "before_cursor_execute", note)


def num_to_name(desk: Desk, job: Job) -> int:
    """Statements that it takes to name the model that this job will make."""

    async def find(session: AsyncSession) -> int:
        with statements(session.get_bind()) as said:
            await named.find(session, desk.tenant_id, ref(job))
        return len(said)

    return desk.do(find)


def test_what_many_ways_lead_to_is_looked_at_once(desk: Desk) -> None:
    base = {"family": "vae", "dataset": f"ds_{desk.dataset_id.hex}", "model": "coded"}
    coded = desk.submit()
    for _ in range(4):
        coded = ask(desk, TrainRequest.model_validate({"type": "train", "spec": base | {"init_from": ref(coded)}}))
    drawn, cost = diffuse(desk, autoencoder=ref(coded)), list[int]()
    for _ in range(3):
        cost.append(num_to_name(desk, drawn))
        drawn = diffuse(desk, init_from=ref(drawn))

    # One more job in the row, and not all that it stands on once more.
    assert cost[2] - cost[1] == cost[1] - cost[0] <= 6


def test_however_many_reasons_are_told_it_is_a_statement_for_each_generation(desk: Desk) -> None:
    first, cost = desk.submit(), list[int]()
    for num_children in (2, 8):
        first = desk.submit()
        for number in range(num_children):
            draw(desk, ref(diffuse(desk, f"m{number}", autoencoder=ref(first))))
        with statements(desk.engine) as said:
            expire(desk, first.id)
        cost.append(len(said))

    assert cost[0] == cost[1]
    drawings = select(col(Job.error_message)).where(col(Job.type) == "generate")
    told = desk.work(lambda session: set(session.scalars(drawings)))
    cause = f"failed: {ref(first)}, whose model it needs, expired"
    assert (len(told), sum(one.endswith(cause) for one in told if one)) == (10, 8)


def test_who_waits_keeps_nobody_from_being_rung_for_again(desk: Desk) -> None:
    first = desk.submit()
    succeed(desk, desk.claim())
    held = desk.submit()
    desk.claim()
    for _ in range(upkeep.RUNG_AT_ONCE):
        desk.force(draw(desk, ref(held)).id, priority=2)
    lost = draw(desk, ref(first))
    desk.work(lambda session: session.execute(text("DELETE FROM outbox")))
    desk.force(lost.id, queued_at=text("clock_timestamp() - interval '1 h'"))

    assert desk.work(lambda session: upkeep.redispatch(session, after=timedelta(minutes=1))) == 1
    assert desk.count(Bell, col(Bell.job_id) == lost.id) == 1


def test_a_training_keeps_its_summary_whatever_its_model_is_called(desk: Desk) -> None:
    first = desk.submit()
    second = diffuse(desk, ref(first), autoencoder=ref(first))

    succeed(desk, desk.claim())

    assert desk.job(second.id).summary == second.summary == f"train diffusion {ref(first)}"


def test_who_is_one_too_many_for_an_end_is_released_by_the_rounds(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where those before it wait for something else besides."""
    monkeypatch.setattr(needs, "_MOST", 2)
    first = desk.submit()
    second = diffuse(desk, "second", autoencoder=ref(first))
    for _ in range(3):
        diffuse(desk, "third", init_from=ref(second))
    waiting = [second, *(draw(desk, ref(first)) for _ in range(4))]
    released: list[int] = []

    def count() -> None:
        released.append(sum(desk.job(one.id).queued_at is not None for one in waiting))

    succeed(desk, desk.claim())
    count()
    for _ in range(2):
        desk.work(upkeep.settle_needs)
        count()

    assert released == [2, 4, 5]


_SETTLED = """
WITH made AS (
    INSERT INTO jobs (id, tenant_id, type, queue, spec, inputs, summary, state, max_attempts, completed_at)
    SELECT gen_random_uuid(), :tenant_id, 'generate', 'generate', '{}', '{}', 'done', 'succeeded', 3, clock_timestamp()
    FROM generate_series(1, 10000) RETURNING id
) INSERT INTO needs (job_id, field, needs_job_id) SELECT id, 'model', id FROM made"""


def test_a_round_looks_at_each_need_of_who_waits_once(desk: Desk) -> None:
    """And at none of those who wait no more, however many there are."""
    first = desk.submit()
    for _ in range(5):
        draw(desk, ref(first))
    desk.work(lambda session: session.execute(text(_SETTLED), {"tenant_id": desk.tenant_id}))
    desk.work(lambda session: session.execute(text("ANALYZE jobs, needs")))

    plan = text(f"EXPLAIN (ANALYZE, FORMAT JSON) {needs._REMAINING}")
    (whole,) = desk.work(lambda session: session.scalars(plan).one())

    read = [node for node in nodes(whole["Plan"]) if node.get("Relation Name") == "needs"]
    assert sum(node["Actual Rows"] * node["Actual Loops"] for node in read) == 5


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


def test_who_is_looked_at_while_the_last_that_it_needs_ends_does_not_fail(desk: Desk) -> None:
    """Whoever ends that passes over a row that is locked; the model is there only after it was looked for."""
    first, second = desk.submit(), diffuse(desk)
    passed_over, both = draw(desk, ref(first)), draw(desk, ref(first))
    desk.work(lambda s: s.add(Need(job_id=both.id, field="other", needs_job_id=second.id, told={})))
    succeed(desk, desk.claim(queues=["train"]))
    desk.force(passed_over.id, queued_at=None)
    ends = [desk.claim(queues=["train"])]

    def meanwhile(_: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        if "released AS" in statement and ends:
            succeed(desk, ends.pop())

    event.listen(desk.engine, "after_cursor_execute", meanwhile)
    desk.work(upkeep.settle_needs)
    event.remove(desk.engine, "after_cursor_execute", meanwhile)

    assert desk.job(both.id).error_message is None
    desk.work(upkeep.settle_needs)
    assert desk.job(both.id).queued_at is not None


@pytest.mark.parametrize("end", [cancel, expire, fail, lose])
def test_of_all_who_end_with_a_job_whoever_commits_has_to_tell(desk: Desk, end: Callable[[Desk, UUID], object]) -> None:
    first, told = desk.submit(), list[UUID]()
    second = diffuse(desk, autoencoder=ref(first))
    third = draw(desk, ref(second))

    def note(session: Session) -> None:
        told.extend(needs.news(session))

    event.listen(Session, "after_commit", note)
    try:
        end(desk, first.id)
    finally:
        event.remove(Session, "after_commit", note)

    assert told == [second.id, third.id]


def test_of_who_is_released_whoever_commits_has_to_tell_too(desk: Desk) -> None:
    first = desk.submit()
    second = draw(desk, ref(first))
    claim = desk.claim()

    def end(session: Session) -> list[UUID]:
        ending_well(session, claim)
        return needs.news(session)

    assert desk.work(end) == [second.id]


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
