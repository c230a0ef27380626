"""The tables. Wire formats are elsewhere (``shared/wire.py``): rows are never validated input."""

# SQLModel types ``__tablename__`` as a method and documents assigning a string to it.
# pyright: reportAssignmentType=false

from datetime import date, datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlmodel import Field, SQLModel

from shared.ids import uuid7
from shared.jobs import columns
from shared.jobs.state import AttemptOutcome, JobState, JobType

JsonObject = dict[str, Any]

_HELD = "state IN ('running', 'canceling', 'pausing')"
_FINAL = "state IN ('succeeded', 'failed', 'canceled', 'expired')"

SQLModel.metadata.naming_convention = columns.NAMING


class Tenant(SQLModel, table=True):
    """Owner of jobs, datasets and models."""

    __tablename__ = "tenants"

    id: UUID = Field(default_factory=uuid7, primary_key=True)
    name: str = Field(sa_column=Column(Text, nullable=False, unique=True))
    created_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))


class ApiKey(SQLModel, table=True):
    """A bearer key, of which only the SHA-256 is kept."""

    __tablename__ = "api_keys"

    id: UUID = Field(default_factory=uuid7, primary_key=True)
    tenant_id: UUID = Field(sa_column=columns.owner())
    digest: bytes = Field(sa_column=Column(LargeBinary, nullable=False, unique=True))
    hint: str = Field(sa_column=Column(Text, nullable=False))
    scopes: list[str] = Field(sa_column=Column(ARRAY(Text), nullable=False))
    created_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))
    expires_at: datetime | None = Field(default=None, sa_column=columns.time())
    revoked_at: datetime | None = Field(default=None, sa_column=columns.time())


