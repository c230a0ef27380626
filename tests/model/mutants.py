"""Seeded bugs: each a small change of the product's code or SQL, found by the search or explained.

Among them are the designs of well-known queues: finishing by id (Oban), finishing what is running (River,
procrastinate), reaping what was read before (River), claiming whatever a message names (Celery with late
acknowledgement), counting no losses (Celery's ``task_reject_on_worker_lost``).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
from sqlalchemy import Connection, literal, text
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.jobs import attempts, claims, keys, moves, pauses, requests, upkeep
from shared.jobs.moves import Cases
from shared.jobs.rows import Job
from shared.jobs.state import MOVES, JobState
from tests.model import planting
from tests.model.database import Database, Operation
from tests.model.operations import Bounds
from tests.model.planting import Plant, cases, claim_text, values, within
from tests.model.search import searching
from tests.model.sizes import DEADLINE, EVERYTHING, OUTAGES, OUTBOX, REQUESTS, WORKERS
from tests.model.violation import Violation
from tests.model.world import Adversary, Move, Rules, Worker, World


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A bug, and where it is looked for."""

    name: str
    plant: Plant = lambda patch: None
    rules: Rules = field(default_factory=lambda: WORKERS)
    adversary: type[Adversary] = Adversary
    touches: tuple[str, ...] = ()
    """Names of the operations that it changes, if these are known: what was learned of the others holds."""
    breaks: str | None = None
    """The promise that it is found by: a bug that is noticed as something else may be another bug than was meant."""
    equivalent: str | None = None
    """Why it breaks no promise."""

    @contextmanager
    def planted(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            # Bugs are planted into what builds statements: none must be left over from before.
            patch.setattr(attempts, "_success", attempts._success.__wrapped__)
            self.plant(patch)
            yield


class ReadsBeforeItReaps(Adversary):
    """The reaper reads which leases ran out, and later ends those attempts, without looking again."""

    def _upkeep(self, world: World) -> Iterator[Move]:
        yield from super()._upkeep(world)
        lease = self._job(world)["lease_until"]
        if world.reaper_read:
            done = self._apply(world, Operation("reap what was read", (), _reap_by_id))[1]
            yield "the reaper acts on what it read", done._replace(reaper_read=False)
        elif lease is not None and lease < 0:
            yield "the reaper reads", world._replace(reaper_read=True)


def _reap_by_id(session: Session) -> int:
    session.execute(text("UPDATE jobs SET lease_until = '-infinity' WHERE lease_until IS NOT NULL"))
    return len(upkeep.reap(session))


class FinishesBeforeItUploads(Adversary):
    """A worker commits its result while the objects are on their way."""

    def _endings(self, world: World, worker: Worker) -> Iterator[tuple[str, Operation]]:
        yield from super()._endings(world, worker._replace(uploaded=True))


def _shared_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(keys, "artifact_key", lambda job_id, fence, name: f"jobs/{job_id}/{name}")


def _no_loss_cap(given: Cases) -> Cases:
    return [(to, condition) for to, condition in given if to != JobState.FAILED]


def _no_failure_cap(given: Cases) -> Cases:
    again = {JobState.QUEUED: col(Job.state) == "running", JobState.PAUSED: col(Job.state) == "pausing"}
    return [(to, again.get(to, condition)) for to, condition in given]


def _paused_before_failed(given: Cases) -> Cases:
    order = (JobState.CANCELED, JobState.PAUSED, JobState.FAILED, JobState.QUEUED)
    return sorted(given, key=lambda one: order.index(one[0]))


def _cancel_anything(patch: pytest.MonkeyPatch) -> None:
    real = requests.move_by_case

    def changed(given: Cases, *conditions: Any, **how: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            planting.any_state(inner)
            return real([(to, literal(True)) for to, _ in given], *conditions, **how)

    patch.setattr(requests, "move_by_case", changed)


def _success_wins(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(MOVES, JobState.CANCELING, MOVES[JobState.CANCELING] | {JobState.SUCCEEDED})


def _no_redispatch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(upkeep, "redispatch", lambda session, *, after: 0)


def _report_text(old: str, new: str) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        statement = attempts._REPORT
        changed, places = re.subn(old, new, statement.text)
        assert places
        patch.setattr(attempts, "_REPORT", text(changed).bindparams(*statement._bindparams.values()))

    return plant


def _interruptions_count(patch: pytest.MonkeyPatch) -> None:
    real = attempts.move_by_case

    def changed(*args: Any, **how: Any) -> Any:
        counted = {"failures": Job.failures + 1} if "interruptions" in how else {}
        return real(*args, **(how | counted))

    patch.setattr(attempts, "move_by_case", changed)


def _outages_count(patch: pytest.MonkeyPatch) -> None:
    real = attempts.move_by_case
    patch.setattr(attempts, "move_by_case", lambda *args, **how: real(*args, **(how | {"failures": Job.failures + 1})))


def _endless_patience(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pauses, "num_within", lambda patience, backoff: 100)


def _no_pause(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pauses, "end_of", lambda backoff, num_before: None)


def _reclaim_anything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(claims, "HELD", frozenset(JobState))


def _never_look(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attempts, "outcome_of", lambda session, job_id, fence: None)


def _drop_event(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(moves, "_event", lambda moved: moved.select().cte("event"))


MUTANTS: Final = (
    Mutant(
        name="finish by id alone",
        breaks="a result is whole",
        touches=("finish",),
        plant=within(attempts, "succeed", planting.no_guard),
    ),
    Mutant(
        name="finish what is held, by whomever",
        breaks="only the current attempt writes",
        touches=("finish",),
        plant=within(attempts, "succeed", planting.no_fence),
    ),
    Mutant(
        name="fail without the fence",
        breaks="only the current attempt writes",
        touches=("fail",),
        plant=within(attempts, "fail", planting.no_fence),
    ),
    Mutant(
        name="hand back without the fence",
        breaks="only the current attempt writes",
        touches=("finish", "hand_back"),
        plant=within(attempts, "hand_back", planting.no_fence),
    ),
    Mutant(
        name="heartbeat without the fence",
        breaks="only the current attempt writes",
        touches=("heartbeat", "record_twice"),
        plant=within(attempts, "heartbeat", planting.no_fence),
    ),
    Mutant(
        name="record without the fence",
        breaks="only the current attempt writes",
        touches=("record", "record_twice"),
        plant=_report_text("fence = :fence", "fence >= :fence"),
    ),
    Mutant(
        name="record whatever the state",
        breaks="PostgreSQL refuses nothing",
        touches=("record", "record_twice"),
        plant=_report_text(r"AND state IN \([^)]*\)", ""),
    ),
    Mutant(
        name="report what was sent before again",
        breaks="PostgreSQL refuses nothing",
        touches=("record", "record_twice"),
        plant=_report_text("WHERE NOT EXISTS", "WHERE true OR EXISTS"),
    ),
    Mutant(
        name="reap by a stale read",
        breaks="only a lease that ran out is lost",
        touches=("reap what was read",),
        adversary=ReadsBeforeItReaps,
    ),
    Mutant(
        name="claim what is running",
        breaks="one attempt lives",
        touches=("claim",),
        plant=claim_text("state = 'queued'", "state IN ('queued', 'running')"),
    ),
    Mutant(
        name="claim before the time",
        breaks="a job starts in time",
        touches=("claim",),
        plant=claim_text("not_before <= clock_timestamp()", "true"),
    ),
    Mutant(
        name="claim after the deadline",
        breaks="a job starts in time",
        plant=claim_text("start_deadline > clock_timestamp()", "true"),
        rules=DEADLINE,
    ),
    Mutant(
        name="expire what has started",
        breaks="a job starts in time",
        plant=planting.expire_what_has_started,
        rules=DEADLINE,
    ),
    Mutant(
        name="losses without a limit",
        breaks="attempts are within budget",
        touches=("reap",),
        plant=cases(upkeep, _no_loss_cap),
    ),
    Mutant(
        name="failures without a limit",
        breaks="attempts are within budget",
        touches=("fail", "finish", "hand_back"),
        plant=cases(attempts, _no_failure_cap),
    ),
    Mutant(
        name="a pause outlives the last attempt",
        breaks="attempts are within budget",
        touches=("reap",),
        plant=cases(upkeep, _paused_before_failed),
        rules=REQUESTS,
    ),
    Mutant(name="mark the bell, then send it", breaks="every job ends", plant=planting.mark_before_send, rules=OUTBOX),
    Mutant(name="no bell for a new job", breaks="every job ends", plant=planting.submit_without_a_bell, rules=OUTBOX),
    Mutant(
        name="no bell after a lost lease",
        breaks="every job ends",
        plant=within(upkeep, "reap", planting.no_bell),
        rules=OUTBOX,
    ),
    Mutant(
        name="no bell after a failure",
        breaks="every job ends",
        plant=within(attempts, "fail", planting.no_bell),
        rules=OUTBOX,
    ),
    Mutant(
        name="no bell after an interruption",
        breaks="every job ends",
        plant=within(attempts, "hand_back", planting.no_bell),
        rules=OUTBOX,
    ),
    Mutant(
        name="no bell after a resume",
        breaks="every job ends",
        plant=within(requests, "resume", planting.no_bell),
        rules=OUTBOX,
    ),
    Mutant(name="no redispatcher, and a lost message", breaks="every job ends", plant=_no_redispatch, rules=EVERYTHING),
    Mutant(
        name="no reaper",
        breaks="every job ends",
        touches=("reap",),
        plant=lambda patch: patch.setattr(upkeep, "reap", lambda session: []),
    ),
    Mutant(
        name="cancel what has ended",
        breaks="the end is final",
        touches=("cancel",),
        plant=within(requests, "cancel", _cancel_anything),
        rules=REQUESTS,
    ),
    Mutant(
        name="success after a cancel",
        breaks="a canceled job never succeeds",
        touches=("finish",),
        plant=_success_wins,
        rules=REQUESTS,
    ),
    Mutant(name="one key for all attempts", breaks="what is visible is stored", plant=_shared_key),
    Mutant(name="commit before the upload", breaks="what is visible is stored", adversary=FinishesBeforeItUploads),
    Mutant(
        name="an attempt is left open when its job is queued",
        breaks="one attempt lives",
        plant=planting.attempts_left_open,
    ),
    Mutant(name="the fence starts anew", breaks="one attempt lives", plant=values(planting.back_to_the_first_fence)),
    Mutant(
        name="a move keeps the version",
        breaks="every change raises the version",
        plant=values(lambda columns, target: columns.pop("state_version")),
    ),
    Mutant(name="a move without an event", breaks="the log has no gap", plant=_drop_event),
    Mutant(
        name="charge whether or not it counts",
        breaks="usage is charged once",
        touches=("finish",),
        plant=planting.every_success_is_charged,
    ),
    Mutant(
        name="interruptions count as failures",
        breaks="attempts are counted",
        touches=("finish", "hand_back"),
        plant=_interruptions_count,
    ),
    Mutant(
        name="outages count as failures",
        breaks="attempts are counted",
        plant=within(attempts, "postpone", _outages_count),
        rules=OUTAGES,
    ),
    Mutant(
        name="outages without a limit",
        breaks="storage is not waited for for ever",
        plant=_endless_patience,
        rules=OUTAGES,
    ),
    Mutant(
        name="no pause after an outage",
        breaks="storage is not waited for for ever",
        plant=within(attempts, "postpone", _no_pause),
        rules=OUTAGES,
    ),
    Mutant(
        name="reclaim what is over",
        touches=("reclaim",),
        plant=_reclaim_anything,
        equivalent="An attempt that is over has ended_at, which is asked for as well.",
    ),
    Mutant(
        name="end again without looking",
        touches=("outcome_of",),
        plant=_never_look,
        equivalent="The fence refuses the second end; looking saves a worker from trying for a whole lease.",
    ),
)


def find(connection: Connection, mutant: Mutant, known: Database | None = None) -> Violation | None:
    """What the search says about the product with this bug; ``known`` has learned of the product without."""
    shared = known if mutant.touches and mutant.rules.bounds == Bounds() else None
    branch = shared.branch(lambda operation: operation.name in mutant.touches) if shared else None
    try:
        with mutant.planted(), searching(connection, mutant.rules, mutant.adversary, database=branch) as search:
            search.run()
    except Violation as broken:
        return broken
    return None
