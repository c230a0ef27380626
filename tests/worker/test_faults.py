"""Faults at awkward moments: unconfirmed commits, bugs in the watch itself, a broker or cache that misbehaves."""

import asyncio
import itertools
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any, Literal
from uuid import UUID

import pytest
from pydantic import SecretStr
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from shared.database import make_async_engine
from shared.events import EventBell
from shared.ids import uuid7
from shared.jobs import attempts, claims, requests, upkeep
from shared.jobs.state import AttemptOutcome, JobState, JobType
from shared.settings import BrokerSettings, JobSettings, Settings
from shared.storage import Storage
from tests.worker.conftest import Workplace
from worker import nursery
from worker.cache import ObjectCache
from worker.device import GONE, Device
from worker.fuse import Fuse
from worker.run import StoredObject
from worker.supervisor import Supervisor

UNCONFIRMED = OperationalError("COMMIT", None, Exception("server closed the connection unexpectedly"))


def lose_answers(
    supervisor: Supervisor, of: Literal["ask", "settle"], when: Callable[[], object], *, most: float = math.inf,
    executed: bool = True,
) -> list[Any]:  # fmt: skip
    """Let what is committed so be answered by an error, executed or not; returns what was, as it comes."""
    commit, lost = getattr(supervisor, of), list[Any]()

    def loses(work: Any) -> bool:
        if len(lost) < most and when():
            lost.append(work)
            return True
        return False

    def answered_by_an_error(work: Any) -> Any:
        if not executed and loses(work):
            raise UNCONFIRMED
        done = commit(work)
        if executed and loses(work):
            raise UNCONFIRMED
        return done

    setattr(supervisor, of, answered_by_an_error)
    return lost


def test_reports_whose_commit_was_not_confirmed_do_not_fail_the_job(workplace: Workplace) -> None:
    job_id = workplace.job(["publish", "preview", "p", "x"], ["steps", 20, 0.02])
    supervisor = workplace.supervisor()
    lost = lose_answers(supervisor, "ask", lambda: workplace.artifacts(job_id), most=1)

    supervisor.run_next()

    assert lost
    assert workplace.state(job_id) == JobState.SUCCEEDED


@pytest.mark.parametrize("executed", [True, False])
def test_reports_are_written_once_and_in_order_although_every_third_statement_is_not_confirmed(
    workplace: Workplace, *, executed: bool
) -> None:
    said = [[["metrics", step, {"loss": step}], ["publish", "preview", f"p{step}", "x"]] for step in range(10)]
    job_id = workplace.job(*[act for pair in said for act in [*pair, ["steps", 4, 0.05]]])
    supervisor, asked = workplace.supervisor(), itertools.count(1)
    lose_answers(supervisor, "ask", lambda: next(asked) % 3 == 0, executed=executed)

    supervisor.run_next()

    events = workplace.events(job_id)
    assert [event.data["step"] for event in events if event.type == "job.metric"] == list(range(10))
    assert [event.data["name"] for event in events if event.type == "job.preview"] == [f"p{n}" for n in range(10)]
    assert [event.seq for event in events] == list(range(1, len(events) + 1))


def test_a_report_behind_an_object_that_was_told_before_is_written_once(workplace: Workplace) -> None:
    """As when a training that went back to a checkpoint makes the same preview again."""
    preview = ["publish", "preview", "p", "x"]
    job_id = workplace.job(preview, ["steps", 10, 0.05], preview, ["metrics", 1, {"loss": 1.0}], ["steps", 20, 0.05])
    supervisor = workplace.supervisor()
    lost = lose_answers(
        supervisor, "ask", lambda: any(event.type == "job.metric" for event in workplace.events(job_id)), most=1
    )

    supervisor.run_next()

    assert lost
    assert [event.type for event in workplace.events(job_id)].count("job.metric") == 1


@pytest.mark.parametrize("executed", [True, False])
def test_a_claim_whose_commit_was_not_confirmed_costs_nothing(workplace: Workplace, *, executed: bool) -> None:
    job_id = workplace.job(["steps", 1, 0.0], max_attempts=1)
    supervisor = workplace.supervisor()
    lose_answers(supervisor, "settle", lambda: True, most=1, executed=executed)

    assert [supervisor.run_next() for _ in range(3)] == [False, True, False]
    assert (workplace.state(job_id), workplace.get(job_id).fence) == (JobState.SUCCEEDED, 1)


