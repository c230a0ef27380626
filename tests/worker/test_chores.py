"""What each chore takes and what it leaves; that it may be done twice, by several, or be cut off; and seen before."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from threading import Barrier
from typing import Any, TypeVar
from uuid import UUID

import pytest
from sqlalchemy import event, func, select
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.ids import public, uuid7
from shared.jobs.keys import artifact_key, source_key
from shared.jobs.rows import (
    Artifact,
    Bell,
    Dataset,
    DatasetState,
    Event,
    Garbage,
    IdempotencyKey,
    Job,
    Model,
    ModelVersion,
    Worker,
)
from shared.jobs.state import JobState, JobType
from tests.worker.house import House
from worker import chores
from worker.chores import Chore

T = TypeVar("T")

HOUR, DAY, MONTH = timedelta(hours=1), timedelta(days=1), timedelta(days=30)
NOW = func.clock_timestamp()


@pytest.fixture
def house(database: str, s3: Any) -> Iterator[House]:
    house = House(database, s3)
    yield house
    house.engine.dispose()


def put(house: House, key: str) -> str:
    house.storage.put(key, b"x", media_type="x/y")
    return key


def version(house: House, job_id: UUID, key: str) -> None:
    """A model version with these weights."""
    model_id = house.add(Model(tenant_id=house.tenant_id, name=uuid7().hex, latest=1))
    about = {"version": 1, "family": "vae", "spec": {}, "info": {}, "metrics": {}, "job_id": job_id}
    house.add(ModelVersion(model_id=model_id, weights={"key": key}, **about))


def dataset(house: House, **columns: Any) -> None:
    about = {"tenant_id": house.tenant_id, "name": "d", "state": DatasetState.READY, "source": {}}
    house.add(Dataset(**about | columns))


def begin_upload(house: House, key: str) -> None:
    client: Any = house.storage._client  # pyright: ignore[reportPrivateUsage]
    client.create_multipart_upload(Bucket=house.storage.bucket, Key=key)


def key_of(job_id: UUID, fence: int, name: str) -> str:
    return artifact_key(public("job", job_id), fence, name)


def in_disorder(house: House) -> House:
    """Something for each chore, beside as much that is none of its business."""
    lost, _ = house.running_job(max_attempts=1)
    house.upload(lost, 1, "preview-lost")
    begin_upload(house, key_of(lost, 1, "large"))
    house.lose(lost)
    _, claim = house.running_job()
    house.upload(claim.job_id, claim.fence, "preview-running")
    begin_upload(house, key_of(claim.job_id, claim.fence, "large"))
    ended = house.ended_job(ago=2 * MONTH, event_seq=3)
    house.artifact(ended, "checkpoint-old")
    house.artifact(ended, "sample-kept")
    house.artifact(ended, "preview-expired", expires_at=NOW - HOUR)
    house.artifact(ended, "preview-removed", removed_at=NOW - HOUR)
    with Session(house.engine) as session, session.begin():
        kinds = enumerate(("job.state", "job.metric", "job.state"), start=1)
        session.add_all(Event(job_id=ended, seq=seq, type=kind, data={}) for seq, kind in kinds)
        session.add(Bell(job_id=ended, sent_at=NOW - 2 * HOUR))
        session.add(IdempotencyKey(tenant_id=house.tenant_id, key="k", request_sha256="0", created_at=NOW - 2 * DAY))
        session.add(Worker(name="w", host="h", pid=1, queues=[], state="idle", seen_at=NOW - 2 * DAY))
    return house


NAMES = ["lifetimes", "expired", "events", "bells", "idempotency_keys", "workers", "removed", "orphans", "uploads"]


def put_in_order(house: House) -> None:
    """Twice, because some chores make work for others, and orphans are looked at twice."""
    for _ in range(2):
        for name in NAMES:
            house.chore(name).do()


def test_every_chore_is_tested_here(house: House) -> None:
    assert [each.name for each in chores.chores(house.settings, house.storage, house.transact)] == NAMES


def rows_of(due: dict[str, Any]) -> int:
    """What doing it counts: a log is its events, and the job whose it is."""
    return due.get("events", 0) + 1


def test_what_is_shown_beforehand_is_done_and_nothing_is_changed_by_showing(house: House) -> None:
    in_disorder(house)
    for name in NAMES:
        before = house.everything()
        shown = list(house.chore(name).find())

        assert house.everything() == before, name
        assert shown, name
        assert house.chore(name).do().total() == sum(map(rows_of, shown)), name
        assert house.everything() != before, name


def test_what_was_done_is_not_due_any_more(house: House) -> None:
    in_disorder(house)
    for name in NAMES:
        chore = house.chore(name)
        while chore.do().total():
            pass
        before = house.everything()

        assert (list(chore.find()), chore.do().total()) == ([], 0), name
        assert house.everything() == before, name


def test_two_at_once_do_what_one_does(house: House) -> None:
    in_disorder(house)
    start = Barrier(2)

    def work(both: list[Chore]) -> None:
        for chore in both:
            start.wait(20)
            chore.do()

    twice = [house.chore(name) for name in NAMES for _ in range(3)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, [twice, [house.chore(chore.name) for chore in twice]]))

    assert [name for name in NAMES if list(house.chore(name).find())] == []
    assert house.names() == {"preview-running", "sample-kept"}


class CutOffError(Exception):
    """The process ended here."""


def cut_off(house: House, chore: Any, *, before: int) -> Chore:
    """``chore``, ended just before this commit; what it did to storage by then is done."""
    commits = iter(range(1000))

    def transact(work: Callable[[Session], T]) -> T:
        with Session(house.engine) as session:
            result = work(session)
            if next(commits) == before:
                raise CutOffError
            session.commit()
            return result

    chore._transact = transact
    return chore


@pytest.mark.parametrize("before", range(4))
def test_a_house_that_was_left_in_the_middle_is_put_in_order_by_the_next(house: House, before: int) -> None:
    in_disorder(house)
    for name in NAMES:
        house.chore("orphans").do()
        chore = cut_off(house, house.chore(name), before=before)
        with suppress(CutOffError):
            chore.do()

    put_in_order(house)

    assert house.names() == {"preview-running", "sample-kept"}
    assert [upload.key.split("/")[-1] for upload in house.storage.unfinished("")] == ["large"]
    assert [len(list(house.chore(name).find())) for name in NAMES] == [0] * len(NAMES)


def test_of_an_object_whose_attempt_is_over_nothing_is_left(house: House) -> None:
    lost, _ = house.running_job()
    house.upload(lost, 1, "lost")
    house.lose(lost)
    house.upload(lost, 1, "late")
    house.upload(house.ended_job(), 1, "unnamed")
    house.upload(uuid7(), 1, "job-unknown")
    put(house, source_key(uuid7()))

    put_in_order(house)

    assert house.names() == set()
    assert house.everything()["garbage"] == []


def test_an_object_that_something_names_or_may_name_stays(house: House) -> None:
    job_id = house.ended_job()
    version(house, job_id, put(house, key_of(job_id, 1, "weights")))
    dataset(house, job_id=job_id, files=[{"name": "a"}, {"key": put(house, key_of(job_id, 1, "file"))}])
    dataset(house, source={"key": put(house, source_key(uuid7()))})
    house.artifact(job_id, "artifact")
    for state in (JobState.RUNNING, JobState.CANCELING, JobState.PAUSING):
        held = house.job(state=state, fence=7, lease_until=NOW)
        put(house, key_of(held, 7, f"now-{state}"))
        put(house, key_of(held, 8, f"restored-{state}"))
    before = house.everything()

    put_in_order(house)

    assert house.everything() == before


def test_keys_that_are_not_ours_are_left_alone(house: House) -> None:
    job = public("job", house.ended_job())
    strange = ["jobs/x", f"jobs/{job}/0/a", f"jobs/{job}/01/a", f"jobs/{job}/1/", f"jobs/{job}x/1/a"]
    strange += [f"datasets/{uuid7().hex}/other", "datasets/x/source", f"elsewhere/jobs/{job}/1/a"]
    for key in strange[:3] + strange[4:]:
        put(house, key)
    before = house.keys()

    put_in_order(house)

    assert house.keys() == before


def test_an_orphan_is_left_alone_until_it_is_old_enough(house: House) -> None:
    house.upload(house.ended_job(), 1, "young")

    assert house.chore("orphans", orphan_grace=HOUR).do().total() == 0
    assert list(house.chore("orphans", orphan_grace=HOUR).find()) == []


def test_an_unfinished_upload_is_left_alone_until_it_is_old_enough(house: House) -> None:
    begin_upload(house, key_of(house.ended_job(), 1, "young"))

    assert house.chore("uploads", orphan_grace=HOUR).do().total() == 0


def test_an_orphan_is_marked_for_a_whole_period_before_it_is_deleted(house: House) -> None:
    house.upload(house.ended_job(), 1, "orphan")
    patient: Any = house.chore("orphans")
    patient._rest = HOUR

    assert [patient.do() for _ in range(2)] == [Counter(marked=1, deleted=0), Counter(marked=0, deleted=0)]
    house.change(Garbage, found_at=NOW - 2 * HOUR)
    assert patient.do() == Counter(marked=0, deleted=1)


def test_what_is_named_after_it_was_marked_stays(house: House) -> None:
    """An upload's dataset may follow its object."""
    key = put(house, source_key(uuid7()))
    house.chore("orphans").do()
    dataset(house, source={"key": key})

    house.chore("orphans").do()

    assert house.keys() == {key}
    assert house.everything()["garbage"] == []


