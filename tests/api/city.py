"""Tenants, jobs and workers on a simulated clock, over the real SQL, whose clock stands until it is put forward."""

import asyncio
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Self
from uuid import UUID

from sqlalchemy import create_engine, select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlmodel import col

from api import waiting
from shared.jobs import claims, workers
from shared.jobs.attempts import Claim
from shared.jobs.rows import Job
from shared.jobs.state import JobState, Priority
from shared.wire import QueueView
from tests.shared.line import QUEUE, SETTINGS, TERMS, Line

# Found before PostgreSQL's own, by the search path below. Defaults of columns name theirs once and for all.
_CLOCK = """
CREATE TABLE city_clock (now timestamptz NOT NULL);
INSERT INTO city_clock VALUES ('2026-01-05T09:30:00Z');
CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS
    $$ SELECT now FROM public.city_clock $$;
DO $$ DECLARE one record; BEGIN
    FOR one IN SELECT table_name AS of, column_name AS name FROM information_schema.columns
        WHERE table_schema = 'public' AND column_default LIKE '%clock_timestamp()%'
    LOOP EXECUTE format('ALTER TABLE %I ALTER %I SET DEFAULT public.clock_timestamp()', one.of, one.name); END LOOP;
END $$;
"""
_OPTIONS = {"options": "-c jit=off -c timezone=UTC -c search_path=public,pg_catalog"}


@dataclass(frozen=True, order=True)
class Arrival:
    """A job that somebody will submit, and how long it will really take."""

    at: float
    tenant: str
    seconds: float
    priority: Priority = Priority.NORMAL


@dataclass(kw_only=True)
class Story:
    """What was said of a job when it was submitted, and what happened."""

    arrival: Arrival
    said: QueueView
    started: float | None = None

    @property
    def waited(self) -> float:
        assert self.started is not None
        return self.started - self.arrival.at


class City:
    """One queue, some workers, and a clock."""

    def __init__(self, database: str, *, num_workers: int) -> None:
        self._engine = create_engine(database, connect_args=_OPTIONS)
        self._readers = create_async_engine(database, connect_args=_OPTIONS)
        self.session = Session(self._engine)
        self.line = Line(self.session)
        self._runner = asyncio.Runner()
        self._clock = 0.0
        self._tenants: dict[str, UUID] = {}
        self._idle = [f"w{number}" for number in range(num_workers)]
        self._running: list[tuple[float, int, Claim, str]] = []
        self.stories: dict[UUID, Story] = {}
        self.session.execute(text(_CLOCK))
        for name in self._idle:
            self.sign_in(name, [QUEUE])
        self.session.commit()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._readers.dispose())
        self._runner.close()
        self.session.close()
        self._engine.dispose()

    def live(self, arrivals: Iterable[Arrival]) -> list[Story]:
        """Let everything happen, to the last job; the stories in the order of submission."""
        coming = sorted(arrivals)
        while coming or self._running:
            ends = self._running[0][0] if self._running else float("inf")
            if coming and coming[0].at <= ends:
                self.sleep(coming[0].at - self._clock)
                self._submit(coming.pop(0))
            else:
                self.sleep(ends - self._clock)
                _, _, claim, worker = heapq.heappop(self._running)
                self.line.finish(claim)
                self._idle.append(worker)
            self.session.commit()
            self._claim()
        return list(self.stories.values())

    def sign_in(self, worker: str, queues: Sequence[str]) -> None:
        says = {"host": "h", "pid": 1, "device": None, "state": "idle", "job_id": None}
        workers.sign_in(self.session, name=worker, queues=list(queues), **says)

    def sleep(self, seconds: float) -> None:
        """Let time pass, while the workers go on saying that they live."""
        self._clock += seconds
        passed = timedelta(seconds=seconds)
        self.session.execute(text("UPDATE city_clock SET now = now + :passed"), {"passed": passed})
        self.session.execute(text("UPDATE workers SET seen_at = clock_timestamp()"))

    def _submit(self, arrival: Arrival) -> None:
        if arrival.tenant not in self._tenants:
            self._tenants[arrival.tenant] = self.line.tenant(arrival.tenant)
        (job_id,) = self.line.join(self._tenants[arrival.tenant], priority=arrival.priority)
        self.stories[job_id] = Story(arrival=arrival, said=self.look(job_id)[job_id])

    def look(self, *job_ids: UUID) -> dict[UUID, QueueView]:
        """What is said now of these jobs, or of all that wait."""
        self.session.commit()
        return self._runner.run(self._look(job_ids))

    async def _look(self, job_ids: Sequence[UUID]) -> dict[UUID, QueueView]:
        wanted = select(Job).where(col(Job.id).in_(job_ids) if job_ids else col(Job.state) == JobState.QUEUED)
        async with AsyncSession(self._readers) as session:
            facts = await waiting.facts(session, (await session.scalars(wanted)).all(), SETTINGS)
        return {job_id: fact.queue for job_id, fact in facts.items() if fact.queue is not None}

    def _claim(self) -> None:
        while self._idle:
            claimed = claims.claim(self.session, worker=self._idle[-1], queues=[QUEUE], terms=TERMS)
            self.session.commit()
            if not claimed:
                return
            story = self.stories[claimed[0].job_id]
            story.started = self._clock
            ends = self._clock + story.arrival.seconds
            heapq.heappush(self._running, (ends, len(self.stories), claimed[0], self._idle.pop()))
