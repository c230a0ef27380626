"""The product's operations on the one job of the model: each a call of ``shared/jobs``, in one transaction.

Everything is looked up in its module at the moment of the call, so that a seeded bug (``mutants.py``) is in effect.
"""

from collections.abc import Callable, Coroutine, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from hashlib import sha256
from typing import Any, Final, Literal, TypeVar, cast
from uuid import UUID

from sqlalchemy import Engine, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlmodel import col

from shared import relay
from shared.errors import JobError, StorageUnavailable
from shared.ids import public
from shared.jobs import attempts, claims, keys, requests, upkeep
from shared.jobs.attempts import Claim, NewArtifact, Report
from shared.jobs.rows import Dataset, DatasetState, Job, Tenant
from shared.jobs.state import JobState, JobType
from shared.settings import JobSettings
from shared.wire import TrainRequest
from tests.model.canonical import BACKOFF, DEADLINE, JUMP, LEASE, OLD, PATIENCE
from tests.model.database import Operation
from worker.reports import Reports

T = TypeVar("T")

TENANT: Final = UUID(int=1)
DATASET: Final = UUID(int=2)
TERMS: Final = claims.Terms(lease=LEASE, ageing=10 * JUMP, quantum=LEASE)
SETTINGS: Final = JobSettings()
CHECKPOINT, WEIGHTS = "checkpoint", "weights"

Crash = Literal["before the send", "before the mark"]


@dataclass(frozen=True)
class Bounds:
    """What the client asks for and the operator sets, where it bounds the model."""

    max_attempts: int = 2
    deadline: bool = False
    """Whether the job must start within ``DEADLINE``."""
    backoff: bool = True
    """Whether a job that failed waits before its next attempt."""


def prepare(session: Session) -> None:
    """What must exist before a job can be submitted."""
    session.add(Tenant(id=TENANT, name="model"))
    session.flush()
    session.add(Dataset(id=DATASET, tenant_id=TENANT, name="d", state=DatasetState.READY, source={}, modality="image"))
    session.flush()


class Stepped:
    """An ``AsyncSession`` for code that awaits nothing else: each call is done when it returns."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.info = session.info

    def add(self, row: object) -> None:
        self._session.add(row)

    async def execute(self, *args: Any, **how: Any) -> Any:
        return self._session.execute(*args, **how)

    async def scalar(self, *args: Any, **how: Any) -> Any:
        return self._session.scalar(*args, **how)

    async def flush(self) -> None:
        self._session.flush()

    async def refresh(self, row: object) -> None:
        self._session.refresh(row)

    async def run_sync(self, what: Callable[..., Any], *args: Any) -> Any:
        return what(self._session, *args)


def done(coroutine: Coroutine[Any, Any, T]) -> T:
    """What an async function returns that awaits nothing but ``Stepped``: no event loop is needed."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        return ended.value
    raise AssertionError("it waited for something else than SQL")


def asking(request: Callable[[AsyncSession], Coroutine[Any, Any, Job]]) -> Callable[[Session], Hashable]:
    """A function of ``requests.py`` on a sync session; answers the job's state."""
    return lambda session: done(request(cast(AsyncSession, Stepped(session)))).state.value


class RelayDied(Exception):
    """The relay's process ends here."""


class Broker:
    """The broker as the relay sees it: it takes messages for jobs."""

    def __init__(self, crash: Crash | None) -> None:
        self.received = 0
        self._crash = crash

    def ring(self, jobs: Sequence[Any]) -> None:
        if self._crash == "before the send":
            raise RelayDied
        self.received += len(jobs)
        if self._crash == "before the mark":
            raise RelayDied


class Answers:
    """A connection on which one answer is lost, after the statement was executed and committed."""

    def __init__(self, session: Session, *, lost: int) -> None:
        self._session, self._lost, self._asked = session, lost, 0

    def ask(self, statement: Callable[[Session], T]) -> T:
        answer = statement(self._session)
        self._asked += 1
        if self._asked == self._lost:
            raise OperationalError("the answer is lost", None, Exception())
        return answer