def test_a_claim_whose_commit_arrives_late_is_handed_back_while_another_job_runs(
    workplace: Workplace, wait_until
) -> None:
    workplace.settings = workplace.settings.model_copy(update={"jobs": JobSettings()})
    first = workplace.job(["steps", 1, 0.0], max_attempts=1)
    supervisor = workplace.supervisor()
    settle = supervisor.settle
    with Session(workplace.engine) as late:
        late.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))

        def on_its_way(work: Any) -> Any:
            supervisor.settle = settle  # type: ignore[method-assign]
            work(late)
            raise UNCONFIRMED

        supervisor.settle = on_its_way  # type: ignore[method-assign]
        assert not supervisor.run_next()
        second = workplace.job(["steps", 1000, 0.05])
        running = workplace.background(supervisor.run_next)
        wait_until(lambda: workplace.get(second).step > 0, timeout=30)
        late.commit()

    wait_until(lambda: workplace.state(first) == JobState.QUEUED)
    assert [attempt.outcome for attempt in workplace.attempts(first)] == [AttemptOutcome.INTERRUPTED]
    assert workplace.state(second) == JobState.RUNNING
    supervisor.drain()
    running.join(20)


def test_an_end_that_was_not_committed_is_tried_again_without_waiting_for_a_beat(
    workplace: Workplace, wait_until
) -> None:
    job_id = workplace.job(["steps", 1, 0.0])
    supervisor, asked = workplace.supervisor(beat=timedelta(minutes=10)), itertools.count(1)
    lose_answers(supervisor, "settle", lambda: next(asked) == 2, executed=False)
    workplace.background(supervisor.run_next)

    wait_until(lambda: workplace.state(job_id) == JobState.SUCCEEDED)
    assert next(asked) > 3


def test_a_claim_that_is_found_too_late_is_forgotten(workplace: Workplace) -> None:
    job_id = workplace.job(["steps", 1, 0.0])
    supervisor = workplace.supervisor()
    lose_answers(supervisor, "settle", lambda: True, most=1)
    supervisor.run_next()
    with Session(workplace.engine) as session, session.begin():
        session.execute(text("UPDATE jobs SET lease_until = clock_timestamp() - interval '1 s'"))
        upkeep.reap(session)

    assert supervisor.run_next()
    assert [attempt.outcome for attempt in workplace.attempts(job_id)] == [
        AttemptOutcome.LOST,
        AttemptOutcome.SUCCEEDED,
    ]


def test_a_result_that_cannot_be_published_fails_the_job_at_once(workplace: Workplace) -> None:
    job_id = workplace.job(type=JobType.TRAIN)  # its result lacks all that a model version needs

    workplace.supervisor().run_next()

    assert (workplace.state(job_id), workplace.get(job_id).error_code) == (JobState.FAILED, "internal")


def test_a_runner_that_failed_in_an_unforeseen_way_is_replaced(workplace: Workplace) -> None:
    first, broken, second = workplace.job(), workplace.job(["raise", "CUDA error"]), workplace.job()
    supervisor = workplace.supervisor()

    for _ in range(3):
        supervisor.run_next()

    assert workplace.state(broken) == JobState.FAILED
    assert workplace.get(first).result["pid"] != workplace.get(second).result["pid"]


def test_news_ring_after_their_commit(workplace: Workplace) -> None:
    job_id = workplace.job(["steps", 20, 0.05])
    supervisor = workplace.supervisor()
    rings: list[int] = []
    supervisor.ring = lambda _, **__: rings.append(len(workplace.events(job_id)))  # type: ignore[method-assign]

    supervisor.run_next()

    assert len(rings) > 3
    assert rings == sorted(set(rings))  # each found something new in SQL


def test_a_broker_that_hangs_costs_the_ringer_one_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        bell = EventBell(BrokerSettings(url=SecretStr(f"redis://127.0.0.1:{deaf.getsockname()[1]}/0")))
        bell.ring(uuid7())

        began = time.monotonic()
        for _ in range(10):
            bell.ring(uuid7())

    assert time.monotonic() - began < 1


