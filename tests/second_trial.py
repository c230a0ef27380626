"""Which tests may be tried a second time in CI: those that a busy machine alone can make fail.

These meet killed processes, broken networks and clocks: they poll with a deadline (``wait_until``), their module reads
a clock, or they are runs of whole installations. They are marked ``timed``. A failure of any other says that something
is wrong, whatever it says the second time: ``pytest --second-trial`` refuses to try it.
"""

from typing import Final

import pytest

OPTION: Final = "--second-trial"
_FOLDERS: Final = frozenset({"chaos", "drills", "e2e"})
"""Of runs of whole installations."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, action="store_true", help="refuse to run a test that is not timed")


def pytest_itemcollected(item: pytest.Item) -> None:
    polls = "wait_until" in getattr(item, "fixturenames", ())
    reads_a_clock = hasattr(getattr(item, "module", None), "time")
    if polls or reads_a_clock or item.path.parent.name in _FOLDERS:
        item.add_marker(pytest.mark.timed)


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption(OPTION):
        certain = [item.nodeid for item in session.items if item.get_closest_marker("timed") is None]
        if certain:
            raise pytest.UsageError("no second trial, no machine is to blame for:\n  " + "\n  ".join(certain))