class Job(SQLModel, table=True):
    """One request and its life. Changed only by ``requests.py``, ``attempts.py`` and ``upkeep.py``."""

    __tablename__ = "jobs"
    __table_args__ = (
        # The claim reads the head of each tenant's line; a tenant's waiting jobs are counted in it.
        columns.partial(
            "ix_jobs_waiting", "tenant_id", "queue", "priority", "queued_at", "id", where="state = 'queued'"
        ),
        columns.partial("ix_jobs_lease", "lease_until", where=_HELD),
        columns.partial("ix_jobs_paused", "id", where="state = 'paused'"),
        Index("ix_jobs_tenant_list", "tenant_id", text("id DESC")),
        columns.partial(
            "ix_jobs_whole_log", "completed_at", where="completed_at IS NOT NULL AND log_pruned_at IS NULL"
        ),
        Index(
            "ix_jobs_company",
            text("(inputs ->> 'version_id')"),
            *("tenant_id", "queue", "priority", "queued_at", "id"),
            postgresql_where=text("state = 'queued' AND type = 'generate' AND NOT alone"),
        ),
        Index("ix_jobs_evaluations", text("(inputs ->> 'version_id')"), postgresql_where=text("type = 'evaluate'")),
        columns.partial("ix_jobs_needing", "id", where="queued_at IS NULL AND completed_at IS NULL"),
        columns.partial("ix_jobs_unended_retries", "id", where="retry_of IS NOT NULL AND completed_at IS NULL"),
        CheckConstraint(f"({_HELD}) = (lease_until IS NOT NULL)", name="lease_while_held"),
        CheckConstraint(f"({_FINAL}) = (completed_at IS NOT NULL)", name="completed_when_final"),
        CheckConstraint("(state = 'failed') = (error_code IS NOT NULL)", name="error_when_failed"),
        CheckConstraint(f"queued_at IS NOT NULL OR NOT ({_HELD})", name="in_line_before_held"),
        CheckConstraint("priority BETWEEN 0 AND 2", name="priority_known"),
        {"postgresql_with": {"fillfactor": "70"}},
    )

    id: UUID = Field(default_factory=uuid7, primary_key=True)
    tenant_id: UUID = Field(sa_column=columns.owner())
    type: JobType = Field(sa_column=Column(columns.enum(JobType, "type"), nullable=False))
    queue: str = Field(sa_column=Column(Text, nullable=False))
    spec: JsonObject = Field(sa_column=columns.json("{}"))
    inputs: JsonObject = Field(default_factory=dict, sa_column=columns.json("{}"))
    """What the references in the spec meant at submission: ids of the dataset and the model version."""
    summary: str = Field(sa_column=Column(Text, nullable=False))
    labels: JsonObject = Field(default_factory=dict, sa_column=columns.json("{}"))
    priority: int = Field(default=1, sa_column=Column(SmallInteger, nullable=False, server_default=text("1")))

    state: JobState = Field(default=JobState.QUEUED, sa_column=Column(columns.enum(JobState, "state"), nullable=False))
    state_version: int = Field(default=1, sa_column=columns.counter())
    event_seq: int = Field(default=0, sa_column=columns.counter())
    phase: str | None = Field(default=None, sa_column=Column(Text))

    fence: int = Field(default=0, sa_column=columns.counter())
    """Number of the current attempt. Grows with each claim, is never reset, and guards every write."""
    failures: int = Field(default=0, sa_column=columns.counter())
    losses: int = Field(default=0, sa_column=columns.counter())
    interruptions: int = Field(default=0, sa_column=columns.counter())
    max_attempts: int = Field(sa_column=Column(Integer, nullable=False))
    preempt_fence: int | None = Field(default=None, sa_column=Column(BigInteger))
    """The attempt that was asked to give way to a more urgent job."""
    alone: bool = Field(default=False, sa_column=Column(Boolean, nullable=False, server_default=text("false")))
    """An attempt was lost together with others on the same device, so that it shares none any more."""
    worker: str | None = Field(default=None, sa_column=Column(Text))
    lease_until: datetime | None = Field(default=None, sa_column=columns.time())
    not_before: datetime | None = Field(default=None, sa_column=columns.time())
    start_deadline: datetime | None = Field(default=None, sa_column=columns.time())
    timeout_seconds: int | None = Field(default=None, sa_column=Column(Integer))
    """Longest single attempt."""

    step: int = Field(default=0, sa_column=columns.counter())
    steps: int = Field(default=0, sa_column=columns.counter())
    figures: JsonObject = Field(default_factory=dict, sa_column=columns.json("{}"))
    """Latest figures of the running attempt: loss, rate, seconds left."""
    timings: JsonObject = Field(default_factory=dict, sa_column=columns.json("{}"))
    error_code: str | None = Field(default=None, sa_column=Column(Text))
    error_message: str | None = Field(default=None, sa_column=Column(Text))
    result: JsonObject | None = Field(default=None, sa_column=columns.json())

    created_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))
    queued_at: datetime | None = Field(default=None, sa_column=columns.time(default=True, nullable=True))
    """When it joined its line; None: it waits for other jobs (``needs.py``), and has no place in any."""
    started_at: datetime | None = Field(default=None, sa_column=columns.time())
    cancel_requested_at: datetime | None = Field(default=None, sa_column=columns.time())
    retry_of: UUID | None = Field(default=None, sa_column=Column(ForeignKey("jobs.id"), unique=True))
    """The ended job that this one was made to try again."""
    erased_at: datetime | None = Field(default=None, sa_column=columns.time())
    """From then on the row is a tombstone."""
    completed_at: datetime | None = Field(default=None, sa_column=columns.time())
    log_pruned_at: datetime | None = Field(default=None, sa_column=columns.time())
    """From then on the log tells the states alone."""


class Attempt(SQLModel, table=True):
    """One try by one worker. Its number is the fence."""

    __tablename__ = "attempts"
    __table_args__ = (
        CheckConstraint("(outcome IS NULL) = (ended_at IS NULL)", name="ended_with_outcome"),
        columns.partial("ix_attempts_token", "token", where="ended_at IS NULL"),
    )

    job_id: UUID = Field(sa_column=Column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True))
    fence: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    worker: str = Field(sa_column=Column(Text, nullable=False))
    token: UUID | None = None
    """Chosen by the worker before it claimed: how it finds a claim whose commit was not confirmed."""
    started_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))
    ended_at: datetime | None = Field(default=None, sa_column=columns.time())
    outcome: AttemptOutcome | None = Field(default=None, sa_column=Column(columns.enum(AttemptOutcome, "outcome")))
    error_code: str | None = Field(default=None, sa_column=Column(Text))
    error_message: str | None = Field(default=None, sa_column=Column(Text))


class Usage(SQLModel, table=True):
    """Device-seconds of one ended attempt, charged once; outlives the job. Old ones are summed (``UsageOfDay``)."""

    __tablename__ = "usage"
    __table_args__ = (
        Index("ix_usage_line", "tenant_id", "queue", "priority", "created_at"),
        Index("ix_usage_queue", "queue", "created_at"),
    )

    job_id: UUID = Field(primary_key=True)
    fence: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    tenant_id: UUID = Field(sa_column=columns.owner())
    queue: str = Field(sa_column=Column(Text, nullable=False))
    priority: int = Field(sa_column=Column(SmallInteger, nullable=False))
    seconds: float = Field(sa_column=Column(Double, nullable=False))
    created_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))


