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
    setup = Setup(folder=tmp_path, workers=4, lease=4, seed=1, app="tests.chaos.unfenced")
    goals = Goals(kills=0, zombies=6, stop_every=0.5, spared=1, kinds=frozenset({"stop_worker"}))

    report = run(Wanted(setup=setup, jobs=12, goals=goals, limit=300, kinds=frozenset({"train"})))

    assert report.zombies >= 1
    assert [found for found in report.violations if "attempt" in found], report.as_json()