def test_a_large_bucket_is_looked_at_part_by_part(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chores, "BATCH", 2)
    monkeypatch.setattr(chores, "BATCHES", 2)
    job_id = house.ended_job()
    for number in range(7):
        house.upload(job_id, 1, f"{number}")
    for _ in range(2):
        put(house, source_key(uuid7()))
    chore: Any = house.chore("orphans")
    chore._rest = HOUR

    marked = [chore.do()["marked"] for _ in range(4)]
    left = [len(house.keys()) for _ in range(3) if house.chore("orphans").do()["deleted"]]

    assert marked == [4, 4, 1, 0]
    assert left == [5, 1, 0]


@pytest.mark.parametrize(
    ("kind", "lifetime"), [("checkpoint", 7 * DAY), ("preview", MONTH), ("sample", None), ("weights", None)]
)
def test_an_artifact_is_kept_for_as_long_after_its_job_as_its_kind_says(
    house: House, kind: str, lifetime: timedelta | None
) -> None:
    job_id = house.ended_job()
    artifact = house.artifact(job_id, kind)
    house.artifact(house.job(fence=1), kind)

    for _ in range(2):
        house.chore("lifetimes").do()

    with Session(house.engine) as session:
        end = session.get_one(Job, job_id).completed_at
        dated = {row.id: row.expires_at for row in session.scalars(select(Artifact)) if row.expires_at}
    assert dated == ({artifact: end + lifetime} if end and lifetime else {})


