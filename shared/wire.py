"""What travels between client and server: requests and views. Plain pydantic, used by both sides.

Knows neither SQL nor the web, so that the SDK can import it with pydantic alone.
"""

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from shared.described import Described
from shared.reproduction import Original
from shared.specs import AnyTrainSpec, GenerateSpec
from shared.specs.evaluate import EvaluateSpec
from shared.specs.export import ExportSpec
from shared.specs.gate import Bound, Check
from shared.specs.imports import ImportSpec
from shared.specs.reaverage import ReaverageSpec
from shared.specs.spec import DatasetKind

JobStateName = Literal[
    "queued", "running", "canceling", "pausing", "paused", "succeeded", "failed", "canceled", "expired"
]
JobTypeName = Literal["train", "generate", "evaluate", "ingest", "reaverage", "export", "import"]
FINAL_STATES: frozenset[str] = frozenset({"succeeded", "failed", "canceled", "expired"})

Label = Annotated[str, StringConstraints(max_length=63, pattern=r"^[A-Za-z0-9._/-]*$")]
LabelKey = Annotated[str, StringConstraints(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9._/-]+$")]
ItemT = TypeVar("ItemT")


class _Request(Described, BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _JobRequest(_Request):
    priority: Literal["low", "normal", "high"] = "normal"
    """Which queued job is claimed first."""
    labels: Annotated[dict[LabelKey, Label], Field(max_length=32)] = {}
    """Anything you want to find the job by."""
    max_attempts: int | None = Field(default=None, ge=1, le=10)
    """Attempts that may fail or be lost before the job fails; the server's default when left out."""
    start_deadline_seconds: int | None = Field(default=None, ge=1, le=30 * 86_400)
    """The job expires if no worker has started it by then."""
    timeout_seconds: int | None = Field(default=None, ge=1, le=30 * 86_400)
    """Longest single attempt, from when a worker takes the job; loading and others that share the device count, too."""


class TrainRequest(_JobRequest):
    """Train a model and register it as a new version."""

    type: Literal["train"]
    spec: AnyTrainSpec


class GenerateRequest(_JobRequest):
    """Use a trained model."""

    type: Literal["generate"]
    spec: GenerateSpec


class EvaluateRequest(_JobRequest):
    """Measure a trained model on a dataset."""

    type: Literal["evaluate"]
    spec: EvaluateSpec


class ReaverageRequest(_JobRequest):
    """Average a trained model's weights over another length, and register the result as a new version."""

    type: Literal["reaverage"]
    spec: ReaverageSpec


class ExportRequest(_JobRequest):
    """Write a trained model as files that another library opens."""

    type: Literal["export"]
    spec: ExportSpec


class ImportRequest(_JobRequest):
    """Register a model that another library has written as a new version."""

    type: Literal["import"]
    spec: ImportSpec


AnyJobRequest = TrainRequest | GenerateRequest | EvaluateRequest | ReaverageRequest | ExportRequest | ImportRequest
JobRequest = Annotated[AnyJobRequest, Field(discriminator="type")]


DatasetName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Resolution = Annotated[int, Field(ge=4, le=1024)]


class DatasetUpload(_Request):
    """Announce a dataset that will be uploaded straight to storage."""

    name: DatasetName
    """What to call it."""
    filename: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    """Name of the file; its suffix tells the format."""
    size_bytes: int = Field(gt=0)
    """Exact size of the file."""
    modality: DatasetKind | None = None
    """What it must turn out to be; told by the content when left out."""
    resolution: Resolution | None = None
    """Side length that images are brought to; their own when left out."""


class View(Described, BaseModel):
    """Something the server shows. Clients ignore fields they do not know."""

    model_config = ConfigDict(extra="ignore")


class Page(View, Generic[ItemT]):
    """One page of a list; ``next_cursor`` asks for the one after it."""

    data: list[ItemT]
    next_cursor: str | None = None
    has_more: bool = False


class CauseView(View):
    """How one attempt of a failed job ended."""

    attempt: int
    code: str
    message: str


class ErrorView(View):
    """Why a job, or an attempt, failed."""

    code: str
    message: str
    retryable: bool = False
    causes: list[CauseView] = []
    """Of a job: what ended each of its attempts that ended badly, first to last."""


class AttemptView(View):
    """One try by one worker."""

    number: int
    """Numbered from 1; also the fencing token."""
    worker: str
    started_at: datetime
    ended_at: datetime | None = None
    outcome: Literal["succeeded", "failed", "canceled", "paused", "interrupted", "preempted", "lost"] | None = None
    error: ErrorView | None = None


class ProgressView(View):
    """How far the running attempt is."""

    value: float = 0.0
    """From 0 to 1."""
    step: int = 0
    steps: int = 0
    figures: dict[str, Any] = {}
    """Latest figures: ``loss``, ``rate`` (steps per second), ``eta_seconds``."""


class EtaView(View):
    """When something will happen, in seconds from now."""

    p50: float
    """As likely sooner as later."""
    p90: float
    """Later in one case of ten."""


class QueueView(View):
    """Why a job waits."""

    position: int | None
    """Jobs that would be claimed before it, plus one, as things stand; counted up to 1000. None: it is not in line."""
    reason: Literal["waiting_for_worker", "no_compatible_worker", "backing_off", "behind_others", "waiting_for_jobs"]
    """``waiting_for_worker``: it is the next; ``no_compatible_worker``: nobody who lives serves its queue;
    ``waiting_for_jobs``: those of ``waits_for`` have to make their models first."""
    waits_for: list[str] = []
    """Jobs that have not ended and whose models it needs."""
    eta: EtaView | None = None
    """When it starts, judged by how long jobs of its queue took lately; None if that cannot be told."""


class JobView(View):
    """A job."""

    id: str
    type: JobTypeName
    state: JobStateName
    state_version: int
    """Grows with every change: drop what is older than what you have."""
    summary: str
    spec: dict[str, Any]
    priority: Literal["low", "normal", "high"]
    labels: dict[str, str] = {}
    attempt: int
    """Number of the latest attempt; 0 before the first."""
    max_attempts: int
    attempts: list[AttemptView] = []
    phase: str | None = None
    progress: ProgressView
    queue: QueueView | None = None
    metrics: dict[str, float | None] = {}
    """``queue_ms, load_ms, execution_ms, upload_ms, device_seconds``."""
    error: ErrorView | None = None
    result: dict[str, Any] | None = None
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    cancel_requested_at: datetime | None = None
    retry_of: str | None = None
    """The job that this one was made to try again."""
    retried_by: str | None = None
    """The job that was made to try this one again."""
    needs: dict[str, str] = {}
    """Jobs that were named instead of the models that they had still to make, by the field of the spec that named them.
    Once those are there, ``spec`` names them."""
    reproduces: Original | None = None
    """The job that this one runs again, and what it has to match; ``result.reproduction`` tells whether it does."""
    urls: dict[str, str] = {}

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES


class EventView(View):
    """One entry of a job's durable log."""

    seq: int
    """Counts from 1 per job, without a gap; the ``id`` of the server-sent event."""
    type: Literal["job.state", "job.progress", "job.log", "job.metric", "job.preview", "job.checkpoint", "job.artifact"]
    data: dict[str, Any]
    created_at: datetime


class ArtifactView(View):
    """Bytes that a job made."""

    id: str
    job_id: str
    attempt: int
    kind: str
    name: str
    size_bytes: int
    sha256: str
    media_type: str
    details: dict[str, Any] = {}
    created_at: datetime
    expires_at: datetime | None = None
    """From then on the artifact may be removed; None: it is kept."""
    url: str
    """Presigned: works without a key, until ``url_expires_at``."""
    url_expires_at: datetime


class DatasetView(View):
    """A dataset."""

    id: str
    name: str
    state: Literal["uploading", "ingesting", "ready", "failed"]
    modality: DatasetKind | None = None
    count: int | None = None
    digest: str | None = None
    info: dict[str, Any] = {}
    error: str | None = None
    job_id: str | None = None
    """The job that ingests it."""
    created_at: datetime
    upload: dict[str, Any] | None = None
    """``method``, ``url``, ``headers`` and ``expires_at`` of the direct upload, while it is awaited."""
    urls: dict[str, str] = {}


class ModelVersionView(View):
    """One immutable set of weights."""

    model: str
    version: int
    ref: str
    """``name@version``, as a generate job names it."""
    family: str
    spec: dict[str, Any]
    info: dict[str, Any]
    metrics: dict[str, Any]
    tasks: list[str]
    weights_sha256: str
    size_bytes: int
    job_id: str
    dataset_id: str | None = None
    created_at: datetime


class ModelView(View):
    """A registered name."""

    id: str
    name: str
    latest: int
    aliases: dict[str, int] = {}
    """The version that each alias stands for."""
    created_at: datetime
    latest_version: ModelVersionView | None = None


class AliasView(View):
    """A name for a version of a model, which can be moved to another."""

    model: str
    alias: str
    ref: str
    """``name@alias``, as a job names it."""
    version: int
    gate: list[Bound]
    created_at: datetime


class AliasMoveView(View):
    """One entry of an alias's history: a move, or a change of its gate."""

    id: str
    alias: str
    from_version: int | None = None
    """None: the alias was new."""
    to_version: int | None = None
    """None: the alias was removed."""
    gate: list[Bound]
    """As it was from then on."""
    checks: list[Check]
    """What the version had to show, and did."""
    key_id: str
    """The API key by which it was asked for."""
    key_hint: str
    created_at: datetime


class WorkerView(View):
    """A worker, as it last said."""

    name: str
    host: str
    queues: list[str]
    device: str | None = None
    state: str
    job_id: str | None = None
    seen_at: datetime


class FieldError(View):
    """One wrong field."""

    pointer: str | None = None
    """JSON Pointer (RFC 6901) into the body."""
    parameter: str | None = None
    """A parameter instead of a field of the body: ``query limit``, ``header Idempotency-Key``."""
    detail: str


class Problem(View):
    """An error answer (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str | None = None
    instance: str | None = None
    code: str
    errors: list[FieldError] = []
    checks: list[Check] | None = None
    """Of ``gate_failed``: how the version stands to each bound."""
    request_id: str | None = None
