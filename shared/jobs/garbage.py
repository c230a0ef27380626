"""Which objects nobody needs: those that no row names, and those of artifacts that were removed.

Nothing here touches storage: its caller deletes objects between two transactions. Each step may be cut off, repeated,
or done by several at once. No object is ever deleted that a committed row names, however late the deleting happens:

* What names an object of an attempt (an artifact, a model version's weights, a dataset's files) is committed by that
  attempt alone, in a transaction that holds the row of its job, which carries the attempt's fence and a lease. A row
  that does not is never like that again: only a claim gives a lease, and it takes a higher fence. So a statement that
  finds an attempt over sees all that the attempt has committed, and nothing will follow. It must be one statement:
  two would see two moments, and the commit may lie between them.
* What names an upload is its dataset, which is there before it, or is committed before the object has half the age at
  which it may be collected (``api/intake.py``).
* An artifact that was removed keeps its row, and keys are unique: no other artifact will have that key.

The second look, a round after the first, is made of the same statement. It is for what is not foreseen here.
"""

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Boolean, RowMapping, bindparam, delete, func, literal, literal_column, select, text, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.jobs.keys import origin
from shared.jobs.rows import Artifact, Garbage

Aged = tuple[str, datetime]
"""A key, and when its object was written or first looked at."""

_NOW: Final = func.clock_timestamp()

_FREE: Final = """
    NOT EXISTS (SELECT FROM model_versions WHERE weights ->> 'key' = {row}.key)
    AND NOT EXISTS (SELECT FROM datasets WHERE source ->> 'key' = {row}.key)
    AND NOT EXISTS (SELECT FROM datasets WHERE datasets.job_id = {row}.job_id
        AND files @> jsonb_build_array(jsonb_build_object('key', {row}.key)))"""
"""Whether no model version and no dataset is made of the object. Files of a dataset are those of the job it names."""
FREE_ARTIFACT: Final = literal_column(_FREE.format(row="artifacts"), Boolean)
"""The same of an artifact's; only to be joined to other conditions by AND."""

# A fence above that of its job: the database was restored, and the attempt will be made again, under the same key.
# What attempts at drawing have left is gone on with by later ones, however late (``worker/jobs/kept.py``).
_OVER: Final = """
    listed AS (
        SELECT * FROM jsonb_to_recordset(:listed) AS one (key text, job_id uuid, fence bigint, since timestamptz)
    ), over AS (
        SELECT key, job_id FROM listed WHERE since < clock_timestamp() - :age AND NOT EXISTS (
            SELECT FROM jobs WHERE jobs.id = listed.job_id AND jobs.completed_at IS NULL
                AND (jobs.fence < listed.fence OR jobs.fence = listed.fence AND jobs.lease_until IS NOT NULL
                    OR jobs.type = 'generate'))
    )"""
_UNNAMED: Final = f"""{_OVER}, unnamed AS (
        SELECT key FROM over
        WHERE NOT EXISTS (SELECT FROM artifacts WHERE artifacts.key = over.key AND removed_at IS NULL)
            AND {_FREE.format(row="over")}
    )"""  # noqa: S608  (constants of ours)


def _execute(session: Session, statement: str, listed: Iterable[Aged], age: timedelta) -> list[RowMapping]:
    rows = [
        {"key": key, "since": since.isoformat(), "fence": ours.fence, "job_id": ours.job_id and str(ours.job_id)}
        for key, since in listed
        if (ours := origin(key)) is not None
    ]
    typed = text(statement).bindparams(bindparam("listed", type_=JSONB))
    return list(session.execute(typed, {"listed": rows, "age": age}).mappings())


def over(session: Session, listed: Iterable[Aged], *, age: timedelta) -> set[str]:
    """Of these keys those that are older than ``age`` and whose attempt is over, if an attempt wrote them."""
    found = _execute(session, f"WITH {_OVER} SELECT key FROM over", listed, age)  # noqa: S608  (constants of ours)
    return {row["key"] for row in found}


def unnamed(session: Session, listed: Iterable[Aged], *, age: timedelta) -> Mapping[str, datetime | None]:
    """Those of ``over`` that no row names, each with the time at which it was marked."""
    statement = f"WITH {_UNNAMED} SELECT key, found_at FROM unnamed LEFT JOIN garbage USING (key) ORDER BY key"  # noqa: S608  (constants of ours)
    return {row["key"]: row["found_at"] for row in _execute(session, statement, listed, age)}


def mark(session: Session, listed: Iterable[Aged], *, age: timedelta) -> int:
    """Remember those of ``unnamed`` for a second look; returns how many are new."""
    statement = f"""WITH {_UNNAMED} INSERT INTO garbage (key) SELECT key FROM unnamed ORDER BY key
        ON CONFLICT DO NOTHING RETURNING key"""  # noqa: S608  (constants of ours)
    return len(_execute(session, statement, listed, age))


def condemned(session: Session, *, age: timedelta, limit: int) -> list[str]:
    """Keys that were marked longer ago than ``age`` and are still unnamed: their objects may be deleted.

    What is named meanwhile is marked no longer.
    """
    marked = select(col(Garbage.key), col(Garbage.found_at)).where(col(Garbage.found_at) < _NOW - literal(age))
    looked_at = marked.order_by(col(Garbage.found_at)).limit(limit).with_for_update(skip_locked=True)
    listed = [(key, found_at) for key, found_at in session.execute(looked_at).all() if found_at is not None]
    still = unnamed(session, listed, age=age)
    forget(session, {key for key, _ in listed} - still.keys())
    return list(still)


def forget(session: Session, keys: Collection[str]) -> None:
    """These objects are gone, or needed after all."""
    mine = select(col(Garbage.key)).where(col(Garbage.key).in_(keys)).with_for_update(skip_locked=True)
    session.execute(delete(Garbage).where(col(Garbage.key).in_(mine)))


def removed(session: Session, *, age: timedelta, limit: int | None = None) -> Mapping[UUID, str]:
    """Artifacts that were removed longer ago than ``age`` and whose objects may still be there, with their keys."""
    due: Any = (
        select(col(Artifact.id), col(Artifact.key))
        .where(col(Artifact.removed_at) < _NOW - literal(age), col(Artifact.deleted_at).is_(None))
        .where(FREE_ARTIFACT)
        .order_by(col(Artifact.removed_at))
        .limit(limit)
    )
    return {row.id: row.key for row in session.execute(due)}


def deleted(session: Session, artifacts: Collection[UUID]) -> None:
    """The objects of these artifacts, which were removed, are gone."""
    gone = (col(Artifact.id).in_(artifacts), col(Artifact.removed_at).is_not(None), col(Artifact.deleted_at).is_(None))
    session.execute(update(Artifact).where(*gone).values(deleted_at=_NOW))
