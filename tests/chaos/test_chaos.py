"""Short chaos runs over real processes: the promises hold under every family of fault, and without fences they do not.

The long form is ``make chaos``.
"""

from pathlib import Path

import pytest

from tests.chaos import nemesis
from tests.chaos.control import ZOMBIES, control
from tests.chaos.nemesis import KILLS, Goals
from tests.chaos.run import Wanted, run
from tests.chaos.servers import Setup

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OUTAGES = frozenset({"flush_broker", "cut_broker", "terminate_backends", "lie_about_commits", "s3_error", "s3_lie"})


@pytest.fixture(autouse=True)
def no_process_left_behind() -> None:
    """What a run kills leaves orphans for a moment; the end of the run sweeps them, and the end of the tests looks."""


def test_nothing_is_lost_and_nothing_done_twice_under_faults(tmp_path: Path) -> None:
    goals = Goals(
        kills=6,
        zombies=2,
        kill_every=3,
        stop_every=6,
        outage_every=2,
        nap_every=6,
        kinds=frozenset({*KILLS, *nemesis.ZOMBIES, *nemesis.NAPS, *OUTAGES}),
    )

    report = run(Wanted(setup=Setup(folder=tmp_path, workers=4, lease=5, seed=1), jobs=24, goals=goals, limit=300))

    assert report.violations == []
    assert (report.lost, report.duplicates, report.wrong_bytes, report.manual_actions) == (0, 0, 0, 0)
    assert report.kills >= 6 and report.zombies >= 2 and len(report.faults) >= 10


def test_without_the_fence_in_sql_alone_the_same_checks_fail(tmp_path: Path) -> None:
    """The control: supervisors that were taken for dead commit the results of work that somebody else holds."""
    both = control(tmp_path, seed=1)

    assert both.fenced.violations == [] and both.fenced.zombies >= ZOMBIES
    assert both.unfenced.foreign_results > 0, both.as_json()
    assert both.complaints == []
