"""The control: two short runs that differ by the fence in SQL alone. With it all is well; without it results are wrong.

The zombies are supervisors that are stopped while their runner goes on and ends the work. When they continue, the next
attempt has begun, and ``done`` waits in the pipe: the fuse of the product, which is on in both runs, finds a runner
that has nothing left to kill, and only the ``WHERE`` of the commit stands between the late result and the job.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from tests.chaos.nemesis import Goals
from tests.chaos.report import Report
from tests.chaos.run import Wanted, run
from tests.chaos.servers import Setup

ZOMBIES: Final = 3
_GOALS: Final = Goals(
    kills=0, zombies=ZOMBIES, stop_every=1, stopped_at_once=1, stopped_after=1, one_each=True, spared=0,
    kinds=frozenset({"stop_supervisor"}),
)  # fmt: skip
_LIMIT: Final = 300.0
_FOREIGN: Final = ("belongs to attempt", "does not name attempt")
"""How the checker says that what is visible was made by another attempt than it is shown as, or than the last one."""
_APPS: Final = {"fenced": "worker", "unfenced": "tests.chaos.unfenced"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one of the two runs came to."""

    zombies: int
    foreign_results: int
    """Visible results of attempts that had lost their job."""
    duplicates: int
    lost: int
    wrong_bytes: int
    violations: list[str]

    @classmethod
    def of(cls, report: Report) -> "Outcome":
        return cls(
            zombies=report.zombies,
            foreign_results=sum(any(sign in found for sign in _FOREIGN) for found in report.violations),
            duplicates=report.duplicates,
            lost=report.lost,
            wrong_bytes=report.wrong_bytes,
            violations=report.violations,
        )


@dataclass(frozen=True, kw_only=True)
class Control:
    """Both, and whether they show that the fence is what saves."""

    fenced: Outcome
    unfenced: Outcome

    @property
    def failed(self) -> bool:
        """Whether the run without fences failed, by results of attempts that had lost their job. It has to."""
        return self.unfenced.foreign_results > 0

    @property
    def complaints(self) -> list[str]:
        """What is wrong with the harness or the product, if anything is."""
        fenced = [f"control, fenced: {found}" for found in self.fenced.violations]
        return fenced + ([] if self.failed else ["the control without fences passed: this run would see no such bug"])

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "failed": self.failed}


def control(folder: Path, seed: int) -> Control:
    """Run both, one after the other."""
    reports = {
        name: run(
            Wanted(
                setup=Setup(folder=folder / name, workers=3, lease=4, seed=seed, app=app),
                jobs=ZOMBIES,
                goals=_GOALS,
                limit=_LIMIT,
                kinds=frozenset({"training that starts over"}),
                in_flight=1,
            )
        )
        for name, app in _APPS.items()
    }
    return Control(**{name: Outcome.of(report) for name, report in reports.items()})
