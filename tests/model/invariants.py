"""What must never break: promises about each state of the database, each step between two, and each world.

A function's name is the promise's name, its docstring the promise. A step is judged on the rows before and after one
operation; since every reachable step is, what holds for each step holds for every history.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final
from uuid import UUID

from shared.jobs.state import MOVES, JobState
from tests.model.canonical import is_postponed
from tests.model.database import TIMES, Operation, Rows
from tests.model.operations import CHECKPOINT, WEIGHTS, content_of
from tests.model.violation import Violation
from tests.model.world import World

Row = Mapping[str, Any]
Broken = str | None
"""What is wrong, in words."""

_HELD: Final = ("running", "canceling", "pausing")
_OF_AN_ATTEMPT: Final = ("heartbeat", "record", "record_twice", "finish", "fail", "postpone", "hand_back")
_FREE: Final = ("interrupted", "preempted", "paused")


def an_unheld_job_has_no_lease(rows: Rows) -> Broken:
    """A job has a lease exactly while an attempt holds it."""
    job = _job(rows)
    return None if (job["state"] in _HELD) == (job["lease_until"] is not None) else f"{job['state']}, lease or not"


def one_attempt_lives(rows: Rows) -> Broken:
    """A held job has exactly one attempt that has not ended, numbered by the fence; any other job has none."""
    job = _job(rows)
    live = [attempt["fence"] for attempt in rows["attempts"] if attempt["outcome"] is None]
    expected = [job["fence"]] if job["state"] in _HELD else []
    return None if live == expected else f"{job['state']} at fence {job['fence']}, attempts {live} have not ended"


def attempts_are_within_budget(rows: Rows) -> Broken:
    """No more than ``max_attempts`` attempts run, beside those that were interrupted, preempted or paused."""
    job = _job(rows)
    counted = sum(attempt["outcome"] not in _FREE for attempt in rows["attempts"])
    return None if counted <= job["max_attempts"] else f"{counted} attempts of {job['max_attempts']}"


def every_attempt_is_known(rows: Rows) -> Broken:
    """The fence is the number of attempts: numbered from 1, none missing, none twice."""
    fences = [attempt["fence"] for attempt in rows["attempts"]]
    expected = list(range(1, _job(rows)["fence"] + 1))
    return None if fences == expected else f"fence {_job(rows)['fence']}, attempts {fences}"


def the_log_has_no_gap(rows: Rows) -> Broken:
    """Events count from 1 to ``event_seq`` without a gap."""
    seqs = [event["seq"] for event in rows["events"]]
    return (
        None if seqs == list(range(1, _job(rows)["event_seq"] + 1)) else f"event_seq {_job(rows)['event_seq']}: {seqs}"
    )


def usage_is_charged_once(rows: Rows) -> Broken:
    """Each attempt that has ended is charged once, and the tenant's account is their sum."""
    ended = [attempt["fence"] for attempt in rows["attempts"] if attempt["outcome"] is not None]
    charged = [usage["fence"] for usage in rows["usage"]]
    if charged != ended:
        return f"attempts {ended} have ended, charged are {charged}"
    total, account = sum(row["seconds"] for row in rows["usage"]), sum(row["attained"] for row in rows["shares"])
    return None if abs(total - account) < 1e-3 else f"{total} s were used, {account} s are on the account"


def a_result_is_whole(rows: Rows) -> Broken:
    """Result, weights and model version are there exactly if the job succeeded; all of the attempt that did."""
    job = _job(rows)
    won = [attempt["fence"] for attempt in rows["attempts"] if attempt["outcome"] == "succeeded"]
    expected = [job["fence"]] if job["state"] == "succeeded" else []
    seen = {
        "attempts that succeeded": won,
        "attempts whose weights are visible": [row["fence"] for row in rows["artifacts"] if row["kind"] == WEIGHTS],
        "versions": [job["fence"] for _ in rows["model_versions"]],
        "results": [job["fence"]] if job["result"] is not None else [],
    }
    wrong = {what: fences for what, fences in seen.items() if fences != expected}
    return f"{job['state']} at fence {job['fence']}: {wrong}" if wrong else None