class UsageOfDay(SQLModel, table=True):
    """The sum of a tenant's old ``Usage`` of one day (UTC)."""

    __tablename__ = "usage_of_days"

    tenant_id: UUID = Field(sa_column=columns.owner(primary_key=True))
    day: date = Field(primary_key=True)
    queue: str = Field(sa_column=Column(Text, primary_key=True))
    priority: int = Field(sa_column=Column(SmallInteger, primary_key=True, autoincrement=False))
    attempts: int = Field(sa_column=columns.counter())
    seconds: float = Field(sa_column=Column(Double, nullable=False))


class Share(SQLModel, table=True):
    """What a tenant has had of the devices, to compare it with others (``fairness.py``)."""

    __tablename__ = "shares"

    tenant_id: UUID = Field(sa_column=columns.owner(primary_key=True))
    attained: float = Field(sa_column=Column(Double, nullable=False, server_default=text("0")))
    """Device-seconds."""


class Event(SQLModel, table=True):
    """One entry of a job's durable log; ``seq`` counts from 1, without a gap until the log is pruned."""

    __tablename__ = "events"

    job_id: UUID = Field(sa_column=Column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True))
    seq: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    type: str = Field(sa_column=Column(Text, nullable=False))
    data: JsonObject = Field(sa_column=columns.json("{}"))
    created_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))


class Bell(SQLModel, table=True):
    """Transactional outbox: a message that some worker has work to claim."""

    __tablename__ = "outbox"
    __table_args__ = (columns.partial("ix_outbox_unsent", "id", where="sent_at IS NULL"),)

    id: int | None = Field(default=None, sa_column=Column(BigInteger, Identity(always=True), primary_key=True))
    job_id: UUID = Field(sa_column=Column(ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True))
    created_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))
    sent_at: datetime | None = Field(default=None, sa_column=columns.time())


class Artifact(SQLModel, table=True):
    """Bytes in storage that belong to a job. The object was there before this row."""

    __tablename__ = "artifacts"
    __table_args__ = (
        UniqueConstraint("job_id", "fence", "name"),
        Index("ix_artifacts_job", "job_id", "id"),
        columns.partial("ix_artifacts_undated", "kind", "job_id", where="expires_at IS NULL AND removed_at IS NULL"),
        columns.partial("ix_artifacts_expiring", "expires_at", where="expires_at IS NOT NULL AND removed_at IS NULL"),
        columns.partial("ix_artifacts_removed", "removed_at", where="removed_at IS NOT NULL AND deleted_at IS NULL"),
        CheckConstraint("deleted_at IS NULL OR removed_at IS NOT NULL", name="deleted_when_removed"),
    )

    id: UUID = Field(default_factory=uuid7, primary_key=True)
    tenant_id: UUID = Field(sa_column=columns.owner())
    job_id: UUID = Field(sa_column=Column(ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False))
    fence: int = Field(sa_column=Column(BigInteger, nullable=False))
    kind: str = Field(sa_column=Column(Text, nullable=False))
    name: str = Field(sa_column=Column(Text, nullable=False))
    key: str = Field(sa_column=Column(Text, nullable=False, unique=True))
    size_bytes: int = Field(sa_column=Column(BigInteger, nullable=False))
    sha256: str = Field(sa_column=Column(Text, nullable=False))
    media_type: str = Field(sa_column=Column(Text, nullable=False))
    details: JsonObject = Field(default_factory=dict, sa_column=columns.json("{}"))
    created_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))
    expires_at: datetime | None = Field(default=None, sa_column=columns.time())
    removed_at: datetime | None = Field(default=None, sa_column=columns.time())
    """From then on the row is a tombstone, and the object may be gone."""
    deleted_at: datetime | None = Field(default=None, sa_column=columns.time())
    """From then on the object is gone."""


class Garbage(SQLModel, table=True):
    """A key that no row named when it was looked at. Its object is deleted if it still is so later (``garbage.py``)."""

    __tablename__ = "garbage"

    key: str = Field(sa_column=Column(Text, primary_key=True))
    found_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))


class DatasetState(StrEnum):
    """Where a dataset is between upload and use."""

    UPLOADING = "uploading"
    INGESTING = "ingesting"
    READY = "ready"
    FAILED = "failed"


