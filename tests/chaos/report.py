"""What a run has shown, as one JSON object."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.chaos.checker import Checker
from tests.chaos.nemesis import Fault
from tests.chaos.recovery import Excuses, figures, late, recoveries


@dataclass(frozen=True, kw_only=True)
class Report:
    """Counts of one run. ``violations`` says in sentences what must not have happened."""

    seed: int
    jobs: int
    """Accepted while things went wrong; those of the undisturbed run before are in the other counts only."""
    ended: dict[str, int]
    faults: dict[str, int]
    attempts: dict[str, int]
    """By how they ended; the failed ones by their error."""
    recovery_s: dict[str, float]
    """From ``kill -9`` of a worker that held a job to the start of that job's next attempt; ``lease_lost`` is to its
    end by the reaper; ``judged`` is without the time in which the faults left nobody who could have gone on with it."""
    kills: int
    zombies: int
    duplicates: int
    lost: int
    wrong_bytes: int
    orphans: int
    manual_actions: int
    restarts: dict[str, int]
    """Done by the installation, as ``restart: always`` would."""
    commit_lies: dict[str, int]
    s3_faults: dict[str, int]
    duration_s: float
    violations: list[str]
    control: Mapping[str, Any] | None = None
    """What became of the run without fences, and of its twin with them; None for a run that is no ``make chaos``."""

    @property
    def is_clean(self) -> bool:
        return not self.violations

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.as_json() + "\n")


def judge(
    checker: Checker, happened: Sequence[Fault], excuses: Excuses, complaints: Sequence[str], **counted: Any
) -> Report:
    """Check the history, and count what happened."""
    history = checker.history
    duplicates, lost, wrong = list(checker.duplicates()), list(checker.lost()), list(checker.wrong_bytes())
    by_hand = [f"{count} jobs were canceled or retried by hand"] if (count := checker.interventions()) else []
    killed = list(recoveries(history, happened))
    others = [
        late(killed, excuses),
        checker.objects(),
        checker.endings(),
        checker.waits(),
        checker.attempts(),
        checker.events(),
        checker.usage(),
    ]
    return Report(
        ended=dict(sorted(Counter(job.state.value for job in history.jobs).items())),
        attempts=dict(sorted(Counter(_cause(attempt) for attempt in history.attempts).items())),
        recovery_s=dict(figures(killed, excuses)),
        zombies=sum(fault.became_zombie for fault in happened),
        duplicates=len(duplicates),
        lost=len(lost),
        wrong_bytes=len(wrong),
        orphans=checker.orphans(),
        manual_actions=count,
        violations=[*complaints, *by_hand, *duplicates, *lost, *wrong, *(found for rule in others for found in rule)],
        **counted,
    )


def _cause(attempt: Any) -> str:
    if attempt.outcome is None:
        return "never ended"
    return f"failed: {attempt.error_code}" if attempt.outcome == "failed" else attempt.outcome.value