def content_of(fence: int) -> str:
    """SHA-256 of what an attempt makes: no two attempts of the model make the same bytes."""
    return sha256(str(fence).encode()).hexdigest()


def request_for(dataset: UUID, steps: int = 2, **how: Any) -> TrainRequest:
    """A small training."""
    spec = {"family": "vae", "dataset": public("ds", dataset), "model": "m", "steps": steps}
    return TrainRequest.model_validate({"type": "train", "spec": spec, **how})


def submit(bounds: Bounds) -> Operation:
    """Submit the job."""
    deadline = int(DEADLINE.total_seconds()) if bounds.deadline else None
    request = request_for(DATASET, max_attempts=bounds.max_attempts, start_deadline_seconds=deadline)
    return Operation("submit", (), asking(lambda s: requests.submit(s, TENANT, request, settings=SETTINGS)))


def once(make: Callable[..., Operation]) -> Callable[..., Operation]:
    """Make each operation once: they are asked for at every step, and what is known is looked up by them."""

    @wraps(make)
    def made(self: "Operations", *arguments: Any) -> Operation:
        key = make.__name__, arguments
        if (known := self.made.get(key)) is None:
            known = self.made[key] = make(self, *arguments)
        return known

    return made


class Operations:
    """All operations on one job. Each answers something that can be compared."""

    def __init__(self, job_id: UUID, bounds: Bounds) -> None:
        self.job_id = job_id
        self.made: dict[Hashable, Operation] = {}
        self._backoff = BACKOFF if bounds.backoff else 0 * BACKOFF

    # What a client asks for.

    @once
    def cancel(self) -> Operation:
        return Operation("cancel", (), asking(lambda s: requests.cancel(s, TENANT, self.job_id)))

    @once
    def pause(self) -> Operation:
        return Operation("pause", (), asking(lambda s: requests.pause(s, TENANT, self.job_id)))

    @once
    def resume(self) -> Operation:
        return Operation("resume", (), asking(lambda s: requests.resume(s, TENANT, self.job_id, settings=SETTINGS)))

    # What a worker does.

    @once
    def claim(self, token: int) -> Operation:
        """Answers (fence, fences of the checkpoints it may go on from) or None."""

        def run(session: Session) -> Hashable:
            return _claimed(claims.claim(session, worker="w", queues=["train"], terms=TERMS, token=UUID(int=token)))

        return Operation("claim", (token,), run)

    @once
    def reclaim(self, token: int) -> Operation:
        """Like ``claim``."""
        return Operation("reclaim", (token,), lambda session: _claimed(claims.reclaim(session, UUID(int=token))))

    @once
    def heartbeat(self, fence: int) -> Operation:
        """Answers the job's state."""

        def run(session: Session) -> Hashable:
            return attempts.heartbeat(session, self.job_id, fence, lease=LEASE).state.value

        return Operation("heartbeat", (fence,), run)

    @once
    def record(self, fence: int) -> Operation:
        """By an attempt that knows the job's latest event; answers whether the checkpoint is visible."""

        def run(session: Session) -> Hashable:
            reports, latest = [Report.of(self._artifact(fence, CHECKPOINT))], session.scalar(select(col(Job.event_seq)))
            return attempts.report(session, self._claim(fence), reports, after=latest, lease=LEASE) is not None

        return Operation("record", (fence,), run)

    @once
    def record_twice(self, fence: int) -> Operation:
        """``record``, as the supervisor does it when the answer to its first try is lost."""

        def run(session: Session) -> Hashable:
            answers = Answers(session, lost=2)
            reports = Reports(self._claim(fence), lease=LEASE, ask=answers.ask)
            reports.add_artifact(self._artifact(fence, CHECKPOINT))
            with suppress(OperationalError):
                reports.beat()
            return reports.beat().state.value

        return Operation("record_twice", (fence,), run)

    @once
    def finish(self, fence: int) -> Operation:
        """Succeed, or hand back if a cancel came first: one transaction, as in ``worker/watch.py``."""

        def run(session: Session) -> Hashable:
            artifact = self._artifact(fence, WEIGHTS)
            stored = {"key": artifact.key, "sha256": artifact.sha256, "size_bytes": artifact.size_bytes}
            result = {"info": {}, "metrics": {}, "weights": stored}
            how: Any = {"result": result, "artifacts": [artifact], "timings": {}, "steps": 2}
            return attempts.succeed(session, self._claim(fence), **how) or _hand_back(session, self.job_id, fence)

        return Operation("finish", (fence,), run)

    @once
    def fail(self, fence: int, error: type[JobError]) -> Operation:
        def run(session: Session) -> Hashable:
            return attempts.fail(session, self.job_id, fence, error("it went wrong"), backoff=self._backoff)

        return Operation("fail", (fence, error), run)

    @once
    def postpone(self, fence: int) -> Operation:
        """Storage was away for longer than the attempt waits."""

        def run(session: Session) -> Hashable:
            away = StorageUnavailable("it does not answer")
            return attempts.postpone(session, self.job_id, fence, away, backoff=BACKOFF, patience=PATIENCE)

        return Operation("postpone", (fence,), run)

    @once
    def hand_back(self, fence: int) -> Operation:
        return Operation("hand_back", (fence,), lambda session: _hand_back(session, self.job_id, fence))

    @once
    def outcome_of(self, fence: int) -> Operation:
        """Answers whether the attempt has ended: more does not matter to its worker."""

        def run(session: Session) -> Hashable:
            return attempts.outcome_of(session, self.job_id, fence) is not None

        return Operation("outcome_of", (fence,), run)

    # What keeps jobs moving.

    @once
    def relay(self, crash: Crash | None = None) -> Operation:
        """Answers whether a message reached the broker."""

        def run(session: Session) -> bool:
            broker = Broker(crash)
            connection = session.connection()
            with connection.begin_nested(), suppress(RelayDied):
                relay.Relay(cast(Engine, connection), cast(relay.Bells, broker)).run_once()
            return broker.received > 0

        return Operation("relay", () if crash is None else (crash,), run)

    @once
    def reap(self) -> Operation:
        return Operation("reap", (), lambda session: len(upkeep.reap(session)))

    @once
    def expire(self) -> Operation:
        return Operation("expire", (), lambda session: len(upkeep.expire(session)))

    @once
    def redispatch(self) -> Operation:
        """Answers nothing: two at once may both ring, which is harmless."""

        def run(session: Session) -> None:
            upkeep.redispatch(session, after=OLD)

        return Operation("redispatch", (), run)

    def key(self, fence: int, name: str) -> str:
        """Where an attempt puts an object."""
        return keys.artifact_key(public("job", self.job_id), fence, name)

    def _artifact(self, fence: int, name: str) -> NewArtifact:
        details = {"step": fence, "keep": 1, "score": None} if name == CHECKPOINT else {}
        return NewArtifact(
            kind=name,
            name=name,
            key=self.key(fence, name),
            size_bytes=1,
            sha256=content_of(fence),
            media_type="application/octet-stream",
            details=details,
        )

    def _claim(self, fence: int) -> Claim:
        return Claim(
            job_id=self.job_id,
            fence=fence,
            tenant_id=TENANT,
            type=JobType.TRAIN,
            spec={"model": "m", "family": "vae"},
            inputs={"dataset": {"id": public("ds", DATASET)}},
            timeout=None,
        )


def _claimed(found: list[Claim]) -> tuple[int, tuple[str, ...]] | None:
    return (found[0].fence, tuple(stored["key"] for stored in found[0].inputs["resume"])) if found else None


def _hand_back(session: Session, job_id: UUID, fence: int) -> JobState | None:
    return attempts.hand_back(session, job_id, fence)