def what_is_reported_is_there_once(rows: Rows) -> Broken:
    """Each checkpoint is announced by one event, however often its report was sent."""
    told = [event["data"]["id"] for event in rows["events"] if event["type"] == "job.checkpoint"]
    made = sorted(f"art_{UUID(row['id']).hex}" for row in rows["artifacts"] if row["kind"] == CHECKPOINT)
    return None if sorted(told) == made else f"{len(told)} events, {len(made)} checkpoints"


def attempts_are_counted(rows: Rows) -> Broken:
    """``failures``, ``losses`` and ``interruptions`` are the attempts that ended so."""
    job, ended = _job(rows), Counter(attempt["outcome"] for attempt in rows["attempts"])
    # An attempt that fails while it is being canceled counts as a failure and ends as canceled.
    right = (
        ended["failed"] <= job["failures"] <= ended["failed"] + ended["canceled"]
        and job["losses"] == ended["lost"]
        and job["interruptions"] == ended["interrupted"] + ended["preempted"]
    )
    return None if right else f"{job['failures']}, {job['losses']} and {job['interruptions']}, but {dict(ended)}"


STATES: Final[tuple[Callable[[Rows], Broken], ...]] = (
    an_unheld_job_has_no_lease,
    one_attempt_lives,
    attempts_are_within_budget,
    every_attempt_is_known,
    the_log_has_no_gap,
    usage_is_charged_once,
    a_result_is_whole,
    what_is_reported_is_there_once,
    attempts_are_counted,
)


def the_end_is_final(before: Rows, after: Rows) -> Broken:
    """Of a job that has ended nothing changes: state, version, result, attempts, artifacts, events, usage."""
    if _job(before)["completed_at"] is None:
        return None
    changed = [table for table in before if table != "outbox" and _still(before[table]) != _still(after[table])]
    return f"{_job(before)['state']}: {changed} changed" if changed else None


def only_legal_moves_are_made(before: Rows, after: Rows) -> Broken:
    """The state changes as the table of moves says, or not at all."""
    old, new = JobState(_job(before)["state"]), JobState(_job(after)["state"])
    return None if old == new or new in MOVES[old] else f"{old} -> {new}"


def the_fence_never_falls(before: Rows, after: Rows) -> Broken:
    """The fence grows by one with each claim and is never reset."""
    old, new = _job(before)["fence"], _job(after)["fence"]
    return None if new - old in (0, 1) else f"{old} -> {new}"


def an_ended_attempt_stays_as_it_is(before: Rows, after: Rows) -> Broken:
    """How an attempt ended is written once."""
    then = {row["fence"]: row["outcome"] for row in before["attempts"] if row["outcome"] is not None}
    now = {row["fence"]: row["outcome"] for row in after["attempts"]}
    changed = {fence: (how, now.get(fence)) for fence, how in then.items() if now.get(fence) != how}
    return f"{changed}" if changed else None


def every_change_raises_the_version(before: Rows, after: Rows) -> Broken:
    """``state_version`` grows by one with each change that a client can see, and with each comes an event."""
    (old,), (new,) = _still(before["jobs"]), _still(after["jobs"])
    grown = new["state_version"] - old["state_version"], len(after["events"]) - len(before["events"])
    changed = [name for name in old if old[name] != new[name] and name != "lease_until"]
    return (
        None if grown == ((1, 1) if changed else (0, 0)) else f"{changed} changed; version and events grew by {grown}"
    )


def only_a_lease_that_ran_out_is_lost(before: Rows, after: Rows) -> Broken:
    """No attempt is given up for lost while its lease runs."""
    lease = _job(before)["lease_until"]
    lost = Counter(row["outcome"] for row in after["attempts"])["lost"]
    known = Counter(row["outcome"] for row in before["attempts"])["lost"]
    return f"its lease had {lease:.0f} s to run" if lost > known and lease is not None and lease > 0 else None


def a_job_starts_in_time(before: Rows, after: Rows) -> Broken:
    """A job is claimed neither before it may be tried again nor, for the first time, after its deadline.

    It expires only if it never started.
    """
    old, new = _job(before), _job(after)
    if new["state"] == "expired" and new["started_at"] is not None:
        return "it expired, and had started"
    if new["fence"] == old["fence"]:
        return None
    if old["not_before"] is not None and old["not_before"] > 0:
        return f"claimed {old['not_before']:.0f} s too soon"
    late = old["started_at"] is None and old["start_deadline"] is not None and old["start_deadline"] < 0
    return "started after its deadline" if late else None


