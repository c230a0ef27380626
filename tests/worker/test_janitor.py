"""Who does the housekeeping, what one failing chore costs, and the command."""

import json
import logging
from collections.abc import Iterator
from datetime import timedelta
from threading import Event, Thread
from typing import Any

import pytest
from sqlalchemy import func

from shared.jobs import upkeep
from shared.jobs.rows import Worker
from tests.conftest import WaitUntil
from tests.worker.conftest import environment
from tests.worker.house import House
from worker import janitor
from worker.janitor import Janitor

HOUR = timedelta(hours=1)


@pytest.fixture
def house(database: str, s3: Any) -> Iterator[House]:
    house = House(database, s3)
    house.settings = house.settings.model_copy(
        update={"worker": house.settings.worker.model_copy(update={"collect": timedelta(seconds=0.2)})}
    )
    house.upload(house.ended_job(), 1, "orphan")
    gone = func.clock_timestamp() - timedelta(days=2)
    house.transact(lambda s: s.add(Worker(name="w", host="h", pid=1, queues=[], state="idle", seen_at=gone)))
    yield house
    house.engine.dispose()


def employed(house: House, name: str, **s3: Any) -> Janitor:
    settings = house.settings.model_copy(update={"s3": house.settings.s3.model_copy(update=s3)})
    return Janitor(settings, house.engine, name=name)


def test_a_worker_keeps_the_house_in_order_by_itself(house: House, wait_until: WaitUntil) -> None:
    over = Event()
    thread = Thread(target=employed(house, "w1").run_until, args=(over,))
    thread.start()
    try:
        wait_until(lambda: house.keys() == set() and not house.everything()["workers"], timeout=60)
    finally:
        over.set()
        thread.join(20)

    assert house.transact(lambda s: upkeep.hold(s, "janitor", "another", HOUR))


def test_only_one_does_the_housekeeping(house: House) -> None:
    house.transact(lambda s: upkeep.hold(s, "janitor", "another", HOUR))
    before = house.everything()

    employed(house, "w1").round()

    assert house.everything() == before


def test_a_chore_that_fails_keeps_no_other_from_being_done(house: House, caplog: pytest.LogCaptureFixture) -> None:
    employed(house, "w1", endpoint="http://127.0.0.1:9").round()

    assert house.everything()["workers"] == []
    assert house.names() == {"orphan"}
    failed = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [chore for chore in ("orphans", "uploads", "workers") if any(chore in line for line in failed)] == [
        "orphans",
        "uploads",
    ]


def test_a_round_says_what_it_did_in_a_line_for_each_chore(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="worker.janitor")

    employed(house, "w1").round()

    assert [record.getMessage() for record in caplog.records if record.name == "worker.janitor"] == [
        "housekeeping: workers: 1 rows",
        "housekeeping: orphans: 1 marked",
    ]


@pytest.fixture
def command(house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in the environment of the house; returns what it printed."""
    for name, value in environment(house.settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NOISEMILL_JOBS_ORPHAN_GRACE", "0.001")

    def run(*arguments: str) -> Any:
        assert janitor.main([*arguments]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_the_command_shows_what_is_due_and_changes_nothing(house: House, command: Any) -> None:
    before = house.everything()

    shown = command("--dry-run")

    assert house.everything() == before
    assert {name: chore["count"] for name, chore in shown.items() if chore["count"]} == {"workers": 1, "orphans": 1}
    assert shown["orphans"]["due"][0]["key"].endswith("/orphan")


def test_the_command_does_one_chore_alone(house: House, command: Any) -> None:
    assert command("--only", "workers") == {"workers": {"rows": 1}}
    assert house.everything()["garbage"] == []


def test_the_command_knows_no_other_chores(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("--only", "dishes")
    assert "no such chore: dishes; there are lifetimes, expired" in capsys.readouterr().err
