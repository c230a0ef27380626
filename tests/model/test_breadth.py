"""Many jobs of several tenants at once: what one job alone cannot show. Random, so for breadth and not as the gate.

Each example is a transaction on PostgreSQL, rolled back afterwards; each request and each worker's step is a savepoint
in it, undone if it raises.

Whose turn it is depends on how long attempts really took, so an example that is run again may go otherwise: of two
tenants that had nearly the same, the other one's job may be claimed, and then another request be refused. So nothing is
drawn whose range depends on what has happened: Hypothesis would call it an inconsistent generation of data, and fail.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar, cast
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from shared.errors import DependencyEnded, IdempotencyMismatch, IllegalMove, NotFound, QueueFull, UploadFailed
from shared.ids import public
from shared.jobs import attempts, claims, idempotency, requests, upkeep
from shared.jobs.claims import Terms
from shared.jobs.idempotency import Answer
from shared.jobs.rows import Dataset, DatasetState, Tenant
from shared.settings import JobSettings
from shared.wire import TrainRequest
from tests.model import invariants, replay
from tests.model.canonical import JUMP, LEASE
from tests.model.database import Rows
from tests.model.operations import WEIGHTS, Stepped, content_of, done, request_for
from tests.model.prepared import prepared

T = TypeVar("T")

QUEUED_AT_MOST: Final = 3
SETTINGS: Final = JobSettings(max_queued=QUEUED_AT_MOST, quantum=LEASE)
TERMS: Final = Terms(lease=LEASE, ageing=1000 * JUMP, quantum=LEASE)
TENANTS: Final = tuple(UUID(int=10 + number) for number in range(3))
HELD: Final = ("running", "canceling", "pausing")
ENDED: Final = ("failed", "canceled", "expired", "canceling")
"""Without a model, or about to be."""
INFO: Final = {"shape": [1, 8, 8]}
WHICH: Final = st.integers(0, 59)
"""Which of those there are, counted around: the number of jobs and of attempts of an example is smaller."""


class Crowd(RuleBasedStateMachine):
    """Clients of three tenants, and workers."""

    connection: Connection
    """Set by the test."""

    def __init__(self) -> None:
        super().__init__()
        self._transaction = self.connection.begin()
        self._answered: dict[tuple[UUID, str], tuple[str, str]] = {}
        self._claims: list[claims.Claim] = []
        for number, tenant in enumerate(TENANTS):
            self._do(lambda s, tenant=tenant, number=number: s.add(Tenant(id=tenant, name=f"tenant {number}")))
            row = {"id": tenant, "tenant_id": tenant, "name": "d", "state": DatasetState.READY, "source": {}}
            self._do(lambda s, row=row: s.add(Dataset(**row, modality="image", info=INFO)))

    def teardown(self) -> None:
        self._transaction.rollback()

    def _do(self, work: Callable[[Session], T]) -> T:
        with Session(self.connection, join_transaction_mode="create_savepoint") as session, session.begin():
            return work(session)

    def _now(self) -> float:
        return float(self.connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())")) or 0)

    def _rows(self) -> Rows:
        return json.loads(self.connection.scalar(text("SELECT model_read()")) or "")

    @rule(
        tenant=st.sampled_from(TENANTS),
        key=st.sampled_from(["a", "b", None]),
        priority=st.sampled_from(["low", "normal", "high"]),
        begins=st.none() | WHICH,
    )
    def submit(self, tenant: UUID, key: str | None, priority: str, begins: int | None) -> None:
        """One job for a key and a body, no job for a key with another body, none above the limit (which jobs that are
        handed back may pass), none that begins with what a job has not made and never will."""
        before = self._rows()["jobs"]
        mine = [job for job in before if job["tenant_id"] == str(tenant)]
        waiting = sum(job["state"] == "queued" for job in mine)
        known = self._answered.get((tenant, key)) if key else None
        first = mine[begins % len(mine)] if begins is not None and mine else None
        request = request_for(tenant, priority=priority)
        if first is not None:
            named = request.spec.model_copy(update={"init_from": public("job", UUID(first["id"]))})
            request = request.model_copy(update={"spec": named})
        body = idempotency.digest(request.model_dump(mode="json"))
        try:
            answer = self._do(lambda session: self._submitted(session, tenant, key, request, body))
        except IdempotencyMismatch:
            assert known is not None and known[0] != body
        except QueueFull:
            assert known is None and waiting >= QUEUED_AT_MOST
        except DependencyEnded:
            assert known is None and first is not None and first["state"] in ENDED
        else:
            assert known == (body, answer) if known else waiting < QUEUED_AT_MOST
            assert known or first is None or first["state"] not in ENDED
            if key:
                self._answered[tenant, key] = body, answer
            assert len(self._rows()["jobs"]) == len(before) + (known is None)
            return
        assert len(self._rows()["jobs"]) == len(before)

    def _submitted(self, session: Session, tenant: UUID, key: str | None, request: TrainRequest, body: str) -> str:
        stepped = cast(AsyncSession, Stepped(session))
        if key is not None:
            stored = done(idempotency.begin(stepped, tenant, key, body, lifetime=1000 * JUMP))
            if stored is not None:
                return stored.body
        job = done(requests.submit(stepped, tenant, request, settings=SETTINGS))
        if key is not None:
            done(idempotency.complete(stepped, tenant, key, Answer(202, str(job.id))))
        return str(job.id)

    @rule()
    def claim(self) -> None:
        """The highest priority first, then the tenant that has had least, then the oldest."""
        began, rows = self._now(), self._rows()
        claimed = self._do(lambda s: claims.claim(s, worker="w", queues=["train"], terms=TERMS))
        passed = self._now() - began
        queued = [job for job in rows["jobs"] if job["state"] == "queued" and job["queued_at"] is not None]
        ready = [job for job in queued if (job["not_before"] or 0) <= 0]
        assert bool(claimed) == bool(ready)
        if claimed:
            self._claims += claimed
            (job,) = (job for job in ready if job["id"] == str(claimed[0].job_id))
            assert job["priority"] == max(other["priority"] for other in ready)
            rivals = [other for other in ready if other["priority"] == job["priority"]]
            # What runs gets on while we look.
            assert had(rows, job) <= min(had(rows, other) for other in rivals) + passed * len(rows["jobs"]) + 1e-3
            own = [other for other in rivals if other["tenant_id"] == job["tenant_id"]]
            assert job["queued_at"] == min(other["queued_at"] for other in own)

    @rule(which=WHICH, how=st.sampled_from(["succeed", "fail", "hand back", "heartbeat"]))
    def work(self, which: int, how: str) -> None:
        """Any attempt that ever was, in any order: those that are over change nothing."""
        if not self._claims:
            return
        claim = self._claims[which % len(self._claims)]
        job_id, fence = claim.job_id, claim.fence
        (job,) = (job for job in self._rows()["jobs"] if job["id"] == str(job_id))
        current = job["fence"] == fence and job["state"] in HELD
        if how == "heartbeat":
            try:
                self._do(lambda s: attempts.heartbeat(s, job_id, fence, lease=LEASE))
            except attempts.LeaseLost:
                assert not current
        elif how == "succeed":
            ended = self._do(lambda s: attempts.succeed(s, claim, **result_of(claim)))
            assert (ended is not None) == (current and job["state"] != "canceling")
        elif how == "fail":
            failed = self._do(lambda s: attempts.fail(s, job_id, fence, UploadFailed("x"), backoff=LEASE))
            assert (failed is not None) == current
        else:
            assert (self._do(lambda s: attempts.hand_back(s, job_id, fence)) is not None) == current

    @rule(tenant=st.sampled_from(TENANTS), which=WHICH, what=st.sampled_from(["cancel", "pause", "resume"]))
    def request(self, tenant: UUID, which: int, what: str) -> None:
        """Another tenant's job does not exist; a refusal changes nothing."""
        jobs = self._rows()["jobs"]
        if not jobs:
            return
        job = jobs[which % len(jobs)]
        how = {"settings": SETTINGS} if what == "resume" else {}
        ask = getattr(requests, what)
        try:
            self._do(lambda s: done(ask(cast(AsyncSession, Stepped(s)), tenant, UUID(job["id"]), **how)))
        except NotFound:
            assert job["tenant_id"] != str(tenant)
        except (IllegalMove, QueueFull):
            (after,) = (other for other in self._rows()["jobs"] if other["id"] == job["id"])
            assert after["state_version"] == job["state_version"]
        else:
            assert job["tenant_id"] == str(tenant)

    @rule()
    def housekeeping(self) -> None:
        self._do(upkeep.reap)
        self._do(upkeep.expire)

    @rule()
    def the_clock_jumps(self) -> None:
        replay.jump(self.connection)

    @invariant()
    def each_job_keeps_every_promise(self) -> None:
        rows = self._rows()
        for job in rows["jobs"]:
            invariants.judge_state(of_job(rows, job["id"]))
        for tenant in TENANTS:
            versions = [row["version"] for row in rows["model_versions"] if self._tenant_of(rows, row) == str(tenant)]
            assert sorted(versions) == list(range(1, len(versions) + 1))

    @invariant()
    def who_waits_goes_the_way_of_whom_it_waits_for(self) -> None:
        """At once, for here nobody else holds its row."""
        rows = self._rows()
        jobs = {job["id"]: job for job in rows["jobs"]}
        for need in rows["needs"]:
            waiting, needed = jobs[need["job_id"]], jobs[need["needs_job_id"]]
            if waiting["queued_at"] is not None:
                assert needed["state"] == "succeeded" and "@" in waiting["spec"]["init_from"]
            elif waiting["completed_at"] is None:
                assert needed["completed_at"] is None and waiting["fence"] == 0
            elif waiting["state"] == "failed":
                assert needed["state"] in ENDED and waiting["error_code"] == "dependency_failed"

    def _tenant_of(self, rows: Rows, version: dict[str, Any]) -> str:
        (tenant,) = (job["tenant_id"] for job in rows["jobs"] if job["id"] == version["job_id"])
        return tenant


