"""What a run has shown, as one JSON object."""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.chaos.checker import Checker
from tests.chaos.history import History
from tests.chaos.nemesis import Fault


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
    end by the reaper, without the wait for a free worker."""
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

    @property
    def is_clean(self) -> bool:
        return not self.violations

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.as_json() + "\n")


def judge(checker: Checker, happened: Sequence[Fault], complaints: Sequence[str], **counted: Any) -> Report:
    """Check the history, and count what happened."""
    history = checker.history
    duplicates, lost, wrong = list(checker.duplicates()), list(checker.lost()), list(checker.wrong_bytes())
    by_hand = [f"{count} jobs were canceled or retried by hand"] if (count := checker.interventions()) else []
    others = [checker.objects(), checker.endings(), checker.attempts(), checker.events(), checker.usage()]
    return Report(
        ended=dict(sorted(Counter(job.state.value for job in history.jobs).items())),
        attempts=dict(sorted(Counter(_cause(attempt) for attempt in history.attempts).items())),
        recovery_s=recovery(history, happened),
        zombies=sum(fault.became_zombie for fault in happened),
        duplicates=len(duplicates),
        lost=len(lost),
        wrong_bytes=len(wrong),
        orphans=checker.orphans(),
        manual_actions=count,
        violations=[*complaints, *by_hand, *duplicates, *lost, *wrong, *(found for rule in others for found in rule)],
        **counted,
    )


def recovery(history: History, faults: Sequence[Fault]) -> dict[str, float]:
    """Seconds after each kill of a whole worker that held a job; the median and the longest."""
    reaped, started = list[float](), list[float]()
    for fault in faults:
        if fault.kind not in ("kill_worker", "kill_supervisor") or fault.job_id is None:
            continue
        attempts = {attempt.fence: attempt for attempt in history.attempts_of.get(fault.job_id, [])}
        hit, following = attempts.get(fault.fence), attempts.get(fault.fence + 1)
        if hit is None or hit.ended_at is None or hit.outcome != "lost":
            continue  # it had ended before the kill reached it
        reaped.append((hit.ended_at - fault.at).total_seconds())
        if following is not None and following.started_at is not None:
            started.append((following.started_at - fault.at).total_seconds())
    return {**_spread("", started), **_spread("lease_lost_", reaped)}


def _spread(prefix: str, seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {
        f"{prefix}count": len(seconds),
        f"{prefix}p50": round(statistics.median(seconds), 2),
        f"{prefix}max": round(max(seconds), 2),
    }


def _cause(attempt: Any) -> str:
    if attempt.outcome is None:
        return "never ended"
    return f"failed: {attempt.error_code}" if attempt.outcome == "failed" else attempt.outcome.value