class Dataset(SQLModel, table=True):
    """Uploaded data, and what ingestion made of it."""

    __tablename__ = "datasets"
    __table_args__ = (
        Index("ix_datasets_tenant_list", "tenant_id", text("id DESC")),
        Index("ix_datasets_source", text("(source ->> 'key')")),
        Index("ix_datasets_job", "job_id"),
    )

    id: UUID = Field(default_factory=uuid7, primary_key=True)
    tenant_id: UUID = Field(sa_column=columns.owner())
    name: str = Field(sa_column=Column(Text, nullable=False))
    state: DatasetState = Field(sa_column=Column(columns.enum(DatasetState, "state"), nullable=False))
    source: JsonObject = Field(sa_column=columns.json("{}"))
    """{filename, key, size_bytes, sha256}; the last two are None until the upload is complete."""
    modality: str | None = Field(default=None, sa_column=Column(Text))
    count: int | None = Field(default=None, sa_column=Column(BigInteger))
    digest: str | None = Field(default=None, sa_column=Column(Text))
    info: JsonObject = Field(default_factory=dict, sa_column=columns.json("{}"))
    files: list[JsonObject] = Field(default_factory=list, sa_column=columns.json("[]"))
    job_id: UUID | None = Field(default=None, sa_column=Column(ForeignKey("jobs.id", ondelete="SET NULL")))
    error: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))


class Model(SQLModel, table=True):
    """A registered name."""

    __tablename__ = "models"
    __table_args__ = (UniqueConstraint("tenant_id", "name"),)

    id: UUID = Field(default_factory=uuid7, primary_key=True)
    tenant_id: UUID = Field(sa_column=columns.owner())
    name: str = Field(sa_column=Column(Text, nullable=False))
    latest: int = Field(default=0, sa_column=Column(Integer, nullable=False))
    created_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))


class ModelVersion(SQLModel, table=True):
    """One immutable set of weights under a name."""

    __tablename__ = "model_versions"
    __table_args__ = (
        UniqueConstraint("model_id", "version"),
        Index("ix_model_versions_weights", text("(weights ->> 'key')")),
    )

    id: UUID = Field(default_factory=uuid7, primary_key=True)
    model_id: UUID = Field(sa_column=Column(ForeignKey("models.id"), nullable=False))
    version: int = Field(sa_column=Column(Integer, nullable=False))
    family: str = Field(sa_column=Column(Text, nullable=False))
    spec: JsonObject = Field(sa_column=columns.json("{}"))
    info: JsonObject = Field(sa_column=columns.json("{}"))
    metrics: JsonObject = Field(sa_column=columns.json("{}"))
    weights: JsonObject = Field(sa_column=columns.json("{}"))
    """{key, sha256, size_bytes}."""
    job_id: UUID = Field(sa_column=Column(ForeignKey("jobs.id"), nullable=False, unique=True))
    dataset_id: UUID | None = Field(default=None, sa_column=Column(ForeignKey("datasets.id")))
    created_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))


class IdempotencyKey(SQLModel, table=True):
    """A client's promise that two requests are one."""

    __tablename__ = "idempotency_keys"

    tenant_id: UUID = Field(sa_column=columns.owner(primary_key=True))
    key: str = Field(sa_column=Column(Text, primary_key=True))
    request_sha256: str = Field(sa_column=Column(Text, nullable=False))
    status: int | None = Field(default=None, sa_column=Column(Integer))
    body: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))


class Worker(SQLModel, table=True):
    """A worker process that has been seen."""

    __tablename__ = "workers"

    name: str = Field(sa_column=Column(Text, primary_key=True))
    host: str = Field(sa_column=Column(Text, nullable=False))
    pid: int = Field(sa_column=Column(Integer, nullable=False))
    queues: list[str] = Field(sa_column=Column(ARRAY(Text), nullable=False))
    device: str | None = Field(default=None, sa_column=Column(Text))
    state: str = Field(sa_column=Column(Text, nullable=False))
    """``idle``, ``busy``, ``draining`` or ``stopped``; a worker not seen for long is gone."""
    job_id: UUID | None = Field(default=None, sa_column=Column(ForeignKey("jobs.id", ondelete="SET NULL")))
    model_hits: int = Field(default=0, sa_column=columns.counter())
    """Jobs whose model was loaded already, since the worker's process began."""
    model_misses: int = Field(default=0, sa_column=columns.counter())
    started_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))
    seen_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))


class NamedLease(SQLModel, table=True):
    """Who does the housekeeping now; when it was last done at all, and whether SQL was away (``continuity.py``)."""

    __tablename__ = "named_leases"

    name: str = Field(sa_column=Column(Text, primary_key=True))
    holder: str = Field(sa_column=Column(Text, nullable=False))
    until: datetime | None = Field(default=None, sa_column=columns.time(nullable=False))