def storage_is_not_waited_for_for_ever(before: Rows, after: Rows) -> Broken:
    """A job is postponed once, which its patience is enough for, and again only after an attempt that stored something.

    It is not tried again at once.
    """
    stored = max((row["fence"] for row in after["artifacts"]), default=0)
    postponed = [row["fence"] for row in after["attempts"] if is_postponed(row) and row["fence"] > stored]
    if len(postponed) > 1:
        return f"attempts {postponed} were postponed"
    new = any(map(is_postponed, after["attempts"][-1:])) and not any(map(is_postponed, before["attempts"][-1:]))
    return "it may be tried again at once" if new and not (_job(after)["not_before"] or 0) > 0 else None


STEPS: Final[tuple[Callable[[Rows, Rows], Broken], ...]] = (
    the_end_is_final,
    only_legal_moves_are_made,
    the_fence_never_falls,
    an_ended_attempt_stays_as_it_is,
    every_change_raises_the_version,
    only_a_lease_that_ran_out_is_lost,
    a_job_starts_in_time,
    storage_is_not_waited_for_for_ever,
)


def only_the_current_attempt_writes(before: Rows, after: Rows, operation: Operation) -> Broken:
    """What an attempt does changes nothing unless it holds the job: its number is the fence, and the job is held."""
    job = _job(before)
    if operation.name not in _OF_AN_ATTEMPT or (operation.arguments[0] == job["fence"] and job["state"] in _HELD):
        return None
    changed = [table for table in before if _exact(before[table]) != _exact(after[table])]
    return f"{operation} at fence {job['fence']}, {job['state']}: {changed} changed" if changed else None


def what_is_visible_is_stored(rows: Rows, world: World) -> Broken:
    """Each artifact's object lies in storage, with the bytes of the attempt that the row names."""
    objects = dict(world.objects)
    for row in rows["artifacts"]:
        if row["removed_at"] is None and objects.get(row["key"]) != content_of(row["fence"]):
            return f"the {row['kind']} of attempt {row['fence']} " + (
                "is another attempt's" if row["key"] in objects else "is not in storage"
            )
    return None


def a_canceled_job_never_succeeds(rows: Rows, world: World) -> Broken:
    """After a cancel was acknowledged the job is being canceled, or is."""
    state = _job(rows)["state"]
    wrong = world.cancel_acknowledged and state not in ("canceling", "canceled")
    return f"it is {state}" if wrong else None


WORLDS: Final[tuple[Callable[[Rows, World], Broken], ...]] = (what_is_visible_is_stored, a_canceled_job_never_succeeds)


def judge_state(rows: Rows) -> None:
    """
    Raises:
        Violation: the rows of one job do not fit together.
    """
    _demand((promise, promise(rows)) for promise in STATES)


def judge_step(before: Rows, after: Rows, operation: Operation) -> None:
    """
    Raises:
        Violation: the state afterwards, or the way there, breaks a promise.
    """
    if after["jobs"]:
        judge_state(after)
    if before["jobs"]:
        _demand((promise, promise(before, after)) for promise in STEPS)
        _demand([(only_the_current_attempt_writes, only_the_current_attempt_writes(before, after, operation))])


def judge_world(rows: Rows, world: World) -> None:
    """
    Raises:
        Violation: database, storage and what was promised to the client do not fit together.
    """
    _demand((promise, promise(rows, world)) for promise in WORLDS)


def _demand(judged: Iterable[tuple[Callable[..., Broken], Broken]]) -> None:
    for promise, broken in judged:
        if broken is not None:
            raise Violation(promise.__name__.replace("_", " "), broken)


def _job(rows: Rows) -> Row:
    (job,) = rows["jobs"]
    return job


def _exact(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows with times to the minute: a lease that was prolonged shows, the milliseconds of the step do not."""
    return [{name: _minutes(row[name]) if name in TIMES else row[name] for name in row} for row in rows]


def _minutes(offset: float | None) -> int | None:
    return None if offset is None else round(offset / 60)


def _still(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows that say of a time only whether it is set: how long ago it was grows while nothing changes."""
    return [{name: row[name] is not None if name in TIMES else row[name] for name in row} for row in rows]
