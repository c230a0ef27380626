"""Lines of waiting jobs and a device that serves them, on a simulated clock: time passes by moving every time back."""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import literal, select, text, update
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.jobs import attempts, claims, fairness
from shared.jobs.attempts import Claim
from shared.jobs.rows import Attempt, Job, Share, Tenant, Usage
from shared.jobs.state import JobType, Priority
from shared.settings import JobSettings

SETTINGS = JobSettings()
TERMS = claims.Terms.of(SETTINGS)
QUEUE = "generate"
"""Of jobs and workers that name none."""


class Line:
    """All queues, in one session's transaction."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def tenant(self, name: str) -> UUID:
        tenant = Tenant(name=name)
        self.session.add(tenant)
        self.session.flush()
        return tenant.id

    def join(
        self, tenant_id: UUID, *, priority: Priority = Priority.NORMAL, count: int = 1, queue: str = QUEUE
    ) -> list[UUID]:
        """Add jobs as ``requests.submit`` does."""
        made: list[UUID] = []
        for _ in range(count):
            job = Job(
                tenant_id=tenant_id, type=JobType.EXPORT, queue=queue, spec={}, inputs={}, summary="a job",
                max_attempts=3, priority=priority.rank,
            )  # fmt: skip
            self.session.add(job)
            self.session.flush()
            self.session.execute(*fairness.enter(tenant_id, job.id, quantum=SETTINGS.quantum))
            made.append(job.id)
        return made

    def start(self, worker: str = "w", *, queues: Sequence[str] = (QUEUE,)) -> Claim:
        (claim,) = claims.claim(self.session, worker=worker, queues=queues, terms=TERMS)
        return claim

    def serve(self, seconds: float, *, queues: Sequence[str] = (QUEUE,)) -> Claim:
        """Run the next job for so long, while the others wait."""
        claim = self.start(queues=queues)
        self.sleep(seconds)
        self.finish(claim)
        return claim

    def finish(self, claim: Claim) -> None:
        attempts.succeed(self.session, claim, result={}, artifacts=[], timings={}, steps=0)

    def sleep(self, seconds: float) -> None:
        """Let time pass for everybody."""
        passed = literal(timedelta(seconds=seconds))
        self.session.execute(update(Job).values(queued_at=Job.queued_at - passed, lease_until=Job.lease_until - passed))
        moved = {"started_at": Attempt.started_at - passed, "ended_at": Attempt.ended_at - passed}
        self.session.execute(update(Attempt).values(**moved))
        self.session.execute(update(Usage).values(created_at=Usage.created_at - passed))

    def attained(self, tenant_id: UUID) -> float:
        """Device-seconds on the account."""
        return self.session.scalars(select(col(Share.attained)).where(col(Share.tenant_id) == tenant_id)).one()

    def served(self, tenant_id: UUID) -> float:
        """Device-seconds in the ledger."""
        total = text("SELECT coalesce(sum(seconds), 0) FROM usage WHERE tenant_id = :tenant_id")
        return self.session.execute(total, {"tenant_id": tenant_id}).scalar_one()