def result_of(claim: claims.Claim) -> dict[str, Any]:
    """How an attempt succeeds."""
    key = f"jobs/{public('job', claim.job_id)}/{claim.fence}/{WEIGHTS}"
    stored = {"key": key, "sha256": content_of(claim.fence), "size_bytes": 1}
    weights = attempts.NewArtifact(kind=WEIGHTS, name=WEIGHTS, media_type="application/octet-stream", **stored)
    result = {"info": INFO, "metrics": {}, "weights": stored}
    return {"result": result, "artifacts": [weights], "timings": {}, "steps": 2}


def had(rows: Rows, job: dict[str, Any]) -> float:
    """Device-seconds that the job's tenant has had, and has under way: all that run share the one worker's device."""
    held = {(one["id"], one["fence"]): one["tenant_id"] for one in rows["jobs"] if one["state"] in HELD}
    mine = {key for key, tenant in held.items() if tenant == job["tenant_id"]}
    running = [row for row in rows["attempts"] if (row["job_id"], row["fence"]) in mine]
    attained = sum(row["attained"] for row in rows["shares"] if row["tenant_id"] == job["tenant_id"])
    return attained + sum(LEASE.total_seconds() - row["started_at"] for row in running) / max(1, len(held))


def of_job(rows: Rows, job_id: str) -> Rows:
    """The rows of one job; what its tenant has had is taken for its own."""
    own = {table: [row for row in found if row.get("job_id") == job_id] for table, found in rows.items()}
    shares = [{"attained": sum(row["seconds"] for row in own["usage"])}]
    return own | {"jobs": [job for job in rows["jobs"] if job["id"] == job_id], "shares": shares}


@pytest.fixture(scope="module")
def connection(module_database: str) -> Iterator[Connection]:
    """One whose driver forgets its plans when a transaction is rolled back, as the product's does."""
    with prepared(module_database, keeps_plans=False) as connection:
        yield connection


def test_many_jobs_of_many_tenants(connection: Connection) -> None:
    """The same examples each time."""
    meet(connection, max_examples=20, derandomize=True)


@pytest.mark.long
def test_many_more_jobs_of_many_tenants(connection: Connection) -> None:
    """Other examples each time."""
    meet(connection, max_examples=500, derandomize=False)


def meet(connection: Connection, *, max_examples: int, derandomize: bool) -> None:
    Crowd.connection = connection
    run_state_machine_as_test(
        Crowd,
        settings=settings(
            max_examples=max_examples,
            derandomize=derandomize,
            stateful_step_count=30,
            deadline=None,
            database=None,
            # One that fails is shown as it is: going it again and again to find a shorter one would take longer than
            # a test may, and it might go well.
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
