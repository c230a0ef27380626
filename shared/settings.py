"""Every setting, typed, in one place. Read once by each process's entry point and passed down.

A variable is ``NOISEMILL_<SECTION>_<FIELD>``: ``NOISEMILL_DATABASE_URL`` is ``database.url``. A
misspelt field of a section is an error; durations are seconds or ISO 8601.
"""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.described import Described

_MEGABYTE = 1024 * 1024


def _seconds(value: Any) -> Any:
    """Environment variables are text; pydantic takes a bare number of seconds only as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _never(value: Any) -> Any:
    return None if value == "never" else value


Duration = Annotated[timedelta, BeforeValidator(_seconds), Field(gt=timedelta(0))]
Lifetime = Annotated[Duration | None, BeforeValidator(_never)]


class Section(Described):
    """One outside system, or one process."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DatabaseSettings(Section):
    """PostgreSQL, which holds the truth."""

    url: SecretStr
    """``postgresql+psycopg://user:password@host:port/name``."""
    pool_size: int = Field(default=10, ge=1)
    """Connections each process keeps."""
    pool_timeout: Duration = timedelta(seconds=4)
    """How long a request waits for a free connection before 503."""
    statement_timeout: Duration = timedelta(seconds=30)
    """Longest single statement."""


class BrokerSettings(Section):
    """Redis or Valkey: carries bells, never truth."""

    url: SecretStr
    """``redis://:password@host:port/0``."""
    prefix: str = "noisemill:"
    """Put before every key and channel."""


class S3Settings(Section):
    """S3-compatible object storage."""

    endpoint: str | None = None
    """URL of the service; AWS when left out."""
    public_endpoint: str | None = None
    """The same service as clients reach it (presigned URLs); ``endpoint`` when left out."""
    region: str = "us-east-1"
    """Region that requests are signed for; self-hosted services take any."""
    bucket: str = "noisemill"
    """Made by the set-up command unless it is there."""
    access_key: str
    """Access key id; it needs to read, write, list and delete objects of the bucket."""
    secret_key: SecretStr
    """Its secret."""
    path_style: bool = True
    """Bucket in the path, as self-hosted services want it."""
    checksums: Literal["when_supported", "when_required"] = "when_required"
    """Whether boto3 adds its own checksum headers, which some services refuse."""
    link_lifetime: Duration = timedelta(minutes=15)
    """How long a presigned URL works."""
    multipart_threshold: int = Field(default=64 * _MEGABYTE, ge=5 * _MEGABYTE)
    """Objects above this many bytes are sent in parts."""


class ApiSettings(Section):
    """The REST API."""

    key: SecretStr | None = None
    """A key that the set-up command registers for the tenant ``default``."""
    url: str | None = None
    """Address that clients use, for links; taken from the request when left out."""
    max_body: int = Field(default=1 * _MEGABYTE, ge=1024)
    """Largest JSON body, in bytes."""
    max_upload: int = Field(default=2048 * _MEGABYTE, ge=1024)
    """Largest dataset upload, in bytes."""
    flower_url: str | None = None
    """Where the pages link to for Flower."""


class JobSettings(Section):
    """How jobs live."""

    max_attempts: int = Field(default=3, ge=1, le=100)
    """Attempts that may fail or be lost before the job fails."""
    lease: Duration = timedelta(seconds=30)
    """How long a claim holds without a heartbeat."""
    redispatch_after: Duration = timedelta(seconds=20)
    """A job queued for longer rings again."""
    retry_backoff: Duration = timedelta(seconds=2)
    """Wait before the second attempt after a failure; doubled for each further one."""
    storage_patience: Duration = timedelta(hours=24)
    """How long a job waits, in all its pauses between attempts, for storage that is away; anew once it has stored
    something. Then it fails (``storage_unavailable``)."""
    idempotency_lifetime: Duration = timedelta(hours=24)
    """How long an idempotency key is remembered."""
    max_queued: int = Field(default=10_000, ge=1)
    """Jobs of one tenant that may wait; one more is answered 429 ``queue_full``."""
    ageing: Duration = timedelta(minutes=10)
    """A waiting job rises by one priority whenever it has waited for so long again."""
    quantum: Duration = timedelta(seconds=10)
    """Device time that a running attempt counts for from its first moment, when tenants are compared."""
    orphan_grace: Duration = timedelta(hours=24)
    """How old an object must be before it may be collected because nothing names it."""
    artifact_lifetime: Lifetime = None
    """How long artifacts are kept after their job ended, or ``never`` removed, as when left out. What a model or a
    dataset is made of never is."""
    checkpoint_lifetime: Lifetime = timedelta(days=7)
    """How long checkpoints are kept after their job ended, or ``never`` removed."""
    preview_lifetime: Lifetime = timedelta(days=30)
    """How long previews are kept after their job ended, or ``never`` removed."""
    event_lifetime: Lifetime = timedelta(days=30)
    """How long a job's log is kept whole after its end, or ``never`` shortened; of an older one only the
    changes of state are."""
    usage_lifetime: Lifetime = timedelta(days=90)
    """How long what each attempt used is kept by itself, or ``never`` summed; of what is older the sum of each day is,
    by tenant, queue and priority."""
    announced_lifetime: Lifetime = timedelta(days=7)
    """How long a dataset that was announced waits for its upload before it is forgotten, or ``never`` is."""


