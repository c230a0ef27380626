"""How a bug is planted: a function, a condition or a clause of the product is replaced while the search runs."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import CTE, case, false, insert, select, text
from sqlalchemy.orm import Session
from sqlmodel import col

from shared import relay
from shared.jobs import attempts, claims, moves, requests, upkeep
from shared.jobs.moves import Cases
from shared.jobs.rows import Bell, Job
from shared.jobs.state import HELD, JobState

Plant = Callable[[pytest.MonkeyPatch], None]


def within(module: Any, function: str, change: Plant) -> Plant:
    """``change`` is in effect while ``module.function`` runs."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = getattr(module, function)

        def changed(*args: Any, **how: Any) -> Any:
            with pytest.MonkeyPatch.context() as inner:
                change(inner)
                return real(*args, **how)

        async def changed_async(*args: Any, **how: Any) -> Any:
            with pytest.MonkeyPatch.context() as inner:
                change(inner)
                return await real(*args, **how)

        patch.setattr(module, function, changed_async if module is requests else changed)

    return plant


def no_fence(patch: pytest.MonkeyPatch) -> None:
    """An attempt is taken for current if the job is held, whoever holds it."""
    patch.setattr(attempts, "_current", lambda job_id, fence: (col(Job.id) == job_id, col(Job.state).in_(HELD)))


def no_guard(patch: pytest.MonkeyPatch) -> None:
    """Neither the fence nor the state is looked at."""
    patch.setattr(attempts, "_current", lambda job_id, fence: (col(Job.id) == job_id,))
    any_state(patch)


def any_state(patch: pytest.MonkeyPatch) -> None:
    """Every move counts as legal."""
    patch.setattr(moves, "states_before", lambda to: frozenset(JobState))


def no_bell(patch: pytest.MonkeyPatch) -> None:
    """A job that is queued again leaves nothing in the outbox."""
    patch.setattr(
        moves,
        "_bell",
        lambda moved: insert(Bell).from_select(["job_id"], select(moved.c.id).where(false())).cte("bell"),
    )


def cases(module: Any, change: Callable[[Cases], Cases]) -> Plant:
    """Other cases in the moves that ``module`` makes."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = module.move_by_case

        def changed(given: Cases, *conditions: Any, **values: Any) -> Any:
            return real(change(given), *conditions, **values)

        patch.setattr(module, "move_by_case", changed)

    return plant


def claim_text(old: str, new: str) -> Plant:
    """Another text in the statement that claims."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        statement = claims._CLAIM
        assert old in statement.text
        binds = statement._bindparams.values()
        patch.setattr(claims, "_CLAIM", text(statement.text.replace(old, new)).bindparams(*binds))

    return plant


def values(change: Callable[[dict[str, Any], Any], None]) -> Plant:
    """Other columns set by each move: ``change`` gets them and the SQL of the state moved to."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = moves._values

        def changed(target: Any, targets: list[JobState]) -> dict[str, Any]:
            columns = real(target, targets)
            change(columns, target)
            return columns

        patch.setattr(moves, "_values", changed)

    return plant


def attempts_left_open(patch: pytest.MonkeyPatch) -> None:
    """An attempt whose job is queued again is not ended."""
    real = moves._end_attempt

    def changed(moved: CTE, *rest: Any) -> CTE:
        return real(select(moved).where(moved.c.state != "queued").cte("kept"), *rest)

    patch.setattr(moves, "_end_attempt", changed)


def back_to_the_first_fence(columns: dict[str, Any], target: Any) -> None:
    columns["fence"] = case((target == "queued", 0), else_=col(Job.fence))


def mark_before_send(patch: pytest.MonkeyPatch) -> None:
    """The relay marks bells as sent, commits, and then sends them."""

    def run_once(self: relay.Relay) -> int:
        with Session(self._engine) as session, session.begin():
            marked = text("""
                WITH marked AS (UPDATE outbox SET sent_at = clock_timestamp() WHERE sent_at IS NULL RETURNING job_id)
                SELECT job_id FROM marked JOIN jobs ON jobs.id = job_id AND jobs.state = 'queued'""")
            rung = session.scalars(marked).all()
            jobs = [session.get_one(Job, job_id) for job_id in rung]
            session.expunge_all()
        if jobs:
            self._bells.ring(jobs)
        return len(jobs)

    patch.setattr(relay.Relay, "run_once", run_once)


def submit_without_a_bell(patch: pytest.MonkeyPatch) -> None:
    real = requests._add

    async def add(session: Any, *rest: Any) -> Job:
        job = await real(session, *rest)
        await session.execute(text("DELETE FROM outbox"))
        return job

    patch.setattr(requests, "_add", add)


def every_success_is_charged(patch: pytest.MonkeyPatch) -> None:
    """A success is charged outside the guarded statement, whether or not it counted."""
    real = attempts.succeed

    def succeed(session: Session, *args: Any, **how: Any) -> Any:
        session.execute(text("UPDATE shares SET attained = attained + 1"))
        return real(session, *args, **how)

    patch.setattr(attempts, "succeed", succeed)


def expire_what_has_started(patch: pytest.MonkeyPatch) -> None:
    """Whether a job has started is not asked before it expires."""
    real = upkeep._unlocked

    def changed(waits: Any, second: Any, *rest: Any) -> Any:
        return real(waits, *rest) if rest else real(waits, second)

    patch.setattr(upkeep, "_unlocked", changed)
