"""What happened, as it was recorded: the rows of SQL and the objects of storage after a run."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, TypeVar
from uuid import UUID

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from shared.jobs.rows import Artifact, Attempt, Dataset, Event, Job, Model, ModelVersion, Usage
from tests.chaos.objects import Bucket

RowT = TypeVar("RowT")

PASSING_KINDS: Final = frozenset({"preview", "checkpoint"})
"""Artifacts that are visible before their job has ended, and that attempts without success may leave."""


@dataclass(kw_only=True)
class History:
    """Everything a checker may look at. Plain rows, so that a test can plant what must be found."""

    jobs: list[Job]
    attempts: list[Attempt]
    events: list[Event]
    artifacts: list[Artifact]
    usage: list[Usage]
    versions: list[ModelVersion]
    datasets: list[Dataset]
    models: list[Model] = field(default_factory=list[Model])
    objects: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])
    """Size and SHA-256 of every object, by key; read again, not remembered."""

    @classmethod
    def read(cls, engine: Engine, bucket: Bucket) -> "History":
        with Session(engine, expire_on_commit=False) as session:
            rows = {
                name: list(session.scalars(select(table)))
                for name, table in {
                    "jobs": Job, "attempts": Attempt, "events": Event, "artifacts": Artifact, "usage": Usage,
                    "versions": ModelVersion, "datasets": Dataset, "models": Model,
                }.items()
            }  # fmt: skip
        return cls(**rows, objects=read_objects(bucket))

    @cached_property
    def by_id(self) -> Mapping[UUID, Job]:
        return {job.id: job for job in self.jobs}

    @cached_property
    def attempts_of(self) -> Mapping[UUID, list[Attempt]]:
        """By job, in the order of their fences."""
        return _grouped(sorted(self.attempts, key=lambda attempt: attempt.fence))

    @cached_property
    def events_of(self) -> Mapping[UUID, list[Event]]:
        """By job, in the order of their numbers."""
        return _grouped(sorted(self.events, key=lambda event: event.seq))

    @cached_property
    def artifacts_of(self) -> Mapping[UUID, list[Artifact]]:
        return _grouped(self.artifacts)

    def result_of(self, job: Job) -> dict[str, str]:
        """SHA-256 of what the job made, by name: samples and their sheet, weights, a dataset's files."""
        mine = self.artifacts_of.get(job.id, [])
        return {one.name: one.sha256 for one in mine if one.kind not in PASSING_KINDS}


def read_objects(bucket: Bucket) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of the bytes of every object."""
    bodies = ((about.key, bucket.read(about.key)[1]) for about in bucket.all())
    return {key: (len(body), hashlib.sha256(body).hexdigest()) for key, body in bodies}


def _grouped(rows: Iterable[RowT]) -> Mapping[Any, list[RowT]]:
    groups: defaultdict[Any, list[RowT]] = defaultdict(list)
    for row in rows:
        groups[row.job_id].append(row)
    return groups