def test_artifacts_of_all_kinds_but_those_kept_for_ever_expire_if_they_are_set_to(house: House) -> None:
    job_id = house.ended_job()
    for kind in ("checkpoint", "preview", "sample"):
        house.artifact(job_id, kind)

    chore = house.chore("lifetimes", artifact_lifetime=DAY, checkpoint_lifetime=None)

    assert {each["key"].rpartition("/")[2] for each in chore.find()} == {"preview", "sample"}


def test_what_a_model_or_a_dataset_is_made_of_never_expires_and_is_not_deleted_though_removed(house: House) -> None:
    job_id = house.ended_job(ago=2 * MONTH)
    for name in ("checkpoint-model", "checkpoint-data"):
        house.artifact(job_id, name)
        house.artifact(job_id, f"{name}-expired", expires_at=NOW - DAY)
        house.artifact(job_id, f"{name}-removed", removed_at=NOW - DAY)
    keys = sorted(house.keys())
    with_model, with_data = [[key for key in keys if each in key] for each in ("model", "data")]
    for key in with_model:
        version(house, house.ended_job(), key)
    dataset(house, job_id=job_id, files=[{"key": key} for key in with_data])
    before = house.everything()["artifacts"]

    put_in_order(house)

    assert house.names() == {key.rpartition("/")[2] for key in with_model + with_data}
    assert house.everything()["artifacts"] == before


def test_an_expired_artifact_becomes_a_tombstone_without_an_object(house: House) -> None:
    artifact = house.artifact(house.ended_job(), "preview-1", expires_at=NOW - DAY)
    house.artifact(house.ended_job(), "preview-2", expires_at=NOW + DAY)

    put_in_order(house)

    with Session(house.engine) as session:
        row = session.get_one(Artifact, artifact)
    assert (row.removed_at is not None, row.deleted_at is not None) == (True, True)
    assert house.names() == {"preview-2"}


@pytest.mark.parametrize(
    ("state", "kept"), [(JobState.QUEUED, True), (JobState.PAUSED, True), (JobState.CANCELED, False)]
)
def test_a_checkpoint_stays_while_a_retry_may_go_on_from_it(house: House, state: JobState, kept: bool) -> None:
    first = house.ended_job(kind=JobType.TRAIN)
    second = house.ended_job(kind=JobType.TRAIN, retry_of=first, inputs={"lineage": [str(first)]})
    house.artifact(first, "checkpoint-1", expires_at=NOW - DAY)
    house.artifact(first, "preview-1", expires_at=NOW - DAY)
    ended = {"completed_at": NOW} if state.is_final else {}
    house.job(JobType.TRAIN, state=state, retry_of=second, inputs={"lineage": [str(second), str(first)]}, **ended)

    put_in_order(house)

    assert house.names() == ({"checkpoint-1"} if kept else set())


