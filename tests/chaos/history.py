"""What happened, as it was recorded: the rows of SQL and the objects of storage after a run."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
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
    essences: dict[str, str] = field(default_factory=dict[str, str])
    """SHA-256 of every object without what it says of the versions that it was made from, by key."""

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
        objects, essences = dict[str, tuple[int, str]](), dict[str, str]()
        for about in bucket.all():
            body = bucket.read(about.key)[1]
            objects[about.key] = (len(body), hashlib.sha256(body).hexdigest())
            essences[about.key] = hashlib.sha256(essence(about.key, body)).hexdigest()
        return cls(**rows, objects=objects, essences=essences)

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

    def result_of(self, job: Job, *, essential: bool = False) -> dict[str, str]:
        """SHA-256 of what the job made, by name: samples and their sheet, weights, a dataset's files.

        ``essential``: of their essences.
        """
        mine = [one for one in self.artifacts_of.get(job.id, []) if one.kind not in PASSING_KINDS]
        return {one.name: self.essences.get(one.key, "") if essential else one.sha256 for one in mine}


def essence(key: str, body: bytes) -> bytes:
    """Pixels, tensors and words, but for the version that they were made from and the digest of its weights."""
    if key.endswith(".png"):
        return b"".join(chunk for chunk in _chunks(body) if chunk[4:8] != b"iTXt")
    if key.endswith(".safetensors"):
        return body[8 + int.from_bytes(body[:8], "little") :]
    return re.sub(rb'@\d+"', b'@"', body) if key.endswith(".json") else body


def _chunks(png: bytes) -> Iterator[bytes]:
    at = 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        yield png[at:end]
        at = end


def _grouped(rows: Iterable[RowT]) -> Mapping[Any, list[RowT]]:
    groups: defaultdict[Any, list[RowT]] = defaultdict(list)
    for row in rows:
        groups[row.job_id].append(row)
    return groups
