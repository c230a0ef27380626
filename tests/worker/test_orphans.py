"""Objects and uploads that nothing names: which are deleted, which stay, and when."""

from collections import Counter
from typing import Any

import pytest
from sqlalchemy import event

from shared.ids import public, uuid7
from shared.jobs.keys import source_key
from shared.jobs.rows import Garbage
from shared.jobs.state import JobState, JobType
from tests.worker.contents import HOUR, NOW, begin_upload, dataset, key_of, put, put_in_order, version
from tests.worker.house import House
from worker import chores


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
    for state in (JobState.QUEUED, JobState.PAUSED):
        put(house, key_of(house.job(JobType.GENERATE, state=state, fence=2), 1, f"to-go-on-with-{state}"))
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