def test_an_object_that_comes_back_after_it_was_deleted_is_collected(house: House) -> None:
    """A worker that was given up may still be uploading."""
    job_id = house.ended_job()
    house.artifact(job_id, "preview-1", removed_at=NOW - DAY)
    put_in_order(house)
    house.upload(job_id, 1, "preview-1")

    put_in_order(house)

    assert house.names() == set()


def test_a_superseded_checkpoint_is_deleted_while_its_training_goes_on(house: House) -> None:
    _, claim = house.running_job()
    for step in range(3):
        new = house.upload(claim.job_id, claim.fence, f"checkpoint-{step}", step=step, keep=2)
        house.record(claim, new)

    put_in_order(house)

    assert house.names() == {"checkpoint-1", "checkpoint-2"}


def test_a_link_to_an_object_works_for_as_long_as_was_said(house: House) -> None:
    house.artifact(house.ended_job(), "preview-1", removed_at=NOW)
    chore: Any = house.chore("removed")
    chore._age = HOUR

    assert chore.do().total() == 0
    assert house.names() == {"preview-1"}


def seqs(house: House, job_id: UUID) -> list[int]:
    with Session(house.engine) as session:
        return list(session.scalars(select(col(Event.seq)).where(col(Event.job_id) == job_id).order_by(col(Event.seq))))


def log(house: House, job_id: UUID, *kinds: str) -> None:
    with Session(house.engine) as session, session.begin():
        numbered = enumerate(kinds, start=1)
        session.add_all(Event(job_id=job_id, seq=seq, type=f"job.{kind}", data={}) for seq, kind in numbered)


def test_of_an_old_log_the_states_and_the_end_stay(house: House) -> None:
    kinds = ("state", "progress", "state", "metric", "log", "checkpoint", "state", "log")
    old = house.ended_job(ago=2 * MONTH, event_seq=len(kinds))
    young = house.ended_job(ago=DAY, event_seq=len(kinds))
    unended = house.job(event_seq=len(kinds))
    for job_id in (old, young, unended):
        log(house, job_id, *kinds)

    put_in_order(house)

    assert seqs(house, old) == [1, 3, 7, 8]
    assert seqs(house, young) == seqs(house, unended) == list(range(1, 9))


def test_a_long_log_is_pruned_in_several_steps(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chores, "BATCH", 2)
    jobs = [house.ended_job(ago=2 * MONTH, event_seq=6) for _ in range(3)]
    for job_id in jobs:
        log(house, job_id, "state", "log", "log", "log", "log", "state")

    assert house.chore("events").do()["rows"] == 3 * 4 + 3
    assert [seqs(house, job_id) for job_id in jobs] == [[1, 6]] * 3


def test_logs_are_kept_whole_if_they_are_set_to(house: House) -> None:
    settings = house.settings.jobs.model_copy(update={"event_lifetime": None})
    named = [each.name for each in chores.retention.duties(settings)]

    assert "events" not in named


def test_what_is_young_is_not_forgotten(house: House) -> None:
    job_id = house.ended_job()
    with Session(house.engine) as session, session.begin():
        session.add(Bell(job_id=job_id))
        session.add(Bell(job_id=job_id, sent_at=NOW))
        session.add(IdempotencyKey(tenant_id=house.tenant_id, key="k", request_sha256="0"))
        session.add(Worker(name="w", host="h", pid=1, queues=[], state="idle", seen_at=NOW - timedelta(hours=23)))
    before = house.everything()

    put_in_order(house)

    assert house.everything() == before


def test_no_table_is_read_as_a_whole_to_look_for_orphans(house: House) -> None:
    """A thousand keys are looked for at once: each condition must be one that an index answers."""
    plans: list[str] = []

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if "unnamed" in statement and not statement.startswith("EXPLAIN"):
            cursor.connection.execute("SET LOCAL enable_seqscan = off")
            plans.extend(row[0] for row in cursor.connection.execute(f"EXPLAIN {statement}", parameters))

    house.upload(house.ended_job(), 1, "orphan")
    event.listen(house.engine, "before_cursor_execute", explain)

    house.chore("orphans").do()

    assert plans
    assert [line for line in plans if "Seq Scan" in line] == []