class WorkerSettings(Section):
    """One worker process and its device."""

    name: str = ""
    """Name in attempts and pages. Celery's node name; the worker sets it for its own child process."""
    queues: str = ""
    """Queues to claim from, comma-separated. Celery's ``-Q``; the worker sets it for its own child process."""
    lock: Path | None = None
    """Locked while a job runs; the worker sets it for its own child process."""
    nursery: Path | None = None
    """Socket of the process that runners are forked of; the worker sets it for its own child process."""
    device: str = "auto"
    """Torch device, or ``auto``: the first CUDA device, else the CPU."""
    threads: int | None = None
    """CPU threads of the runner; torch's choice when left out."""
    train_devices: int = Field(default=1, ge=1, le=64)
    """Devices that share each training, ``device`` and those after it, which no other worker may use; on a CPU,
    processes."""
    train_address: Annotated[str, Field(pattern=r"^\S+:\d{1,5}$")] | None = None
    """``host:port`` at which other hosts (``python -m worker.member``) dial in to help with trainings. The worker that
    leads them listens there; members are given the same address."""
    train_secret: Annotated[SecretStr, Field(min_length=16)] | None = None
    """What leader and members know, and nobody else; needed with ``train_address``."""
    train_members: int = Field(default=1, ge=0, le=64)
    """Members that a training waits for, 10 seconds at most."""
    cache_dir: Path = Path("~/.cache/noisemill")
    """Downloaded inputs, by digest."""
    cache_bytes: int = 20 * 1024 * _MEGABYTE
    """Size the cache is kept under."""
    code_bytes: int = 1024 * _MEGABYTE
    """Size the code is kept under that this machine has compiled for networks, in a folder of the cache."""
    model_bytes: int | None = Field(default=None, ge=0)
    """Weights of models that stay on the device between jobs, those used last; a model in use always may. A quarter of
    the memory that is free when the first one is loaded, when left out."""
    feature_networks: Path | None = None
    """Folder with networks that jobs may compare images in: ``inception.safetensors``, which is FID's, and
    ``imagenet.safetensors`` to evaluate, and ``vgg19.safetensors`` to train style transfer."""
    poll: Duration = timedelta(seconds=3)
    """How often an idle worker looks into SQL by itself (with jitter)."""
    beat: Duration = timedelta(seconds=0.75)
    """Between two heartbeats of a running attempt; also the bound on noticing a cancel."""
    look: Duration = timedelta(seconds=0.25)
    """Between two looks for jobs that can join those on the device, while it has room for more."""
    time_slice: Duration = timedelta(seconds=10)
    """For so long a worker may go on taking jobs for the model that is loaded while others wait, unless these are more
    urgent; generate jobs that have had it for longer give way where it is somebody else's turn."""
    tick: Duration = timedelta(seconds=2)
    """Between two rounds of what keeps jobs moving: reaping, redispatching, publishing bells."""
    collect: Duration = timedelta(minutes=10)
    """Between two rounds of collecting what nobody needs any more."""
    cancel_grace: Duration = timedelta(seconds=1)
    """From asking the runner to stop to killing it."""
    drain_grace: Duration = timedelta(seconds=20)
    """From SIGTERM to killing the runner; the job is handed back in between."""
    stall: Duration = timedelta(minutes=10)
    """A runner that does no step for so long, and moves no byte to or from storage, is killed (``timeout``)."""

    @model_validator(mode="after")
    def _secret_goes_with_address(self) -> Self:
        if (self.train_address is None) != (self.train_secret is None):
            raise ValueError("train_address and train_secret go together")
        return self


class Settings(BaseSettings):
    """All sections. ``Settings.read()`` is called by entry points only."""

    model_config = SettingsConfigDict(
        env_prefix="NOISEMILL_", env_nested_delimiter="_", env_nested_max_split=1, frozen=True, extra="forbid"
    )

    database: DatabaseSettings
    broker: BrokerSettings
    s3: S3Settings
    api: ApiSettings = ApiSettings()
    jobs: JobSettings = JobSettings()
    worker: WorkerSettings = WorkerSettings()

    @classmethod
    def read(cls) -> Self:
        """From the environment; raises ``ValidationError`` naming each wrong variable."""
        return cls.model_validate({})
