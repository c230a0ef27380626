"""Short chaos runs over real processes: the promises hold under every family of fault, and without fences they do not.

The long form is ``make chaos``.
"""

from pathlib import Path

import pytest

from tests.chaos.nemesis import KILLS, ZOMBIES, Goals
from tests.chaos.run import Wanted, run
from tests.chaos.servers import Setup

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OUTAGES = frozenset({"flush_broker", "cut_broker", "terminate_backends", "lie_about_commits", "s3_error", "s3_lie"})


@pytest.fixture(autouse=True)
def no_process_left_behind() -> None:
    """What a run kills leaves orphans for a moment; the end of the run sweeps them, and the end of the tests looks."""


def test_nothing_is_lost_and_nothing_done_twice_under_faults(tmp_path: Path) -> None:
    goals = Goals(
        kills=6, zombies=2, kill_every=3, stop_every=6, outage_every=2, kinds=frozenset({*KILLS, *ZOMBIES, *OUTAGES})
    )

    report = run(Wanted(setup=Setup(folder=tmp_path, workers=4, lease=5, seed=1), jobs=24, goals=goals, limit=300))

    assert report.violations == []
    assert (report.lost, report.duplicates, report.wrong_bytes, report.manual_actions) == (0, 0, 0, 0)
    assert report.kills >= 6 and report.zombies >= 2 and len(report.faults) >= 8


def test_without_fences_the_same_checks_fail(tmp_path: Path) -> None:
    """The control: zombies that were taken for dead finish work that somebody else holds."""
    setup = Setup(folder=tmp_path, workers=3, lease=4, seed=1, app="tests.chaos.unfenced")
    goals = Goals(
        kills=0, zombies=3, stop_every=1, stopped_at_once=1, stopped_after=1, spared=0, kinds=frozenset({"stop_worker"})
    )
    kinds = frozenset({"training that starts over"})

    report = run(Wanted(setup=setup, jobs=4, goals=goals, limit=300, kinds=kinds, in_flight=1))

    assert report.zombies >= 3
    assert [found for found in report.violations if "belongs to attempt" in found], report.as_json()