def test_a_cached_file_may_vanish_while_room_is_made(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another runner of the machine makes room at the same time."""
    storage = Storage(settings.s3)
    stored = storage.put("inputs/a", b"good", media_type="text/plain")
    cache = ObjectCache(tmp_path / "shared", storage, limit_bytes=1)
    (tmp_path / "shared" / "old").write_bytes(b"old")
    scan = os.scandir

    def vanishing(folder: Path) -> list[os.DirEntry[str]]:
        entries = list(scan(folder))
        (tmp_path / "shared" / "old").unlink()
        return entries

    monkeypatch.setattr(os, "scandir", vanishing)
    path = cache.fetch(StoredObject(key="inputs/a", sha256=stored.sha256, size_bytes=4), moved=lambda: None)

    assert path.read_bytes() == b"good"


def test_a_runner_that_talks_nonsense_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    birth = "birth = Births(listener=int(sys.argv[2]), opener=int(sys.argv[4])).next()"
    nonsense = "os.write(birth.channel, b'nonsense\\n'); time.sleep(60)"
    program = f"import os, sys, time; from worker.births import Births; {birth}; {nonsense}"
    monkeypatch.setattr(nursery, "COMMAND", (sys.executable, "-c", program))
    device = Device()
    device.start()
    try:
        assert device.receive(20) is GONE
    finally:
        device.close()


def test_a_fuse_that_is_left_burns_nothing_any_more() -> None:
    burning, burnt = Event(), Event()

    def burn() -> None:
        burning.set()
        time.sleep(0.2)
        burnt.set()

    fuse = Fuse(0.01, burn)
    fuse.light()
    burning.wait(5)
    fuse.put_out()

    assert burnt.is_set()


def test_a_claim_that_was_answered_too_late_is_not_worked_on(workplace: Workplace) -> None:
    """Its lease counts from when SQL ran it, so it may be over before the first heartbeat."""
    job_id = workplace.job(["hang", 1.5], ["publish", "sample", "a", "x"])
    supervisor = workplace.supervisor(beat=timedelta(seconds=1))
    with workplace.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION doze() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(3.2); RETURN NULL; END'"
        )
        connection.exec_driver_sql(
            "CREATE CONSTRAINT TRIGGER doze AFTER INSERT ON attempts"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION doze()"
        )

    supervisor.run_next()

    job = workplace.get(job_id)
    assert not workplace.artifacts(job_id)
    assert (job.state, job.interruptions, job.losses) == (JobState.QUEUED, 1, 0)


def test_a_cancel_is_not_lost_between_a_claim_and_its_return(workplace: Workplace) -> None:
    job_id = workplace.job()
    acts = [
        lambda s: claims.claim(s, worker="w", queues=["generate"], terms=claims.Terms.of(JobSettings())),
        lambda s: attempts.hand_back(s, job_id, 1),
    ]

    def between(statement: str) -> None:
        """Another worker acts after the first, and after the second statement that tries to move the job."""
        if "UPDATE jobs" in statement and acts:
            with Session(workplace.engine) as session, session.begin():
                session.execute(text("SET LOCAL lock_timeout = 200"))
                acts.pop(0)(session)

    cancel(workplace, job_id, after_each=between)

    assert workplace.state(job_id) == JobState.CANCELED


def cancel(workplace: Workplace, job_id: UUID, *, after_each: Callable[[str], None]) -> None:
    async def ask() -> None:
        engine = make_async_engine(workplace.settings.database, "test client")

        def executed(*about: Any) -> None:
            with suppress(OperationalError):
                after_each(about[2])

        event.listen(engine.sync_engine, "after_cursor_execute", executed)
        async with AsyncSession(engine) as session, session.begin():
            await requests.cancel(session, workplace.tenant_id, job_id)
        await engine.dispose()

    asyncio.run(ask())


def test_what_a_thread_of_the_last_job_still_says_is_not_taken_for_the_next(workplace: Workplace) -> None:
    talker, next_one = workplace.job(["chatter", 0.02]), workplace.job(["steps", 20, 0.02])
    supervisor = workplace.supervisor()

    supervisor.run_next()
    supervisor.run_next()

    assert workplace.get(talker).result["pid"] == workplace.get(next_one).result["pid"]
    assert not [event for event in workplace.events(next_one) if event.type == "job.log"]


def test_a_report_that_arrives_late_although_it_was_given_up_is_not_written_again(workplace: Workplace) -> None:
    """As one that lay in a network while it was sent again on another connection."""
    job_id = workplace.job(["metrics", 1, {"loss": 1.0}], ["steps", 20, 0.05])
    supervisor = workplace.supervisor()
    ask, asked = supervisor.ask, itertools.count(1)
    delayed: list[Any] = []

    def delaying(work: Any) -> Any:
        turn = next(asked)
        if turn == 2:  # the first report: the heartbeat before it told which event is the latest
            delayed.append(work)
            raise UNCONFIRMED
        done = ask(work)
        if turn == 5:
            ask(delayed[0])
        return done

    supervisor.ask = delaying  # type: ignore[method-assign]
    supervisor.run_next()

    said = [json.dumps(event.data, sort_keys=True) for event in workplace.events(job_id)]
    assert delayed
    assert len(said) == len(set(said))
