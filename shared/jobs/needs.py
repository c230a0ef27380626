"""Jobs that wait for the models that other jobs make: what becomes of them when one of those ends.

A job that waits is queued (or paused) and has no place in line: its ``queued_at`` is NULL, so that no claim comes by
it. Whatever ends a job calls ``settle`` in the same transaction. Nobody waits for anybody there: rows that somebody
holds, or that are one too many, are passed over, and who is being submitted just then is not seen.
``settle_remaining`` finds them a round later. Whoever commits rings for all of whom there is ``news``.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from sqlalchemy import UUID as SQL_UUID
from sqlalchemy import Row, Select, Text, bindparam, cast, func, literal, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.errors import DependencyFailed, DependencyUnfit, JobError
from shared.ids import public
from shared.jobs.moves import move
from shared.jobs.rows import Job
from shared.jobs.state import ENDED_BADLY, JobState
from shared.specs.reaverage import AVERAGES

_AT_ONCE: Final = 100
"""Ended jobs for which a round looks at who waits for them."""
_MOST: Final = 1000
"""Jobs that are released or ended with the job they waited for; the rounds see to the others. An end must not take so
long that it is given up for that."""

_IS_DECIDED: Final = """(
    NOT EXISTS (
        SELECT FROM needs AS other JOIN jobs AS another ON another.id = other.needs_job_id
        WHERE other.job_id = waiting.id AND another.completed_at IS NULL)
    OR EXISTS (
        SELECT FROM needs AS other JOIN jobs AS another ON another.id = other.needs_job_id
        WHERE other.job_id = waiting.id AND another.completed_at IS NOT NULL AND another.state <> 'succeeded'))"""
"""Whether all that a job waits for is there, or some of it will never be."""
_LOCK: Final = text(f"""
SELECT id FROM jobs AS waiting WHERE queued_at IS NULL AND completed_at IS NULL AND {_IS_DECIDED}
    AND id IN (SELECT job_id FROM needs WHERE needs_job_id = ANY(:ended)) LIMIT :most FOR UPDATE OF waiting SKIP LOCKED
