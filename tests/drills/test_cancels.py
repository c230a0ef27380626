"""Two hundred cancels, at every place of a job's life: bounded, final, and nothing of the work goes on."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import psutil
import pytest
from sqlalchemy import text

from shared.jobs import requests
from shared.jobs.state import JobState, JobType
from tests.drills.conftest import Report, Site, StartSite

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

BOUND_SECONDS = 5
EACH = 17
FOREVER = ["steps", 100_000, 0.02]
DEAF = ["hang", 600]


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """A place to cancel at: what the job does, and when it is there."""

    script: tuple[list[Any], ...]
    is_there: Callable[[Site, UUID], object]
    columns: dict[str, Any] = field(default_factory=dict)
    pauses: bool = False
    """Whether a pause is asked for first, and when that was done the job is there."""


def in_state(*states: JobState) -> Callable[[Site, UUID], bool]:
    return lambda site, job_id: site.state(job_id) in states


def in_phase(phase: str) -> Callable[[Site, UUID], bool]:
    return lambda site, job_id: site.get(job_id).phase == phase


def at_step(step: int) -> Callable[[Site, UUID], bool]:
    return lambda site, job_id: site.get(job_id).step >= step


def has_checkpoint(site: Site, job_id: UUID) -> bool:
    return any(artifact.kind == "checkpoint" for artifact in site.artifacts(job_id))


BOUNDARIES = {
    "queued": Boundary(script=(FOREVER,), is_there=in_state(JobState.QUEUED), columns={"queue": "nobody"}),
    "just claimed": Boundary(script=(FOREVER,), is_there=in_state(JobState.RUNNING)),
    "loading": Boundary(script=(["fork"], ["phase", "loading_data"], DEAF), is_there=in_phase("loading_data")),
    "first step": Boundary(script=(FOREVER,), is_there=at_step(1)),
    "within a step": Boundary(script=(["fork"], ["steps", 1, 0.0], DEAF), is_there=at_step(1)),
    "checkpointing": Boundary(
        script=(["train", 100_000, 0.02, 10],), is_there=has_checkpoint, columns={"type": JobType.TRAIN}
    ),
    "uploading": Boundary(
        script=(["fork"], ["steps", 1, 0.0], ["phase", "uploading"], DEAF), is_there=in_phase("uploading")
    ),
    "just before done": Boundary(script=(["steps", 20, 0.05],), is_there=at_step(10)),
    "waiting to retry": Boundary(
        script=(["fail", "upload_failed", "no"],), is_there=lambda site, job_id: site.get(job_id).failures == 1
    ),
    "pausing": Boundary(
        script=(["fork"], ["steps", 1, 0.0], DEAF),
        is_there=in_state(JobState.PAUSING),
        columns={"max_attempts": 1},
        pauses=True,
    ),
    "paused": Boundary(script=(FOREVER,), is_there=in_state(JobState.PAUSED), pauses=True),
    "being preempted": Boundary(
        script=(["train", 100_000, 0.02, 100_000],), is_there=at_step(1), columns={"type": JobType.TRAIN}
    ),
}


def test_two_hundred_cancels_at_every_boundary_end_within_five_seconds(
    start_site: StartSite, wait_until, report: Report
) -> None:
    site = start_site(workers=2)
    took: dict[str, list[float]] = defaultdict(list)
    ends, forked = Counter[str](), 0

    for place, boundary in BOUNDARIES.items():
        for _ in range(EACH):
            job_id = _bring(site, place, boundary, wait_until)
            before = _processes(site, job_id)
            forked += len(before)
            asked = time.monotonic()
            answer = site.ask(requests.cancel, job_id).state
            wait_until(lambda job_id=job_id: site.state(job_id).is_final, timeout=60)
            took[place].append(time.monotonic() - asked)
            ends[site.state(job_id).value] += 1
            assert (answer in (JobState.CANCELING, JobState.CANCELED)) == (site.state(job_id) == JobState.CANCELED)
            assert not [process for process in before if _lives(process)]

    slowest = {place: round(max(seconds), 2) for place, seconds in took.items()}
    report(cancels=sum(map(len, took.values())), forked=forked, ends=dict(ends), slowest_s=slowest, bound=BOUND_SECONDS)
    assert sum(map(len, took.values())) >= 200 and forked >= 4 * EACH
    assert max(slowest.values()) < BOUND_SECONDS


def _bring(site: Site, place: str, boundary: Boundary, wait_until: Any) -> UUID:
    job_id = site.job(*boundary.script, **boundary.columns)
    if boundary.pauses:
        wait_until(lambda: site.get(job_id).step > 0, timeout=60, every=0.05)
        site.ask(requests.pause, job_id)
    wait_until(lambda: boundary.is_there(site, job_id), timeout=60, every=0.05)
    if place == "being preempted":
        with site.engine.begin() as connection:
            connection.execute(text("UPDATE jobs SET preempt_fence = fence WHERE id = :id"), {"id": job_id})
    return job_id


def _processes(site: Site, job_id: UUID) -> list[psutil.Process]:
    """What a job said that it started: it is gone when the job is."""
    said = [event.data["message"] for event in site.events(job_id) if event.type == "job.log"]
    found = []
    for message in said:
        if message.startswith("pids "):
            with suppress(psutil.NoSuchProcess):
                found += [psutil.Process(int(pid)) for pid in message.split()[1:]]
    return found


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