""").bindparams(bindparam("ended", type_=ARRAY(SQL_UUID)))  # noqa: S608  (constants of ours)

# Whoever was submitted with a job's id in the place of a model now names the version that it made. A version that is
# not what was told of it, or has no averages where those are asked for, is no version here.
_RELEASE: Final = text(f"""
WITH found AS (
    SELECT needs.job_id, needs.field, versions.id AS version_id, models.name || '@' || versions.version AS ref,
        'job_' || replace(CAST(needs.needs_job_id AS text), '-', '') AS named, averages.id AS averages_id
    FROM needs JOIN jobs AS waiting ON waiting.id = needs.job_id
    LEFT JOIN model_versions AS versions ON versions.job_id = needs.needs_job_id AND NOT EXISTS (
        SELECT FROM jsonb_each(needs.told) AS one WHERE versions.info -> one.key IS DISTINCT FROM one.value)
    LEFT JOIN models ON models.id = versions.model_id
    LEFT JOIN LATERAL (
        SELECT id FROM artifacts WHERE waiting.type = 'reaverage' AND job_id = needs.needs_job_id
            AND kind = 'weights' AND name = '{AVERAGES}' AND removed_at IS NULL ORDER BY id DESC LIMIT 1
    ) AS averages ON true
    WHERE needs.job_id = ANY(:waiting)
), ready AS (
    SELECT job_id, jsonb_object_agg(field, ref) AS refs, jsonb_object_agg(field, version_id) AS ids,
        min(named) AS named, min(ref) AS ref, min(CAST(averages_id AS text)) AS averages_id
    FROM found GROUP BY job_id HAVING bool_and(version_id IS NOT NULL)
), released AS (
    UPDATE jobs SET queued_at = clock_timestamp(), state_version = state_version + 1, event_seq = event_seq + 1,
        spec = spec || refs,
        summary = CASE type WHEN 'train' THEN summary ELSE replace(summary, ready.named, ready.ref) END,
        inputs = inputs || CASE type
            WHEN 'train' THEN jsonb_build_object('models', (inputs -> 'models') || ids)
            WHEN 'reaverage' THEN jsonb_build_object('version_id', ids -> 'model', 'artifact_id', averages_id)
            ELSE jsonb_build_object('version_id', ids -> 'model') END
    FROM ready WHERE jobs.id = ready.job_id AND queued_at IS NULL AND completed_at IS NULL
        AND (type <> 'reaverage' OR averages_id IS NOT NULL)
    RETURNING jobs.id, jobs.state, jobs.event_seq, refs
), event AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, event_seq, 'job.log', jsonb_build_object('message', 'What it waited for is there: ' || (
        SELECT string_agg(value, ', ' ORDER BY key) FROM jsonb_each_text(refs)) || '.') FROM released
), bell AS (
    INSERT INTO outbox (job_id) SELECT id FROM released WHERE state = 'queued'
)
SELECT id FROM released
""").bindparams(bindparam("waiting", type_=ARRAY(SQL_UUID)))  # noqa: S608  (constants of ours)

_STILL: Final = text("""
SELECT needs.job_id, needed.id, needed.state, needed.error_message
FROM needs JOIN jobs AS waiting ON waiting.id = needs.job_id JOIN jobs AS needed ON needed.id = needs.needs_job_id
WHERE needs.job_id = ANY(:waiting) AND waiting.queued_at IS NULL ORDER BY needs.job_id, needed.completed_at
""").bindparams(bindparam("waiting", type_=ARRAY(SQL_UUID)))
# First the few that may be decided, by indexes of what waits; in one join the planner asked it of all that wait.
_REMAINING: Final = text(f"""
WITH waiting AS MATERIALIZED (
    SELECT jobs.id, needed.id AS needs_job_id FROM jobs JOIN needs ON needs.job_id = jobs.id
    JOIN jobs AS needed ON needed.id = needs.needs_job_id
    WHERE jobs.queued_at IS NULL AND jobs.completed_at IS NULL AND needed.completed_at IS NOT NULL
)
SELECT DISTINCT needs_job_id FROM waiting WHERE {_IS_DECIDED} LIMIT {_AT_ONCE}
""")  # noqa: S608  (constants)


def settle(session: Session, ended: Sequence[UUID]) -> list[UUID]:
    """Release those that waited for these jobs, which have ended, or end them, and then those that wait for them.

    Returns:
        The jobs that ended because of that.
    """
    failed, told = list[UUID](), news(session)
    while ended and (waiting := session.scalars(_LOCK, {"ended": list(ended), "most": _MOST}).all()):
        # Looked at before: of what ends in between nobody can say yet that it did not make the model.
        found = session.execute(_STILL, {"waiting": waiting}).all()
        released = set(session.scalars(_RELEASE, {"waiting": waiting}))
        ended = _fail(session, [row for row in found if row.job_id not in released])
        failed += ended
        told += [*released, *ended]
    return failed


def news(session: Session | AsyncSession) -> list[UUID]:
    """Jobs that ``settle`` ended or released by this session: to be rung for, like any that moved, after the commit."""
    return session.info.setdefault("settled", [])


def settle_remaining(session: Session) -> list[UUID]:
    """``settle`` for those who were passed over, or not seen yet."""
    return settle(session, session.scalars(_REMAINING).all())


def _fail(session: Session, still: Sequence[Row[Any]]) -> list[UUID]:
    """End those whose models will never be there, or are not what was told of them; the others wait on."""
    found: defaultdict[UUID, list[Row[Any]]] = defaultdict(list)
    for row in still:
        found[row.job_id].append(row)
    why: defaultdict[type[JobError], dict[UUID, str]] = defaultdict(dict)
    for job_id, needed in found.items():
        if bad := [one for one in needed if one.state in ENDED_BADLY]:
            why[DependencyFailed][job_id] = _told(bad[0])
        elif all(one.state == JobState.SUCCEEDED for one in needed):
            named = " or ".join(public("job", one.id) for one in needed)
            why[DependencyUnfit][job_id] = f"the model that {named} made is not what this job was accepted for"
    failed: list[UUID] = []
    for kind, messages in why.items():
        failed += [row["id"] for row in session.execute(_failure(kind, messages)).mappings()]
    return failed


def _failure(kind: type[JobError], messages: Mapping[UUID, str]) -> Select[Any]:
    """One statement, however many jobs end and however many reasons they are told: each level of a tree is one."""
    ours = col(Job.id) == func.any(literal(list(messages), ARRAY(SQL_UUID)))
    listed = literal({str(job_id): message for job_id, message in messages.items()}, JSONB)
    told = listed[cast(col(Job.id), Text)].astext
    return move(JobState.FAILED, ours, col(Job.queued_at).is_(None), error_code=kind.code, error_message=told)


def _told(needed: Row[Any]) -> str:
    ended = {JobState.CANCELED: "was canceled", JobState.EXPIRED: "expired"}.get(needed.state, "failed")
    why = f": {needed.error_message}" if needed.error_message else ""
    return f"{public('job', needed.id)}, whose model it needs, {ended}{why}"
